"""Supervised fine-tuning on long chains of thought about videos.

python pretrain_sft.py --config FILE [key=value ...] [--resume auto|never|PATH]
torchrun --nproc-per-node N pretrain_sft.py --config FILE parallel.tensor_parallel=T [key=value ...]

Ranks that `parallel` does not use split the rows: data parallel degree = N / (tensor x context).
"""

import sys

from megavila.config import SftRunConfig
from megavila.training.entry import main


def run(config: SftRunConfig) -> None:
    """Train. Imported here: torch and Megatron-core take seconds, which a mistyped key need not wait for."""
    from megavila.sft.run import run_sft

    run_sft(config)


if __name__ == "__main__":
    sys.exit(main(SftRunConfig, run, "Fine-tune a vision-language model on chains of thought."))
