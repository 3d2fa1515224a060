"""The MR-SP benchmark on a tiny model: every variant runs, and the counters say what each one saves."""

import json
import subprocess
import sys
from pathlib import Path

FRAMES, GROUP = 4, 3


def test_every_variant_and_its_counters(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    sizes = ["--model", "tiny", "--frames", str(FRAMES), "--group-size", str(GROUP), "--response", "8"]
    command = [sys.executable, "-m", "benchmarks.mrsp_step", *sizes, "--rounds", "1", "--out", str(out)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    found = {entry["variant"]: entry for entry in json.loads(out.read_text())["summary"]}
    assert list(found) == ["plain", "stage_1", "stages_1_2", "megavila", "megavila_dp"]
    assert all(entry["seconds"]["step"] > 0 and entry["peak_gib"] >= 0 for entry in found.values())
    counters = {name: entry["counters"] for name, entry in found.items()}
    prompt, response = (counters["plain"][f"tokens/{part}"] for part in ("prompt", "response"))
    # The rollout reads a prompt once in every variant; then the reference and the policy make a pass each.
    once = prompt + response
    for name in ("plain", "stage_1", "stages_1_2"):
        assert counters[name]["tokens/llm_forward"] == once + 2 * (GROUP * prompt + response)
    for name in ("megavila", "megavila_dp"):
        assert counters[name]["tokens/llm_forward"] == 3 * once
        assert counters[name]["frames/encoded"] == FRAMES
        assert counters[name]["frames/decoded"] <= FRAMES
    assert counters["plain"]["frames/encoded"] == 3 * FRAMES
    assert found["megavila"]["speedup"].keys() >= {"step_over_plain", "update_over_stages_1_2"}
