"""The public functions: shapes and limits are checked here, then the kernels are launched."""

# Triton's launch syntax, kernel[grid](…), is not in its type stubs.
# pyright: reportCallIssue=false

from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Tokens of the vocabulary that one program goes through.
SPLIT = 4096


@dataclass(frozen=True)
class ProductConfig:
    """rows, vocabulary, features: the tile of the matrix product."""

    rows: int
    vocabulary: int
    features: int
    num_warps: int
    num_stages: int


def product_config(dtype: torch.dtype) -> ProductConfig:
    """One choice for sm_80 and later; fits 99 KiB of shared memory."""
    if dtype == torch.float32:
        return ProductConfig(64, 64, 16, 8, 2)
    return ProductConfig(128, 128, 64, 8, 3)


def vocab_partials(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Softmax statistics of x = hidden @ weightᵀ / temperature over this rank's part of the vocabulary.

    Args:
        hidden: (n, size), fp16, bf16 or fp32.
        weight: (vocabulary, size), same dtype.
        target: (n,) integer rows of `weight`; a target outside [0, vocabulary) is another rank's.
        temperature: > 0.

    Returns:
        peak (n,), the largest x of each row, and sums (3, n): Σ exp(x - peak), x of the target (0 if it is
        another rank's), Σ x exp(x - peak). fp32. Not differentiable: see `logit_gradients`.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    from megavila_kernels.linear_logprob.triton_kernels import partials_kernel

    _check(hidden, weight, target, temperature)
    n, vocabulary = hidden.shape[0], weight.shape[0]
    config = product_config(hidden.dtype)
    splits = -(-vocabulary // SPLIT)
    partials = torch.empty((splits, 4, n), dtype=torch.float32, device=hidden.device)
    if n:
        partials_kernel[(-(-n // config.rows) * splits,)](
            hidden,
            weight,
            target,
            partials,
            n,
            vocabulary,
            hidden.stride(0),
            weight.stride(0),
            1.0 / temperature,
            SIZE=hidden.shape[1],
            SPLIT=SPLIT,
            BLOCK_ROWS=config.rows,
            BLOCK_VOCAB=config.vocabulary,
            BLOCK_SIZE=config.features,
            PRECISION="ieee" if hidden.dtype == torch.float32 else "tf32",
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    tops = partials[:, 0]
    peak = tops.amax(dim=0)
    shrink = torch.exp(tops - peak)
    sums = torch.stack(
        [(partials[:, 1] * shrink).sum(0), partials[:, 2].sum(0), (partials[:, 3] * shrink).sum(0)]
    )
    return peak, sums


def logit_gradients(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float,
    lse: Tensor,
    entropy: Tensor | None,
    d_logprob: Tensor,
    d_entropy: Tensor | None,
) -> Tensor:
    """Gradient (n, vocabulary) of the logits before the division by temperature, in hidden's dtype.

    Arguments as in `vocab_partials`, and of the whole vocabulary: lse and entropy (n,) fp32, the upstream
    gradients of the log-probability and the entropy (n,) fp32; entropy and d_entropy None where unused. The
    caller keeps n small (a chunk of rows): this is the one matrix of the vocabulary's width.
    """
    from megavila_kernels.linear_logprob.triton_kernels import gradient_kernel

    _check(hidden, weight, target, temperature)
    n, vocabulary = hidden.shape[0], weight.shape[0]
    config = product_config(hidden.dtype)
    d_logits = torch.empty((n, vocabulary), dtype=hidden.dtype, device=hidden.device)
    with_entropy = entropy is not None and d_entropy is not None
    if n:
        gradient_kernel[(-(-n // config.rows) * -(-vocabulary // config.vocabulary),)](
            hidden,
            weight,
            target,
            lse.contiguous(),
            # An argument must be a tensor even where a constant says that it is not read.
            entropy.contiguous() if with_entropy else lse,  # type: ignore[union-attr]
            d_logprob.contiguous(),
            d_entropy.contiguous() if with_entropy else lse,  # type: ignore[union-attr]
            d_logits,
            n,
            vocabulary,
            hidden.stride(0),
            weight.stride(0),
            1.0 / temperature,
            SIZE=hidden.shape[1],
            BLOCK_ROWS=config.rows,
            BLOCK_VOCAB=config.vocabulary,
            BLOCK_SIZE=config.features,
            WITH_ENTROPY=with_entropy,
            PRECISION="ieee" if hidden.dtype == torch.float32 else "tf32",
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return d_logits


def _check(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"expected hidden (n, size) and weight (vocabulary, size); got {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if target.shape != hidden.shape[:1]:
        raise ValueError(f"{hidden.shape[0]} hidden rows but targets of shape {tuple(target.shape)}")
    if hidden.dtype != weight.dtype or hidden.dtype not in DTYPES:
        raise ValueError(
            f"hidden and weight must share one of {DTYPES}; got {hidden.dtype} and {weight.dtype}"
        )
    if hidden.stride(1) != 1 or weight.stride(1) != 1:
        raise ValueError("rows of hidden and weight must be contiguous; call .contiguous()")
    if weight.shape[0] == 0 or not temperature > 0:
        raise ValueError(
            f"the vocabulary ({weight.shape[0]}) and the temperature ({temperature}) must be above 0"
        )
