"""A world of one rank for tests that need a model in this process."""

from collections.abc import Iterator

import pytest

from megavila.runtime.topology import Topology, shutdown
from tests.models.hf_reference import start


@pytest.fixture
def topology() -> Iterator[Topology]:
    yield start()
    shutdown()
