"""One rollout batch over the context-parallel ranks of a replica: each generates for some of the prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megavila.data.prompt import Prompt
from megavila.rollout.protocol import Response
from megavila.runtime.collectives import gather_objects
from megavila.runtime.topology import Topology


def own_share(prompts: Sequence[Prompt], topology: Topology) -> list[int]:
    """Indices of this rank's prompts, longest first: dealt out by length, so that ranks have about the same work."""
    by_length = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].token_ids))
    return by_length[topology.context_rank :: topology.context]


def gather_shares(own: Mapping[int, tuple[Response, ...]], topology: Topology) -> list[tuple[Response, ...]]:
    """The groups of all prompts in order, on every rank, from what each generated under its prompts' indices."""
    done = {
        index: group
        for share in gather_objects(own, topology.context_group)
        for index, group in share.items()
    }
    return [done[index] for index in range(len(done))]
