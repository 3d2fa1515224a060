"""Interval attention on Triton kernels: allocation, launches, and what they support."""

# Triton's launch syntax, kernel[grid](…), is not in its type stubs.
# pyright: reportCallIssue=false

import torch
from torch import Tensor

from megavila_kernels.interval_attention.backend import AttentionState, Gradients, RowGradients
from megavila_kernels.interval_attention.mask import IntervalMask
from megavila_kernels.interval_attention.triton_backward import dkdv_kernel, dq_kernel, prepare_kernel
from megavila_kernels.interval_attention.triton_config import (
    dot_precision,
    padded_head_dim,
    select_config,
    unsupported,
)
from megavila_kernels.interval_attention.triton_forward import forward_kernel

LOG2E = 1.4426950408889634
PREPARE_ROWS = 32


class TritonBackend:
    """See `Backend`. Raises ValueError where the kernels do not support the inputs."""

    def accumulate(
        self, q: Tensor, k: Tensor, v: Tensor, mask: IntervalMask, scale: float, state: AttentionState | None
    ) -> AttentionState:
        following = state
        if following is None:
            rows = q.shape[:2]
            following = AttentionState(
                acc=torch.empty(q.shape, dtype=torch.float32, device=q.device),
                top=torch.empty(rows, dtype=torch.float32, device=q.device),
                total=torch.empty(rows, dtype=torch.float32, device=q.device),
            )
        _launch_forward(q, k, v, mask, scale, following, state is not None, None)
        return following

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: IntervalMask,
        scale: float,
        state: AttentionState | None = None,
    ) -> tuple[Tensor, Tensor]:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        _launch_forward(q, k, v, mask, scale, state, state is not None, (out, lse))
        return out, lse

    def row_gradients(self, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor) -> RowGradients:
        tokens, heads, d = out.shape
        dout, out = _rows_contiguous(dout), _rows_contiguous(out)
        prepared = torch.empty((2, heads, tokens), dtype=torch.float32, device=out.device)
        programs = -(-tokens // PREPARE_ROWS) * heads
        if programs:
            prepare_kernel[(programs,)](
                dout,
                out,
                lse.contiguous(),
                # An argument must be a tensor even where a constant says that it is not read.
                prepared if dlse is None else dlse.contiguous(),
                prepared,
                *dout.stride()[:2],
                *out.stride()[:2],
                tokens,
                HEADS=heads,
                D=d,
                BLOCK_D=padded_head_dim(d),
                BLOCK_Q=PREPARE_ROWS,
                HAS_DLSE=dlse is not None,
            )
        return RowGradients(dout, out, lse, dlse, prepared)

    def backward(
        self,
        rows: RowGradients,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: IntervalMask,
        scale: float,
        into: Gradients | None = None,
    ) -> Gradients:
        q, k, v = _rows_contiguous(q), _rows_contiguous(k), _rows_contiguous(v)
        grads = into
        if grads is None:
            grads = Gradients(*(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)))
        for x in (grads.dq, grads.dk, grads.dv):
            if not x.is_contiguous():
                raise ValueError(f"gradient accumulators must be contiguous; got strides {x.stride()}")
        _launch_backward("dq", rows, q, k, v, mask, scale, (grads.dq,), into is not None)
        _launch_backward("dkdv", rows, q, k, v, mask, scale, (grads.dk, grads.dv), into is not None)
        return grads


def _launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    scale: float,
    state: AttentionState | None,
    load_state: bool,
    ending: tuple[Tensor, Tensor] | None,
) -> None:
    """Reads `state` if `load_state`, and writes out and lse to `ending` or else the new state to `state`."""
    _check(q, scale)
    q, k, v = _rows_contiguous(q), _rows_contiguous(k), _rows_contiguous(v)
    heads, d = q.shape[1:]
    config = select_config("forward", q.device, d, q.dtype)
    plan = mask.tile_runs(config.block_q, config.block_k, False, q.device)
    # See above on arguments that are not read.
    acc, top, total = (q, q, q) if state is None else (state.acc, state.top, state.total)
    out, lse = (q, q) if ending is None else ending
    programs = plan.table.shape[0] * heads
    if programs == 0:
        return
    forward_kernel[(programs,)](
        q,
        k,
        v,
        plan.lo,
        plan.hi,
        plan.table,
        plan.runs,
        acc,
        top,
        total,
        out,
        lse,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        q.shape[0],
        k.shape[0],
        scale * LOG2E,
        HEADS=heads,
        REPEAT=heads // k.shape[1],
        D=d,
        BLOCK_D=padded_head_dim(d),
        BLOCK_Q=config.block_q,
        BLOCK_K=config.block_k,
        INTERVALS=plan.lo.shape[0],
        LOAD_STATE=load_state,
        FINISH=ending is not None,
        PRECISION=dot_precision(q.dtype),
        **config.launch,
    )


def _launch_backward(
    name: str,
    rows: RowGradients,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    scale: float,
    targets: tuple[Tensor, ...],
    accumulate: bool,
) -> None:
    """ "dq" fills or adds to targets (dq,), "dkdv" to (dk, dv)."""
    _check(q, scale)
    assert rows.prepared is not None
    by_keys = name == "dkdv"
    kernel = dkdv_kernel if by_keys else dq_kernel
    heads, d = q.shape[1:]
    config = select_config(name, q.device, d, q.dtype)
    plan = mask.tile_runs(config.block_q, config.block_k, by_keys, q.device)
    programs = plan.table.shape[0] * (k.shape[1] if by_keys else heads)
    if programs == 0:
        return
    kernel[(programs,)](
        q,
        k,
        v,
        rows.dout,
        rows.prepared,
        plan.lo,
        plan.hi,
        plan.table,
        plan.runs,
        *targets,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *rows.dout.stride()[:2],
        q.shape[0],
        k.shape[0],
        scale,
        HEADS=heads,
        REPEAT=heads // k.shape[1],
        D=d,
        BLOCK_D=padded_head_dim(d),
        BLOCK_Q=config.block_q,
        BLOCK_K=config.block_k,
        INTERVALS=plan.lo.shape[0],
        ACCUMULATE=accumulate,
        PRECISION=dot_precision(q.dtype),
        **config.launch,
    )


def _check(q: Tensor, scale: float) -> None:
    reason = unsupported(q)
    if reason is not None:
        raise ValueError(f"the Triton attention kernels do not support this: {reason}; use backend='torch'")
    if not scale > 0:
        raise ValueError(f"the Triton attention kernels need a scale above 0; got {scale}")


def _rows_contiguous(x: Tensor) -> Tensor:
    """Any strides between tokens and heads will do, for views into a fused q, k, v projection."""
    return x if x.stride(-1) == 1 else x.contiguous()
