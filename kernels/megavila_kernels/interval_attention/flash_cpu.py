"""One large block through torch's CPU flash attention, which returns and takes a log-sum-exp.

Given the rows' global out and lse, its backward pass returns the exact partial gradients of the block. Query
heads that share a K/V head are passed as the heads of one batch entry with K/V expanded by stride 0, so K/V
is not copied for GQA. Computation is in fp32 (fp64 for fp64 inputs), because a half-precision kernel would
round every partial result.
"""

import torch
from torch import Tensor

from megavila_kernels.interval_attention.plan import LargeBlock


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, block: LargeBlock, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """out (rows, heads, d) and natural-log lse (rows, heads) of the block's rows over the block's keys
    alone."""
    heads, repeat = q.shape[1], q.shape[1] // k.shape[1]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        _queries(q[block.q0 : block.q1], repeat, dtype),
        _keys(k[block.k0 : block.k1], repeat, dtype),
        _keys(v[block.k0 : block.k1], repeat, dtype),
        0.0,
        block.causal,
        scale=scale,
    )
    return _rows(out, heads), _rows(lse[..., None], heads)[..., 0]


def flash_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block: LargeBlock,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (rows, heads, d), dk and dv (keys, kv_heads, d): this block's share of the gradients."""
    heads, repeat, d = q.shape[1], q.shape[1] // k.shape[1], q.shape[-1]
    rows, keys = slice(block.q0, block.q1), slice(block.k0, block.k1)
    tensors = [x[rows] for x in (dout, q, out)] + [x[keys] for x in (k, v)]
    if dlse is not None:
        # The kernel computes delta = dout . out itself. One more column, with dlse in dout, 1 in v and 0
        # elsewhere, adds dlse to every dp and nothing to delta: exactly the gradient of the lse.
        fills = [dlse[rows, :, None], 0.0, 0.0, 0.0, 1.0]
        tensors = [_with_column(x, fill) for x, fill in zip(tensors, fills, strict=True)]
    dout_block, q_block, out_block, k_block, v_block = tensors
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _queries(dout_block, repeat, dtype),
        _queries(q_block, repeat, dtype),
        _keys(k_block, repeat, dtype),
        _keys(v_block, repeat, dtype),
        _queries(out_block, repeat, dtype),
        _queries(lse[rows, :, None], repeat, dtype)[..., 0],
        0.0,
        block.causal,
        scale=scale,
    )
    return (
        _rows(dq, heads)[..., :d],
        dk.sum(dim=1).transpose(0, 1)[..., :d],
        dv.sum(dim=1).transpose(0, 1)[..., :d],
    )


def _with_column(x: Tensor, fill: Tensor | float) -> Tensor:
    column = x.new_empty(*x.shape[:-1], 1)
    column[...] = fill
    return torch.cat([x, column], dim=-1)


def _queries(x: Tensor, repeat: int, dtype: torch.dtype) -> Tensor:
    """(rows, heads, d) -> (kv_heads, repeat, rows, d), a view unless the dtype changes."""
    return x.to(dtype).unflatten(1, (-1, repeat)).permute(1, 2, 0, 3)


def _keys(x: Tensor, repeat: int, dtype: torch.dtype) -> Tensor:
    """(keys, kv_heads, d) -> (kv_heads, repeat, keys, d), expanded without a copy."""
    return x.to(dtype).transpose(0, 1)[:, None].expand(-1, repeat, -1, -1)


def _rows(x: Tensor, heads: int) -> Tensor:
    """(kv_heads, repeat, rows, d) -> (rows, heads, d)."""
    return x.permute(2, 0, 1, 3).flatten(1, 2)
