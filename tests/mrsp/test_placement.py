"""Frames over ranks: all of them, each once, whole pooling windows, balanced."""

import random

import pytest

from megavila.mrsp.placement import Placement, place_frames


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 13])
@pytest.mark.parametrize("pooling", [1, 2, 8])
def test_every_frame_once_and_balanced(ranks: int, pooling: int) -> None:
    rng = random.Random(ranks * 10 + pooling)
    lists = [[1], [1, 1], [ranks * 8 * pooling], [5, 1000, 3, 777], [2] * 9, [4096]]
    lists += [[rng.randint(1, 40 * ranks) for _ in range(rng.randint(1, 12))] for _ in range(30)]
    for counts in lists:
        placed = place_frames(counts, ranks, pooling)
        windows = [0] * ranks
        for count, slices in zip(counts, placed, strict=True):
            assert len(slices) == ranks
            at = 0
            for rank, (start, stop) in enumerate(slices):
                assert start == at and start <= stop <= count
                assert start % pooling == 0 or start == stop == count
                windows[rank] += -(-(stop - start) // pooling)
                at = stop
            assert at == count
        assert max(windows) - min(windows) <= 1, (counts, windows)


def test_a_long_video_is_balanced_by_itself_and_a_short_one_is_not_cut_up() -> None:
    placed = place_frames([512, 6, 515, 6, 6, 6], ranks=4)
    for slices in (placed[0], placed[2]):
        sizes = [stop - start for start, stop in slices]
        assert max(sizes) - min(sizes) <= 1
    assert sum(stop > start for slices in placed[3:] for start, stop in slices) <= 6


def test_videos_stay_where_they_were() -> None:
    placement = Placement(3, 1)
    first = placement.place({"a": 7, "b": 5, "c": 90})
    again = placement.place({"c": 90, "d": 4, "a": 7})
    assert again["a"] == first["a"] and again["c"] == first["c"]
    assert placement.place({"b": 5})["b"] == first["b"]
    assert placement.place({}) == {}
