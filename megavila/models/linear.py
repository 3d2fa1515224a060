"""Megatron-core's parallel linear layers, without their machinery where one rank holds the whole weight.

At tensor-parallel degree 1 Megatron-core still goes through three autograd functions written for communication.
On small models, and in every decoding step, those cost as much as the matrix product.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel


class ColumnParallelLinear(tensor_parallel.ColumnParallelLinear):
    """Weight cut along the output dimension."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_plain = (
            self.output_size_per_partition == self.output_size and not self.gradient_accumulation_fusion
        )

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(tokens / SP, 1, in) -> (tokens, 1, out / TP), and the bias if adding it is left to the caller."""
        weight = self.weight if weight is None else weight
        if not self.is_plain or weight is None:
            return super().forward(input_, weight, runtime_gather_output)
        bias = None if self.skip_bias_add else self.bias
        return F.linear(input_, weight, bias), self.bias if self.skip_bias_add else None


class RowParallelLinear(tensor_parallel.RowParallelLinear):
    """Weight cut along the input dimension."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_plain = (
            self.input_size_per_partition == self.input_size and not self.gradient_accumulation_fusion
        )

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(tokens, 1, in / TP) -> (tokens / SP, 1, out), and the bias if adding it is left to the caller."""
        if not self.is_plain:
            return super().forward(input_)
        bias = None if self.skip_bias_add else self.bias
        return F.linear(input_, self.weight, bias), self.bias if self.skip_bias_add else None
