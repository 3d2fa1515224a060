"""`megavila eval`: accuracy of a checkpoint on rows."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from megavila.cli.settings import ConfigFile, Data, Model, Overrides, load_settings
from megavila.config import EvalConfig
from megavila.evaluation.answering import open_answerer
from megavila.evaluation.evaluate import score_rows
from megavila.evaluation.result import EvalResult


def evaluate_command(
    overrides: Overrides = None, model: Model = None, data: Data = None, config: ConfigFile = None
) -> None:
    """Accuracy of a checkpoint, overall and by category, at one or several numbers of frames.

    Example: megavila eval --model runs/demo/grpo/hf --data runs/demo/data/eval.jsonl num_frames=[8,16,32] output=scores

    Runs under torchrun too: torchrun --nproc-per-node N -m megavila eval …
    """
    settings = load_settings(EvalConfig, config, model, data, overrides)
    with open_answerer(settings) as answerer:
        rows = answerer.rows()
        for frames in settings.num_frames or (None,):
            result = score_rows(answerer, rows, num_frames=frames, blank=settings.blank_frames)
            if not answerer.topology.is_main:
                continue
            if settings.output is not None:
                result.save(Path(settings.output), "scores" if frames is None else f"scores_{frames}_frames")
            _print(frames, result)


def _print(frames: int | None, result: EvalResult) -> None:
    letter, share = result.always_one_letter
    table = Table(
        "category", "questions", "accuracy (%)", title=None if frames is None else f"{frames} frames"
    )
    counts = result.counts_by_category()
    for name, value in result.by_category().items():
        table.add_row(name or "(none)", str(counts[name]), f"{100 * value:.1f}")
    table.add_section()
    table.add_row(
        "all",
        str(len(result.predictions)),
        f"{100 * result.accuracy:.1f} ± {100 * result.standard_error:.1f}",
    )
    table.add_row("well-formed", "", f"{100 * result.format_rate:.1f}")
    table.add_row("chance", "", f"{100 * result.chance:.1f}")
    table.add_row(f"always {letter}", "", f"{100 * share:.1f}")
    if result.skipped:
        table.add_row("skipped (unreadable media)", str(result.skipped), "")
    Console().print(table)
