"""Weights in and out under Hugging Face names: streams of tensors, and whole checkpoint directories."""

import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from megavila.config import LanguageConfig, ProjectorConfig, VisionConfig
from megavila.models.families import get_family
from megavila.models.safetensors_io import CheckpointTensors, ShardWriter
from megavila.models.vlm import VisionLanguageModel
from megavila.runtime.collectives import barrier
from megavila.runtime.errors import MegavilaError

MAX_FILE_BYTES = 4 * 1024**3


@torch.no_grad()
def export_hf(model: VisionLanguageModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight as (checkpoint name, full tensor), one parameter gathered at a time.

    A collective: all ranks of a tensor-parallel group must iterate to the end. A tensor may share memory with
    the parameter, so copy what must outlive the next optimizer step.
    """
    topology = model.language.topology
    parameters = dict(model.named_parameters())
    for mapping in get_family(model.config.family).mappings(model.config):
        parameter = parameters[mapping.native].detach()
        shards = [parameter]
        if mapping.is_sharded and topology.tensor > 1:
            shards = [torch.empty_like(parameter) for _ in range(topology.tensor)]
            dist.all_gather(shards, parameter.contiguous(), group=topology.tensor_group)
        yield from zip(mapping.hf, mapping.unshard(shards), strict=True)


@torch.no_grad()
def load_hf(model: VisionLanguageModel, state: Mapping[str, torch.Tensor]) -> None:
    """Copies weights with checkpoint names into the model, each rank its part.

    Raises MegavilaError for a tensor that is missing, has the wrong shape or has no place in the model,
    before any weight has changed. Tensors the features cannot depend on (SigLIP's pooling head, blocks after
    the chosen layer) are passed over. A tied output layer may be given if it equals the embedding.
    """
    family = get_family(model.config.family)
    mappings = family.mappings(model.config)
    names = {family.canonical_name(name): name for name in state}
    wanted = {
        name: shape for mapping in mappings for name, shape in zip(mapping.hf, mapping.shapes, strict=True)
    }
    if missing := sorted(wanted.keys() - names.keys()):
        raise MegavilaError(f"the checkpoint lacks {len(missing)} tensors of the model, first {missing[0]}")
    extra = {name for name in names.keys() - wanted.keys() if not family.is_unused(model.config, name)}
    tied = "llm.lm_head.weight"
    if tied in extra and torch.equal(state[names[tied]], state[names["llm.model.embed_tokens.weight"]]):
        extra.discard(tied)
    if extra:
        raise MegavilaError(
            f"the checkpoint has {len(extra)} tensors the model has no place for, first {min(extra)}"
        )
    for name, shape in wanted.items():
        stored = names[name]
        found = state.shape(stored) if isinstance(state, CheckpointTensors) else tuple(state[stored].shape)
        if found != shape:
            raise MegavilaError(f"{name} has shape {found} in the checkpoint, the model needs {shape}")
    parameters = dict(model.named_parameters())
    topology = model.language.topology
    for mapping in mappings:
        tensors = [state[names[name]] for name in mapping.hf]
        parameters[mapping.native].copy_(mapping.shard(tensors, topology.tensor_rank, topology.tensor))


def read_hf_config(
    directory: Path | str, family: str = "vila"
) -> tuple[LanguageConfig, VisionConfig | None, ProjectorConfig]:
    """The architecture a checkpoint directory describes."""
    return get_family(family).read_config(Path(directory))


def load_hf_directory(model: VisionLanguageModel, directory: Path | str) -> None:
    """Loads the weights of a checkpoint directory of the model's family, one parameter at a time."""
    load_hf(model, CheckpointTensors(Path(directory), get_family(model.config.family).parts))


def save_hf(
    model: VisionLanguageModel, directory: Path | str, tokenizer_dir: Path | str | None = None
) -> None:
    """Writes a checkpoint directory in the family's layout: configuration, safetensors, tokenizer files.

    A collective; the main rank writes. The directory appears when it is complete and must not exist before.
    """
    final = Path(directory)
    topology = model.language.topology
    if final.exists():
        raise MegavilaError(f"{final} exists already; give a new directory")
    family = get_family(model.config.family)
    partial = final.with_name(f"{final.name}.partial")
    if topology.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        for path, values in family.write_config(
            model.config, str(model.dtype).removeprefix("torch.")
        ).items():
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            (partial / path).write_text(json.dumps(values, indent=2) + "\n")
        if tokenizer_dir is not None:
            copy_tokenizer(Path(tokenizer_dir), partial / "llm")
    writers = {
        prefix: ShardWriter(partial / folder, MAX_FILE_BYTES) for folder, prefix in family.parts.items()
    }
    constants = family.constants(model.config)
    for name, tensor in itertools.chain(
        export_hf(model), ((n, t.to(model.dtype)) for n, t in constants.items())
    ):
        if topology.is_main:
            prefix = name.split(".")[0] + "."
            writers[prefix].add(name.removeprefix(prefix), tensor)
    if topology.is_main:
        for writer in writers.values():
            writer.close()
        os.replace(partial, final)
    barrier(topology.world_group)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies a tokenizer's files, not the weights or the config.json that may lie beside them."""
    files = [
        path
        for path in sorted(source.iterdir())
        if path.is_file()
        and path.name != "config.json"
        and path.suffix in (".json", ".txt", ".model", ".jinja")
    ]
    if not files:
        raise MegavilaError(f"{source} holds no tokenizer files")
    for path in files:
        if "safetensors" not in path.name:
            shutil.copy(path, target / path.name)
