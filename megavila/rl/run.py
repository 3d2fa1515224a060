"""A whole GRPO run, from its config to an exported model."""

from pathlib import Path

from megavila.config import GrpoRunConfig
from megavila.evaluation.periodic import evaluate_session
from megavila.media import FrameCache
from megavila.rewards import Scorer
from megavila.rl.grpo import GrpoTrainer
from megavila.rollout.engines import open_engine
from megavila.runtime.errors import MegavilaError
from megavila.training.loop import Evaluate, run
from megavila.training.session import open_session


def run_grpo(
    config: GrpoRunConfig, *, frames: FrameCache | None = None, evaluate: Evaluate | None = None
) -> Path:
    """Train as configured and return the directory of the exported model, ``<run>/hf``.

    Args:
        frames: decoded frames to go on from, where several runs in one process read the same videos.
        evaluate: called every ``run.eval_every`` steps with the session and the step; scores `data.eval` by
            default.

    Raises:
        Interrupted: SIGTERM or SIGINT arrived; the run is saved and goes on with run.resume=auto.
    """
    budget, response = config.grpo.max_tokens_per_microbatch, config.rollout.max_response_tokens
    if budget <= response:
        raise MegavilaError(
            f"grpo.max_tokens_per_microbatch is {budget}, which leaves no room for a prompt beside a "
            f"response of rollout.max_response_tokens {response}; raise the first or lower the second"
        )
    with open_session(config, max_prompt_tokens=budget - response, frames=frames) as session:
        scorer = Scorer(config.reward)
        scorer.check(session.rows)
        with open_engine(
            config.rollout, session.model, session.tokenizer, session.topology, max_tokens=budget
        ) as engine:
            return run(session, GrpoTrainer(session, engine, scorer), evaluate or evaluate_session)
