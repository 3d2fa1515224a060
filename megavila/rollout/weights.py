"""Weights on their way to a rollout engine: what must arrive, and a check that it does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from megavila.models import VisionLanguageModel, export_hf
from megavila.models.families import get_family
from megavila.rollout.protocol import RolloutError

LANGUAGE_PART = "llm"
"""Part of a checkpoint that an engine needs when it is given embeddings; tower and projector stay behind."""

_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"

Shape = tuple[int, ...]


class WeightTransferError(RolloutError):
    """An engine did not get the weights that the trainer has."""


def language_prefix(model: VisionLanguageModel) -> str:
    """What stands before the decoder's names in a checkpoint of the model's family, such as "llm."."""
    parts = get_family(model.config.family).parts
    if LANGUAGE_PART not in parts:
        raise RolloutError(
            f"model family {model.config.family!r} keeps its decoder in one checkpoint with the tower; only "
            'families with a part "llm" can be served from embeddings: use rollout.engine=megatron'
        )
    return parts[LANGUAGE_PART]


def weight_manifest(model: VisionLanguageModel) -> dict[str, Shape]:
    """Names and full shapes of all of the decoder's weights, without the family's prefix.

    The output layer is among them also where it is the embedding, see `language_weights`.
    """
    prefix = language_prefix(model)
    mappings = get_family(model.config.family).mappings(model.config)
    manifest = {
        name.removeprefix(prefix): shape
        for mapping in mappings
        for name, shape in zip(mapping.hf, mapping.shapes, strict=True)
        if name.startswith(prefix)
    }
    return manifest | {_OUTPUT: manifest[_EMBEDDING]}


def language_weights(model: VisionLanguageModel) -> Iterator[tuple[str, Tensor]]:
    """The decoder's weights as (name without the family's prefix, full tensor), one parameter at a time.

    A collective: all ranks of a tensor-parallel group must iterate to the end. The tensors of one fused
    layer (q, k, v; gate, up) follow each other. A tied embedding is given twice, for an engine whose output
    layer is its own: vLLM's keeps a repacked copy on a CPU, which a reload of a tied embedding leaves as it was.
    """
    prefix, tied = language_prefix(model), model.language.config.tie_word_embeddings
    for name, tensor in export_hf(model):
        if name.startswith(prefix):
            yield name.removeprefix(prefix), tensor
            if tied and name == prefix + _EMBEDDING:
                yield _OUTPUT, tensor


def checked_weights(
    stream: Iterable[tuple[str, Tensor]], manifest: Mapping[str, Shape]
) -> Iterator[tuple[str, Tensor]]:
    """Passes ``stream`` on, and raises WeightTransferError unless it holds ``manifest``, each name once.

    An engine merges q, k and v into one matrix and takes what it is given: one of them missing leaves the
    others next to an old part, which no later step would notice.
    """
    left = dict(manifest)
    for name, tensor in stream:
        if name not in manifest:
            raise WeightTransferError(
                f"weight transfer: {name} is not a weight of the decoder; its {len(manifest)} names come "
                "from the model family's table"
            )
        if name not in left:
            raise WeightTransferError(f"weight transfer: {name} came twice")
        if tuple(tensor.shape) != left[name]:
            raise WeightTransferError(
                f"weight transfer: {name} has shape {tuple(tensor.shape)}, the engine needs {left[name]}; "
                "gather the shards of all tensor-parallel ranks"
            )
        del left[name]
        yield name, tensor
    if left:
        raise WeightTransferError(
            f"weight transfer: {len(left)} of {len(manifest)} weights did not come, first {min(left)}"
        )
