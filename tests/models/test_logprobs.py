"""Chunked log-probabilities against a full softmax in fp64."""

import pytest
import torch

from megavila.models import token_logprobs
from megavila.runtime.errors import MegavilaError
from megavila.runtime.topology import Topology
from tests.models.tensor_parallel_cases import logprob_inputs, logprob_reference


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equals_full_softmax(chunk: int, temperature: float, topology: Topology) -> None:
    inputs = logprob_inputs()
    expected = logprob_reference(inputs, temperature)
    hidden = inputs.hidden.float().requires_grad_()
    weight = inputs.weight.float().requires_grad_()
    logprobs, entropy = token_logprobs(
        hidden,
        weight,
        inputs.targets,
        topology=topology,
        temperature=temperature,
        chunk=chunk,
        with_entropy=True,
    )
    assert entropy is not None
    ((logprobs * inputs.upstream[0]).sum() + (entropy * inputs.upstream[1]).sum()).backward()
    for ours, theirs in zip((logprobs, entropy, hidden.grad, weight.grad), expected, strict=True):
        assert ours is not None
        assert (ours.double() - theirs).norm() / theirs.norm() < 1e-5


@pytest.mark.parametrize("with_entropy", [True, False])
def test_fused_backend_equals_full_softmax(with_entropy: bool, topology: Topology) -> None:
    """The whole path on the Triton kernels, gradients included; in their interpreter without a GPU."""
    pytest.importorskip("triton")
    inputs = logprob_inputs()
    inputs.upstream[1] *= with_entropy
    expected = logprob_reference(inputs, 0.7)
    hidden = inputs.hidden.float().requires_grad_()
    weight = inputs.weight.float().requires_grad_()
    logprobs, entropy = token_logprobs(
        hidden,
        weight,
        inputs.targets,
        topology=topology,
        temperature=0.7,
        chunk=7,
        with_entropy=with_entropy,
        backend="triton",
    )
    loss = (logprobs * inputs.upstream[0]).sum()
    if entropy is not None:
        loss = loss + (entropy * inputs.upstream[1]).sum()
    loss.backward()
    actual = (logprobs, entropy, hidden.grad, weight.grad)
    for ours, theirs in zip(actual, expected, strict=True):
        if ours is not None:
            assert (ours.double() - theirs).norm() / theirs.norm() < 1e-5


def test_without_entropy_and_in_double_precision(topology: Topology) -> None:
    inputs = logprob_inputs()
    hidden, weight = inputs.hidden.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
    logprobs, entropy = token_logprobs(hidden, weight, inputs.targets, topology=topology, chunk=5)
    assert entropy is None and logprobs.dtype == torch.float64
    grads = torch.autograd.grad(logprobs, (hidden, weight), inputs.upstream[0].double())
    full = torch.log_softmax(hidden @ weight.T, -1).gather(1, inputs.targets[:, None]).squeeze(1)
    expected = torch.autograd.grad(full, (hidden, weight), inputs.upstream[0].double())
    torch.testing.assert_close(grads, expected)


def test_extreme_logits_stay_finite(topology: Topology) -> None:
    hidden = torch.tensor([[1e4, 0.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    logprobs, entropy = token_logprobs(
        hidden, weight, torch.tensor([1]), topology=topology, with_entropy=True
    )
    assert logprobs.item() == -2e4 and entropy is not None and entropy.item() == 0.0
    logprobs.sum().backward()
    assert hidden.grad is not None and torch.isfinite(hidden.grad).all()


def test_frozen_output_weight_gets_no_gradient(topology: Topology) -> None:
    inputs = logprob_inputs()
    hidden = inputs.hidden.float().requires_grad_()
    token_logprobs(hidden, inputs.weight.float(), inputs.targets, topology=topology)[0].sum().backward()
    assert hidden.grad is not None and hidden.grad.abs().sum() > 0


def test_errors(topology: Topology) -> None:
    hidden, weight = torch.randn(4, 3), torch.randn(5, 3)
    with pytest.raises(MegavilaError, match="target token 5 is outside"):
        token_logprobs(hidden, weight, torch.tensor([0, 1, 5, 2]), topology=topology)
    with pytest.raises(MegavilaError, match="4 hidden rows but 3 targets"):
        token_logprobs(hidden, weight, torch.tensor([0, 1, 2]), topology=topology)
    with pytest.raises(MegavilaError, match="temperature is 0"):
        token_logprobs(hidden, weight, torch.tensor([0, 1, 2, 3]), topology=topology, temperature=0)
    with pytest.raises(MegavilaError, match="backend is 'fast'"):
        token_logprobs(hidden, weight, torch.tensor([0, 1, 2, 3]), topology=topology, backend="fast")
    with pytest.raises(MegavilaError, match="chunk is 0"):
        token_logprobs(hidden, weight, torch.tensor([0, 1, 2, 3]), topology=topology, chunk=0)
