"""Keep a demo's numbers as data: python -m tools.record_demo runs/demo [more runs …] [--commit C] [--note TEXT]

Writes benchmarks/results/demo/seed_<n>.json with date, commit and machine, and the pictures of the first run for the README.
"""

import argparse
import json
import shutil
from pathlib import Path

from benchmarks.machine import ROOT, measured


def record(run: Path, commit: str, note: str) -> Path:
    """Copy one run's summary, with where and when it was measured, and return the file."""
    summary = json.loads((run / "summary.json").read_text())
    summary["measured"] = measured(f"megavila demo --seed {summary['seed']}")
    if commit:
        summary["measured"]["commit"] = commit
    if note:
        summary["measured"]["note"] = note
    target = ROOT / "benchmarks" / "results" / "demo" / f"seed_{summary['seed']}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(summary, indent=2) + "\n")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument(
        "--commit", default="", help="the commit that ran, when it is not the one checked out"
    )
    parser.add_argument(
        "--note", default="", help="what else a reader of the times must know, such as the cores used"
    )
    options = parser.parse_args()
    for run in options.runs:
        print(record(run, options.commit, options.note))
    for picture in ("reward_curves", "accuracy_by_frames"):
        target = ROOT / "docs" / "images" / f"demo_{picture}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(options.runs[0] / "plots" / f"{picture}.png", target)


if __name__ == "__main__":
    main()
