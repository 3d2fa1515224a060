"""The device a run computes on: CUDA with NCCL, or a CPU with gloo."""

import resource
import sys
from dataclasses import dataclass
from typing import Literal

import torch

from megavila.runtime.errors import MegavilaError

_GIB = 1024**3

# Dense bf16 TFLOP/s of the tensor cores, as the vendor's data sheets give them.
_PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0}


@dataclass(frozen=True)
class Platform:
    """What differs between devices. Obtained from `get_platform`."""

    name: Literal["cpu", "cuda"]

    @property
    def device(self) -> torch.device:
        """Where tensors live: the CPU, or this process's own GPU (chosen by `topology.initialize`)."""
        return (
            torch.device("cuda", torch.cuda.current_device()) if self.name == "cuda" else torch.device("cpu")
        )

    @property
    def backend(self) -> Literal["gloo", "nccl"]:
        """The torch.distributed backend for tensors on this device."""
        return "nccl" if self.name == "cuda" else "gloo"

    def synchronize(self) -> None:
        """Waits until all queued work is done, so that a clock read afterwards means something."""
        if self.name == "cuda":
            torch.cuda.synchronize()

    def peak_memory_gib(self) -> float:
        """Most memory held at once so far, in GiB: tensors on the GPU, or the CPU process's resident set."""
        if self.name == "cuda":
            return torch.cuda.max_memory_allocated() / _GIB
        return cpu_peak_memory_gib()

    def peak_tflops(self) -> float | None:
        """Most dense bf16 TFLOP/s of this GPU; None for a CPU or a GPU that is not in the table."""
        name = torch.cuda.get_device_name() if self.name == "cuda" else ""
        return next((peak for key, peak in _PEAK_TFLOPS.items() if key in name), None)

    def default_dtype(self) -> torch.dtype:
        """What `model.dtype: auto` means: bfloat16 on CUDA, float32 on a CPU."""
        return torch.bfloat16 if self.name == "cuda" else torch.float32


def cpu_peak_memory_gib() -> float:
    """Largest resident set of this process so far, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB


def get_platform(device: str = "auto") -> Platform:
    """The platform called "cpu", "cuda" or "auto" (CUDA where there is a device)."""
    if device not in ("auto", "cpu", "cuda"):
        raise MegavilaError(f"device is {device!r}; use auto, cpu or cuda")
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        why = "found no GPU" if torch.version.cuda else "is a CPU build"
        raise MegavilaError(f"device is cuda but torch {torch.__version__} {why}; use run.device=cpu")
    return Platform("cuda" if device == "cuda" or (device == "auto" and available) else "cpu")
