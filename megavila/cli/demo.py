"""`megavila demo`."""

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
    quick: Annotated[
        bool, typer.Option("--quick", help="Walk through every stage in a minute or two, learning nothing.")
    ] = False,
) -> None:
    """Train a small model to reason over videos, end to end: videos, SFT, GRPO, exams and a report.

    Run again, it goes on where it was stopped. Give another --out (or delete the directory) to start anew.
    """
    Demo(out, seed, tuple(overrides or ()), quick).run()
