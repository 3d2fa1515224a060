"""The step loop that SFT and GRPO share: resume, metrics, checkpoints, progress, a clean stop."""

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from megavila.models import save_hf
from megavila.runtime.collectives import barrier
from megavila.runtime.logging import get_logger
from megavila.runtime.platform import cpu_peak_memory_gib
from megavila.runtime.progress import Progress
from megavila.training import state as training_state
from megavila.training.errors import Interrupted, ResumeError
from megavila.training.session import Session
from megavila.training.signals import StopRequest
from megavila.training.state import TrainState
from megavila.training.throughput import throughput

logger = get_logger(__name__)

EXPORT = "hf"


class Trainer(Protocol):
    """One algorithm on a session."""

    label: str
    headline: tuple[str, ...]
    """Metrics worth a place beside the progress bar."""
    reference: str
    """Fingerprint of the reference weights, empty where there are none."""

    def train_step(self, step: int) -> Mapping[str, float]:
        """Do step ``step``, counted from 1, and return its metrics. Called by all ranks together."""
        ...


Evaluate = Callable[[Session, int], Mapping[str, float]]


def run(session: Session, trainer: Trainer, evaluate: Evaluate) -> Path:
    """Train to the configured number of steps and return the directory of the exported model.

    Args:
        evaluate: called by all ranks with the session and the step, every ``run.eval_every`` steps; its
            numbers join the step's metrics.

    Raises:
        Interrupted: SIGTERM or SIGINT arrived; a checkpoint of the last finished step was written.
    """
    config, total = session.config, session.config.run.steps
    state = _resume(session, trainer)
    progress = Progress(trainer.label, total, enabled=session.topology.is_main, completed=state.step)
    with StopRequest(session.topology) as stop, progress:
        while state.step < total:
            step = state.step + 1
            with session.timers("time/step"):
                metrics = dict(trainer.train_step(step))
            state.step = step
            if config.run.eval_every and step % config.run.eval_every == 0:
                metrics |= evaluate(session, step)
            _record(session, state, metrics)
            progress.advance(text=_headline(trainer, metrics) if step % config.run.log_every == 0 else "")
            number = stop.asked()
            due = config.checkpoint.every > 0 and step % config.checkpoint.every == 0
            if number or due or (step == total and config.checkpoint.save_final):
                with session.timers("time/checkpoint"):
                    training_state.save(
                        session.checkpoints, state, session.model, session.optimizer, session.prompts
                    )
            if number and step < total:
                raise Interrupted(number, step)
    session.metrics.close()
    return export(session)


def _resume(session: Session, trainer: Trainer) -> TrainState:
    """Restore the checkpoint that ``run.resume`` means, or start anew."""
    resume, checkpoints = session.config.run.resume, session.checkpoints
    if resume == "never":
        existing = checkpoints.latest()
        if existing is not None:
            raise ResumeError(
                f"run.resume is never, but the run has a checkpoint already ({existing}); choose another "
                f"run.name, delete {checkpoints.directory} or use run.resume=auto"
            )
        found = None
    else:
        found = checkpoints.load(resume if resume == "auto" else Path(resume))
    if found is None:
        session.metrics.rewind(0)
        session.state.reference = trainer.reference
        return session.state
    state = training_state.restore(found, session.model, session.optimizer, session.prompts)
    if state.reference != trainer.reference:
        raise ResumeError(
            f"the reference model has changed since {found.path} was written: start from the same model.path "
            "and checkpoint.init_from, and the same model.train_* and grpo.kl_beta, as the run did"
        )
    session.metrics.rewind(state.step)
    logger.info("going on from %s", found.path)
    vars(session.state).update(vars(state))
    return session.state


def _record(session: Session, state: TrainState, metrics: dict[str, float]) -> None:
    """Write the step's metrics, with counters, times and memory."""
    metrics["train/updates"] = state.updates
    metrics["train/rows"] = state.rows
    metrics["data/skipped_rows"] = session.skipped_rows
    seconds = session.timers.pop()
    metrics = throughput(metrics, seconds["time/step"], session.topology, session.platform) | seconds
    metrics["memory/cpu_peak_gib"] = cpu_peak_memory_gib()
    if session.platform.name == "cuda":
        metrics["memory/gpu_peak_gib"] = session.platform.peak_memory_gib()
    session.metrics.write(state.step, metrics)


def _headline(trainer: Trainer, metrics: Mapping[str, float]) -> str:
    parts = []
    for name in trainer.headline:
        value = metrics.get(name, math.nan)
        parts.append(f"{name.split('/')[-1]} {value:.4g}")
    return "  ".join(parts)


def export(session: Session) -> Path:
    """Write the model in its family's checkpoint layout to ``<run>/hf`` and return that directory."""
    directory = session.directory / EXPORT
    if session.topology.is_main and directory.exists():
        shutil.rmtree(directory)
    barrier(session.topology.world_group)
    save_hf(session.model, directory, session.tokenizer.directory)
    return directory
