"""Decoding kernels: split over the keys (Flash-Decoding: Dao et al., 2023), with a group's rows in one tile.

A program owns a span of the keys of one prompt (or of one row's own keys) and one K/V head. The rows of its
tile are all queries that read those keys: the rows of the group, times the query heads of the K/V head. So a
prompt's keys and values are read once for the whole group. Each program leaves an unfinished softmax,

    top = max_j s_j;  total = Σ_j 2^(s_j - top);  acc = Σ_j 2^(s_j - top) v_j,   s = q kᵀ · scale · log2 e

in one slot of each of its rows, and `merge_kernel` joins the slots of a row. All of it is fp32.
"""

# Triton's loop constructs are not in its type stubs.
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

# A span is a multiple of this many keys: what joining its result costs is then small beside reading it.
SPAN_UNIT = 256
# One prompt alone is cut in so many parts, over all K/V heads, that it fills a large GPU.
SPANS = 256


def keys_per_span(length: int, kv_heads: int) -> int:
    """Keys that one program goes through. It depends on nothing but the part's own length, so a row's result
    does not depend on what else is decoded."""
    return max(1, -(-length * kv_heads // (SPANS * SPAN_UNIT))) * SPAN_UNIT


@triton.jit
def _keys_per_span(length, KV_HEADS: tl.constexpr, SPANS: tl.constexpr, UNIT: tl.constexpr):
    """`keys_per_span` on the GPU."""
    return tl.maximum(1, tl.cdiv(length * KV_HEADS, SPANS * UNIT)) * UNIT


@triton.jit
def _attend_tiles(
    acc,
    top,
    total,
    queries,
    keys,
    values,
    first,
    last,
    end,
    stride_kt,
    stride_kd,
    stride_vt,
    stride_vd,
    scale_log2,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc, top and total after the keys [first, last) in steps of BLOCK_K; with MASKED those from `end` on are
    hidden."""
    column = tl.arange(0, BLOCK_D)
    for start in range(first, last, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        key_pointers = keys + key.to(tl.int64)[None, :] * stride_kt + column[:, None] * stride_kd
        value_pointers = values + key.to(tl.int64)[:, None] * stride_vt + column[None, :] * stride_vd
        if MASKED:
            key_tile = tl.load(key_pointers, mask=(key < end)[None, :] & (column < D)[:, None], other=0.0)
            value_tile = tl.load(value_pointers, mask=(key < end)[:, None] & (column < D)[None, :], other=0.0)
        elif BLOCK_D > D:
            key_tile = tl.load(key_pointers, mask=(column < D)[:, None], other=0.0)
            value_tile = tl.load(value_pointers, mask=(column < D)[None, :], other=0.0)
        else:
            key_tile = tl.load(key_pointers)
            value_tile = tl.load(value_pointers)
        scores = tl.dot(queries, key_tile, input_precision=PRECISION) * scale_log2
        if MASKED:
            scores = tl.where((key < end)[None, :], scores, float("-inf"))
        # Never -inf: every tile has a key before `end`.
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(value_tile.dtype), value_tile, acc, input_precision=PRECISION)
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=["length", "first_slot", "slots"])
def partial_kernel(
    q,
    keys,
    values,
    lengths,
    first_row,
    acc_slots,
    top_slots,
    total_slots,
    stride_qn,
    stride_qh,
    stride_kn,
    stride_kh,
    stride_kt,
    stride_kd,
    stride_vn,
    stride_vh,
    stride_vt,
    stride_vd,
    length,
    first_slot,
    slots,
    scale_log2,
    HEADS: tl.constexpr,
    REPEAT: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SHARED: tl.constexpr,
    SPANS: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (K/V heads x sources, spans, tiles of rows). SHARED: the sources are prompts, with `lengths` and the rows
    that `first_row` says; otherwise source i is row i's own `length` keys. Slots: (n, heads, slots)."""
    KV_HEADS: tl.constexpr = HEADS // REPEAT
    source = tl.program_id(0) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    first, count = source, REPEAT
    if SHARED:
        first = tl.load(first_row + source)
        count = (tl.load(first_row + source + 1) - first) * REPEAT
        length = tl.load(lengths + source)
    span = _keys_per_span(length, KV_HEADS, SPANS, UNIT)
    begin = tl.program_id(1) * span
    # The grid is as large as the longest prompt and the widest group need.
    if (begin >= length) | (tl.program_id(2) * BLOCK_ROWS >= count):
        return
    end = tl.minimum(begin + span, length)

    member = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_D)
    row, head = (first + member // REPEAT).to(tl.int64), kv_head * REPEAT + member % REPEAT
    real = member < count
    inside = real[:, None] & (column < D)[None, :]
    queries = tl.load(
        q + (row * stride_qn + head * stride_qh)[:, None] + column[None, :], mask=inside, other=0.0
    )
    source = source.to(tl.int64)
    keys += source * stride_kn + kv_head * stride_kh
    values += source * stride_vn + kv_head * stride_vh
    top = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    whole = begin + (end - begin) // BLOCK_K * BLOCK_K
    for masked in tl.static_range(2):
        acc, top, total = _attend_tiles(
            acc,
            top,
            total,
            queries,
            keys,
            values,
            whole if masked else begin,
            end if masked else whole,
            end,
            stride_kt,
            stride_kd,
            stride_vt,
            stride_vd,
            scale_log2,
            D,
            BLOCK_D,
            BLOCK_K,
            masked,
            PRECISION,
        )

    slot = (row * HEADS + head) * slots + first_slot + tl.program_id(1)
    tl.store(top_slots + slot, top, mask=real)
    tl.store(total_slots + slot, total, mask=real)
    tl.store(acc_slots + slot[:, None] * D + column[None, :], acc, mask=inside)


@triton.jit(do_not_specialize=["length", "slots"])
def merge_kernel(
    acc_slots,
    top_slots,
    total_slots,
    lengths,
    prompt_of_row,
    out,
    length,
    slots,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr,
    SPANS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """out (n, heads, d) = Σ 2^(top - peak) acc / Σ 2^(top - peak) total over the slots in use: first those of the
    row's own `length` keys, then its prompt's."""
    row = tl.program_id(0) // HEADS
    prompt = tl.load(lengths + tl.load(prompt_of_row + row))
    used = tl.cdiv(length, _keys_per_span(length, KV_HEADS, SPANS, UNIT))
    used += tl.cdiv(prompt, _keys_per_span(prompt, KV_HEADS, SPANS, UNIT))
    base = tl.program_id(0).to(tl.int64) * slots
    column = tl.arange(0, BLOCK_D)
    peaks = tl.full((BLOCK_SLOTS,), float("-inf"), tl.float32)
    for start in range(0, used, BLOCK_SLOTS):
        slot = start + tl.arange(0, BLOCK_SLOTS)
        peaks = tl.maximum(peaks, tl.load(top_slots + base + slot, mask=slot < used, other=float("-inf")))
    peak = tl.max(peaks, 0)
    totals = tl.zeros((BLOCK_SLOTS,), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, used, BLOCK_SLOTS):
        slot = start + tl.arange(0, BLOCK_SLOTS)
        weight = tl.exp2(tl.load(top_slots + base + slot, mask=slot < used, other=float("-inf")) - peak)
        totals += weight * tl.load(total_slots + base + slot, mask=slot < used, other=0.0)
        part = tl.load(
            acc_slots + (base + slot)[:, None] * D + column[None, :],
            mask=(slot < used)[:, None] & (column < D)[None, :],
            other=0.0,
        )
        acc += tl.sum(part * weight[:, None], 0)
    result = acc / tl.sum(totals, 0)
    target = out + tl.program_id(0).to(tl.int64) * D + column
    tl.store(target, result.to(out.dtype.element_ty), mask=column < D)
