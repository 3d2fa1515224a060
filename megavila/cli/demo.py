"""`megavila demo`."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from megavila.demo.pipeline import Demo


def demo(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value]...", help="Settings of the GRPO stage.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Directory for everything the demo makes.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of videos, weights and sampling.")] = 0,
    ranks: Annotated[
        int, typer.Option(min=0, help="Processes that train side by side; 0: two where there are two cores.")
    ] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Walk through every stage in a minute or two, learning nothing.")
    ] = False,
) -> None:
    """Train a small model to reason over videos, end to end: videos, SFT, GRPO, exams and a report.

    Run again, it goes on where it was stopped. Give another --out (or delete the directory) to start anew.
    """
    run = Demo(out, seed, tuple(overrides or ()), quick)
    run.check()
    cores = len(os.sched_getaffinity(0))
    ranks = ranks or min(2, cores)
    if ranks == 1 or "RANK" in os.environ:  # under torchrun, this is one of them
        run.run()
    else:
        sys.exit(_launch(ranks, cores // ranks))


def _launch(ranks: int, threads: int) -> int:
    """This command again, in so many processes; its exit code."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {"OMP_NUM_THREADS": str(max(1, threads)), **os.environ}
    return subprocess.run(
        [*torchrun, "-m", "megavila", *sys.argv[1:]], env=environment, check=False
    ).returncode
