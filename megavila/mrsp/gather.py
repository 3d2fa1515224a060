"""A rank's padded shard of a sequence, written in one pass from wherever its rows lie."""

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megavila.runtime.logging import get_logger

EXTENSION = "megavila._shard_gather"


def padded_shard_gather(
    sources: Sequence[Tensor], source_index: Tensor, row_index: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """Row i of the result is `sources[source_index[i]][row_index[i]]`, or zeros where source_index is -1.

    Args:
        sources: (rows_i, D) tensors of one dtype, on the indices' device; pinned host memory will do for CUDA.
        source_index: int32 (S,), -1 for padding.
        row_index: int64 (S,); not looked at where source_index is -1.
        out: contiguous (S, D) to write instead of a new tensor, apart from the sources; only where no gradient
            is wanted, because a result that carries one lives until its backward pass.

    Returns:
        (S, D) on the indices' device. Gradients are added up per source row in fp32 (fp64 for fp64), on a CPU
        in an order that does not depend on the number of threads.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or `out` with gradient. IndexError: an index out of range (on CUDA the
        kernel traps instead).

    Runs in C++ or CUDA where the extension is built, and in plain torch, with one warning, where it is not.
    """
    extension = load_extension()
    if out is not None and torch.is_grad_enabled() and any(source.requires_grad for source in sources):
        raise ValueError(
            "out cannot hold a result that carries gradient; leave it out, or use torch.no_grad()"
        )
    if extension is None:
        return reference_gather(sources, source_index, row_index, out=out)
    if out is not None:
        return extension.gather(list(sources), source_index, row_index, out)
    return _ShardGather.apply(extension, source_index, row_index, *sources)  # type: ignore[no-any-return]


@functools.cache
def load_extension() -> Any | None:
    """The compiled module, or None, with one warning, where it was not built."""
    try:
        return importlib.import_module(EXTENSION)
    except ImportError as error:
        get_logger(__name__).warning(
            f"{EXTENSION} is not built ({error}): shards are gathered in plain torch, which takes more memory; "
            "install a C++ compiler and reinstall the package (make install)"
        )
        return None


def reference_gather(
    sources: Sequence[Tensor], source_index: Tensor, row_index: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """`padded_shard_gather` in plain torch: its specification, and the fallback."""
    device = source_index.device
    rows = torch.tensor([len(source) for source in sources], device=device)
    real = source_index >= 0
    known = source_index.long().clamp(0, len(sources) - 1)
    wrong = (source_index < -1) | (source_index >= len(sources))
    wrong |= real & ((row_index < 0) | (row_index >= rows[known]))
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        raise IndexError(
            f"shard row {i} names row {int(row_index[i])} of source {int(source_index[i])}, but the sources have "
            f"{rows.tolist()} rows (source -1 is padding)"
        )
    first = rows.cumsum(0) - rows
    padding = sources[0].new_zeros(1, sources[0].shape[1], device=device)
    flat = torch.cat([*(source.to(device) for source in sources), padding])
    if out is not None and out.shape != (len(source_index), flat.shape[1]):  # index_select would resize it
        raise ValueError(f"out must be ({len(source_index)}, {flat.shape[1]}); got {tuple(out.shape)}")
    return torch.index_select(flat, 0, torch.where(real, first[known] + row_index, len(flat) - 1), out=out)


class _ShardGather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, extension: Any, source_index: Tensor, row_index: Tensor, *sources: Tensor
    ) -> Tensor:
        ctx.extension = extension
        ctx.rows = [len(source) for source in sources]
        ctx.devices = [source.device for source in sources]
        ctx.save_for_backward(source_index, row_index)
        return extension.gather(list(sources), source_index, row_index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        source_index, row_index = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[3:])
        parts = ctx.extension.scatter_add(grads[0], source_index, row_index, ctx.rows, needed)
        moved = [
            None if part is None else part.to(device) for part, device in zip(parts, ctx.devices, strict=True)
        ]
        return (None, None, None, *moved)
