"""The specification, as transformers' MLP computes it."""

import torch.nn.functional as F
from torch import Tensor


def reference_swiglu(gate_up: Tensor) -> Tensor:
    """See `swiglu`; in gate_up's dtype, plain autograd."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
