"""Builds the C++/CUDA shard gather where a compiler and torch are there; the package works without it.

pip's isolated build environment has no torch, so `make` installs torch first and then runs
`pip install --no-build-isolation -e .`, which compiles the extension for that very torch.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

SOURCE = Path("csrc/shard_gather.cpp")
CUDA_SOURCE = Path("csrc/shard_gather_cuda.cu")


def extension() -> tuple[list[Any], dict[str, Any]]:
    """`(ext_modules, cmdclass)`; both empty, with one line that says why, where it cannot be built."""
    if not SOURCE.exists():
        return skipped(f"{SOURCE} is not there")
    if not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        return skipped("no C++ compiler (c++, g++ or clang++) was found")
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        return skipped(f"torch cannot be imported here ({error}); install it, then use --no-build-isolation")
    sources, macros = [str(SOURCE)], []
    kind: Any = cpp_extension.CppExtension
    if CUDA_SOURCE.exists() and torch.version.cuda and cpp_extension.CUDA_HOME and shutil.which("nvcc"):
        kind = cpp_extension.CUDAExtension
        sources.append(str(CUDA_SOURCE))
        macros.append(("WITH_CUDA", None))
    module = kind(
        "megavila._shard_gather",
        sources,
        define_macros=macros,
        extra_compile_args={"cxx": ["-O3", "-std=c++20"]},
    )
    module.optional = True  # a failing compiler is reported and the package is installed without it
    use_ninja = shutil.which("ninja") is not None
    return [module], {"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=use_ninja)}


def skipped(why: str) -> tuple[list[Any], dict[str, Any]]:
    """No extension, and the reason on stderr."""
    print(f"megavila: not building the C++ extension megavila._shard_gather: {why}", file=sys.stderr)
    return [], {}


if __name__ == "__main__":
    modules, commands = extension()
    setup(
        ext_modules=modules, cmdclass=commands, package_dir={"megavila_kernels": "kernels/megavila_kernels"}
    )
