"""Sampling on over failures, with engines that fail on purpose."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import pytest

from megavila.rollout.protocol import RolloutError
from megavila.rollout.recovery import EngineFailed, sample_all


class Failing:
    """Answers index i with i squared. `plan` says, try by try, after how many results it raises; None: never.

    Indices in `deadly` are never answered: it raises there.
    """

    def __init__(self, plan: Sequence[int | None] = (), deadly: Sequence[int] = ()) -> None:
        self.plan, self.deadly = list(plan), deadly
        self.asked: list[list[int]] = []
        self.recovered = 0

    def sample(self, indices: Sequence[int]) -> Iterator[tuple[int, int]]:
        self.asked.append(list(indices))
        until = self.plan.pop(0) if self.plan else None
        for done, index in enumerate(reversed(indices)):  # in any order
            if done == until or index in self.deadly:
                raise OSError(f"died at {index}")
            yield index, index**2

    def recover(self) -> None:
        self.recovered += 1

    def run(self, count: int, retries: int = 2) -> list[int]:
        return sample_all([f"row{i}" for i in range(count)], self.sample, self.recover, retries=retries)


def test_what_was_done_is_kept_and_the_rest_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    engine = Failing([3, 0])
    with caplog.at_level(logging.WARNING, logger="megavila"):
        logging.getLogger("megavila").addHandler(caplog.handler)
        assert engine.run(5) == [0, 1, 4, 9, 16]
        logging.getLogger("megavila").removeHandler(caplog.handler)
    assert engine.asked == [[0, 1, 2, 3, 4], [0, 1], [0], [1]] and engine.recovered == 2
    assert "failed at try 1 of 3, with 3 of 5 prompts done: OSError: died at 1" in caplog.text


def test_without_failures_there_is_one_call() -> None:
    engine = Failing()
    assert engine.run(3) == [0, 1, 4] and engine.asked == [[0, 1, 2]] and engine.recovered == 0
    assert Failing().run(0) == []


@pytest.mark.parametrize("retries", [1, 2, 5])
def test_a_deadly_prompt_is_named_and_takes_no_other_with_it(retries: int) -> None:
    engine = Failing(deadly=[2])
    with pytest.raises(
        EngineFailed, match=rf"failed {retries + 1} times on 1 of 5 prompts \(row2\): OSError: died at 2"
    ):
        engine.run(5, retries)
    assert engine.recovered == retries + 1
    assert sorted(engine.asked[-3:]) == [[0], [1], [2]]  # the last time one by one


def test_without_retries_a_failure_is_final() -> None:
    engine = Failing([1])
    with pytest.raises(EngineFailed, match=r"failed 1 times on 2 of 3 prompts \(row0, row1\)"):
        engine.run(3, retries=0)
    assert engine.recovered == 1


def test_input_that_is_wrong_is_not_tried_again() -> None:
    calls = []

    def sample(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
        calls.append(indices)
        yield 0, 0
        raise RolloutError("no such thing")

    with pytest.raises(RolloutError, match="no such thing"):
        sample_all(["a", "b"], sample, lambda: pytest.fail("nothing to recover from"), retries=3)
    assert len(calls) == 1


def test_prompts_that_an_engine_forgets_are_asked_again() -> None:
    asked = []

    def sample(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
        asked.append(list(indices))
        yield from ((index, index) for index in indices[1:] or indices)

    assert sample_all(["a", "b", "c"], sample, lambda: None, retries=1) == [0, 1, 2]
    assert asked == [[0, 1, 2], [0]]
