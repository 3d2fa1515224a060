"""Keep a demo's numbers as data: python tools/record_demo.py runs/demo [more runs …]

Writes benchmarks/results/demo/seed_<n>.json with date, commit and machine, and the picture of the first run for the README.
"""

import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def cpu_name() -> str:
    """The processor as the kernel names it."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    names = [
        line.split(":", 1)[1].strip()
        for line in info.read_text().splitlines()
        if line.startswith("model name")
    ]
    return names[0] if names else platform.machine()


def record(run: Path) -> Path:
    """Copy one run's summary, with where and when it was measured, and return the file."""
    summary = json.loads((run / "summary.json").read_text())
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    summary["measured"] = {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "machine": f"{cpu_name()}, {os.cpu_count()} cores",
        "command": f"megavila demo --seed {summary['seed']}",
    }
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
