"""Tile sizes, warps and pipeline stages of the interval attention kernels, by GPU and head dimension.

Every configuration here is cross-compiled by tools/kernel_report.py, which fails when one spills registers.
They are fixed rather than autotuned: the runs of a mask depend on the tile size, and a result must not depend
on which configuration won a race.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
# On a GPU. fp32 products run on the ordinary cores, for which Triton keeps whole rows of both operands in registers.
MAX_HEAD_DIM_FP32 = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class KernelConfig:
    """block_q, block_k: rows and keys of a tile. maxnreg: said to ptxas where it would rather spill than use all
    registers of a thread."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    @property
    def launch(self) -> dict[str, int]:
        """Triton's options of a launch."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.maxnreg is None else options | {"maxnreg": self.maxnreg}


# [kernel][GPU][padded head dimension up to]. "small": 99 KiB of shared memory a multiprocessor (sm_86, sm_89,
# sm_120), which any later GPU has too.
HALF: dict[str, dict[str, dict[int, KernelConfig]]] = {
    "forward": {
        "sm_90": {
            64: KernelConfig(128, 64, 4, 3),
            128: KernelConfig(128, 64, 8, 3),
            256: KernelConfig(128, 32, 8, 2),
        },
        "sm_80": {
            64: KernelConfig(128, 64, 8, 3),
            128: KernelConfig(128, 64, 8, 3),
            256: KernelConfig(64, 32, 8, 2),
        },
        "small": {
            64: KernelConfig(128, 64, 8, 2),
            128: KernelConfig(64, 64, 8, 2),
            256: KernelConfig(64, 32, 8, 1),
        },
    },
    "dq": {
        "sm_90": {
            64: KernelConfig(128, 64, 8, 3),
            128: KernelConfig(128, 64, 8, 2),
            256: KernelConfig(64, 32, 8, 2),
        },
        "sm_80": {
            64: KernelConfig(128, 64, 8, 3),
            128: KernelConfig(128, 32, 8, 2),
            256: KernelConfig(64, 32, 8, 2),
        },
        "small": {
            64: KernelConfig(64, 64, 4, 2),
            128: KernelConfig(64, 32, 4, 2),
            256: KernelConfig(32, 32, 4, 1),
        },
    },
    "dkdv": {
        "sm_90": {
            64: KernelConfig(64, 128, 8, 2),
            128: KernelConfig(64, 128, 8, 2),
            256: KernelConfig(32, 64, 8, 2),
        },
        "sm_80": {
            64: KernelConfig(64, 64, 8, 2),
            128: KernelConfig(128, 64, 8, 2),
            256: KernelConfig(32, 64, 8, 1),
        },
        "small": {
            64: KernelConfig(64, 64, 8, 2),
            128: KernelConfig(32, 64, 8, 2),
            256: KernelConfig(32, 32, 8, 1),
        },
    },
}
# fp32, at full precision: for comparisons rather than for training.
FULL_PRECISION = {
    "forward": {64: KernelConfig(32, 32, 8, 1), 128: KernelConfig(16, 16, 8, 1)},
    "dq": {64: KernelConfig(32, 32, 4, 1), 128: KernelConfig(16, 16, 8, 1)},
    "dkdv": {64: KernelConfig(32, 16, 8, 1), 128: KernelConfig(16, 16, 8, 1, maxnreg=255)},
}
# What Triton's interpreter takes grows with the number of tiles.
INTERPRETER = KernelConfig(64, 64, 4, 1)


def unsupported(q: Tensor) -> str | None:
    """Why the kernels cannot run on inputs like q, or None."""
    if q.dtype not in DTYPES:
        return f"dtype {q.dtype} is not one of {', '.join(str(x) for x in DTYPES)}"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"head dimension {q.shape[-1]} is greater than {MAX_HEAD_DIM}"
    if q.dtype == torch.float32 and q.shape[-1] > MAX_HEAD_DIM_FP32 and q.device.type != "cpu":
        return f"head dimension {q.shape[-1]} is greater than {MAX_HEAD_DIM_FP32}, the limit in fp32 on a GPU"
    return None


def padded_head_dim(d: int) -> int:
    """The power of two, at least 16, that a tile's columns are padded to."""
    return max(16, 1 << (d - 1).bit_length())


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 products are not rounded to TF32; half precision ignores this."""
    return "ieee" if dtype == torch.float32 else "tf32"


def select_config(kernel: str, device: torch.device, d: int, dtype: torch.dtype) -> KernelConfig:
    """The configuration of `kernel` ("forward", "dq" or "dkdv") for `device`."""
    if device.type == "cpu":
        return INTERPRETER
    return config_for(kernel, capability_of(device), d, dtype)


def config_for(kernel: str, capability: tuple[int, int], d: int, dtype: torch.dtype) -> KernelConfig:
    """The configuration on a GPU of this compute capability."""
    columns = max(64, padded_head_dim(d))
    if dtype == torch.float32:
        return FULL_PRECISION[kernel][columns]
    return HALF[kernel][gpu_class(capability)][columns]


def gpu_class(capability: tuple[int, int]) -> str:
    """ "sm_90", "sm_80" or "small", by shared memory."""
    if capability in ((9, 0), (10, 0), (10, 3)):
        return "sm_90"
    return "sm_80" if capability == (8, 0) else "small"


@cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability; (8, 0) for a CPU, where kernels are interpreted."""
    return (8, 0) if device.type == "cpu" else torch.cuda.get_device_capability(device)
