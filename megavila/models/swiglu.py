"""SwiGLU, the gated activation of the decoder's MLP."""

from typing import Any

import torch
from megavila_kernels.swiglu import swiglu
from torch import nn


class SwiGlu(nn.Module):
    """[gate | up] (…, 2n) -> silu(gate) · up (…, n) (Shazeer, 2020).

    Takes the place of Megatron-core's chain of element-wise passes as the `activation_func` submodule of its
    MLP.
    """

    def __init__(self, config: Any = None) -> None:
        super().__init__()

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        return swiglu(gate_up)
