"""A run that was killed, or asked to stop, goes on as if nothing had happened: bit for bit on a CPU."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megavila.config import save_config
from megavila.rl.run import run_grpo
from megavila.runtime.errors import MegavilaError
from megavila.runtime.metrics import read_metrics
from megavila.sft.run import run_sft
from megavila.training.errors import Interrupted
from tests.end_to_end.tiny import grpo_config, reward_words, sft_config, write_world

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 4

# Clocks, memory, and caches that are cold after a restart.
OUTWARD = ("time/", "tflops_per_gpu", "memory/", "store/", "frames/", "tokens/vision")


def signal_in_third_step(row, text):
    """The usual reward; but the first response of the third step that this process sees brings a signal."""
    target = os.environ.get("TEST_SIGNAL")
    calls = signal_in_third_step.calls = getattr(signal_in_third_step, "calls", 0) + 1
    if target and calls == 2 * 16 + 1:
        os.kill(os.getpid(), int(target))
    return reward_words(row, text)


def grpo(world, name, **run):
    return grpo_config(
        world,
        name,
        run={"steps": STEPS, **run},
        checkpoint={"every": 2, "save_final": True},
        grpo={"kl_beta": 0.1, "updates_per_batch": 2},
        reward={"functions": ["tests.end_to_end.test_resume:signal_in_third_step"]},
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("resume")
    write_world(directory, rows=5)
    run_grpo(grpo(directory, "straight"))
    return directory


def inward(run: Path):
    rows = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(OUTWARD)} for row in rows]


def assert_same_run(ours: Path, expected: Path, steps: int = STEPS):
    assert [row["step"] for row in inward(expected)] == list(range(1, steps + 1))
    assert inward(ours) == inward(expected)
    files = sorted(path.relative_to(expected / "hf") for path in (expected / "hf").rglob("*.safetensors"))
    assert files
    for file in files:
        theirs = load_file(expected / "hf" / file)
        for name, tensor in load_file(ours / "hf" / file).items():
            assert torch.equal(tensor, theirs[name]), name


def test_killed_in_mid_step(world):
    config_file = world / "killed.yaml"
    save_config(grpo(world, "killed"), config_file)
    environment = {
        **os.environ,
        "TEST_SIGNAL": str(int(signal.SIGKILL)),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}",
    }
    command = [sys.executable, str(REPOSITORY / "pretrain_grpo.py"), "--config", str(config_file)]
    killed = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = world / "runs" / "killed"
    assert len(read_metrics(run / "metrics.jsonl")) == 2 and not (run / "hf").exists()
    run_grpo(grpo(world, "killed", resume="auto"))
    assert_same_run(run, world / "runs" / "straight")


def test_sigterm_saves_and_stops(world, monkeypatch):
    monkeypatch.setenv("TEST_SIGNAL", str(int(signal.SIGTERM)))
    signal_in_third_step.calls = 0
    with pytest.raises(Interrupted, match="SIGTERM after step 3"):
        run_grpo(grpo(world, "stopped"))
    monkeypatch.delenv("TEST_SIGNAL")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    run = world / "runs" / "stopped"
    assert (run / "checkpoints" / "step_00000003").is_dir()
    run_grpo(grpo(world, "stopped"))
    assert_same_run(run, world / "runs" / "straight")


VARY = """
import random
from dataclasses import replace

def frames(row, seed):
    return replace(row, extra={**row.extra, "num_frames": random.Random(seed).choice([2, 3, 5])})
"""


def test_sft_from_an_older_checkpoint_forgets_what_came_after(world, monkeypatch):
    (world / "vary.py").write_text(VARY)
    monkeypatch.syspath_prepend(world)

    def config(name, **run):
        return sft_config(
            world,
            name,
            run={"steps": 5, **run},
            checkpoint={"every": 2},
            model={"train_vision": True},
            data={"transform": "vary:frames"},
        )

    run_sft(config("sft-straight"))
    run_sft(config("sft-again"))
    run = world / "runs" / "sft-again"
    run_sft(config("sft-again", resume=str(run / "checkpoints" / "step_00000002")))
    assert_same_run(run, world / "runs" / "sft-straight", steps=5)
    prompts = [row["tokens/prompt"] for row in inward(run)]
    assert len(set(prompts)) > 1, "the numbers of frames did not vary"


def test_what_cannot_be_gone_on_from(world):
    with pytest.raises(MegavilaError, match=r"run\.resume is never.*straight"):
        run_grpo(grpo(world, "straight", resume="never"))
    with pytest.raises(MegavilaError, match="nowhere"):
        run_grpo(grpo(world, "fresh", resume=str(world / "nowhere")))
    other = sft_config(
        world,
        "other",
        checkpoint={"init_from": str(world / "runs/straight/checkpoints/step_00000004")},
        model={"language": {**sft_config(world, "x").model.language.__dict__, "num_layers": 3}},
    )
    with pytest.raises(MegavilaError, match="another model"):
        run_sft(other)


def test_changed_reference_is_noticed(world):
    source = world / "runs" / "straight" / "checkpoints" / "step_00000004"
    config = grpo_config(
        world,
        "moved",
        run={"steps": STEPS + 1, "resume": str(source)},
        checkpoint={"init_from": str(source)},
        grpo={"kl_beta": 0.1},
    )
    with pytest.raises(MegavilaError, match="reference model has changed"):
        run_grpo(config)


def test_init_from_takes_the_weights_and_nothing_else(world):
    source = world / "runs" / "straight" / "checkpoints" / "step_00000004"
    config = sft_config(
        world,
        "from-grpo",
        run={"steps": 1},
        optimizer={"lr": 1e-12},
        checkpoint={"init_from": str(source), "save_final": True},
    )
    run_sft(config)
    saved = load_file(source / "model-tp0-pp0.safetensors")
    started = load_file(world / "runs/from-grpo/checkpoints/step_00000001/model-tp0-pp0.safetensors")
    for name, tensor in saved.items():
        torch.testing.assert_close(started[name], tensor, rtol=0, atol=1e-9)


def test_interrupted_by_hand(world, monkeypatch):
    """SIGINT is handled as SIGTERM is."""
    monkeypatch.setenv("TEST_SIGNAL", str(int(signal.SIGINT)))
    signal_in_third_step.calls = 32
    with pytest.raises(Interrupted, match="SIGINT after step 1"):
        run_grpo(grpo(world, "by-hand"))
