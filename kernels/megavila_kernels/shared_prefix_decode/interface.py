"""The public function: shapes are checked here, then Triton or torch computes."""

# Triton's launch syntax, kernel[grid](…), is not in its type stubs, nor that constants are plain numbers.
# pyright: reportCallIssue=false, reportArgumentType=false

import math

import torch
from torch import Tensor

from megavila_kernels.choice import use_triton
from megavila_kernels.interval_attention.triton_config import (
    capability_of,
    dot_precision,
    padded_head_dim,
    unsupported,
)
from megavila_kernels.shared_prefix_decode.groups import DecodeGroups
from megavila_kernels.shared_prefix_decode.torch_path import torch_shared_prefix_decode
from megavila_kernels.shared_prefix_decode.triton_config import BLOCK_SLOTS, decode_config


def shared_prefix_decode(
    q: Tensor,
    prompt_keys: Tensor,
    prompt_values: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    groups: DecodeGroups,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """One query of each row against its group's prompt and the row's own keys, in one softmax over both.

    Args:
        q: (n, heads, d); rows of a group are neighbours, as `groups` says.
        prompt_keys, prompt_values: (groups, kv_heads, at least the longest prompt, d); what lies behind a
            prompt's length is not read or has no weight, but must be finite. kv_heads divides heads.
        own_keys, own_values: (n, kv_heads, length, d), at least one key: every row has as many.
        groups: which prompt each row continues, and how long the prompts are.
        scale: factor of the scores, 1/sqrt(d) if None.
        backend: "auto" (Triton on CUDA, torch elsewhere), "torch" or "triton".

    Returns:
        (n, heads, d) in q's dtype. Not differentiable. Keys and values may have any strides (keys are best
        contiguous along the tokens or along d, values along d); on torch they may have a wider dtype than q.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an unknown backend.
    """
    _check(q, prompt_keys, prompt_values, own_keys, own_values, groups)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    tensors = (q, prompt_keys, prompt_values, own_keys, own_values)
    if use_triton("decoding attention", backend, q, unsupported):
        return _launch(*tensors, groups, scale)
    return torch_shared_prefix_decode(*tensors, groups, scale)


def _launch(
    q: Tensor,
    prompt_keys: Tensor,
    prompt_values: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    groups: DecodeGroups,
    scale: float,
) -> Tensor:
    from megavila_kernels.shared_prefix_decode.triton_kernels import (
        SPAN_UNIT,
        SPANS,
        keys_per_span,
        merge_kernel,
        partial_kernel,
    )

    if not q.dtype == prompt_keys.dtype == own_keys.dtype:
        raise ValueError(
            f"the Triton kernels need one dtype; got {q.dtype}, {prompt_keys.dtype}, {own_keys.dtype}"
        )
    q = q if q.stride(-1) == 1 else q.contiguous()
    rows, heads, d = q.shape
    kv_heads, length = own_keys.shape[1:3]
    repeat = heads // kv_heads
    own_spans = -(-length // keys_per_span(length, kv_heads))
    # No prompt has more spans than these, whichever its length.
    prompt_spans = min(-(-SPANS // kv_heads), -(-groups.longest // SPAN_UNIT))
    slots = own_spans + prompt_spans
    acc = torch.empty((rows, heads, slots, d), dtype=torch.float32, device=q.device)
    top, total = torch.empty((2, rows, heads, slots), dtype=torch.float32, device=q.device)
    constants = {"SPANS": SPANS, "UNIT": SPAN_UNIT, "D": d, "BLOCK_D": padded_head_dim(d), "HEADS": heads}
    for keys, values, shared, spans, widest, first_slot in (
        (own_keys, own_values, False, own_spans, 1, 0),
        (prompt_keys, prompt_values, True, prompt_spans, groups.widest, own_spans),
    ):
        config = decode_config(capability_of(q.device), d, q.dtype, widest * repeat)
        partial_kernel[(keys.shape[0] * kv_heads, spans, -(-widest * repeat // config.rows))](
            q,
            keys,
            values,
            groups.lengths,
            groups.first_row,
            acc,
            top,
            total,
            *q.stride()[:2],
            *keys.stride(),
            *values.stride(),
            length,
            first_slot,
            slots,
            scale * math.log2(math.e),
            REPEAT=repeat,
            BLOCK_ROWS=config.rows,
            BLOCK_K=config.keys,
            SHARED=shared,
            PRECISION=dot_precision(q.dtype),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **constants,
        )
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    merge_kernel[(rows * heads,)](
        acc,
        top,
        total,
        groups.lengths,
        groups.prompt_of_row,
        out,
        length,
        slots,
        KV_HEADS=kv_heads,
        BLOCK_SLOTS=BLOCK_SLOTS,
        **constants,
    )
    return out


def _check(
    q: Tensor,
    prompt_keys: Tensor,
    prompt_values: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    groups: DecodeGroups,
) -> None:
    shapes = [tuple(x.shape) for x in (q, prompt_keys, prompt_values, own_keys, own_values)]
    if [len(x) for x in shapes] != [3, 4, 4, 4, 4] or shapes[1] != shapes[2] or shapes[3] != shapes[4]:
        raise ValueError(
            "expected q (n, heads, d), prompt keys and values (groups, kv_heads, tokens, d) and own keys and "
            f"values (n, kv_heads, length, d); got {shapes}"
        )
    (rows, heads, d), (count, kv_heads, tokens, _), (own_rows, own_heads, length, _) = (
        shapes[0],
        shapes[1],
        shapes[3],
    )
    if not d == shapes[1][3] == shapes[3][3] or kv_heads != own_heads or rows != own_rows:
        raise ValueError(f"rows, K/V heads or head dimensions differ: {shapes}")
    if heads % kv_heads:
        raise ValueError(
            f"{heads} query heads cannot share {kv_heads} K/V heads evenly; the second must divide the first"
        )
    if (rows, count) != (groups.num_rows, groups.num_groups):
        raise ValueError(
            f"the groups are of {groups.num_rows} rows and {groups.num_groups} prompts; got {rows} and {count}"
        )
    if groups.longest > tokens or length < 1:
        raise ValueError(
            f"the longest prompt has {groups.longest} tokens and a row must have a key of its own; got "
            f"{tokens} prompt keys and {length} own ones"
        )
