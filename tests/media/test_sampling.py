"""Which frames are chosen."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megavila.media import MediaError, SampledVideo, fingerprint, probe, sample_video
from megavila.media.sampling import rate_ids, uniform_ids
from megavila.runtime.errors import MegavilaError


def test_uniform_is_vilas_rule() -> None:
    for total in (*range(1, 40), 75, 100, 119):
        for count in (*range(1, 45), 64, 99, 118, 130):
            ids = uniform_ids(total, count)
            assert len(ids) == min(total, count) == len(set(ids.tolist()))
            if 1 < count < total:
                assert ids.tolist() == [int(round(x)) for x in np.linspace(0, total - 1, count)]
                assert ids[0] == 0 and ids[-1] == total - 1
    assert uniform_ids(9, 1).tolist() == [4]


def test_rate(clip_file: Callable[[str], Path]) -> None:
    index = probe(clip_file("open_gop.mp4"))  # 75 frames at 25 a second: 3 s
    assert index.duration == pytest.approx(3.0)
    assert rate_ids(index, 1, 100).tolist() == [0, 25, 50]
    assert rate_ids(index, 5, 100).tolist() == list(range(0, 75, 5))
    assert rate_ids(index, 25, 100).tolist() == list(range(75))
    assert rate_ids(index, 60, 100).tolist() == list(range(75))  # each frame once
    assert rate_ids(index, 10, 100).tolist() == [i * 25 // 10 for i in range(30)]
    assert rate_ids(index, 25, 8).tolist() == uniform_ids(75, 8).tolist()
    assert rate_ids(index, 0.01, 8).tolist() == [0]


def test_rate_shows_what_was_on_show_in_a_variable_rate_video(clip_file: Callable[[str], Path]) -> None:
    index = probe(clip_file("variable_rate.mkv"))
    ids = rate_ids(index, 4, 100)
    shown = [max(i for i in range(40) if i * i + 20 * i <= 250 * k) for k in range(len(ids) + 5)]
    assert ids.tolist() == sorted(set(shown[: len(ids)]))
    times = index.pts_seconds
    assert times[ids[-1]] <= index.duration


def test_sample_keeps_times_and_is_a_value(clip_file: Callable[[str], Path]) -> None:
    path = clip_file("open_gop.mp4")
    video = sample_video(path, num_frames=4)
    assert video.frame_ids == (0, 25, 49, 74)
    assert video.timestamps == pytest.approx((0.0, 1.0, 1.96, 2.96))
    assert video.num_frames == 4 and video.duration == pytest.approx(3.0)
    assert pickle.loads(pickle.dumps(video)) == video
    assert hash(video) == hash(sample_video(str(path), num_frames=4))
    assert isinstance(video, SampledVideo)


def test_short_video_gives_each_frame_once(clip_file: Callable[[str], Path]) -> None:
    with pytest.warns(UserWarning, match="fewer frames"):
        video = sample_video(clip_file("mjpeg.avi"), num_frames=64)
    assert video.frame_ids == tuple(range(20))


def test_bad_requests(clip_file: Callable[[str], Path]) -> None:
    path = clip_file("mjpeg.avi")
    for request, message in (
        ({}, "not both or neither"),
        ({"num_frames": 3, "fps": 1.0}, "not both or neither"),
        ({"num_frames": 0}, "between 1 and 8192"),
        ({"num_frames": 9000}, "between 1 and 8192"),
        ({"fps": 0.0}, "positive"),
        ({"fps": 1.0, "max_frames": 8193}, "between 1 and 8192"),
        ({"num_frames": 3, "max_frames": 4}, "max_frames"),
    ):
        with pytest.raises(MegavilaError, match=message):
            sample_video(path, **request)


def test_copies_share_a_fingerprint(clip_file: Callable[[str], Path], tmp_path: Path) -> None:
    path = clip_file("mjpeg.avi")
    copy = tmp_path / "copy.avi"
    shutil.copy(path, copy)
    assert fingerprint(path) == fingerprint(copy)
    assert fingerprint(path, stream=0) != fingerprint(path)
    data = bytearray(copy.read_bytes())
    data[len(data) // 2] ^= 1
    copy.write_bytes(data)
    assert fingerprint(path) != fingerprint(copy)


def test_large_files_are_told_apart(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = rng.integers(0, 255, 17 * 2**20, dtype=np.uint8)
    (tmp_path / "a").write_bytes(data.tobytes())
    (tmp_path / "shorter").write_bytes(data[:-1].tobytes())
    data[-1] ^= 1
    (tmp_path / "b").write_bytes(data.tobytes())
    assert len({fingerprint(tmp_path / name) for name in ("a", "b", "shorter")}) == 3


def test_missing_file() -> None:
    with pytest.raises(MediaError, match="no such file"):
        fingerprint("/nowhere/video.mp4")
