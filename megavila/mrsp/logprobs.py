"""Log-probabilities of all responses of a layout: one forward pass, and the head on response tokens alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megavila.models.vlm import VisionLanguageModel
from megavila.mrsp.context_parallel import take_shard
from megavila.mrsp.layout import Layout
from megavila.mrsp.shards import ShardedRows

MediaRows = Tensor | ShardedRows | Sequence[Tensor | None] | Sequence[ShardedRows | None] | None


def response_logprobs(
    model: VisionLanguageModel,
    layout: Layout,
    media_rows: MediaRows,
    *,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> Tensor:
    """Log-probability of every response token under the model, (layout.num_targets,) in fp32, differentiable.

    Args:
        layout: on the model's device.
        media_rows: rows of all prompts of the layout in order, (rows, hidden), or one entry per prompt with
            None for a prompt without video. Of `ShardedRows` a rank fetches those of its shard: it never holds
            all of them.
        temperature: > 0, divides the logits as it did when the responses were sampled.
        chunk: response tokens whose logits exist at one time.

    Only the rows that predict a response token reach the output layer.
    """
    return _predict(model, layout, media_rows, temperature, chunk, with_entropy=False)[0]


def response_logprobs_and_entropy(
    model: VisionLanguageModel,
    layout: Layout,
    media_rows: MediaRows,
    *,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor]:
    """As `response_logprobs`, with the entropy of each predicting distribution, (layout.num_targets,)."""
    logprobs, entropy = _predict(model, layout, media_rows, temperature, chunk, with_entropy=True)
    assert entropy is not None
    return logprobs, entropy


def _predict(
    model: VisionLanguageModel,
    layout: Layout,
    media_rows: MediaRows,
    temperature: float,
    chunk: int,
    with_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    shard = take_shard(
        layout,
        model.language.topology,
        model.config.attention_backend,
        keep=model.config.recompute == "keep_attention" and torch.is_grad_enabled(),
    )
    hidden = model(shard.embed(model, join_media_rows(media_rows)), shard.context)
    logprobs, entropy = model.token_logprobs(
        hidden.index_select(0, shard.predictor_rows),
        shard.targets,
        temperature=temperature,
        chunk=chunk,
        with_entropy=with_entropy,
    )
    return shard.collect(logprobs), None if entropy is None else shard.collect(entropy)


def join_media_rows(media_rows: MediaRows) -> Tensor | ShardedRows | None:
    """Rows of all prompts in order as one, or None if no prompt has any."""
    if media_rows is None or isinstance(media_rows, Tensor | ShardedRows):
        return media_rows
    sharded = [rows for rows in media_rows if isinstance(rows, ShardedRows)]
    whole = [rows for rows in media_rows if isinstance(rows, Tensor)]
    return ShardedRows.join(sharded) if sharded else torch.cat(whole) if whole else None
