"""Ulysses attention: ranks swap tokens for heads, so that each attends over all their tokens with a part of the
heads.

Before attention one all-to-all carries q, k and v together; after it another brings the output back. What runs
in between, on the tokens of all ranks of the group in the layout's order, is another strategy: attention on the
spot, or a ring over groups (hybrid).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megavila.models.attention import AttentionStrategy
from megavila.mrsp.sharding import PADDING
from megavila.runtime.errors import MegavilaError


class Exchange(Protocol):
    """This rank's connection to the others of its Ulysses group."""

    size: int

    def all_to_all(self, send: Tensor) -> Tensor:
        """send (size, …), contiguous: part i goes to rank i. Returns the parts received, in rank order."""
        ...


class GroupExchange:
    """`Exchange` over a process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = group.size()

    def all_to_all(self, send: Tensor) -> Tensor:
        """See `Exchange`."""
        received = torch.empty_like(send)
        dist.all_to_all_single(received, send, group=self.group)
        return received


class UlyssesAttention:
    """Attention strategy over the ranks of a Ulysses group.

    Args:
        exchange: the connection; every rank must call the strategy, and its backward pass, in the same order.
        padded_tokens: for each rank of the group the tokens that its rows hold, (rows,) with PADDING, of one
            length. Padding takes no part and comes out as zeros.
        inner: attends over the group's tokens, in increasing order and without padding, with heads / size
            query heads.
    """

    def __init__(
        self,
        exchange: Exchange,
        padded_tokens: Sequence[Tensor],
        inner: AttentionStrategy,
        device: torch.device,
    ) -> None:
        self.exchange = exchange
        self.inner = inner
        tokens = torch.cat(list(padded_tokens))
        order = tokens.argsort()  # padding first
        self.order = order[int((tokens == PADDING).sum()) :].to(device)
        self.rows = len(padded_tokens[0])

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q (rows, heads, d); k, v (rows, kv_heads, d); returns (rows, heads, d).

        Raises MegavilaError where the heads cannot be divided among the ranks.
        """
        split = split_heads(q.shape[1], k.shape[1], self.exchange.size)
        q, k, v = _ToHeads.apply(q, k, v, self, split)  # type: ignore[misc]
        return _ToTokens.apply(self.inner(layer, q, k, v, scale), self)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class HeadSplit:
    """Which heads each of the ranks computes.

    Attributes:
        heads: query heads of a rank; rank u has the u-th run of so many.
        kv_heads: key/value heads of a rank.
        sources: the key/value head that each rank's j-th one is a copy of, by rank and j, (ranks * kv_heads,).
    """

    heads: int
    kv_heads: int
    sources: Tensor


def split_heads(heads: int, kv_heads: int, ranks: int) -> HeadSplit:
    """Divide query heads among ranks, with the key/value heads that they read.

    Where kv_heads divides by ranks nothing is copied, and where ranks is a multiple of it each head goes to
    ranks / kv_heads ranks. In between a rank's queries may begin in the middle of those that share a head; it
    then gets one copy for each run of gcd(heads / ranks, heads / kv_heads) queries, which keeps the number of
    queries to a head the same for all.
    """
    if heads % ranks:
        allowed = [degree for degree in range(1, heads + 1) if heads % degree == 0]
        raise MegavilaError(
            f"{heads} heads on each tensor-parallel rank cannot be split over Ulysses degree {ranks}; "
            f"use parallel.cp_ulysses in {allowed} or cp_comm_type p2p (ring)"
        )
    own, sharing = heads // ranks, heads // kv_heads
    run = math.gcd(own, sharing)
    return HeadSplit(own, own // run, torch.arange(0, heads, run) // sharing)


class _ToHeads(torch.autograd.Function):
    """(rows, heads) here -> (tokens of the group, heads / ranks), for q, k and v at once."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, ulysses: UlyssesAttention, split: HeadSplit
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.ulysses, ctx.split, ctx.kv_shape = ulysses, split, k.shape
        if len(split.sources) > k.shape[1]:
            sources = split.sources.to(k.device)
            k, v = k.index_select(1, sources), v.index_select(1, sources)
        send = torch.cat([_by_rank(part, ulysses.exchange.size) for part in (q, k, v)], dim=2)
        received = ulysses.exchange.all_to_all(send).flatten(0, 1)
        # One copy each, which brings the tokens in order and makes the heads contiguous.
        counts = [split.heads, split.kv_heads, split.kv_heads]
        q, k, v = (part.index_select(0, ulysses.order) for part in received.split(counts, dim=1))
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ulysses, split = ctx.ulysses, ctx.split
        send = _in_rank_order(torch.cat(grads, dim=1), ulysses)
        received = ulysses.exchange.all_to_all(send)
        counts = [split.heads, split.kv_heads, split.kv_heads]
        dq, dk, dv = (_by_token(part) for part in received.split(counts, dim=2))
        return dq, _sum_copies(dk, split, ctx.kv_shape), _sum_copies(dv, split, ctx.kv_shape), None, None


class _ToTokens(torch.autograd.Function):
    """(tokens of the group, heads / ranks) -> (rows, heads) here; padding becomes zeros."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, ulysses: UlyssesAttention) -> Tensor:
        ctx.ulysses = ulysses
        return _by_token(ulysses.exchange.all_to_all(_in_rank_order(out, ulysses)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        exchange = ctx.ulysses.exchange
        received = exchange.all_to_all(_by_rank(grads[0], exchange.size).contiguous()).flatten(0, 1)
        return received.index_select(0, ctx.ulysses.order), None


def _by_rank(x: Tensor, ranks: int) -> Tensor:
    """(rows, ranks * h, d) -> (ranks, rows, h, d), a view."""
    return x.unflatten(1, (ranks, -1)).transpose(0, 1)


def _by_token(x: Tensor) -> Tensor:
    """(ranks, rows, h, d) -> (rows, ranks * h, d)."""
    return x.transpose(0, 1).flatten(1, 2)


def _in_rank_order(x: Tensor, ulysses: UlyssesAttention) -> Tensor:
    """(tokens of the group, h, d) -> (ranks, rows, h, d): to the rows that the tokens came from."""
    size = ulysses.exchange.size
    rows = x.new_zeros(size * ulysses.rows, *x.shape[1:])
    return rows.index_copy_(0, ulysses.order, x).unflatten(0, (size, ulysses.rows))


def _sum_copies(gradient: Tensor, split: HeadSplit, shape: torch.Size) -> Tensor:
    """(rows, copies, d) -> (rows, kv_heads, d); copies of a head are added up in fp32 or wider."""
    if len(split.sources) == shape[1]:
        return gradient
    wide = torch.promote_types(gradient.dtype, torch.float32)
    total = gradient.new_zeros(shape, dtype=wide)
    total.index_add_(1, split.sources.to(gradient.device), gradient.to(wide))
    return total.to(gradient.dtype)
