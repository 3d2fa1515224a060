"""Learning-rate schedules as a pure function of the step, so that resuming needs no state."""

import math

from megavila.runtime.errors import MegavilaError

SCHEDULES = ("constant", "linear", "cosine")


class ScheduleError(MegavilaError):
    """A learning-rate schedule that cannot be followed."""


def learning_rate(
    step: int,
    *,
    peak: float,
    total_steps: int,
    schedule: str = "constant",
    warmup_steps: int = 0,
    minimum: float = 0.0,
) -> float:
    """Return the learning rate of optimizer step ``step``, counted from 0.

    It rises linearly to ``peak`` over ``warmup_steps`` (the first step already moves: 1/warmup of the peak),
    then stays (``constant``) or falls to ``minimum`` at ``total_steps`` along a line or half a cosine.
    """
    if schedule not in SCHEDULES:
        raise ScheduleError(
            f"learning-rate schedule {schedule!r} is unknown; use one of {', '.join(SCHEDULES)}"
        )
    if not 0 <= warmup_steps <= total_steps:
        raise ScheduleError(f"{warmup_steps} warm-up steps do not fit into {total_steps} steps")
    if not 0.0 <= minimum <= peak:
        raise ScheduleError(f"the minimum learning rate {minimum} must lie between 0 and the peak {peak}")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    remaining = 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return minimum + (peak - minimum) * remaining
