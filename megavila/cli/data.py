"""`megavila data`: making and checking rows."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from megavila.config import DataConfig
from megavila.config.load import build
from megavila.data import read_rows
from megavila.data.synth import DifficultyRange, SplitConfig, WorldConfig, synthesize
from megavila.media import MediaError, probe

app = typer.Typer(
    help="Make a world of videos with checkable questions, and check files of rows.", no_args_is_help=True
)


def _span(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    try:
        return int(low), int(high or low)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number or a range such as 2-4") from None


@app.command("synth")
def synth(
    out: Annotated[Path, typer.Option(help="Directory for <split>.jsonl and videos/<split>/*.mp4.")],
    split: Annotated[
        str, typer.Option(help="Name of the split; different names never share a video.")
    ] = "train",
    count: Annotated[int, typer.Option(help="Rows, one video each; the four categories take turns.")] = 100,
    events: Annotated[
        str, typer.Option(help="Swaps, flashes, turns or thefts in a video, such as 2-4.")
    ] = "2-4",
    decoys: Annotated[str, typer.Option(help="Happenings that change nothing.")] = "0-1",
    distractors: Annotated[str, typer.Option(help="Coloured bits drifting through the picture.")] = "0-2",
    event_seconds: Annotated[float, typer.Option(help="How long one event is visible.")] = 3.0,
    slack_seconds: Annotated[
        float, typer.Option(help="Most idle time added: longer videos, same story.")
    ] = 0.0,
    drift: Annotated[float, typer.Option(help="Camera drift in pixels.")] = 2.0,
    noise: Annotated[float, typer.Option(help="Sensor noise in grey levels.")] = 8.0,
    size: Annotated[int, typer.Option(help="Side of the square pictures in pixels.")] = 84,
    fps: Annotated[int, typer.Option(help="Frames per second.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the world.")] = 0,
    shuffle_options: Annotated[
        bool, typer.Option(help="Draw the order of the options anew for every row.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Processes; 0: one per core.")] = 0,
) -> None:
    """Render H.264 videos with questions, answers and truthful reasoning, in the paper's four categories."""
    difficulty = DifficultyRange(
        events=_span(events),
        decoys=_span(decoys),
        distractors=_span(distractors),
        slack_seconds=(0.0, slack_seconds),
        event_seconds=event_seconds,
        drift=drift,
        noise=noise,
    )
    world = WorldConfig(
        out_dir=out,
        splits=(SplitConfig(split, count, difficulty),),
        seed=seed,
        size=size,
        fps=fps,
        shuffle_options=shuffle_options,
        workers=workers,
    )
    for path in synthesize(world).values():
        print(path)


@app.command("check")
def check(
    files: Annotated[list[Path], typer.Argument(help="JSON Lines or parquet files of rows.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value of the data section, such as prompt_key=question."),
    ] = None,
) -> None:
    """Read every row and the index of every video, and report what cannot be used, by file and line."""
    values: dict[str, Any] = {"on_bad_row": "skip"}
    for item in settings or []:
        key, _, value = item.partition("=")
        values[key] = value
    config = build(DataConfig, values, "--set")
    table = Table("file", "rows", "malformed", "videos", "unreadable", "seconds of video")
    bad = 0
    for path in files:
        rows = read_rows(path, config)
        videos = sorted({video for row in rows.rows for video in row.videos})
        seconds, unreadable = 0.0, 0
        for video in videos:
            try:
                seconds += probe(video).duration
            except MediaError as error:
                unreadable += 1
                print(error)
        bad += rows.skipped + unreadable
        table.add_row(
            str(path),
            str(len(rows.rows)),
            str(rows.skipped),
            str(len(videos)),
            str(unreadable),
            f"{seconds:.0f}",
        )
    Console().print(table)
    if bad:
        raise typer.Exit(1)
