"""`megavila convert`: a training checkpoint to a checkpoint directory under Hugging Face names."""

from pathlib import Path
from typing import Annotated

import typer

from megavila.config import ModelConfig, ParallelConfig
from megavila.config.load import build, read_yaml
from megavila.data import load_tokenizer
from megavila.models import build_model, resolve_config, save_hf
from megavila.runtime.platform import get_platform
from megavila.runtime.topology import opened
from megavila.training.session import load_initial_weights, tokenizer_path, with_vocabulary


def convert(
    checkpoint: Annotated[
        Path, typer.Argument(help="A run's checkpoint, such as runs/<name>/checkpoints/step_00000100.")
    ],
    out: Annotated[
        Path, typer.Option(help="Directory to write: config, safetensors and tokenizer, in VILA's layout.")
    ],
    config: Annotated[
        Path | None, typer.Option(help="The run's config.yaml; default: the one beside its checkpoints.")
    ] = None,
) -> None:
    """Write a checkpoint's weights under Hugging Face names.

    Run it with as many processes as the checkpoint has tensor-parallel shards: torchrun --nproc-per-node N -m megavila convert …
    """
    source = config or checkpoint.parent.parent / "config.yaml"
    settings = read_yaml(source)
    model_config = build(ModelConfig, settings["model"], str(source))
    parallel = build(ParallelConfig, settings["parallel"], str(source))
    platform = get_platform("cpu")
    with opened(parallel, platform) as topology:
        tokenizer = load_tokenizer(tokenizer_path(model_config))
        model = build_model(with_vocabulary(resolve_config(model_config), tokenizer), topology, platform)
        load_initial_weights(model, checkpoint, topology)
        save_hf(model, out, tokenizer.directory)
        if topology.is_main:
            print(out)
