"""Execution plan of the torch backend: chunks of similar small blocks, large blocks, and how their parts are
joined.

Rows of q are addressed as (token, query head) pairs, `token * heads + head`, and rows of k and v as (token,
kv head) pairs, so that one index_select brings a chunk into the layout its batched matmul wants and no K/V is
repeated for GQA. Every chunk and every large block writes its partial results one after another into a flat
buffer; a `Bags` object says which rows of that buffer belong to which row of the result.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megavila_kernels.interval_attention.mask import Block, IntervalMask, find_blocks

# Blocks from this area on run one by one through the flash kernel (CPU); below, padded batched matmuls are
# faster.
FLASH_AREA = 1 << 17
# Scores per chunk (heads included) on a CPU: a few passes over them should stay in the L2 cache.
CHUNK_SCORES_CPU = 1 << 18
CHUNK_SCORES_CUDA = 1 << 26
# A chunk takes smaller blocks until padding reaches this share, counted beyond a free allowance.
PADDING_RATIO = 1.3
PADDING_FREE = 1 << 14
# Added to scores of hidden pairs: finite, so that a row with nothing but hidden keys stays free of nan.
HIDDEN = -1e30


@dataclass(frozen=True)
class Chunk:
    """Small blocks padded to one shape and computed as a batch of `batch * kv_heads` matrices."""

    batch: int
    rows: int
    keys: int
    q_index: Tensor  # int32 (batch * kv_heads * repeat * rows,): row of q as (token, head)
    k_index: Tensor  # int32 (batch * kv_heads * keys,): row of k as (token, kv head)
    hidden: Tensor | None  # fp32 (batch, 1, rows, keys): 0 where seen, HIDDEN where not; None if all is seen
    q_start: int  # where this chunk's rows begin in the buffer of partial outputs
    k_start: int  # and in the buffer of partial key gradients


@dataclass(frozen=True)
class LargeBlock:
    """One `full` or square `causal` block, computed by the flash kernel."""

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool
    q_start: int
    k_start: int


@dataclass(frozen=True)
class Bags:
    """Result row i is a (weighted) sum of the buffer rows index[offset[i]:offset[i + 1]]."""

    index: Tensor  # int32 (parts,)
    offset: Tensor  # int32 (rows,)
    table: Tensor | None  # int64 (rows, widest bag): the same as a table, padded with the buffer's length
    table_slot: Tensor | None  # int64 (parts,): position in the flattened table of each entry of index


@dataclass(frozen=True)
class Plan:
    """Everything about a mask that does not depend on the values of q, k and v."""

    heads: int
    kv_heads: int
    chunks: tuple[Chunk, ...]
    large: tuple[LargeBlock, ...]
    q_parts: int  # rows of the buffer of partial outputs
    k_parts: int  # rows of the buffer of partial key (and value) gradients
    max_scores: int  # scores in the largest chunk
    max_q_rows: int  # (token, head) rows of q in the largest chunk
    max_k_rows: int  # and of k
    q_bags: Bags
    k_bags: Bags


def build_plan(mask: IntervalMask, heads: int, kv_heads: int, device: torch.device) -> Plan:
    """Decompose `mask` and precompute all index tensors on `device`, for these head counts."""
    on_cpu = device.type == "cpu"
    budget = max(1, (CHUNK_SCORES_CPU if on_cpu else CHUNK_SCORES_CUDA) // heads)
    keep_area = FLASH_AREA if on_cpu else budget
    lo, hi = mask.bounds()
    small: list[Block] = []
    large: list[Block] = []
    for block in find_blocks(mask, keep_area):
        if on_cpu and block.shape != "general" and block.area >= FLASH_AREA:
            large += _flash_blocks(block)
        else:
            small += _tile(block, hi, lo, max(budget, FLASH_AREA) if on_cpu else budget)

    chunks: list[Chunk] = []
    large_blocks: list[LargeBlock] = []
    q_destination: list[np.ndarray] = []
    k_destination: list[np.ndarray] = []
    q_start = k_start = max_scores = 0
    for blocks in _similar(small, budget):
        chunk, q_rows, k_rows = _chunk(blocks, lo, hi, heads, kv_heads, q_start, k_start, device)
        chunks.append(chunk)
        q_destination.append(q_rows)
        k_destination.append(k_rows)
        q_start += len(q_rows)
        k_start += len(k_rows)
        max_scores = max(max_scores, chunk.batch * heads * chunk.rows * chunk.keys)
    for block in large:
        large_blocks.append(
            LargeBlock(block.q0, block.q1, block.k0, block.k1, block.shape == "causal", q_start, k_start)
        )
        q_destination.append(np.arange(block.q0 * heads, block.q1 * heads))
        k_destination.append(np.arange(block.k0 * kv_heads, block.k1 * kv_heads))
        q_start += block.rows * heads
        k_start += block.keys * kv_heads
    return Plan(
        heads=heads,
        kv_heads=kv_heads,
        chunks=tuple(chunks),
        large=tuple(large_blocks),
        q_parts=q_start,
        k_parts=k_start,
        max_scores=max_scores,
        max_q_rows=max((len(c.q_index) for c in chunks), default=0),
        max_k_rows=max((len(c.k_index) for c in chunks), default=0),
        q_bags=_bags(q_destination, mask.tokens_q * heads, device, with_table=True),
        k_bags=_bags(k_destination, mask.tokens_k * kv_heads, device, with_table=False),
    )


def _flash_blocks(block: Block) -> list[Block]:
    """The flash kernel aligns its causal mask top left: a bottom-right block is a full part and a causal
    square."""
    if block.shape == "full" or block.rows == block.keys:
        return [block]
    square = block.k1 - block.rows
    return [
        Block(block.q0, block.q1, block.k0, square, "full", block.interval),
        Block(block.q0, block.q1, square, block.k1, "causal", block.interval),
    ]


def _tile(block: Block, hi: np.ndarray, lo: np.ndarray, limit: int) -> list[Block]:
    """Cut a block that exceeds `limit` pairs by rows; each part keeps only the keys that its rows see."""
    rows = max(1, limit // block.keys)
    if block.rows <= rows:
        return [block]
    parts = []
    for q0 in range(block.q0, block.q1, rows):
        q1 = min(q0 + rows, block.q1)
        k0, k1 = int(lo[block.interval, q0:q1].min()), int(hi[block.interval, q0:q1].max())
        parts.append(Block(q0, q1, k0, k1, "full" if block.shape == "full" else "general", block.interval))
    return parts


def _similar(blocks: list[Block], budget: int) -> list[list[Block]]:
    """Group blocks of similar shape so that padding stays low and no group's padded area exceeds `budget`."""
    groups: list[list[Block]] = []
    rows = keys = useful = 0
    for block in sorted(blocks, key=lambda b: (b.keys, b.rows), reverse=True):
        if groups:
            new_rows, new_keys = max(rows, block.rows), max(keys, block.keys)
            padded = (len(groups[-1]) + 1) * new_rows * new_keys
            if padded <= budget and padded <= PADDING_RATIO * (useful + block.area) + PADDING_FREE:
                groups[-1].append(block)
                rows, keys, useful = new_rows, new_keys, useful + block.area
                continue
        groups.append([block])
        rows, keys, useful = block.rows, block.keys, block.area
    return groups


