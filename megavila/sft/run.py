"""A whole SFT run, from its config to an exported model."""

from pathlib import Path

from megavila.config import SftRunConfig
from megavila.evaluation.periodic import evaluate_session
from megavila.media import FrameCache
from megavila.runtime.plugins import load_function
from megavila.sft.trainer import SftTrainer
from megavila.training.loop import Evaluate, run
from megavila.training.session import open_session


def run_sft(
    config: SftRunConfig, *, frames: FrameCache | None = None, evaluate: Evaluate | None = None
) -> Path:
    """Train as configured and return the directory of the exported model, ``<run>/hf``.

    Args:
        frames: decoded frames to go on from, where several runs in one process read the same videos.
        evaluate: called every ``run.eval_every`` steps with the session and the step; scores `data.eval` by
            default.

    Raises:
        Interrupted: SIGTERM or SIGINT arrived; the run is saved and goes on with run.resume=auto.
    """
    rewrite = None if config.sft.reasoning is None else load_function(config.sft.reasoning)
    # A prompt needs room for a target beside it; how long that one is, is known only when it is written.
    with open_session(
        config, max_prompt_tokens=config.sft.max_tokens_per_microbatch - 1, frames=frames
    ) as session:
        return run(session, SftTrainer(session, rewrite), evaluate or evaluate_session)
