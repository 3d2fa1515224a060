"""Where and when something was measured, as it is kept beside every number."""

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def measured(command: str) -> dict[str, str]:
    """Date, commit, machine, torch and the command, for a file of results."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "machine": machine(),
        "torch": torch.__version__,
        "command": command,
    }


def machine() -> str:
    """The GPU, or the processor as the kernel names it, with the number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def results_directory() -> Path:
    """benchmarks/results/<gpu or cpu>/, as short as a file name should be."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return ROOT / "benchmarks" / "results" / name.lower().replace(" ", "-")


def _commit() -> str:
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not a git checkout"
    return found.stdout.strip()
