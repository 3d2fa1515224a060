"""Padded shard gather against copying as many bytes, and against plain torch: `python -m benchmarks.kernels.shard_gather`.

All contestants take turns within one run, so that what else the machine does hits each of them, and it is ratios of
neighbouring times that are reported, by the wall clock and by the process's own CPU time (which a busy machine
disturbs less; with several threads it says nothing about how long anything takes): speed relative to `torch.Tensor.copy_` of one block of the same size on the
same threads (1.0: memory bandwidth), and relative to `index_select` on one table of all rows followed by `pad`. The
table is not charged for: plain torch would have to build it first.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.machine import measured
from megavila.mrsp.gather import load_extension, padded_shard_gather

WIDTH = 3584  # Qwen2-7B
PER_FRAME, TEXT_PER_FRAME = 256, 2


def zigzag(tokens: int, ranks: int) -> tuple[Tensor, Tensor]:
    """(source, row) of one rank's two chunks of a prompt: frames of media rows with a little text between."""
    position = torch.arange(tokens)
    frame, place = position // (PER_FRAME + TEXT_PER_FRAME), position % (PER_FRAME + TEXT_PER_FRAME)
    source = (place < PER_FRAME).int()
    row = torch.where(
        place < PER_FRAME, frame * PER_FRAME + place, frame * TEXT_PER_FRAME + place - PER_FRAME
    )
    chunk = tokens // (2 * ranks)
    mine = torch.cat([torch.arange(chunk), torch.arange(tokens - chunk, tokens)])
    return source[mine], row[mine]


def scattered(tokens: int, ranks: int) -> tuple[Tensor, Tensor]:
    """The same rows in random order: no two neighbours, the worst case."""
    source, row = zigzag(tokens, ranks)
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))
    return source[order], row[order]


def measure(case: Callable[[int, int], tuple[Tensor, Tensor]], tokens: int, rounds: int) -> dict[str, object]:
    """Times of one case, contestants in turn."""
    source, row = case(tokens, 4)
    padding = 64
    frames = -(-tokens // (PER_FRAME + TEXT_PER_FRAME))
    sources = [torch.randn(frames * n, WIDTH).bfloat16() for n in (TEXT_PER_FRAME, PER_FRAME)]
    source_index = torch.cat([source, torch.full((padding,), -1, dtype=torch.int32)])
    row_index = torch.cat([row, torch.zeros(padding, dtype=torch.int64)])
    table, index = torch.cat(sources), row + source.long() * len(sources[0])
    out = torch.zeros(len(source_index), WIDTH, dtype=torch.bfloat16)
    block, target = torch.randn(out.shape).bfloat16(), torch.zeros_like(out)
    contestants: dict[str, Callable[[], Tensor]] = {
        "gather": lambda: padded_shard_gather(sources, source_index, row_index, out=out),
        "copy": lambda: target.copy_(block),
        "index_select_pad": lambda: F.pad(table.index_select(0, index), (0, 0, 0, padding)),
    }
    assert torch.equal(contestants["gather"](), contestants["index_select_pad"]())
    clocks = {"wall": time.perf_counter, "cpu": time.process_time}
    times: dict[str, dict[str, list[float]]] = {c: {name: [] for name in contestants} for c in clocks}
    for _ in range(rounds):
        for name, run in contestants.items():
            start = {c: clock() for c, clock in clocks.items()}
            run()
            for c, clock in clocks.items():
                times[c][name].append(clock() - start[c])
    ratios = {
        f"{other}_{c}_time_over_gather_{c}_time": _quartiles(
            [t / g for t, g in zip(times[c][other], times[c]["gather"], strict=True)]
        )
        for other in ("copy", "index_select_pad")
        for c in clocks
    }
    return {
        "case": case.__name__,
        "rows": len(source_index),
        "mebibytes": round(out.nbytes / 2**20, 1),
        "copy_gb_read_and_written_per_cpu_s": round(
            2 * out.nbytes / statistics.median(times["cpu"]["copy"]) / 1e9, 2
        ),
        **ratios,
    }


def _quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, 3), "quartile_1": round(low, 3), "quartile_3": round(high, 3)}


def main() -> None:
    """Measure, print and, with --out, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    if load_extension() is None:
        raise SystemExit("the C++ extension is not built; run make install")
    torch.set_num_threads(options.threads)
    record = {
        "measured": measured(
            f"python -m benchmarks.kernels.shard_gather --threads {options.threads} --rounds {options.rounds}"
        ),
        "dtype": "bfloat16",
        "width": WIDTH,
        "load_before": [round(value, 2) for value in os.getloadavg()],
        "results": [
            measure(case, tokens, options.rounds) for tokens in (8192, 65536) for case in (zigzag, scattered)
        ],
        "load_after": [round(value, 2) for value in os.getloadavg()],
    }
    text = json.dumps(record, indent=2)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
