"""The fused output layer against the specification in fp64; in Triton's interpreter without a GPU."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from megavila_kernels.linear_logprob import interface, logit_gradients, vocab_partials  # noqa: E402
from megavila_kernels.linear_logprob.reference import (  # noqa: E402
    reference_logit_gradients,
    reference_vocab_partials,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_inputs(n: int, size: int, vocabulary: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, size, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, size, generator=generator, dtype=torch.float64) / size**0.5 * 3
    # Of a vocabulary three times this rank's part.
    target = torch.randint(-vocabulary, 2 * vocabulary, (n,), generator=generator)
    upstream = torch.randn(2, n, generator=generator, dtype=torch.float64)
    return [x.half().double().to(DEVICE) for x in (hidden, weight)] + [
        target.to(DEVICE),
        *upstream.to(DEVICE).unbind(),
    ]


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


CASES = [(1, 32, 17), (63, 60, 97), (111, 48, 1025)]


@pytest.mark.parametrize("n,size,vocabulary", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_statistics(
    n: int, size: int, vocabulary: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interface, "SPLIT", 384)  # several splits, the last one ragged
    hidden, weight, target, *_ = make_inputs(n, size, vocabulary)
    peak, sums = vocab_partials(hidden.to(dtype), weight.to(dtype), target, temperature=0.7)
    expected_peak, expected = reference_vocab_partials(hidden, weight, target, 0.7)
    # Products of fp16 numbers are exact in fp32: both dtypes must reach fp32's precision.
    assert error(peak, expected_peak) < 1e-6
    for a, e in zip(sums, expected, strict=True):
        assert error(a, e) < 2e-6 if e.any() else not a.any()


@pytest.mark.parametrize("n,size,vocabulary", CASES)
@pytest.mark.parametrize("with_entropy", [True, False])
def test_gradients(n: int, size: int, vocabulary: int, with_entropy: bool) -> None:
    hidden, weight, target, d_logprob, d_entropy = make_inputs(n, size, vocabulary)
    peak, sums = reference_vocab_partials(hidden, weight, target, 0.7)
    lse = peak + sums[0].log()
    entropy = lse - sums[2] / sums[0] if with_entropy else None
    upstream = (d_logprob, d_entropy if with_entropy else None)
    expected = reference_logit_gradients(hidden, weight, target, 0.7, lse, entropy, *upstream)
    actual = logit_gradients(
        hidden.float(),
        weight.float(),
        target,
        0.7,
        lse.float(),
        None if entropy is None else entropy.float(),
        d_logprob.float(),
        d_entropy.float() if with_entropy else None,
    )
    assert error(actual, expected) < 2e-6
    without_target = reference_logit_gradients(hidden, weight, target * 0 - 1, 0.7, lse, entropy, *upstream)
    if ((target >= 0) & (target < vocabulary)).any():
        assert error(without_target, expected) > 1e-2  # a forgotten onehot would be seen


def test_the_specification_is_autograd_of_log_softmax() -> None:
    hidden, weight, target, d_logprob, d_entropy = make_inputs(9, 8, 30)
    target = target % 30
    logits = (hidden @ weight.T).requires_grad_()
    log_p = torch.log_softmax(logits / 0.7, dim=1)
    logprob = log_p.gather(1, target[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p).sum(1)
    (expected,) = torch.autograd.grad([logprob, entropy], logits, [d_logprob, d_entropy])
    peak, sums = reference_vocab_partials(hidden, weight, target, 0.7)
    lse = peak + sums[0].log()
    torch.testing.assert_close(sums[1] - lse, logprob.detach())
    torch.testing.assert_close(lse - sums[2] / sums[0], entropy.detach())
    actual = reference_logit_gradients(
        hidden, weight, target, 0.7, lse, entropy.detach(), d_logprob, d_entropy
    )
    torch.testing.assert_close(actual, expected)


def test_mistakes_are_named() -> None:
    hidden, weight, target = torch.zeros(3, 8), torch.zeros(5, 8), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"got \(3, 8\) and \(5, 7\)"):
        vocab_partials(hidden, weight[:, :7], target, 1.0)
    with pytest.raises(ValueError, match=r"3 hidden rows but targets of shape \(2,\)"):
        vocab_partials(hidden, weight, target[:2], 1.0)
    with pytest.raises(ValueError, match="float64"):
        vocab_partials(hidden.double(), weight.double(), target, 1.0)
    with pytest.raises(ValueError, match=r"temperature \(0.0\) must be above 0"):
        vocab_partials(hidden, weight, target, 0.0)
