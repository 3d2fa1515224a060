"""A whole SFT run, from its config to an exported model."""

from pathlib import Path

from megavila.config import SftRunConfig
from megavila.data.targets import ReasoningHook
from megavila.sft.trainer import SftTrainer
from megavila.training.augment import RowTransform
from megavila.training.loop import Evaluate, run
from megavila.training.session import open_session


def run_sft(
    config: SftRunConfig,
    *,
    transform: RowTransform | None = None,
    rewrite: ReasoningHook | None = None,
    evaluate: Evaluate | None = None,
) -> Path:
    """Train as configured and return the directory of the exported model, ``<run>/hf``.

    Args:
        transform: changes rows as they are drawn, to other numbers of frames for example.
        rewrite: supplies the reasoning that the frames shown support.
        evaluate: called every ``run.eval_every`` steps with the session and the step.
    """
    # A prompt needs room for a target beside it; how long that one is, is known only when it is written.
    with open_session(
        config, max_prompt_tokens=config.sft.max_tokens_per_microbatch - 1, transform=transform
    ) as session:
        return run(session, SftTrainer(session, rewrite), evaluate)
