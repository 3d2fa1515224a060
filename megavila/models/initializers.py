"""How parameters start: each function fills one full checkpoint tensor, neither fused nor cut."""

import math

import torch

from megavila.models.mapping import Initializer


def ones(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Norm weights."""
    tensor.fill_(1.0)


def zeros(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Biases."""
    tensor.zero_()


def normal(std: float) -> Initializer:
    """Gaussian with standard deviation `std`."""

    def fill(tensor: torch.Tensor, generator: torch.Generator) -> None:
        tensor.normal_(0.0, std, generator=generator)

    return fill


def lecun_normal(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Variance 1 / fan-in (LeCun et al., 1998): keeps the scale of a normalised input."""
    tensor.normal_(0.0, tensor[0].numel() ** -0.5, generator=generator)


def xavier_uniform(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Uniform with variance 2 / (fan-in + fan-out) (Glorot and Bengio, 2010)."""
    bound = math.sqrt(6.0 / (tensor.shape[0] + tensor[0].numel()))
    tensor.uniform_(-bound, bound, generator=generator)