def _chunk(
    blocks: list[Block],
    lo: np.ndarray,
    hi: np.ndarray,
    heads: int,
    kv_heads: int,
    q_start: int,
    k_start: int,
    device: torch.device,
) -> tuple[Chunk, np.ndarray, np.ndarray]:
    """The chunk of these blocks, and for each of its q and k rows the (token, head) row it stands for or
    -1."""
    rows, keys = max(b.rows for b in blocks), max(b.keys for b in blocks)
    q0, q1 = np.array([[b.q0] for b in blocks]), np.array([[b.q1] for b in blocks])
    k0, k1 = np.array([[b.k0] for b in blocks]), np.array([[b.k1] for b in blocks])
    interval = np.array([[b.interval] for b in blocks])
    q_token, k_token = q0 + np.arange(rows), k0 + np.arange(keys)
    q_real, k_real = q_token < q1, k_token < k1
    q_token, k_token = np.where(q_real, q_token, q0), np.where(k_real, k_token, k0)

    # int32, because these comparisons over all pairs are most of a plan's time.
    row_lo = lo[interval, q_token].astype(np.int32)
    row_hi = np.where(q_real, hi[interval, q_token], 0).astype(np.int32)
    key = (k0 + np.arange(keys)).astype(np.int32)[:, None, :]
    seen = (key >= row_lo[..., None]) & (key < row_hi[..., None])
    hidden = None
    if not seen.all():
        hidden = torch.from_numpy(np.where(seen, np.float32(0), np.float32(HIDDEN)))[:, None].to(device)

    head = np.arange(heads).reshape(1, kv_heads, heads // kv_heads, 1)
    q_row = q_token[:, None, None, :] * heads + head
    k_row = k_token[:, None, :] * kv_heads + np.arange(kv_heads).reshape(1, kv_heads, 1)
    q_destination = np.where(q_real[:, None, None, :], q_row, -1).reshape(-1)
    k_destination = np.where(k_real[:, None, :], k_row, -1).reshape(-1)
    chunk = Chunk(
        batch=len(blocks),
        rows=rows,
        keys=keys,
        q_index=torch.from_numpy(q_row.reshape(-1).astype(np.int32)).to(device),
        k_index=torch.from_numpy(k_row.reshape(-1).astype(np.int32)).to(device),
        hidden=hidden,
        q_start=q_start,
        k_start=k_start,
    )
    return chunk, q_destination, k_destination


def _bags(destinations: list[np.ndarray], rows: int, device: torch.device, with_table: bool) -> Bags:
    destination = np.concatenate(destinations) if destinations else np.zeros(0, dtype=np.int64)
    parts = np.nonzero(destination >= 0)[0]
    index = parts[np.argsort(destination[parts], kind="stable")]
    count = np.bincount(destination[parts], minlength=rows)
    offset = np.cumsum(count) - count
    table = slot = None
    if with_table:
        width = max(1, int(count.max())) if rows else 1
        filled = np.arange(width) < count[:, None]  # (rows, width); row-major order is the order of `index`
        cells = np.full((rows, width), len(destination), dtype=np.int64)
        cells[filled] = index
        table = torch.from_numpy(cells).to(device)
        slot = torch.from_numpy(np.nonzero(filled.reshape(-1))[0]).to(device)
    return Bags(
        index=torch.from_numpy(index.astype(np.int32)).to(device),
        offset=torch.from_numpy(offset.astype(np.int32)).to(device),
        table=table,
        table_slot=slot,
    )
