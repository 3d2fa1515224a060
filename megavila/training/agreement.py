"""Errors that one rank meets, raised on all of them, so that none waits for another that has left."""

from collections.abc import Callable
from typing import TypeVar

from megavila.runtime.collectives import gather_objects
from megavila.runtime.errors import MegavilaError
from megavila.runtime.topology import Topology
from megavila.training.errors import PeerError

T = TypeVar("T")


def together(action: Callable[[], T], topology: Topology) -> T:
    """Run ``action`` on every rank and return this rank's result.

    A MegavilaError on any rank is raised on all: its own on the rank that met it, a `PeerError` with the same
        message elsewhere. The action itself must not communicate beyond the ranks that fail with it.
    """
    failure: MegavilaError | None = None
    result: T | None = None
    try:
        result = action()
    except MegavilaError as error:
        failure = error
    messages = gather_objects(None if failure is None else str(failure), topology.world_group)
    if failure is not None:
        raise failure
    for rank, message in enumerate(messages):
        if message is not None:
            raise PeerError(f"rank {rank}: {message}")
    return result  # type: ignore[return-value]
