"""Fixtures of the MR-SP tests."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megavila.config import ParallelConfig
from megavila.runtime.platform import get_platform
from megavila.runtime.seeds import seed_everything
from megavila.runtime.topology import Topology, initialize, shutdown
from tests.mrsp import prompts


@pytest.fixture(scope="session")
def make_prompt() -> Callable[..., Any]:
    return prompts.make_prompt


@pytest.fixture(scope="session")
def make_responses() -> Callable[..., tuple[torch.Tensor, ...]]:
    return prompts.make_responses


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    """A world of one, left again after the module."""
    world = initialize(ParallelConfig(), get_platform("cpu"))
    seed_everything(0, world)
    yield world
    shutdown()
