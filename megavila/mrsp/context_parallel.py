"""One rank's part of a forward pass over a layout: its inputs, its attention, and the way its results join."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megavila_kernels import IntervalMask
from torch import Tensor
from torch.autograd.function import once_differentiable

from megavila.models.attention import AttentionContext, AttentionStrategy
from megavila.models.vlm import VisionLanguageModel
from megavila.mrsp.attention import Kept, LocalAttention
from megavila.mrsp.gather import padded_shard_gather
from megavila.mrsp.layout import Layout
from megavila.mrsp.ring import GroupNeighbours, RingAttention
from megavila.mrsp.sharding import Sharding, shard_layout
from megavila.mrsp.shards import ShardedRows
from megavila.mrsp.ulysses import GroupExchange, UlyssesAttention
from megavila.runtime.errors import MegavilaError
from megavila.runtime.topology import Topology


@dataclass(frozen=True, eq=False)
class Shard:
    """What this context rank computes; with one rank that is the layout.

    Attributes:
        sharding: who holds what.
        context: positions and attention of the shard's rows.
        text_ids: (n_text,) token ids of the rows that are text.
        source_index, row_index: (rows,) where each row's embedding lies: source 0 are the text rows, source 1
            the media rows, -1 is padding; see `padded_shard_gather`.
        target_numbers: (n,) the targets that this rank predicts, as numbers into the layout's.
        predictor_rows: (n,) rows of the shard that predict them.
        targets: (n,) their token ids.
    """

    sharding: Sharding
    context: AttentionContext
    text_ids: Tensor
    source_index: Tensor
    row_index: Tensor
    target_numbers: Tensor
    predictor_rows: Tensor
    targets: Tensor
    group: dist.ProcessGroup

    def embed(self, model: VisionLanguageModel, media_rows: Tensor | ShardedRows | None) -> Tensor:
        """(rows, hidden) embeddings of the shard, zeros in padding; differentiable.

        media_rows: those of the whole layout, or None where it has none: (m, hidden), of which each rank's
        gradient is the part that flows through its shard; or what each rank encoded, of which the rows of this
        shard are fetched and no more.
        """
        expected = self.sharding.layout.num_media_rows
        given = 0 if media_rows is None else len(media_rows)
        if given != expected:
            raise MegavilaError(
                f"the layout has {expected} media rows but {given} were given; "
                "encode the same frames the prompts were built from"
            )
        text, row_index = model.language.embed(self.text_ids), self.row_index
        if isinstance(media_rows, ShardedRows):
            media_rows, row_index = self._fetch(media_rows)
        sources = [text] if media_rows is None else [text, media_rows.to(text.dtype)]
        return padded_shard_gather(sources, self.source_index, row_index)

    def _fetch(self, media_rows: ShardedRows) -> tuple[Tensor, Tensor]:
        """The media rows of this shard, and `row_index` counted within them; a collective of the replica."""
        if media_rows.is_whole:
            return media_rows.rows, self.row_index
        topology = media_rows.topology
        wanted = [self.sharding.media_rows_of(rank) for rank in range(topology.context)]
        own = wanted[topology.context_rank].to(self.row_index.device)
        place = torch.searchsorted(own, self.row_index.contiguous())
        fetched = media_rows.take([wanted[rank // topology.tensor] for rank in range(topology.mrsp_size)])
        return fetched, torch.where(self.source_index == 1, place, self.row_index)

    def collect(self, values: Tensor) -> Tensor:
        """Values of all targets of the layout, (num_targets,), from each rank's own, (n,); differentiable.

        Every rank gets all of them and is expected to compute the same from them: the gradient that flows back
        is the one of this rank's own values, so that gradients of parameters, summed over context ranks, are
        those of the loss and not a multiple of it.
        """
        if self.sharding.ranks == 1:
            return values
        total = self.sharding.layout.num_targets
        return _Collect.apply(values, self.target_numbers, total, self.group)  # type: ignore[no-any-return]


def take_shard(layout: Layout, topology: Topology, backend: str = "auto", *, keep: bool = False) -> Shard:
    """This rank's shard of a layout, on the layout's device.

    Args:
        backend: of the interval kernel, as `model.attention_backend`.
        keep: attention's results are kept for the recomputation of layers, which must follow.
    """
    # One rank needs no padding: sequence parallelism brings its own.
    tensor = topology.tensor if topology.context > 1 else 1
    sharding = shard_layout(
        layout,
        topology.context,
        topology.context_rank,
        tensor=tensor,
        split_always=topology.split_always,
    )
    device = layout.token_ids.device
    tokens = sharding.padded_tokens().to(device)
    held = tokens.clamp(min=0)
    real, media = tokens >= 0, layout.media_index[held]
    is_text = real & (media < 0)
    numbers, predictors = sharding.targets_of(sharding.rank)
    numbers = numbers.to(device)
    return Shard(
        sharding=sharding,
        context=AttentionContext(
            position_ids=layout.position_ids[..., held].masked_fill(~real, 0),
            attend=attention_over(sharding, topology, device, backend, {} if keep else None),
        ),
        text_ids=layout.token_ids[held[is_text]],
        source_index=torch.where(real, torch.where(is_text, 0, 1), -1).int(),
        row_index=torch.where(is_text, is_text.cumsum(0) - 1, media),
        target_numbers=numbers,
        predictor_rows=predictors.to(device),
        targets=layout.targets[numbers],
        group=topology.context_group,
    )


def attention_over(
    sharding: Sharding, topology: Topology, device: torch.device, backend: str, kept: Kept | None = None
) -> AttentionStrategy:
    """The attention strategy for a shard: Ulysses groups of neighbouring ranks, a ring of such groups, or both; or
    none of them where no group is split.

    Neighbouring ranks hold neighbouring chunks of a prompt, from its front and from its end, so the tokens of a
    Ulysses group are again one rank's share of the zigzag over the ring.
    """
    if not sharding.split:
        return LocalAttention(_own_mask(sharding), backend, kept)
    degree, ring_group, ring_rank = topology.ulysses, topology.ring_group, topology.ring_rank
    if topology.ring_tokens is not None and sharding.rows >= topology.ring_tokens:
        degree, ring_group, ring_rank = 1, topology.context_group, topology.context_rank
    members = [range(first, first + degree) for first in range(0, sharding.ranks, degree)]
    blocks = [torch.cat([sharding.tokens[rank] for rank in group]).sort().values for group in members]
    masks = [sharding.mask(blocks[ring_rank], block) for block in blocks]
    if len(members) == 1:
        assert masks[0] is not None  # every token sees itself
        inner: AttentionStrategy = LocalAttention(masks[0], backend, kept)
    else:
        inner = RingAttention(
            GroupNeighbours(ring_group), masks, [len(block) for block in blocks], backend, kept
        )
    if degree == 1:
        return inner
    padded = [sharding.padded_tokens(rank) for rank in members[ring_rank]]
    return UlyssesAttention(GroupExchange(topology.ulysses_group), padded, inner, device)


def _own_mask(sharding: Sharding) -> IntervalMask:
    """What this rank's rows see of one another; padding sees nothing and nothing sees it."""
    own = sharding.tokens[sharding.rank]
    mask = sharding.mask(own, own)
    nothing = torch.zeros(1, len(own), dtype=torch.int32)
    lo, hi = (nothing, nothing) if mask is None else (mask.lo, mask.hi)
    padding = (0, sharding.rows - len(own))
    return IntervalMask(F.pad(lo, padding), F.pad(hi, padding), sharding.rows)


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, numbers: Tensor, total: int, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(numbers)
        everyone = values.new_zeros(total)
        everyone[numbers] = values
        dist.all_reduce(everyone, group=group)  # one summand of each element is not zero
        return everyone

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (numbers,) = ctx.saved_tensors
        return grads[0][numbers], None, None, None
