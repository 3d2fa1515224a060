import numpy as np
import pytest
import torch

from megavila.rl.advantages import AdvantageError, group_advantages


@pytest.mark.parametrize("ddof", [0, 1])
def test_equals_equation_two_in_double_precision(ddof):
    rewards = torch.rand(7, 5, generator=torch.Generator().manual_seed(1))
    expected = rewards.double().numpy()
    expected = (expected - expected.mean(1, keepdims=True)) / (
        expected.std(1, keepdims=True, ddof=ddof) + 1e-4
    )
    got = group_advantages(rewards, ddof=ddof)
    np.testing.assert_allclose(got.values.numpy(), expected, rtol=2e-5, atol=1e-6)
    assert got.informative.all()


def test_groups_without_variance_get_exact_zeros():
    # The mean of eight times 0.1 is not 0.1 in fp32, so the bare formula would give advantages of about 1e-4.
    rewards = torch.tensor([[0.1] * 7, [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0], [1.0] * 7])
    got = group_advantages(rewards)
    assert got.informative.tolist() == [False, True, False]
    assert (got.values[[0, 2]] == 0).all()
    assert got.values[1, 1] > 0 > got.values[1, 0]


def test_scale_none_only_centres():
    rewards = torch.tensor([[0.0, 1.0, 0.25]])
    got = group_advantages(rewards, scale="none").values
    torch.testing.assert_close(got, rewards - rewards.mean())


@pytest.mark.parametrize(
    ("rewards", "options", "words"),
    [
        (torch.ones(3, 1), {}, "group_size"),
        (torch.ones(4), {}, "shape"),
        (torch.tensor([[0.0, float("nan")]]), {}, "response 1 in group 0"),
        (torch.rand(1, 2), {"scale": "batsh"}, "batsh"),
    ],
)
def test_rejects_what_has_no_advantages(rewards, options, words):
    with pytest.raises(AdvantageError, match=words):
        group_advantages(rewards, **options)
