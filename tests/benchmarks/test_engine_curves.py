"""Bands of seeds, and where two of them overlap."""

import numpy as np

from benchmarks.engine_curves import band, overlap


def test_band_is_the_range_of_running_means() -> None:
    low, high = band([[0.0, 1.0, 2.0], [4.0, 4.0, 4.0]])
    assert low.tolist() == [0.0, 0.5, 1.0] and high.tolist() == [4.0, 4.0, 4.0]


def test_overlap_is_a_share_of_steps() -> None:
    one = np.array([[0.0, 0.0, 0.5], [1.0, 1.0, 0.6]])
    assert overlap(one, one) == 1.0
    assert overlap(one, one + 1.0) == 2 / 3  # the first two touch
    assert overlap(one, one + 2.0) == 0.0
