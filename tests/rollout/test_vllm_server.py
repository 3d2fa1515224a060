"""A vLLM in a process of its own: the same groups as from one in this process, and what happens when it is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megavila.config import ConfigError, RolloutConfig
from megavila.rollout.protocol import RolloutError, SamplingParams
from megavila.rollout.recovery import EngineFailed
from megavila.rollout.vllm_host import pack_weights
from megavila.rollout.vllm_limits import check_server
from megavila.rollout.weights import WeightTransferError, language_weights
from megavila.runtime.topology import shutdown
from tests.models.hf_reference import start
from tests.rollout import vllm_cases as cases
from tests.rollout.engine_fakes import Pieces, make_prompt
from tests.rollout.test_vllm_engine import needs_vllm

SECONDS = 120.0


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    from megavila.rollout.vllm import VllmEngine

    topology = start()
    # Its output layer is its embedding, and its heads have norms.
    model = cases.text_model(cases.CASES[3], topology)
    options: dict[str, Any] = {"max_tokens": cases.MAX_TOKENS, "kv_cache_gib": 0.05}
    with VllmEngine(
        model, Pieces(), topology, **options, timeout_seconds=SECONDS, placement="server"
    ) as engine:
        engine.update_weights()
        yield engine
    assert not engine_processes()
    shutdown()


def engine_processes() -> list[Any]:
    import multiprocessing

    return [process for process in multiprocessing.active_children() if process.name == "megavila-vllm"]


@pytest.fixture(scope="module")
def undisturbed(engine: Any) -> list[Any]:
    return cases.rollout(engine)


@needs_vllm
def test_groups_are_those_of_a_colocated_engine(engine: Any, undisturbed: list[Any]) -> None:
    from megavila.rollout.vllm import VllmEngine

    with VllmEngine(
        engine.model, Pieces(), engine.topology, max_tokens=cases.MAX_TOKENS, kv_cache_gib=0.05
    ) as colocated:
        colocated.update_weights()
        colocated.take_counts()
        engine.take_counts()
        cases.check_same(cases.rollout(colocated), undisturbed)
        cases.check_same(cases.rollout(engine), undisturbed)
        theirs = colocated.take_counts()
    ours = engine.take_counts()
    # This engine was asked before, so it has read the prompts already.
    assert (
        ours.decode_tokens == theirs.decode_tokens and ours.reused_prompt_tokens > theirs.reused_prompt_tokens
    )
    total = theirs.prefill_tokens + theirs.reused_prompt_tokens
    assert ours.prefill_tokens + ours.reused_prompt_tokens == total


@needs_vllm
def test_decoders_agree_before_and_after_updates(engine: Any) -> None:
    prompts, rows, seeds = cases.text_requests()
    saved = {name: tensor.clone() for name, tensor in engine.model.state_dict().items() if tensor is not None}
    process = engine._host.process.pid
    for step in range(2):
        assert cases.compare(engine, prompts, rows, seeds) < cases.TOLERANCE
        cases.shake(engine.model, step)
        version = engine.weight_version
        engine.update_weights()
        assert engine.weight_version == version + 1
    assert cases.compare(engine, prompts, rows, seeds) < cases.TOLERANCE
    engine.model.load_state_dict(saved, strict=False)
    engine.update_weights()
    assert engine._host.process.pid == process and engine.restarts == 0


def at_answer(monkeypatch: pytest.MonkeyPatch, engine: Any, number: int, action: Callable[[], None]) -> None:
    """Let `action` happen before the answer of this number is read."""
    host, answers = engine._host, []
    answer = host._answer

    def acting(seconds: float | None) -> Any:
        answers.append(1)
        if len(answers) == number:
            action()
        return answer(seconds)

    monkeypatch.setattr(host, "_answer", acting)


@needs_vllm
def test_a_process_that_is_killed_in_a_rollout_loses_no_group(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, rows, seeds = cases.text_requests()
    # This one has room for 3 tokens, so its group comes long before the others.
    early, own = make_prompt(cases.MAX_TOKENS - 3, seed=5)
    prompts, rows, seeds = [*prompts, early], [*rows, own], [*seeds, 5]
    params = SamplingParams(max_tokens=150, group_size=2)
    expected = engine.generate(prompts, rows, params, seeds)
    pid, restarts, sizes = engine._host.process.pid, engine.restarts, []
    attempt = engine._attempt

    def recorded(prompts: Any, *rest: Any) -> Any:
        sizes.append(len(prompts))
        return attempt(prompts, *rest)

    monkeypatch.setattr(engine, "_attempt", recorded)
    engine.take_counts()
    # The first answer is the early group.
    at_answer(monkeypatch, engine, 2, lambda: os.kill(pid, signal.SIGKILL))
    cases.check_same(engine.generate(prompts, rows, params, seeds), expected)
    assert sizes == [5, 1, 4]  # all, the probe of the new process's weights, those that were left
    assert engine.restarts == restarts + 1 and engine._host.process.pid != pid
    assert [process.pid for process in engine_processes()] == [engine._host.process.pid]
    assert engine.take_counts().failures == 1


@needs_vllm
@pytest.mark.parametrize("tokens", [33, 690], ids=["before its answer", "before it has read the prompts"])
def test_a_process_that_hangs_is_killed(engine: Any, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    made = [make_prompt(tokens, seed=seed) for seed in range(4)]  # 690 tokens each are more than a pipe holds
    request = [prompt for prompt, _ in made], [rows for _, rows in made], cases.PARAMS, list(range(4))
    expected = engine.generate(*request)
    pid, restarts = engine._host.process.pid, engine.restarts
    monkeypatch.setattr(engine, "_timeout", 0.5)
    monkeypatch.setattr(engine._host, "_timeout", 1.0)
    os.kill(pid, signal.SIGSTOP)

    def patient() -> Any:
        """The next process may take its time to start."""
        monkeypatch.setattr(engine, "_timeout", SECONDS)
        return open_host()

    open_host = engine._open_host
    monkeypatch.setattr(engine, "_open_host", patient)
    cases.check_same(engine.generate(*request), expected)
    assert engine.restarts == restarts + 1 and engine._host.process.pid != pid


@needs_vllm
def test_a_prompt_that_the_process_cannot_do_with_is_named(
    engine: Any, undisturbed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    embed, pid = engine._embed, engine._host.process.pid

    def halved(prompt: Any, rows: Any) -> torch.Tensor:
        found = embed(prompt, rows)
        return found[:, :32].contiguous() if prompt.row.problem_id == "fake-33" else found

    monkeypatch.setattr(engine, "_embed", halved)
    with pytest.raises(EngineFailed, match=r"failed 3 times on 1 of 4 prompts \(fake-33\): RemoteFailure: "):
        cases.rollout(engine)
    monkeypatch.undo()
    cases.check_same(cases.rollout(engine), undisturbed)
    assert engine._host.process.pid == pid


@needs_vllm
def test_weights_reach_a_process_that_has_died(engine: Any, undisturbed: list[Any]) -> None:
    restarts = engine.restarts
    os.kill(engine._host.process.pid, signal.SIGKILL)
    engine._host.process.join()
    engine.take_counts()
    engine.update_weights()
    assert engine.restarts == restarts + 1
    cases.check_same(cases.rollout(engine), undisturbed)


@needs_vllm
def test_a_transfer_that_breaks_off_ends_the_engine(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last test that uses this engine."""
    import megavila.rollout.vllm as module

    name = "model.layers.1.self_attn.q_proj.weight"
    monkeypatch.setattr(
        module, "language_weights", lambda model: (w for w in language_weights(model) if w[0] != name)
    )
    with pytest.raises(WeightTransferError, match=f"did not come, first {name}"):
        engine.update_weights()
    monkeypatch.undo()
    with pytest.raises(EngineFailed, match="lost its weights in a transfer that broke off"):
        cases.rollout(engine)


