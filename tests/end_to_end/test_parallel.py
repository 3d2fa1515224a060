"""TP=2 and DP=2 runs have the metrics, losses, gradient norms and final weights of a single process."""

import copy

import pytest
import torch
from megatron.core import parallel_state
from safetensors.torch import load_file

import megavila.training.session as session_module
from megavila.rl.run import run_grpo
from megavila.runtime.metrics import read_metrics
from megavila.sft.run import run_sft
from tests.distributed import run_ranks
from tests.end_to_end.tiny import grpo_config, sft_config, write_world

GRPO = {"kl_beta": 0.1, "updates_per_batch": 2, "drop_zero_variance": True}


def sft(world, name, tensor):
    return sft_config(
        world,
        name,
        parallel={"tensor_parallel": tensor},
        sft={"batch_size": 5, "max_tokens_per_microbatch": 90},
        model={"train_vision": True},
        # Some biases have no gradient but rounding; Adam must not take it for one.
        optimizer={"eps": 1e-5},
    )


def grpo(world, name, tensor):
    return grpo_config(world, name, parallel={"tensor_parallel": tensor}, grpo=GRPO)


def on_two_ranks(rank, world):
    """All four runs in one pair of processes: starting one takes longer than training."""
    session_module.shutdown = parallel_state.destroy_model_parallel  # keep the world for the next run
    for tensor in (1, 2):
        run_sft(sft(world, f"sft-tp{tensor}", tensor))
        run_grpo(grpo(world, f"grpo-tp{tensor}", tensor))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parallel")
    write_world(directory, rows=5)
    run_sft(sft(directory, "sft-alone", 1))
    run_grpo(grpo(directory, "grpo-alone", 1))
    run_ranks(on_two_ranks, 2, directory)
    return directory


def weights(world, run):
    found = {}
    for file in sorted((world / "runs" / run / "hf").rglob("*.safetensors")):
        found |= {f"{file.parent.name}/{name}": tensor for name, tensor in load_file(file).items()}
    assert len(found) > 20
    return found


def metrics(world, run):
    rows = read_metrics(world / "runs" / run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    return rows


# What a rank did for itself differs: its time and memory, how often its own store was asked.
OWN = (
    "time/",
    "memory/",
    "store/",
    "frames/",
    "tokens/llm_forward",
    "tokens/vision",
    "rollout/logprob_abs_diff",
)


@pytest.mark.parametrize("run", ["sft-tp1", "sft-tp2", "grpo-tp1", "grpo-tp2"])
def test_equals_a_single_process(world, run):
    single = run.split("-")[0] + "-alone"
    for ours, expected in zip(metrics(world, run), metrics(world, single), strict=True):
        assert ours.keys() == expected.keys()
        for name, value in expected.items():
            if not name.startswith(OWN):
                assert ours[name] == pytest.approx(value, rel=2e-4, abs=1e-6), name
    theirs = weights(world, single)
    for name, tensor in weights(world, run).items():
        torch.testing.assert_close(
            tensor, theirs[name], rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_two_ranks_of_a_replica_do_the_work_of_one(world, kind):
    """No frame is decoded or encoded twice because there are two ranks; SFT trains the tower, GRPO does not."""
    for ours, expected in zip(metrics(world, f"{kind}-tp2"), metrics(world, f"{kind}-alone"), strict=True):
        for name in ("frames/decoded", "frames/encoded", "tokens/vision", "tokens/llm_forward"):
            assert ours[name] == expected[name], name
    first = metrics(world, f"{kind}-tp2")[0]
    assert first["frames/decoded"] == first["frames/encoded"] == 3 * first["media/videos"] > 0


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_something_was_learned(world, kind):
    """The comparison above would hold for runs that do nothing."""
    rows = metrics(world, f"{kind}-alone")
    assert all(row["optimizer/grad_norm"] > 0.01 and row["optimizer/lr"] > 0 for row in rows)
    if kind == "sft":
        assert rows[-1]["sft/loss"] < rows[0]["sft/loss"]
    else:
        assert rows[0]["grpo/clip_fraction"] > 0 and rows[-1]["grpo/kl"] > 0


def test_rollouts_are_the_same_text(world):
    """Sampling depends on the seed, the step and the row, not on who samples."""
    for step in (1, 2, 3):
        texts = [
            (world / "runs" / run / "rollouts" / f"step_{step:06d}.jsonl").read_text()
            for run in ("grpo-alone", "grpo-tp1", "grpo-tp2")
        ]
        assert len({text.count('"text"') for text in texts}) == 1
        strip = [[line.split('"reward"')[0] for line in copy.copy(text).splitlines()] for text in texts]
        assert strip[0] == strip[1] == strip[2]
