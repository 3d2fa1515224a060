"""The fused output layer against chunked matrix products in torch: time, TFLOP/s and peak memory.

    python benchmarks/kernels/linear_logprob.py      # results/<gpu>/linear_logprob.csv and plots

Both give the softmax statistics of every row (forward) and the gradient of a chunk's logits (the backward up to
the two matrix products that follow, which are the same for both). Without a GPU a small size runs in torch
alone.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from megavila_kernels.linear_logprob import logit_gradients, vocab_partials
from megavila_kernels.linear_logprob.reference import reference_logit_gradients
from torch import Tensor

from measure import Measurement, device_name, measure, show, write_results  # isort: skip

CUDA = torch.cuda.is_available()
CHUNK = 1024


def chunked_partials(hidden: Tensor, weight: Tensor, target: Tensor) -> list[Tensor]:
    """What megavila computes without Triton: logits of CHUNK rows at a time, rounded to hidden's dtype."""
    results = []
    for start in range(0, len(hidden), CHUNK):
        x = (hidden[start : start + CHUNK] @ weight.T).float()
        peak = x.amax(dim=1)
        picked = x.gather(1, target[start : start + CHUNK, None])
        exponentials = torch.exp(x - peak[:, None])
        results += [peak, picked, exponentials.sum(dim=1), exponentials.mul_(x).sum(dim=1)]
    return results


def run_size(rows: int, size: int, vocabulary: int, seconds: float) -> list[Measurement]:
    device, dtype = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
    hidden = torch.randn(rows, size, device=device, dtype=dtype)
    weight = torch.randn(vocabulary, size, device=device, dtype=dtype) / size**0.5
    target = torch.randint(0, vocabulary, (rows,), device=device)
    lse, ones = torch.full((rows,), 12.0, device=device), torch.ones(rows, device=device)
    chunk = slice(0, min(rows, CHUNK))
    gradient_inputs = (
        hidden[chunk],
        weight,
        target[chunk],
        1.0,
        lse[chunk],
        lse[chunk],
        ones[chunk],
        ones[chunk],
    )
    case, flops = f"{vocabulary} x {size}", 2.0 * rows * size * vocabulary
    runs: list[tuple[str, str, float, Callable[[], object]]] = [
        ("torch, chunked", "forward", flops, lambda: chunked_partials(hidden, weight, target)),
        (
            "torch, chunked",
            "gradient of one chunk",
            flops * min(1.0, CHUNK / rows),
            lambda: reference_logit_gradients(*gradient_inputs),
        ),
    ]
    if CUDA:
        runs += [
            ("megavila", "forward", flops, lambda: vocab_partials(hidden, weight, target, 1.0)),
            (
                "megavila",
                "gradient of one chunk",
                flops * min(1.0, CHUNK / rows),
                lambda: logit_gradients(*gradient_inputs),
            ),
        ]
    lines = []
    for provider, direction, work, run in runs:
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        line = measure(case, rows, provider, direction, work, run, seconds)
        show(line)
        if CUDA:
            # Includes the buffer that flushes the cache, for all providers alike.
            print(
                f"    memory beyond the inputs: {(torch.cuda.max_memory_allocated() - before) / 2**20:.0f} MiB"
            )
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[2048, 8192] if CUDA else [64])
    parser.add_argument("--size", type=int, default=3584 if CUDA else 64)
    parser.add_argument("--vocabulary", type=int, default=152064 if CUDA else 1000)
    parser.add_argument("--seconds", type=float, default=0.5 if CUDA else 0.1, help="per measurement")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder; benchmarks/results/<gpu> if not given"
    )
    arguments = parser.parse_args()
    print(f"{device_name()}, torch {torch.__version__}")
    lines = []
    with torch.no_grad():
        for rows in arguments.rows:
            lines += run_size(rows, arguments.size, arguments.vocabulary, arguments.seconds)
    out = arguments.out or Path(__file__).parents[1] / "results" / device_name()
    write_results(lines, out, "linear_logprob")


if __name__ == "__main__":
    main()
