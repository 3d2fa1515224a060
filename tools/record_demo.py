"""Keep a demo's numbers as data: python -m tools.record_demo runs/demo [more runs …]

Writes benchmarks/results/demo/seed_<n>.json with date, commit and machine, and the picture of the first run for the README.
"""

import json
import shutil
import sys
from pathlib import Path

from benchmarks.machine import ROOT, measured


def record(run: Path) -> Path:
    """Copy one run's summary, with where and when it was measured, and return the file."""
    summary = json.loads((run / "summary.json").read_text())
    summary["measured"] = measured(f"megavila demo --seed {summary['seed']}")
    target = ROOT / "benchmarks" / "results" / "demo" / f"seed_{summary['seed']}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(summary, indent=2) + "\n")
    return target


if __name__ == "__main__":
    runs = [Path(name) for name in sys.argv[1:]] or [Path("runs/demo")]
    for run in runs:
        print(record(run))
    for picture in ("reward_curves", "accuracy_by_frames"):
        target = ROOT / "docs" / "images" / f"demo_{picture}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(runs[0] / "plots" / f"{picture}.png", target)
