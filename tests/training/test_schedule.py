import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from megavila.training.schedule import ScheduleError, learning_rate


@pytest.mark.parametrize(
    ("name", "peer"),
    [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)],
)
def test_equals_transformers_after_warmup(name, peer):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    scheduler = peer(optimizer, num_warmup_steps=4, num_training_steps=17)
    for step in range(18):
        ours = learning_rate(step, peak=3e-4, total_steps=17, schedule=name, warmup_steps=4)
        # transformers starts its warm-up at a rate of zero, a wasted step; from the peak on the two are the
        # same.
        expected = 3e-4 * (step + 1) / 4 if step < 4 else scheduler.get_last_lr()[0]
        assert ours == pytest.approx(expected, rel=1e-9, abs=1e-18)
        optimizer.step()
        scheduler.step()


def test_minimum_and_constant():
    assert learning_rate(10, peak=1.0, total_steps=10, schedule="cosine", minimum=0.1) == pytest.approx(0.1)
    assert learning_rate(99, peak=1.0, total_steps=10, schedule="linear", minimum=0.1) == pytest.approx(0.1)
    assert learning_rate(9, peak=0.5, total_steps=10) == 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "cosin"}, "cosin"),
        ({"warmup_steps": 11}, "11 warm-up steps"),
        ({"minimum": 2.0}, "minimum"),
    ],
)
def test_rejects_contradictions(options, words):
    with pytest.raises(ScheduleError, match=words):
        learning_rate(0, peak=1.0, total_steps=10, **options)
