"""Supervised fine-tuning on long chains of thought about videos.

python pretrain_sft.py --config FILE [key=value ...] [--resume auto|never|PATH]
torchrun --nproc-per-node N pretrain_sft.py --config FILE parallel.tensor_parallel=T [key=value ...]

Ranks that `parallel` does not use split the rows: data parallel degree = N / (tensor x context).
"""

import sys

from megavila.config import SftRunConfig
from megavila.sft.run import run_sft
from megavila.training.entry import main

if __name__ == "__main__":
    sys.exit(main(SftRunConfig, run_sft, "Fine-tune a vision-language model on chains of thought."))
