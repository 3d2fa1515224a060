"""One decoding step of G responses on a shared prompt, against attention that reads the prompt once for each row.

    python benchmarks/kernels/shared_prefix_decode.py      # results/<gpu>/shared_prefix_decode.csv and plots

Decoding is bound by memory, so what counts is GB/s of the keys and values that must be read, each once: the prompt's
for the group and every row's own. SDPA has no shared prefix: it reads the prompt's G times, from G copies, and is
rated by the same bytes. Without a GPU a small size runs in torch.
"""

import argparse
from pathlib import Path

import torch
from megavila_kernels.shared_prefix_decode import DecodeGroups, shared_prefix_decode
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from measure import Measurement, copy_gb_per_second, device_name, measure, show, write_results  # isort: skip

CUDA = torch.cuda.is_available()
HEADS, KV_HEADS, HEAD_DIM = (28, 4, 128) if CUDA else (4, 2, 64)


def run_size(prompt: int, own: int, group: int, groups: int, seconds: float) -> list[Measurement]:
    device, dtype = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
    rows = groups * group

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    q = random(rows, HEADS, HEAD_DIM)
    # Keys of prompts lie transposed, as in the rollout engine's cache.
    prompt_keys, prompt_values = (
        random(groups, KV_HEADS, HEAD_DIM, prompt).mT,
        random(groups, KV_HEADS, prompt, HEAD_DIM),
    )
    own_keys, own_values = random(rows, KV_HEADS, own, HEAD_DIM), random(rows, KV_HEADS, own, HEAD_DIM)
    plan = DecodeGroups(
        torch.arange(groups).repeat_interleave(group),
        torch.full((groups,), prompt),
        torch.device(device),
    )
    tensors = (q, prompt_keys, prompt_values, own_keys, own_values)
    moved = sum(x.numel() * x.element_size() for x in tensors[1:])
    case = f"{groups} x {group} rows, {own} own"

    def time_it(provider: str, run: object) -> Measurement:
        line = measure(case, prompt, provider, "forward", None, run, seconds, moved=moved)  # type: ignore[arg-type]
        show(line)
        return line

    lines = [time_it("torch", lambda: shared_prefix_decode(*tensors, plan, backend="torch"))]
    if CUDA:
        lines.append(time_it("megavila", lambda: shared_prefix_decode(*tensors, plan, backend="triton")))

    try:
        keys, values = (
            torch.cat([shared.repeat_interleave(group, dim=0), mine], dim=2)
            for shared, mine in ((prompt_keys, own_keys), (prompt_values, own_values))
        )
    except torch.cuda.OutOfMemoryError as problem:
        print(f"{case} {prompt}: no memory for the copies that SDPA needs: {str(problem).splitlines()[0]}")
        return lines
    queries = q[:, :, None]
    lines.append(
        time_it(
            "sdpa, G copies",
            lambda: scaled_dot_product_attention(queries, keys, values, enable_gqa=True),
        )
    )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", nargs="+", type=int, default=[4096, 32768, 131072] if CUDA else [256])
    parser.add_argument("--own", type=int, default=512 if CUDA else 16, help="tokens of each response")
    parser.add_argument("--group", type=int, default=8, help="responses of a prompt (G)")
    parser.add_argument("--groups", nargs="+", type=int, default=[1, 4] if CUDA else [1])
    parser.add_argument("--seconds", type=float, default=0.5 if CUDA else 0.05, help="per measurement")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder; benchmarks/results/<gpu> if not given"
    )
    arguments = parser.parse_args()
    print(
        f"{device_name()}, torch {torch.__version__}, heads {HEADS}/{KV_HEADS}, d {HEAD_DIM}; "
        f"a plain copy reads and writes {copy_gb_per_second():.0f} GB/s"
    )
    lines = []
    with torch.no_grad():
        for groups in arguments.groups:
            for prompt in arguments.prompts:
                lines += run_size(prompt, arguments.own, arguments.group, groups, arguments.seconds)
    out = arguments.out or Path(__file__).parents[1] / "results" / device_name()
    write_results(lines, out, "shared_prefix_decode")


if __name__ == "__main__":
    main()
