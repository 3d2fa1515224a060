"""One optimizer step from accumulated gradients."""

from megavila.training.schedule import learning_rate
from megavila.training.session import Session
from megavila.training.tally import Tally


def apply_update(session: Session, tally: Tally) -> None:
    """Reduce the gradients over all ranks, clip them, step along the schedule and clear them."""
    options = session.config.optimizer
    rate = learning_rate(
        session.state.updates,
        peak=options.lr,
        total_steps=session.config.total_updates,
        schedule=options.schedule,
        warmup_steps=options.warmup_steps,
        minimum=options.min_lr,
    )
    session.gradients.reduce()
    norm = session.gradients.clip(options.clip_grad)
    session.optimizer.step(rate)
    session.gradients.zero()
    session.state.updates += 1
    tally.maximum("optimizer/lr", rate)
    tally.maximum("optimizer/grad_norm", norm)


def skip_update(session: Session, tally: Tally) -> None:
    """Pass over an update for which no rank has anything to learn from; the schedule moves on.

    Not the same as a step along a gradient of zero, in which Adam would still follow its momentum.
    """
    session.state.updates += 1
    if session.topology.data_rank == 0:
        tally.total("optimizer/skipped_updates", 1)
