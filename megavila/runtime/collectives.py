"""Small collectives over a process group; tensors go on the group's device, any dtype."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def broadcast_object(obj: T | None, group: dist.ProcessGroup, src: int = 0) -> T:
    """The picklable `obj` of the group's rank `src`, on every rank; other ranks' `obj` is ignored."""
    if group.size() == 1:
        return obj  # type: ignore[return-value]
    box: list[Any] = [obj]
    dist.broadcast_object_list(box, src=dist.get_global_rank(group, src), group=group)
    return box[0]


def gather_objects(obj: T, group: dist.ProcessGroup) -> list[T]:
    """Every rank's picklable `obj`, in the order of ranks, on every rank."""
    if group.size() == 1:
        return [obj]
    objects: list[Any] = [None] * group.size()
    dist.all_gather_object(objects, obj, group=group)
    return objects


def all_reduce_sum(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum over ranks as a new tensor; half-precision types are summed in float32. Not differentiable."""
    return _all_reduce(tensor, dist.ReduceOp.SUM, group)


def all_reduce_max(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Elementwise maximum over ranks as a new tensor. Not differentiable."""
    return _all_reduce(tensor, dist.ReduceOp.MAX, group)


def barrier(group: dist.ProcessGroup) -> None:
    """Returns once every rank of the group has called it."""
    if group.size() > 1:
        dist.barrier(group=group)


def _all_reduce(tensor: torch.Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup) -> torch.Tensor:
    narrow = tensor.dtype in (torch.bfloat16, torch.float16)
    result = tensor.detach().to(torch.float32 if narrow else tensor.dtype, copy=True).contiguous()
    if group.size() > 1:
        dist.all_reduce(result, op=op, group=group)
    return result.to(tensor.dtype)
