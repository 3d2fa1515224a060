"""Sampling against transformers' logits warpers and against observed frequencies."""

from __future__ import annotations

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megavila.rollout.protocol import RolloutError, SamplingParams
from megavila.rollout.sampling import draw, group_uniforms, restrict, sample, scale_logits


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (7, 1.0), (0, 0.9), (0, 0.01), (13, 0.6), (500, 0.5)]
)
def test_restriction_equals_transformers(temperature: float, top_k: int, top_p: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(9, 151) * 3
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    ours = restrict(scale_logits(logits, temperature), top_k, top_p)
    assert torch.equal(ours.isinf(), expected.isinf())
    torch.testing.assert_close(ours.softmax(-1), expected.softmax(-1))


def test_ties_with_the_kth_token_are_kept_as_in_transformers() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    assert torch.equal(restrict(logits, 2, 1.0), TopKLogitsWarper(2)(None, logits))


def test_draws_follow_the_distribution() -> None:
    torch.manual_seed(1)
    draws = 40_000
    logits = torch.randn(1, 23) * 1.5
    params = SamplingParams(max_tokens=1, temperature=0.8, top_k=17, top_p=0.9)
    uniforms = group_uniforms(5, 4, draws // 4).flatten()
    ids, _ = sample(logits.expand(draws, -1), uniforms, params)
    warped = TopPLogitsWarper(0.9)(
        None, TopKLogitsWarper(17)(None, TemperatureLogitsWarper(0.8)(None, logits))
    )
    expected = warped.softmax(-1)[0].double() * draws
    observed = torch.bincount(ids, minlength=23).double()
    kept = expected > 0
    assert observed[~kept].sum() == 0
    assert 4 < kept.sum() < 17
    chi_square = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    # 99.9 % quantile of chi-square is below 40 for 16 degrees of freedom and fewer.
    assert chi_square < 40


def test_logprobs_are_of_the_temperature_processed_full_softmax() -> None:
    torch.manual_seed(2)
    logits = torch.randn(64, 31)
    params = SamplingParams(max_tokens=1, temperature=0.7, top_k=3, top_p=0.5)
    ids, logprobs = sample(logits, torch.rand(64, dtype=torch.float64), params)
    expected = (logits.double() / 0.7).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-6)


def test_greedy_is_the_argmax_and_reports_plain_logprobs() -> None:
    torch.manual_seed(3)
    logits = torch.randn(8, 31)
    ids, logprobs = sample(
        logits, torch.rand(8, dtype=torch.float64), SamplingParams(max_tokens=1, temperature=0)
    )
    assert torch.equal(ids, logits.argmax(-1))
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).max(-1).values)


def test_uniforms_depend_on_seed_and_index_only() -> None:
    small, large = group_uniforms(7, 3, 5), group_uniforms(7, 8, 4000)
    assert torch.equal(small, large[:3, :5])
    assert not torch.equal(large[0, :5], large[1, :5])
    assert not torch.equal(group_uniforms(8, 3, 5), small)
    assert large.min() >= 0 and large.max() < 1
    state = torch.get_rng_state()
    group_uniforms(7, 3, 5)
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(4)
    logits, uniforms = torch.randn(17, 97), torch.rand(17, dtype=torch.float64)
    params = SamplingParams(max_tokens=1, top_p=0.8)
    together, _ = sample(logits, uniforms, params)
    alone = torch.cat([sample(logits[i : i + 1], uniforms[i : i + 1], params)[0] for i in range(17)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
def test_extreme_numbers_draw_tokens_that_can_be_drawn(uniform: float) -> None:
    logits = torch.full((1, 1000), float("-inf"))
    logits[0, [10, 500, 900]] = torch.tensor([0.3, -20.0, 0.1])
    token = int(draw(logits, torch.tensor([uniform], dtype=torch.float64)))
    assert token == (10 if uniform == 0 else 900)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("group_size", 0),
        ("stop", ("",)),
        ("stop", "end"),
    ],
)
def test_impossible_parameters_are_named(field: str, value: object) -> None:
    with pytest.raises(RolloutError, match=f"{field} is "):
        SamplingParams(**{"max_tokens": 4, field: value})  # type: ignore[arg-type]
