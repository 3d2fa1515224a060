"""`megavila video`: what a file holds, and what a model would see of it."""

from pathlib import Path
from typing import Annotated

import typer

from megavila.media import load_frames, probe, sample_video

app = typer.Typer(help="Look into video files.", no_args_is_help=True)


@app.command("info")
def info(path: Annotated[Path, typer.Argument(help="Video file.")]) -> None:
    """Frames, duration, codec and random-access points, from the index alone (nothing is decoded)."""
    index = probe(path)
    for name, value in (
        ("codec", index.codec),
        ("size", f"{index.width}x{index.height}, rotated by {index.rotation} degrees"),
        ("frames", index.num_frames),
        ("duration", f"{index.duration:.3f} s"),
        ("random-access points", len(index.random_access)),
        ("truncated", "yes" if index.truncated else "no"),
    ):
        print(f"{name:>22}  {value}")


@app.command("strip")
def strip(
    path: Annotated[Path, typer.Argument(help="Video file.")],
    out: Annotated[Path, typer.Option(help="PNG to write.")],
    num_frames: Annotated[
        int | None, typer.Option(help="Frames, uniform over the video (24 unless --fps).")
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second.")] = None,
    max_frames: Annotated[int | None, typer.Option(help="Most frames when sampling by --fps.")] = None,
    size: Annotated[int, typer.Option(help="Height and width of a frame, as the model's image size.")] = 112,
) -> None:
    """Write the frames that a model would be shown, with their times, as one picture."""
    from megavila.demo.plots import film_strip

    if num_frames is None and fps is None:
        num_frames = 24
    video = sample_video(path, num_frames=num_frames, fps=fps, max_frames=max_frames)
    film_strip(load_frames(video, (size, size)).numpy(), video.timestamps, out)
    print(f"{video.num_frames} frames -> {out}")
