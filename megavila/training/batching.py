"""Groups cut and packed into micro-batches of a token budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from megavila.mrsp.layout import Group, LayoutKind, pack_groups


@dataclass(frozen=True)
class Piece:
    """Some of a group's responses behind its prompt.

    Attributes:
        owner: place of the group in the list that was split.
        first, stop: which of the owner's responses `group` holds.
    """

    owner: int
    first: int
    stop: int
    group: Group


def micro_batches(groups: Sequence[Group], max_tokens: int, kind: LayoutKind) -> list[list[Piece]]:
    """Return the groups, in order, as micro-batches of at most ``max_tokens`` tokens.

    A group that is too large for one is cut between responses: each part has the prompt again, and because
        losses are weighted sums over tokens nothing but time changes. Raises MegavilaError where a prompt
        does not fit with a single response.
    """
    pieces = [piece for owner, group in enumerate(groups) for piece in _split(owner, group, max_tokens, kind)]
    sizes = [len(batch) for batch in pack_groups([piece.group for piece in pieces], max_tokens, kind)]
    remaining = iter(pieces)
    return [list(islice(remaining, size)) for size in sizes]


def _split(owner: int, group: Group, max_tokens: int, kind: LayoutKind) -> list[Piece]:
    if group.tokens(kind) <= max_tokens:
        return [Piece(owner, 0, len(group.responses), group)]
    pieces, first = [], 0
    while first < len(group.responses):
        stop = first + 1
        while stop < len(group.responses):
            larger = Group(group.prompt, group.responses[first : stop + 1])
            if larger.tokens(kind) > max_tokens:
                break
            stop += 1
        pieces.append(Piece(owner, first, stop, Group(group.prompt, group.responses[first:stop])))
        first = stop
    return pieces
