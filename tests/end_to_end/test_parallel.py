"""Tensor, context and data parallel runs have the metrics, losses, gradient norms and final weights of a single
process."""

import copy

import pytest
import torch
from megatron.core import parallel_state
from safetensors.torch import load_file

import megavila.runtime.topology as topology_module
from megavila.rl.run import run_grpo
from megavila.runtime.metrics import read_metrics
from megavila.sft.run import run_sft
from tests.distributed import run_ranks
from tests.end_to_end.tiny import grpo_config, retold, scored, sft_config, write_world

GRPO = {"kl_beta": 0.1, "updates_per_batch": 2, "drop_zero_variance": True}


# By number of ranks: what each run is called, and its degrees.
DEGREES = {
    2: {
        "dp2": {},
        "tp2": {"tensor_parallel": 2},
        "cp2": {"context_parallel": 2, "cp_split": "always"},
        "cp2-whole": {"context_parallel": 2},
        "cp2-ulysses": {"context_parallel": 2, "cp_comm_type": "a2a", "cp_split": "always"},
    },
    4: {"cp2-tp2": {"context_parallel": 2, "tensor_parallel": 2, "cp_split": "always"}},
}
RUNS = [f"{kind}-{name}" for degrees in DEGREES.values() for name in degrees for kind in ("sft", "grpo")]


def sft(world, name, parallel):
    return sft_config(
        world,
        name,
        parallel=parallel,
        sft={
            "batch_size": 5,
            "max_tokens_per_microbatch": 90,
            "reasoning": "tests.end_to_end.tiny:retell",
        },
        model={"train_vision": True},
        # Some biases have no gradient but rounding; Adam must not take it for one.
        optimizer={"eps": 1e-5},
    )


def grpo(world, name, parallel):
    return grpo_config(world, name, parallel=parallel, grpo=GRPO)


def on_ranks(rank, size, world):
    """All runs in one set of processes: starting one takes longer than training.

    Returns for each run how many responses this rank has scored and how much reasoning it has written.
    """
    topology_module.shutdown = parallel_state.destroy_model_parallel  # keep the world for the next run
    counts = {}
    for name, parallel in DEGREES[size].items():
        scored.clear()
        retold.clear()
        run_sft(sft(world, f"sft-{name}", parallel))
        run_grpo(grpo(world, f"grpo-{name}", parallel))
        counts[name] = len(scored), len(retold)
    return counts


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parallel")
    write_world(directory, rows=5)
    run_sft(sft(directory, "sft-alone", {}))
    run_grpo(grpo(directory, "grpo-alone", {}))
    return directory


@pytest.fixture(scope="module")
def counts(world):
    """After all runs, what `on_ranks` returned, by number of ranks and rank."""
    return {size: run_ranks(on_ranks, size, size, world) for size in DEGREES}


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
    "tflops_per_gpu",
    "memory/",
    "store/",
    "frames/",
    "tokens/llm_forward",
    "tokens/vision",
    "rollout/logprob_abs_diff",
)


@pytest.mark.parametrize("run", RUNS)
def test_equals_a_single_process(world, counts, run):
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


@pytest.mark.parametrize("run", [run for run in RUNS if "dp2" not in run])
def test_ranks_of_a_replica_do_the_work_of_one(world, counts, run):
    """No frame is decoded or encoded, no token read twice because there are more ranks.

    SFT trains the tower. In GRPO it is frozen: a video's first pass in the first step is its last.
    """
    kind = run.split("-")[0]
    for ours, expected in zip(metrics(world, run), metrics(world, f"{kind}-alone"), strict=True):
        for name in ("frames/decoded", "frames/encoded", "tokens/vision", "tokens/llm_forward"):
            assert ours[name] == expected[name], name
    first = metrics(world, run)[0]
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


def test_each_response_is_scored_and_each_reasoning_written_once(counts):
    """By one rank of its replica: 3 steps of 4 prompts with 4 responses each, and of 5 rows."""
    for size, degrees in DEGREES.items():
        for name in degrees:
            scores, reasonings = zip(*(rank[name] for rank in counts[size]), strict=True)
            assert sum(scores) == 48 and max(scores) < 48
            assert sum(reasonings) == 15


def test_rollouts_are_the_same_text(world, counts):
    """Sampling depends on the seed, the step and the row, not on who samples."""
    for step in (1, 2, 3):
        texts = [
            (world / "runs" / run / "rollouts" / f"step_{step:06d}.jsonl").read_text()
            for run in ("grpo-alone", *(run for run in RUNS if run.startswith("grpo")))
        ]
        assert len({text.count('"text"') for text in texts}) == 1
        strip = [[line.split('"reward"')[0] for line in copy.copy(text).splitlines()] for text in texts]
        assert all(each == strip[0] for each in strip)
