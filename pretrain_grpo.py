"""GRPO on long videos.

python pretrain_grpo.py --config FILE [key=value ...] [--resume auto|never|PATH]
torchrun --nproc-per-node N pretrain_grpo.py --config FILE parallel.tensor_parallel=T [key=value ...]

Ranks that `parallel` does not use split the prompts: data parallel degree = N / (tensor x context).
"""

import sys

from megavila.config import GrpoRunConfig
from megavila.rl.run import run_grpo
from megavila.training.entry import main

if __name__ == "__main__":
    sys.exit(main(GrpoRunConfig, run_grpo, "Train a vision-language model by GRPO on long videos."))
