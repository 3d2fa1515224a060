"""Timing and result files shared by the kernel benchmarks."""

import csv
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from megavila.runtime.platform import get_platform


@dataclass(frozen=True)
class Measurement:
    """One line of a result file. milliseconds None: it did not run, and `note` says why.

    What is bound by arithmetic has tflops, and their fraction of the GPU's peak; what is bound by memory has
    gb_per_second, and their fraction of a plain copy's.
    """

    case: str
    tokens: int
    provider: str
    direction: str  # "forward" or "forward+backward"
    milliseconds: float | None
    tflops: float | None
    fraction_of_peak: float | None
    note: str = ""
    gb_per_second: float | None = None

    @property
    def rate(self) -> float | None:
        return self.gb_per_second if self.tflops is None else self.tflops


def device_name() -> str:
    """A short name for the folder of results: "h100-80gb-hbm3", or "cpu"."""
    if not torch.cuda.is_available():
        return "cpu"
    name = torch.cuda.get_device_name().removeprefix("NVIDIA ")
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def median_milliseconds(run: Callable[[], object], seconds: float) -> float:
    """Median over about `seconds` of calls, after warming up. On a GPU timed by events, with the L2 cache
    flushed before each call as it would be between two layers."""
    run()
    run()
    if not torch.cuda.is_available():
        times = []
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            began = time.perf_counter()
            run()
            times.append((time.perf_counter() - began) * 1e3)
        return statistics.median(times)
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    calls = max(5, min(200, int(seconds / max(time.perf_counter() - began, 1e-5))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for start, stop in events:
        flush.zero_()
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events)


def measure(
    case: str,
    tokens: int,
    provider: str,
    direction: str,
    flops: float | None,
    run: Callable[[], object],
    seconds: float,
    moved: int = 0,
) -> Measurement:
    """What fails (no memory, a mask the provider does not know) becomes a line that says so.

    flops: operations of a call; None where memory is what counts, with `moved` bytes read and written.
    """
    try:
        milliseconds = median_milliseconds(run, seconds)
    except Exception as error:
        torch.cuda.empty_cache()
        note = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return Measurement(case, tokens, provider, direction, None, None, None, note[:200])
    if flops is None:
        speed = moved / milliseconds / 1e6
        share = speed / copy_gb_per_second()
        return Measurement(case, tokens, provider, direction, milliseconds, None, share, gb_per_second=speed)
    tflops = flops / milliseconds / 1e9
    peak = get_platform().peak_tflops()
    return Measurement(
        case, tokens, provider, direction, milliseconds, tflops, None if peak is None else tflops / peak
    )


@cache
def copy_gb_per_second() -> float:
    """Bytes read and written by a plain copy of a large tensor: what an op bound by memory can hope for."""
    size = (1 << 30) if torch.cuda.is_available() else (1 << 26)
    source = torch.zeros(size, dtype=torch.int8, device=get_platform().device)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_milliseconds(lambda: target.copy_(source), 0.2) / 1e6


def show(line: Measurement) -> None:
    if line.milliseconds is None:
        print(
            f"{line.case:<24} {line.tokens:>7} {line.direction:<17} {line.provider:<22} {line.note}",
            flush=True,
        )
        return
    of = "peak" if line.gb_per_second is None else "a plain copy"
    share = "" if line.fraction_of_peak is None else f" {line.fraction_of_peak:5.1%} of {of}"
    speed = f"{line.rate:8.3f} TFLOP/s" if line.gb_per_second is None else f"{line.rate:8.1f} GB/s"
    print(
        f"{line.case:<24} {line.tokens:>7} {line.direction:<17} {line.provider:<22} "
        f"{line.milliseconds:9.3f} ms {speed}{share}",
        flush=True,
    )


def write_results(lines: Sequence[Measurement], directory: Path, name: str) -> None:
    """`name`.csv and, per direction, `name`-forward.png and so on: TFLOP/s or GB/s of each provider."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = [asdict(line) for line in lines]
    with open(directory / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)

    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no plots")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    for direction in dict.fromkeys(line.direction for line in lines):
        cases = list(dict.fromkeys(line.case for line in lines))
        figure, axes = pyplot.subplots(
            1, len(cases), figsize=(5 * len(cases), 4), sharey=True, squeeze=False, layout="constrained"
        )
        for axis, case in zip(axes[0], cases, strict=True):
            done = [x for x in lines if (x.case, x.direction) == (case, direction) and x.rate is not None]
            for provider in dict.fromkeys(x.provider for x in done):
                points = [(x.tokens, x.rate) for x in done if x.provider == provider]
                axis.plot(*zip(*points, strict=True), marker="o", label=provider)
            axis.set(title=case, xlabel="tokens", xscale="log")
            if done:
                axis.legend(fontsize=7)
        axes[0][0].set_ylabel("TFLOP/s" if any(x.tflops for x in lines) else "GB/s")
        figure.suptitle(f"{direction}, {device_name()}")
        figure.savefig(directory / f"{name}-{direction.replace('+', '-')}.png", dpi=120)
        pyplot.close(figure)
