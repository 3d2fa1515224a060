"""Megatron-core's parallel linear layers, without their machinery where one rank holds the whole weight.

At tensor-parallel degree 1 Megatron-core still goes through three autograd functions written for
communication. On small models, and in every decoding step, those cost as much as the matrix product.
"""

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel


class ColumnParallelLinear(tensor_parallel.ColumnParallelLinear):
    """Weight cut along the output dimension."""

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(tokens / SP, 1, in) -> (tokens, 1, out / TP), and the bias if adding it is left to the caller."""
        if self.tp_group.size() > 1 or self.gradient_accumulation_fusion:
            return super().forward(input_, weight, runtime_gather_output)
        bias = None if self.skip_bias_add else self.bias
        output = F.linear(input_, self.weight if weight is None else weight, bias)
        return output, self.bias if self.skip_bias_add else None


class RowParallelLinear(tensor_parallel.RowParallelLinear):
    """Weight cut along the input dimension."""

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(tokens, 1, in / TP) -> (tokens / SP, 1, out), and the bias if adding it is left to the caller."""
        if self.tp_group.size() > 1 or self.gradient_accumulation_fusion:
            return super().forward(input_)
        bias = None if self.skip_bias_add else self.bias
        return F.linear(input_, self.weight, bias), self.bias if self.skip_bias_add else None
