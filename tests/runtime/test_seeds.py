"""Seeds by name are stable; all generators go back to a saved state."""

import random
from pathlib import Path

import numpy as np
import torch

from megavila.config import ParallelConfig
from megavila.runtime.platform import get_platform
from megavila.runtime.seeds import derive_seed, load_rng_state, rng_state, seed_everything
from megavila.runtime.topology import initialize, shutdown


def test_derived_seeds_are_the_same_everywhere_and_differ_by_part() -> None:
    # b2sum -l 64 of the parts' reprs joined by NUL, shifted right by one bit.
    assert derive_seed(7, "rollout", 3) == 4446930551231766493
    seeds = {
        derive_seed(*parts)
        for parts in [(1,), ("1",), (1, 1), (11,), ("a", "b"), ("ab",), ("a", "b", ""), ()]
    }
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)
    many = [derive_seed("spread", i) for i in range(4000)]
    assert abs(sum(seed / 2**63 for seed in many) / 4000 - 0.5) < 0.02


def _draw() -> list[float]:
    return [
        random.random(),
        float(np.random.rand()),
        torch.rand(1).item(),
        random.gauss(0, 1),
        float(np.random.randn()),
    ]


def test_seeding_repeats_and_state_survives_a_file(tmp_path: Path) -> None:
    topology = initialize(ParallelConfig(), get_platform("cpu"))
    seed_everything(1, topology)
    first = _draw()
    seed_everything(2, topology)
    assert _draw() != first
    seed_everything(1, topology)
    assert _draw() == first
    torch.save(rng_state(), tmp_path / "rng.pt")
    expected = [_draw(), _draw()]
    load_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert [_draw(), _draw()] == expected
    shutdown()
