"""The specification: transformers' formula, with the half-turned copy in memory."""

import torch
from torch import Tensor


def reference_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `rotate`; in x's dtype, plain autograd."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    cos, sin = (torch.cat([angle, angle], dim=-1)[:, None].to(x.dtype) for angle in (cos, sin))
    return x * cos + turned * sin
