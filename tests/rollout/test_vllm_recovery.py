"""A vLLM engine that is really broken in the middle of a rollout: no group is lost, and none is another one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from megavila.rollout.recovery import EngineFailed
from megavila.runtime.topology import shutdown
from tests.models.hf_reference import start
from tests.rollout import vllm_cases as cases
from tests.rollout.engine_fakes import Pieces
from tests.rollout.test_vllm_engine import needs_vllm

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    from megavila.rollout.vllm import VllmEngine

    topology = start()
    model = cases.text_model(cases.CASES[0], topology)
    with VllmEngine(
        model, Pieces(), topology, max_tokens=cases.MAX_TOKENS, kv_cache_gib=0.05, timeout_seconds=0.5
    ) as engine:
        engine.update_weights()
        yield engine
    shutdown()


@pytest.fixture(scope="module")
def undisturbed(engine: Any) -> list[Any]:
    return cases.rollout(engine)


def core(engine: Any) -> Any:
    """vLLM's scheduler and workers, in this process."""
    return engine._host.llm.llm_engine.engine_core.engine_core


def break_at(
    monkeypatch: pytest.MonkeyPatch, engine: Any, call: int, action: Callable[[], None]
) -> list[int]:
    """Let `action` happen inside of the engine's `call`-th forward pass; returns the list of calls."""
    executor, calls = core(engine).model_executor, []
    execute = executor.execute_model

    def breaking(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == call:
            action()
        return execute(*args, **kwargs)

    monkeypatch.setattr(executor, "execute_model", breaking)
    return calls


def test_a_step_that_raises_loses_no_group(
    engine: Any, undisturbed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise MemoryError("no memory for this step")

    engine.take_counts()
    calls = break_at(monkeypatch, engine, 5, fail)
    cases.check_same(cases.rollout(engine), undisturbed)
    assert len(calls) > 5 + 12 and engine.restarts == 0
    counts = engine.take_counts()
    # What was computed before the failure is counted too.
    assert counts.failures == 1 and counts.decode_tokens > 0
    prompt_tokens = 3 * sum(tokens for tokens, _ in cases.LENGTHS)
    assert prompt_tokens < counts.prefill_tokens + counts.reused_prompt_tokens <= 2 * prompt_tokens


def test_a_core_that_is_shut_down_is_started_again(
    engine: Any, undisturbed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    version, old = engine.weight_version, core(engine)
    break_at(monkeypatch, engine, 4, lambda: old.model_executor.shutdown())
    cases.check_same(cases.rollout(engine), undisturbed)
    assert engine.restarts == 1 and core(engine) is not old and engine.weight_version == version
    prompts, rows, seeds = cases.text_requests()
    assert cases.compare(engine, prompts, rows, seeds) < cases.TOLERANCE


def test_a_prompt_that_the_engine_dies_of_is_named(
    engine: Any, undisturbed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    embed, restarts = engine._embed, engine.restarts

    def halved(prompt: Any, rows: Any) -> torch.Tensor:
        """One prompt's embeddings are too narrow for the model, which nobody sees before they are used."""
        found = embed(prompt, rows)
        return found[:, :32].contiguous() if prompt.row.problem_id == "fake-33" else found

    monkeypatch.setattr(engine, "_embed", halved)
    with pytest.raises(EngineFailed, match=r"failed 3 times on 1 of 4 prompts \(fake-33\): "):
        cases.rollout(engine)
    monkeypatch.undo()
    cases.check_same(cases.rollout(engine), undisturbed)
    assert engine.restarts == restarts


def test_a_request_that_dies_alone_is_sampled_again(
    engine: Any, undisturbed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM drops one of the requests in the middle, as it does when keys and values cannot be loaded."""

    def drop() -> None:
        scheduler = core(engine).scheduler
        victim = max(scheduler.running, key=lambda request: request.num_prompt_tokens)
        engine._host.llm.llm_engine.output_processor.request_states.pop(victim.request_id)
        scheduler.finish_requests([victim.request_id], victim.status.__class__.FINISHED_ERROR)

    break_at(monkeypatch, engine, 6, drop)
    cases.check_same(cases.rollout(engine), undisturbed)
    assert engine.take_counts().failures >= 1


def test_an_engine_that_stands_still_has_failed(
    engine: Any, undisturbed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm_engine, restarts = engine._host.llm.llm_engine, engine.restarts
    step = llm_engine.step

    def idle() -> list[Any]:
        """Nothing comes of the first try; after it was given up, all is as usual."""
        if engine._counts.failures:
            return step()
        time.sleep(0.01)
        return []

    engine.take_counts()
    monkeypatch.setattr(llm_engine, "step", idle)
    started = time.monotonic()
    cases.check_same(cases.rollout(engine), undisturbed)
    assert engine.take_counts().failures == 1 and time.monotonic() - started > engine._timeout
    assert engine.restarts == restarts


def test_weights_reach_an_engine_that_has_died(engine: Any) -> None:
    restarts = engine.restarts
    core(engine).model_executor.shutdown()
    cases.shake(engine.model, 9)
    engine.update_weights()
    assert engine.restarts == restarts + 1
    prompts, rows, seeds = cases.text_requests()
    assert cases.compare(engine, prompts, rows, seeds) < cases.TOLERANCE


def test_among_several_processes_a_dead_engine_is_the_end(engine: Any) -> None:
    """The last test that uses this engine: vLLM's groups are built by all processes together."""
    engine.topology, engine._host.restartable = replace(engine.topology, world_size=2), False
    core(engine).model_executor.shutdown()
    with pytest.raises(EngineFailed, match="in one of 2 processes it cannot be started again"):
        cases.rollout(engine)
    with pytest.raises(EngineFailed, match="lost its weights"):
        cases.rollout(engine)
