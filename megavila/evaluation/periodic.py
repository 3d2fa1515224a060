"""Evaluation in the middle of training, on the model as it is."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from megavila.config import EvalConfig, GrpoRunConfig
from megavila.evaluation.answering import Answerer
from megavila.evaluation.evaluate import score_rows
from megavila.rollout.megatron import MegatronEngine

if TYPE_CHECKING:
    from megavila.training.session import Session


def evaluate_session(session: "Session", step: int) -> Mapping[str, float]:
    """Greedy accuracy on `data.eval`, overall and by category, as metrics; all ranks together.

    The model, its frames and its embeddings are the session's: nothing is loaded or decoded twice.
    Predictions go to `<run>/eval/step_000100.json` and `.predictions.jsonl`.
    """
    answerer = _answerer(session)
    with session.timers("time/eval"):
        result = score_rows(answerer, answerer.rows())
    if session.topology.is_main:
        result.save(session.directory / "eval", f"step_{step:06d}")
    metrics = {
        "eval/accuracy": result.accuracy,
        "eval/format": result.format_rate,
        "eval/skipped": result.skipped,
    }
    return metrics | {f"eval/accuracy/{name}": value for name, value in result.by_category().items() if name}


def _answerer(session: "Session") -> Answerer:
    config = session.config
    settings = {"model": session.model.config, "data": config.data, "parallel": config.parallel}
    settings |= {"seed": config.run.seed, "device": config.run.device}
    if isinstance(config, GrpoRunConfig):
        settings |= {
            "reward": config.reward,
            "max_response_tokens": config.rollout.max_response_tokens,
            "max_batch_tokens": config.rollout.max_batch_tokens,
        }
    evaluation = EvalConfig(**settings)
    return Answerer(
        evaluation,
        session.topology,
        session.tokenizer,
        session.model,
        MegatronEngine(
            session.model, session.tokenizer, session.topology, max_batch_tokens=evaluation.max_batch_tokens
        ),
        session.encoder.videos,
    )
