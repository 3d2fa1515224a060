"""Interval attention against torch SDPA, FlexAttention and flash-attn: TFLOP/s and share of the GPU's limit.

    python benchmarks/kernels/attention.py                     # results/<gpu>/attention.csv and plots
    python benchmarks/kernels/attention.py --tokens 16384 --cases causal

TFLOP/s count the pairs that the mask shows (4 d operations a pair and head forward, 10 d backward), so a
provider that computes hidden pairs is slower by as much. For the shared prefix, SDPA and flash-attn have no
such mask: they run the G full sequences that it replaces, and are rated by the same visible pairs. Without a
GPU a small size runs on the torch backend.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from megavila_kernels import IntervalMask, attend
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from measure import Measurement, device_name, measure, show, write_results  # isort: skip

CUDA = torch.cuda.is_available()
HEADS, KV_HEADS, HEAD_DIM = 28, 4, 128  # Qwen2.5-7B
GROUP = 8  # sequences of a packed run, responses of a shared-prefix run
# Share of the tokens of a shared-prefix run that belong to the prompt.
PROMPT_SHARE = 0.75


@dataclass(frozen=True)
class Problem:
    """The intervals, and the batch of equally long sequences that providers without such masks run instead."""

    name: str
    mask: IntervalMask
    batch: int
    length: int
    causal: bool


def build_problem(name: str, tokens: int, device: str) -> Problem:
    row = torch.arange(tokens, dtype=torch.int32, device=device)
    zero = torch.zeros_like(row)
    if name == "full":
        return Problem(name, IntervalMask(zero[None], (zero + tokens)[None], tokens), 1, tokens, False)
    if name == "causal":
        return Problem(name, IntervalMask(zero[None], (row + 1)[None], tokens), 1, tokens, True)
    if name == "packed":
        length = tokens // GROUP
        start = row // length * length
        return Problem(name, IntervalMask(start[None], (row + 1)[None], tokens), GROUP, length, True)
    if name == "shared_prefix":
        prompt = tokens - int(tokens * (1 - PROMPT_SHARE)) // GROUP * GROUP
        response = (tokens - prompt) // GROUP
        in_prompt = row < prompt
        start = (row - prompt) // response * response + prompt
        lo = torch.stack([zero, torch.where(in_prompt, 0, start)])
        hi = torch.stack([torch.where(in_prompt, row + 1, prompt), torch.where(in_prompt, 0, row + 1)])
        return Problem(name, IntervalMask(lo.int(), hi.int(), tokens), GROUP, prompt + response, True)
    raise ValueError(f"unknown case {name!r}; use full, causal, packed or shared_prefix")


def providers(problem: Problem) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Functions of q (tokens, heads, d) and k, v for "megavila", of the batched sequences for the others."""
    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}

    def sdpa(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=problem.causal, enable_gqa=True)

        return run

    found["sdpa flash"] = sdpa(SDPBackend.FLASH_ATTENTION)
    if CUDA:
        found["sdpa cudnn"] = sdpa(SDPBackend.CUDNN_ATTENTION)
        found["flex"] = _flex(problem)
        try:
            from flash_attn import flash_attn_func
        except ImportError:
            print("flash-attn is not installed: left out")
        else:
            found["flash-attn"] = lambda q, k, v: flash_attn_func(q, k, v, causal=problem.causal)
    return found


def _flex(problem: Problem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention with the very same intervals; compiled at the first call."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    lo, hi, tokens = problem.mask.lo, problem.mask.hi, problem.mask.tokens_k

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key >= lo[0][query]) & (key < hi[0][query])
        for interval in range(1, len(lo)):
            seen = seen | ((key >= lo[interval][query]) & (key < hi[interval][query]))
        return seen

    @cache
    def block_mask() -> object:
        return torch.compile(create_block_mask)(visible, None, None, tokens, tokens, device="cuda")

    compiled = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=block_mask(), enable_gqa=True)


def run_case(
    problem: Problem, dtype: torch.dtype, heads: tuple[int, int, int], seconds: float
) -> list[Measurement]:
    q_heads, kv_heads, d = heads
    device, tokens = problem.mask.lo.device, problem.mask.tokens_q
    lines = []

    def tensors(shape: Callable[[int], tuple[int, ...]]) -> list[Tensor]:
        return [
            torch.randn(shape(n), device=device, dtype=dtype).requires_grad_()
            for n in (q_heads, kv_heads, kv_heads)
        ]

    def time_it(name: str, run: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor]) -> None:
        flops = 4.0 * problem.mask.pairs * q_heads * d
        with torch.no_grad():
            line = measure(problem.name, tokens, name, "forward", flops, lambda: run(*inputs), seconds)
        show(line)
        lines.append(line)
        if line.milliseconds is None:
            return
        upstream = torch.randn_like(run(*inputs))
        line = measure(
            problem.name,
            tokens,
            name,
            "forward+backward",
            3.5 * flops,
            lambda: torch.autograd.grad(run(*inputs), inputs, upstream),
            seconds,
        )
        show(line)
        lines.append(line)

    time_it("megavila", lambda q, k, v: attend(q, k, v, problem.mask)[0], tensors(lambda n: (tokens, n, d)))
    for name, run in providers(problem).items():
        if name == "flex":
            inputs = tensors(lambda n: (1, n, tokens, d))
        elif name == "flash-attn":
            inputs = tensors(lambda n: (problem.batch, problem.length, n, d))
        else:
            inputs = tensors(lambda n: (problem.batch, n, problem.length, d))
        time_it(name, run, inputs)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=["causal", "full", "packed", "shared_prefix"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096, 16384, 65536] if CUDA else [512])
    parser.add_argument("--seconds", type=float, default=0.5 if CUDA else 0.2, help="per measurement")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder; benchmarks/results/<gpu> if not given"
    )
    arguments = parser.parse_args()
    heads = (HEADS, KV_HEADS, HEAD_DIM) if CUDA else (4, 2, 64)
    dtype = torch.bfloat16 if CUDA else torch.float32
    device = "cuda" if CUDA else "cpu"
    print(f"{device_name()}, torch {torch.__version__}, heads {heads[0]}/{heads[1]}, d {heads[2]}, {dtype}")
    lines = []
    for case in arguments.cases:
        for tokens in arguments.tokens:
            lines += run_case(build_problem(case, tokens, device), dtype, heads, arguments.seconds)
    write_results(lines, arguments.out or Path(__file__).parents[1] / "results" / device_name(), "attention")


if __name__ == "__main__":
    main()