def test_weights_are_packed_block_by_block() -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = {"a": (3, 5), "b": (7,), "c": (30, 4), "d": (), "e": (1, 1)}
    weights = {
        name: torch.randn(shape, generator=generator).to(torch.bfloat16 if name in "bd" else torch.float32)
        for name, shape in shapes.items()
    }
    block = memoryview(bytearray(480))  # c alone
    found, blocks = {}, []
    for tensors in pack_weights(weights.items(), block):
        blocks.append([name for name, *_ in tensors])
        for name, dtype, shape, offset in tensors:
            kind = getattr(torch, dtype)
            count = torch.Size(shape).numel()
            found[name] = torch.frombuffer(block, dtype=kind, count=count, offset=offset).view(shape).clone()
            assert offset % 64 == 0
    assert blocks == [["a", "b"], ["c"], ["d", "e"]]
    for name, tensor in weights.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype


def test_what_a_server_cannot_do_is_refused() -> None:
    with pytest.raises(
        RolloutError, match="parallel.tensor_parallel is 2: .* use rollout.placement=colocated"
    ):
        check_server(2, torch.device("cpu"))
    with pytest.raises(RolloutError, match="the model is on cuda"):
        check_server(1, torch.device("cuda"))
    with pytest.raises(ConfigError, match="placement is server and engine is megatron"):
        RolloutConfig(placement="server")
