"""SwiGLU, the gated activation of the decoder's MLP."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class _SwiGlu(torch.autograd.Function):
    """Keeps only its input for the backward pass, and makes no copy of the two halves."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        return _swiglu(gate_up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        d_gate, d_up = out.chunk(2, dim=-1)
        torch.mul(F.silu(gate), grads[0], out=d_up)
        d_gate.copy_(torch.ops.aten.silu_backward(grads[0] * up, gate))
        return out


class SwiGlu(nn.Module):
    """[gate | up] (…, 2n) -> silu(gate) · up (…, n) (Shazeer, 2020).

    Takes the place of Megatron-core's chain of element-wise passes as the `activation_func` submodule of its
    MLP.
    """

    def __init__(self, config: Any = None) -> None:
        super().__init__()

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            return _SwiGlu.apply(gate_up)  # type: ignore[return-value]
        return _swiglu(gate_up)


def _swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
