"""Missing, empty, cut and damaged files: one error type that names the file and the reason."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from megavila.media import FrameCache, MediaError, get_decoder, load_frames, probe, sample_video

Reference = Callable[..., tuple[list[int | None], torch.Tensor]]


def write_audio(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "random.mp4").write_bytes(np.random.default_rng(0).bytes(50_000))
    (tmp_path / "folder.mp4").mkdir()
    write_audio(tmp_path / "audio.mp4")
    with av.open(str(tmp_path / "no_frames.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height = 64, 48
        container.start_encoding()
    for name, reason in (
        ("missing.mp4", "no such file"),
        ("empty.mp4", "empty"),
        ("random.mp4", "Invalid data"),
        ("folder.mp4", "directory|Invalid"),
        ("audio.mp4", "no video stream.*audio"),
        ("no_frames.mp4", "no video stream|no frames|Invalid data"),
    ):
        with pytest.raises(MediaError, match=reason) as caught:
            sample_video(tmp_path / name, num_frames=4)
        assert caught.value.path == str(tmp_path / name)
        assert name in str(caught.value) and caught.value.reason in str(caught.value)


def test_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(MediaError("a.mp4", "no such file")))
    assert (error.path, error.reason, str(error)) == ("a.mp4", "no such file", "a.mp4: no such file")


def test_lost_header(clip_file: Callable[[str], Path], tmp_path: Path) -> None:
    """PyAV writes the sample table at the end: a cut file has none."""
    data = clip_file("closed_gop.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(MediaError, match="Invalid data"):
        probe(tmp_path / "cut.mp4")


@pytest.mark.parametrize("name", ["closed_gop.mp4", "open_gop.mkv", "open_gop.ts"])
def test_cut_file_gives_what_exists(
    clip_file: Callable[[str], Path], decode_everything: Reference, tmp_path: Path, name: str
) -> None:
    source = tmp_path / name
    if name.endswith("mp4"):  # the sample table in front, as for streaming
        with (
            av.open(str(clip_file(name))) as old,
            av.open(str(source), "w", options={"movflags": "+faststart"}) as new,
        ):
            stream = new.add_stream_from_template(old.streams.video[0])
            for packet in old.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    new.mux(packet)
    else:
        source.write_bytes(clip_file(name).read_bytes())
    _, expected = decode_everything(source)
    data = source.read_bytes()
    cut = tmp_path / f"cut_{name}"
    cut.write_bytes(data[: len(data) * 2 // 3])
    index = probe(cut)
    assert 0.5 * len(expected) < index.num_frames < len(expected)
    assert index.truncated == name.endswith("mp4")  # the others do not say how many frames they should hold
    result = get_decoder().decode(str(cut), index, range(index.num_frames), None)
    assert result.valid.sum() > 0.5 * len(expected)
    for frame in torch.nonzero(result.valid).flatten().tolist():
        assert torch.equal(result.frames[frame], expected[frame])
    if not result.valid.all():
        lost = int(torch.nonzero(~result.valid)[0])
        with pytest.raises(MediaError, match=f"cannot be decoded: {lost}"):
            load_frames(sample_video(cut, num_frames=index.num_frames), (8, 8))


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg4", "mpeg2video"])
def test_damage_spoils_the_rest_of_its_group_only(
    encode: Callable[..., Path], decode_everything: Reference, tmp_path: Path, codec: str
) -> None:
    """From the first sign of damage to the next random-access point no frame is passed off as sound."""
    path = encode(
        tmp_path / "sound.mp4",
        codec=codec,
        frames=60,
        options={"x265-params": "log-level=none:keyint=12:open-gop=0"} if codec == "libx265" else {},
    )
    _, expected = decode_everything(path)
    with av.open(str(path)) as container:
        packet = [p for p in container.demux(video=0) if p.size][30]
        assert packet.pos is not None
        begin, length = packet.pos, packet.size
    index = probe(path)
    end = int(index.random_access[index.random_access > 30].min())
    # MPEG-2's decoder holds a frame back to put frames in order, and drops it when it fails on the next.
    first = 29 if codec == "mpeg2video" else 30
    outside = torch.tensor([frame < first or frame >= end for frame in range(60)])
    detected = 0
    for seed in range(4):
        data = bytearray(path.read_bytes())
        data[begin : begin + length] = np.random.default_rng(seed).bytes(length)
        damaged = tmp_path / f"damaged_{seed}.mp4"
        damaged.write_bytes(data)
        assert probe(damaged).num_frames == 60
        result = get_decoder().decode(str(damaged), probe(damaged), range(60), None)
        same = (result.frames == expected).flatten(1).all(dim=1)
        assert result.valid[outside].all() and same[outside].all()
        if not result.valid.all():
            detected += 1
            lost = int(torch.nonzero(~result.valid)[0])
            assert lost >= first
            assert not result.valid[lost:end].any()
            with pytest.raises(
                MediaError, match=rf"damaged_{seed}.mp4: \d+ of 60 frames cannot be decoded: {lost}"
            ):
                load_frames(sample_video(damaged, num_frames=60), (8, 8))
    assert detected >= 2


def test_recording_that_starts_in_mid_group(
    clip_file: Callable[[str], Path], decode_everything: Reference, tmp_path: Path
) -> None:
    """Frames that nothing can decode are not offered; the rest is exact."""
    data = clip_file("open_gop.ts").read_bytes()
    part = tmp_path / "part.ts"
    part.write_bytes(data[188 * (len(data) // 188 // 3) :])
    _, expected = decode_everything(part)
    index = probe(part)
    assert index.num_frames == len(expected) < 75
    result = get_decoder().decode(str(part), index, range(index.num_frames), None)
    assert result.valid.all() and torch.equal(result.frames, expected)


def test_rewritten_file_is_probed_again(encode: Callable[..., Path], tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", codec="libx264", frames=10)
    assert probe(path).num_frames == 10
    encode(path, codec="libx264", frames=14)
    assert probe(path).num_frames == 14


def test_frame_outside_the_video(clip_file: Callable[[str], Path]) -> None:
    path = clip_file("mjpeg.avi")
    with pytest.raises(MediaError, match="frame 20 is outside its 20 frames"):
        get_decoder().decode(str(path), probe(path), [20], None)


def test_frame_cache(clip_file: Callable[[str], Path], tmp_path: Path) -> None:
    video = sample_video(clip_file("mjpeg.avi"), num_frames=8)
    whole = load_frames(video, (20, 30))
    cache = FrameCache(limit_bytes=8 * 3 * 20 * 30)
    assert torch.equal(cache.load(video, (20, 30), 0, 4), whole[:4])
    misses = cache.misses
    assert cache.hits == 0 < misses
    copy = tmp_path / "copy.avi"
    copy.write_bytes(clip_file("mjpeg.avi").read_bytes())
    assert torch.equal(cache.load(sample_video(copy, num_frames=8), (20, 30), 0, 4), whole[:4])
    assert cache.hits > 0 and cache.misses == misses  # the same content under another path
    assert torch.equal(cache.load(video, (10, 30), 0, 4), load_frames(video, (10, 30), 0, 4))
    assert cache.misses > misses
    for start, stop in ((4, 8), (2, 6), (0, 8), (0, 4)):
        assert torch.equal(cache.load(video, (20, 30), start, stop), whole[start:stop])
        assert 0 < cache.used_bytes <= cache.limit_bytes
    small = FrameCache(limit_bytes=0)
    assert torch.equal(small.load(video, (20, 30)), whole) and small.used_bytes == 0
