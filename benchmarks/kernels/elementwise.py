"""Rotary embeddings and SwiGLU against torch, eager and compiled: GB/s and the share of a plain copy's.

    python benchmarks/kernels/elementwise.py      # results/<gpu>/elementwise.csv and plots

The bytes counted are those that must move: each input read once and each output written once (for the rotary table
once for all heads). Without a GPU a small size runs in torch.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from megavila_kernels.rotary import rotate
from megavila_kernels.rotary.reference import reference_rotate
from megavila_kernels.swiglu import swiglu
from megavila_kernels.swiglu.reference import reference_swiglu
from torch import Tensor

from measure import Measurement, copy_gb_per_second, device_name, measure, show, write_results  # isort: skip

CUDA = torch.cuda.is_available()
# Qwen2.5-7B.
HEADS, HEAD_DIM, FFN = (28, 128, 18944) if CUDA else (4, 64, 256)
Op = Callable[[Tensor], Tensor]


def time_op(
    case: str, tokens: int, providers: dict[str, Op], x: Tensor, moved: tuple[int, int], seconds: float
) -> list[Measurement]:
    """moved: bytes of the forward and of the backward pass."""
    lines = []
    for provider, op in providers.items():
        x = x.detach().requires_grad_()
        upstream = torch.randn_like(op(x))

        def forward(op: Op = op, x: Tensor = x) -> Tensor:
            with torch.no_grad():
                return op(x)

        def both(op: Op = op, x: Tensor = x, upstream: Tensor = upstream) -> object:
            return torch.autograd.grad(op(x), x, upstream)

        for direction, run, size in (
            ("forward", forward, moved[0]),
            ("forward+backward", both, sum(moved)),
        ):
            lines.append(measure(case, tokens, provider, direction, None, run, seconds, moved=size))
            show(lines[-1])
    return lines


def run_size(tokens: int, seconds: float) -> list[Measurement]:
    device, dtype = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
    width = torch.finfo(dtype).bits // 8
    # A view into the fused projection of queries, keys and values, as in the decoder.
    fused = torch.randn(tokens, HEADS + 8, HEAD_DIM, device=device, dtype=dtype)
    angle = torch.rand(tokens, HEAD_DIM // 2, device=device) * 1000
    cos, sin = angle.cos(), angle.sin()
    rotary: dict[str, Op] = {
        "torch": lambda x: rotate(x, cos, sin, backend="torch"),
        "transformers' formula": lambda x: reference_rotate(x, cos, sin),
    }
    gated: dict[str, Op] = {
        "torch": lambda x: swiglu(x, backend="torch"),
        "transformers' formula": reference_swiglu,
    }
    if CUDA:
        rotary["megavila"] = lambda x: rotate(x, cos, sin, backend="triton")
        rotary["torch.compile"] = torch.compile(rotary["transformers' formula"])
        gated["megavila"] = lambda x: swiglu(x, backend="triton")
        gated["torch.compile"] = torch.compile(reference_swiglu)
    one_pass = 2 * tokens * HEADS * HEAD_DIM * width + tokens * HEAD_DIM * 4
    lines = time_op("rotary", tokens, rotary, fused[:, :HEADS], (one_pass, one_pass), seconds)
    gate_up = torch.randn(tokens, 2 * FFN, device=device, dtype=dtype)
    column = tokens * FFN * width
    return lines + time_op("swiglu", tokens, gated, gate_up, (3 * column, 5 * column), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 32768] if CUDA else [64])
    parser.add_argument("--seconds", type=float, default=0.5 if CUDA else 0.05, help="per measurement")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder; benchmarks/results/<gpu> if not given"
    )
    arguments = parser.parse_args()
    print(
        f"{device_name()}, torch {torch.__version__}; a plain copy reads and writes {copy_gb_per_second():.0f} GB/s"
    )
    lines = []
    for tokens in arguments.tokens:
        lines += run_size(tokens, arguments.seconds)
    write_results(
        lines, arguments.out or Path(__file__).parents[1] / "results" / device_name(), "elementwise"
    )


if __name__ == "__main__":
    main()
