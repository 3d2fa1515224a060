"""What a run is called, how long it goes on and where it writes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megavila.config.section import Section, knob, require, required


@dataclass(frozen=True, kw_only=True)
class RunSettings(Section):
    """Name, length and bookkeeping of a run."""

    name: str = required("Name of the run; everything is written under <output_dir>/<name>.")
    output_dir: str = knob("runs", "Directory that holds the runs.")
    seed: int = knob(0, "Seed of weights, data order and sampling.")
    steps: int = required("Optimizer steps of an SFT run; rollout batches of a GRPO run.")
    device: Literal["auto", "cpu", "cuda"] = knob("auto", "auto: CUDA where there is a device, else the CPU.")
    resume: str = knob(
        "auto",
        "auto: go on from the run's latest checkpoint if there is one; never: start anew (an error if the run "
        "already has checkpoints); or the path of a checkpoint.",
    )
    log_every: int = knob(1, "Print a line every so many steps; metrics.jsonl always gets every step.")
    eval_every: int = knob(0, "Evaluate on data.eval every so many steps; 0: never.")

    def validate(self) -> None:
        require(bool(self.name) and self.name not in (".", ".."), "name must not be empty")
        require(
            "/" not in self.name,
            f"name is {self.name!r}, must be one directory name without '/'; set output_dir to choose where",
        )
        self.require_at_least(0, "seed", "eval_every")
        self.require_at_least(1, "steps", "log_every")

    @property
    def directory(self) -> Path:
        """Where this run writes: <output_dir>/<name>."""
        return Path(self.output_dir) / self.name
