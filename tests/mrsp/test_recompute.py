"""Recomputed layers give the same gradients, and with keep_attention no attention is computed twice."""

from typing import Any

import pytest
import torch
from megavila_kernels.interval_attention.torch_backend import TorchBackend
from torch.autograd.graph import save_on_cpu

from megavila.config import LanguageConfig, ModelConfig
from megavila.config.section import ConfigError
from megavila.models import language as language_module
from megavila.mrsp import context_parallel
from megavila.mrsp.attention import LocalAttention
from megavila.mrsp.layout import build_layout
from megavila.mrsp.logprobs import response_logprobs
from megavila.runtime.topology import Topology
from tests.mrsp.steps import build, encode, make_step, run

LAYERS = 2


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each forward pass of the kernel."""
    calls: list[int] = []
    forward = TorchBackend.forward

    def counted(self: TorchBackend, q: torch.Tensor, *rest: Any) -> Any:
        calls.append(len(q))
        return forward(self, q, *rest)

    monkeypatch.setattr(TorchBackend, "forward", counted)
    return calls


@pytest.mark.parametrize(("recompute", "times"), [("none", 1), ("full", 2), ("keep_attention", 1)])
def test_gradients_and_work(recompute: str, times: int, topology: Topology, forwards: list[int]) -> None:
    step = make_step("mixed")
    logprobs, grads = run(build(topology, "float64"), step, "shared_prefix")
    forwards.clear()
    again, recomputed = run(build(topology, "float64", recompute), step, "shared_prefix")
    assert len(forwards) == LAYERS * times
    assert torch.equal(again, logprobs)
    for name, grad in grads.items():
        torch.testing.assert_close(recomputed[name], grad, rtol=1e-12, atol=1e-14)


def test_nothing_stays_behind(topology: Topology, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass without gradient keeps no results, and a backward pass leaves none."""
    made: list[LocalAttention] = []

    def remembered(*arguments: Any) -> LocalAttention:
        made.append(LocalAttention(*arguments))
        return made[-1]

    monkeypatch.setattr(context_parallel, "LocalAttention", remembered)
    model, step = build(topology, "float64", "keep_attention"), make_step("odd")
    layout = build_layout(step.groups)
    with torch.no_grad():
        response_logprobs(model, layout, encode(model, step))
    logprobs = response_logprobs(model, layout, encode(model, step))
    without, with_gradient = made
    assert without.kept is None
    assert with_gradient.kept is not None and sorted(with_gradient.kept) == list(range(LAYERS))
    logprobs.sum().backward()
    assert with_gradient.kept == {}


def test_offloaded_are_the_layers_inputs_and_nothing_else_of_them(
    topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[tuple[int, ...]] = []

    class Counted(save_on_cpu):
        def __init__(self, pin_memory: bool) -> None:
            super().__init__(pin_memory)
            pack = self.pack_hook

            def counted(tensor: torch.Tensor) -> Any:
                moved.append(tuple(tensor.shape))
                return pack(tensor)

            self.pack_hook = counted

    monkeypatch.setattr(language_module, "save_on_cpu", Counted)
    step = make_step("mixed")
    expected = run(build(topology, "float64"), step, "shared_prefix")
    logprobs, grads = run(build(topology, "float64", "full", offload=True), step, "shared_prefix")
    assert torch.equal(logprobs, expected[0])
    for name, grad in expected[1].items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-12, atol=1e-14)
    inputs = (build_layout(step.groups).num_tokens, 1, 32)
    # Of the final norm its input, the rows' scales and the weight.
    assert moved[:LAYERS] == [inputs] * LAYERS and len(moved) <= LAYERS + 3


def test_what_cannot_be_recomputed_is_refused() -> None:
    language = LanguageConfig(hidden_size=8, num_layers=1, num_heads=1, ffn_hidden_size=8)
    with pytest.raises(ConfigError, match="offload_activations needs recompute full, not none"):
        ModelConfig(language=language, offload_activations=True)
    with pytest.raises(ConfigError, match="keep_attention needs an attention_backend"):
        ModelConfig(language=language, recompute="keep_attention", attention_backend="reference")
