"""Which rank of the MR-SP group decodes and encodes which frames."""

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence

Slices = tuple[tuple[int, int], ...]
"""For each rank its frames [start, stop) of one video: contiguous, in the order of ranks, possibly empty."""

# A video with fewer pooling windows a rank than this is not cut over all ranks: each cut inside a group of
# pictures has frames decoded on both sides of it.
_MIN_WINDOWS = 8
_REMEMBERED = 1 << 14


def place_frames(num_frames: Sequence[int], ranks: int, pooling: int = 1) -> list[Slices]:
    """Divides the frames of videos over ranks, all videos together balanced to within one window.

    Long videos are cut over all ranks, so that any of them alone is balanced too, as a micro-batch needs it.
    Short ones are laid end to end and cut where a rank's share of the whole is full.

    Args:
        num_frames: of each video.
        ranks: at least 1.
        pooling: frames of one pooling window (a video's last may be shorter); a window stays on one rank. 1:
            windows are frames.
    """
    windows = [-(-count // pooling) for count in num_frames]
    whole, extra = divmod(sum(windows), ranks)
    left = [whole + (rank < extra) for rank in range(ranks)]  # windows that each rank still takes
    placed: dict[int, Slices] = {}
    cursor = 0  # the next rank to take a window more than others, of those that do not divide
    long = [video for video, count in enumerate(windows) if count >= _MIN_WINDOWS * ranks]
    for video in long:
        share, rest = divmod(windows[video], ranks)
        sizes = [share + ((rank - cursor) % ranks < rest) for rank in range(ranks)]
        cursor = (cursor + rest) % ranks
        left = [room - size for room, size in zip(left, sizes, strict=True)]
        placed[video] = _slices(sizes, num_frames[video], pooling)
    rank = 0
    for video in (video for video in range(len(windows)) if video not in placed):
        sizes = [0] * ranks
        remaining = windows[video]
        while remaining:
            while left[rank] == 0:
                rank += 1
            taken = min(remaining, left[rank])
            sizes[rank] += taken
            left[rank] -= taken
            remaining -= taken
        placed[video] = _slices(sizes, num_frames[video], pooling)
    return [placed[video] for video in range(len(windows))]


def _slices(sizes: Sequence[int], num_frames: int, pooling: int) -> Slices:
    """Frame ranges from numbers of windows."""
    slices, window = [], 0
    for size in sizes:
        start, window = window, window + size
        slices.append((min(start * pooling, num_frames), min(window * pooling, num_frames)))
    return tuple(slices)


class Placement:
    """Remembers where a video's frames went, the same on every rank without a word between them.

    A later pass over the video, in whatever company, goes to the ranks that have decoded its frames.
    """

    def __init__(self, ranks: int, pooling: int) -> None:
        self.ranks = ranks
        self.pooling = pooling
        self._slices: OrderedDict[Hashable, Slices] = OrderedDict()

    def place(self, num_frames: Mapping[Hashable, int]) -> dict[Hashable, Slices]:
        """Slices of each video, by its name; `num_frames` counts the frames of each.

        Ranks stay in step as long as all of them ask for the same videos in the same order.
        """
        new = [name for name in num_frames if name not in self._slices]
        slices = place_frames([num_frames[name] for name in new], self.ranks, self.pooling)
        self._slices.update(zip(new, slices, strict=True))
        found = {}
        for name in num_frames:
            self._slices.move_to_end(name)
            found[name] = self._slices[name]
        while len(self._slices) > _REMEMBERED:
            self._slices.popitem(last=False)
        return found
