"""Frame-exact against plain PyAV decoding of the whole file."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from megavila.media import get_decoder, load_frames, probe, sample_video
from megavila.media.resize import resize_frame

REAL_FILES = ("nasa_13013.mp4", "h264_10bits.mp4", "h265_video.mp4", "av1_video.mkv")
SMALL = (36, 52)


Reference = Callable[..., tuple[list[int | None], torch.Tensor]]


def assert_exact(decode_everything: Reference, path: Path, stream: int | None = None) -> None:
    ticks, expected = decode_everything(path, stream)
    index = probe(path, stream)
    assert index.num_frames == len(expected)
    if index.timed:
        assert index.pts.tolist() == ticks
    rng = random.Random(7)
    everything = list(range(index.num_frames))
    scattered = [rng.sample(everything, k) for k in (1, 2, 9)]
    for workers, ids in ((2, everything), (1, scattered[0]), (1, scattered[1]), (3, scattered[2])):
        result = get_decoder(workers=workers).decode(str(path), index, ids, None)
        assert bool(result.valid.all()), (ids, result.errors)
        assert torch.equal(result.frames, expected[ids]), ids
        np.testing.assert_array_equal(result.pts.numpy(), index.pts_seconds[ids])


def test_encoded_clips(clip_file: Callable[[str], Path], clip: Any, decode_everything: Reference) -> None:
    path = clip_file(clip.name)
    assert_exact(decode_everything, path)
    index = probe(path)
    assert index.num_frames == clip.frames
    assert index.rotation % 360 == clip.rotation % 360


@pytest.mark.parametrize("name", REAL_FILES)
def test_real_files(videos_dir: Path, name: str, decode_everything: Reference) -> None:
    assert_exact(decode_everything, videos_dir / name)


def test_other_stream_of_a_real_file(videos_dir: Path, decode_everything: Reference) -> None:
    assert_exact(decode_everything, videos_dir / "nasa_13013.mp4", stream=0)


def test_timestamps_of_a_real_file(videos_dir: Path) -> None:
    """Against a listing made by another program (ffprobe)."""
    listing = json.loads((videos_dir / "nasa_13013.mp4.stream3.all_frames_info.json").read_text())
    expected = [float(frame["pts_time"]) for frame in listing]
    path = videos_dir / "nasa_13013.mp4"
    assert probe(path).stream == 3
    np.testing.assert_allclose(probe(path, stream=3).pts_seconds, expected, atol=1e-6)
    video = sample_video(path, num_frames=11, stream=3)
    np.testing.assert_allclose(video.timestamps, [expected[i] for i in video.frame_ids], atol=1e-6)


def test_open_gop_has_leading_frames(clip_file: Callable[[str], Path]) -> None:
    """The clip is what the open-GOP tests need: frames decoded after a random-access point but shown before it."""
    index = probe(clip_file("open_gop.mp4"))
    points = index.random_access
    assert len(points) > 3
    leading = [(index.positions > p) & (index.pts < index.packet_pts[p]) for p in points[1:]]
    assert sum(bool(mask.any()) for mask in leading) >= 3


def test_variable_rate_times(clip_file: Callable[[str], Path]) -> None:
    expected = [(i * i + 20 * i) / 1000 for i in range(40)]
    np.testing.assert_allclose(probe(clip_file("variable_rate.mkv")).pts_seconds, expected, atol=1e-9)


@pytest.mark.parametrize("name", ["open_gop.mp4", "rotated_90.mp4", "vp9.webm"])
def test_slices_are_the_whole(clip_file: Callable[[str], Path], name: str) -> None:
    path = clip_file(name)
    video = sample_video(path, num_frames=17)
    whole = load_frames(video, SMALL)
    assert whole.shape == (17, 3, *SMALL) and whole.dtype == torch.uint8
    for cuts in ([0, 17], [0, 5, 6, 6, 17], [0, 1, 9, 17]):
        parts = [load_frames(video, SMALL, a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
        assert torch.equal(torch.cat(parts), whole)


def test_a_slice_costs_a_slice(clip_file: Callable[[str], Path]) -> None:
    path = clip_file("closed_gop.mp4")
    index = probe(path)
    decoder = get_decoder()
    whole = decoder.decode(str(path), index, range(index.num_frames), SMALL).frames_decoded
    quarter = decoder.decode(str(path), index, range(48, 60), SMALL).frames_decoded
    assert whole == index.num_frames
    assert quarter == 12


def test_frames_nobody_refers_to_are_not_decoded(clip_file: Callable[[str], Path]) -> None:
    path = clip_file("open_gop.mp4")
    index = probe(path)
    result = get_decoder().decode(str(path), index, [11, 23, 35, 47], None)
    needed = sum(run_length for run_length in (12, 12, 12, 12))
    assert result.frames_decoded < 0.8 * needed


def bicubic_weights(source: int, target: int) -> np.ndarray:
    """(target, source) weights of the bicubic filter (a = -0.5), widened when shrinking; each row sums to 1."""
    scale = source / target
    stretch = max(scale, 1.0)
    weights = np.zeros((target, source))
    for place in range(target):
        centre = (place + 0.5) * scale
        first, stop = max(int(centre - 2 * stretch + 0.5), 0), min(int(centre + 2 * stretch + 0.5), source)
        x = np.abs(np.arange(first, stop) - centre + 0.5) / stretch
        near, far = (1.5 * x - 2.5) * x * x + 1, -0.5 * (((x - 5) * x + 8) * x - 4)
        row = np.where(x < 1, near, np.where(x < 2, far, 0.0))
        weights[place, first:stop] = row / row.sum()
    return weights


def fixed_point_pass(image: np.ndarray, size: int, axis: int, int16: bool) -> np.ndarray:
    """One pass of a resize in integers: weights of 22 fractional bits, or of as many as int16 holds."""
    if image.shape[axis] == size:
        return image
    weights, bits = bicubic_weights(image.shape[axis], size), 22
    if int16:
        bits = max(b for b in range(22) if int(0.5 + weights.max() * (1 << b)) < 1 << 15)
    scaled = weights * (1 << bits)
    rounded = np.trunc(scaled + np.where(weights < 0, -0.5, 0.5)).astype(np.int64)
    sums = np.moveaxis(np.tensordot(rounded, image.astype(np.int64), axes=([1], [axis])), 0, axis)
    return np.clip((sums + (1 << (bits - 1))) >> bits, 0, 255)


@pytest.mark.parametrize("size", [(28, 28), (448, 448), (31, 90), (93, 300)])
def test_resize_is_pillows_bicubic_with_16_bit_weights(size: tuple[int, int]) -> None:
    """The models' preprocessors resample with Pillow, whose filter weights have 22 fractional bits; torch keeps
    them in 16 bits and is otherwise the same to the bit, as integer models of both show.

    So a pixel between the two passes may be rounded to its neighbour, and the second pass, whose weights' absolute
    values sum to at most 1.5, may turn that into 2 grey levels: rarely, and never more.
    """
    coarse = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((121, 93), Image.Resampling.BILINEAR)
    pixels = np.array(image)
    ours = resize_frame(torch.from_numpy(pixels).permute(2, 0, 1), size)
    pillow = np.array(image.resize(size[::-1], Image.Resampling.BICUBIC))
    assert ours.dtype == torch.uint8 and ours.shape == (3, *size)
    for int16, result in ((True, ours.permute(1, 2, 0).numpy()), (False, pillow)):
        between = fixed_point_pass(pixels, size[1], 1, int16)
        assert np.array_equal(fixed_point_pass(between, size[0], 0, int16), result)
    assert np.abs(bicubic_weights(pixels.shape[0], size[0])).sum(1).max() < 1.5
    difference = np.abs(ours.permute(1, 2, 0).numpy().astype(int) - pillow)
    assert difference.max() <= 2 and (difference > 1).mean() < 1e-4 and (difference > 0).mean() < 0.01


def test_swscale_resampler(clip_file: Callable[[str], Path]) -> None:
    """FFmpeg's own resampling, applied before the frame is turned upright."""
    path = clip_file("rotated_90.mp4")
    ours = get_decoder("pyav_swscale").decode(str(path), probe(path), [0, 5], (100, 60)).frames
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    for row, frame in enumerate((frames[0], frames[5])):
        resized = frame.reformat(100, 60, format="rgb24", interpolation="BICUBIC").to_ndarray()
        assert np.array_equal(ours[row].permute(1, 2, 0).numpy(), np.rot90(resized))
