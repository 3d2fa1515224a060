"""GRPO on long videos.

python pretrain_grpo.py --config FILE [key=value ...] [--resume auto|never|PATH]
torchrun --nproc-per-node N pretrain_grpo.py --config FILE parallel.tensor_parallel=T [key=value ...]

Ranks that `parallel` does not use split the prompts: data parallel degree = N / (tensor x context).
"""

import sys

from megavila.config import GrpoRunConfig
from megavila.training.entry import main


def run(config: GrpoRunConfig) -> None:
    """Train. Imported here: torch and Megatron-core take seconds, which a mistyped key need not wait for."""
    from megavila.rl.run import run_grpo

    run_grpo(config)


if __name__ == "__main__":
    sys.exit(main(GrpoRunConfig, run, "Train a vision-language model by GRPO on long videos."))
