"""Cross-compilation without a GPU, in a process of its own: this one interprets kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = """
import os, sys
os.environ["TRITON_CACHE_DIR"] = sys.argv[1]
sys.path.insert(0, "tools")
from dataclasses import replace
from kernel_report import attention_variants, report, torch

forward = next(attention_variants([80], [64], [torch.bfloat16], [False]))
# Twice the rows for as many threads: too many accumulators for their registers.
crowded = replace(forward, constants=forward.constants | {"BLOCK_Q": 256}, launch={"num_warps": 4, "num_stages": 3})
assert report([forward, crowded]) == 1
"""


def test_a_spilling_configuration_is_counted(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=REPOSITORY,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    shipped, crowded = [x for x in result.stdout.splitlines() if "attention forward" in x]
    assert "HMMA" in shipped and "LDGSTS" in shipped and "SPILLS" not in shipped
    assert crowded.endswith("SPILLS")
