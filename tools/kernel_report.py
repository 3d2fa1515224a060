"""Compiles every shipped Triton kernel for GPUs that need not be here and reports what the compiler made of it.

For each kernel, GPU, head dimension, dtype and mode: registers, shared memory, stack, tensor-core instructions
(HMMA, or HGMMA on sm_90) and asynchronous copies (LDGSTS, or UTMA) in the machine code. A stack means that
registers spill to memory: one in any shipped configuration makes the exit code 1, and so does, in half precision, a
matrix product without tensor cores or a pipelined loop without asynchronous copies. Needs Triton, whose wheel brings
ptxas and cuobjdump, but neither a GPU nor CUDA.

    python tools/kernel_report.py                        # everything
    python tools/kernel_report.py --only 'sm90 .*d=128'  # head dimension 128 on sm_90
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# Kernels must be compiled, not interpreted.
os.environ["TRITON_INTERPRET"] = "0"

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "kernels")]
from megavila_kernels.interval_attention import triton_backward, triton_forward  # noqa: E402
from megavila_kernels.interval_attention.triton_backend import PREPARE_ROWS  # noqa: E402
from megavila_kernels.interval_attention.triton_config import (  # noqa: E402
    MAX_HEAD_DIM_FP32,
    KernelConfig,
    config_for,
    dot_precision,
    padded_head_dim,
)
from megavila_kernels.linear_logprob import triton_kernels  # noqa: E402
from megavila_kernels.linear_logprob.interface import SPLIT, product_config  # noqa: E402
from megavila_kernels.rotary import triton_kernels as rotary_kernels  # noqa: E402
from megavila_kernels.rotary.interface import tile as rotary_tile  # noqa: E402
from megavila_kernels.shared_prefix_decode import triton_kernels as decode_kernels  # noqa: E402
from megavila_kernels.shared_prefix_decode.triton_config import BLOCK_SLOTS, decode_config  # noqa: E402
from megavila_kernels.swiglu import triton_kernels as swiglu_kernels  # noqa: E402
from megavila_kernels.swiglu.interface import BLOCK as SWIGLU_BLOCK  # noqa: E402

from benchmarks.machine import measured  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
DEFAULTS = {"num_warps": 4, "num_stages": 3}  # Triton's
INSTRUCTIONS = ("HMMA", "HGMMA", "LDGSTS", "UTMA")


@dataclass(frozen=True)
class Variant:
    """One compilation: `types` and `constants` cover all arguments of the kernel between them."""

    label: str
    kernel: Any
    capability: int  # 90 for sm_90
    constants: dict[str, Any]
    types: dict[str, str]
    launch: dict[str, int]  # num_warps, num_stages and other options


@dataclass(frozen=True)
class Compiled:
    registers: int
    stack: int
    shared_bytes: int
    instructions: dict[str, int]


def argument_types(kernel: Any, constants: dict[str, Any], pointers: dict[str, str]) -> dict[str, str]:
    """Triton's signature: `pointers` where named, i32 for sizes and strides, fp32 for scales."""
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in pointers:
            types[name] = "*" + pointers[name]
        else:
            types[name] = "fp32" if name.startswith("scale") else "i32"
    return types


def attention_variants(
    capabilities: list[int], head_dims: list[int], dtypes: list[torch.dtype], carried: list[bool]
) -> Iterator[Variant]:
    """The three attention kernels, with two intervals a row as shared prefixes have, 28 query on 4 K/V heads.

    carried: with fp32 state or gradients read and written, as within a ring.
    """
    kernels = {
        "forward": triton_forward.forward_kernel,
        "dq": triton_backward.dq_kernel,
        "dkdv": triton_backward.dkdv_kernel,
    }
    for capability in capabilities:
        for d in head_dims:
            for dtype in dtypes:
                for name, kernel in kernels.items():
                    for carry in carried:
                        config = config_for(name, divmod(capability, 10), d, dtype)
                        yield _attention_variant(name, kernel, capability, d, dtype, carry, config)


def _attention_variant(
    name: str, kernel: Any, capability: int, d: int, dtype: torch.dtype, carry: bool, config: KernelConfig
) -> Variant:
    constants: dict[str, Any] = {
        "HEADS": 28,
        "REPEAT": 7,
        "D": d,
        "BLOCK_D": padded_head_dim(d),
        "BLOCK_Q": config.block_q,
        "BLOCK_K": config.block_k,
        "INTERVALS": 2,
        "PRECISION": dot_precision(dtype),
    }
    if name == "forward":
        constants |= {"LOAD_STATE": carry, "FINISH": not carry}
    else:
        constants["ACCUMULATE"] = carry
    pointers = dict.fromkeys(("q", "k", "v", "out", "dout"), TYPE_NAMES[dtype])
    pointers |= dict.fromkeys(("dq", "dk", "dv"), "fp32" if carry else TYPE_NAMES[dtype])
    pointers |= dict.fromkeys(("acc_state", "top_state", "total_state", "lse", "prepared"), "fp32")
    pointers |= dict.fromkeys(("lo", "hi", "table", "runs"), "i32")
    return Variant(
        label=f"attention {name} d={d} {TYPE_NAMES[dtype]} {config.block_q}x{config.block_k} "
        f"w{config.num_warps} s{config.num_stages}{' carried' if carry else ''}",
        kernel=kernel,
        capability=capability,
        constants=constants,
        types=argument_types(kernel, constants, pointers),
        launch=config.launch,
    )


def prepare_variants(
    capabilities: list[int], head_dims: list[int], dtypes: list[torch.dtype]
) -> Iterator[Variant]:
    """The kernel that runs once before the two of the backward pass; with the warps and stages of Triton's
    defaults, as it is launched."""
    for capability in capabilities:
        for d in head_dims:
            for dtype in dtypes:
                kernel = triton_backward.prepare_kernel
                constants = {
                    "HEADS": 28,
                    "D": d,
                    "BLOCK_D": padded_head_dim(d),
                    "BLOCK_Q": PREPARE_ROWS,
                    "HAS_DLSE": True,
                }
                pointers = dict.fromkeys(("dout", "out"), TYPE_NAMES[dtype])
                pointers |= dict.fromkeys(("lse", "dlse", "prepared"), "fp32")
                types = argument_types(kernel, constants, pointers)
                label = f"attention prepare d={d} {TYPE_NAMES[dtype]}"
                yield Variant(label, kernel, capability, constants, types, DEFAULTS)


def logprob_variants(capabilities: list[int], dtypes: list[torch.dtype]) -> Iterator[Variant]:
    """The fused output layer for a hidden size of 3584."""
    for capability in capabilities:
        for dtype in dtypes:
            config = product_config(dtype)
            tile = {
                "SIZE": 3584,
                "BLOCK_ROWS": config.rows,
                "BLOCK_VOCAB": config.vocabulary,
                "BLOCK_SIZE": config.features,
                "PRECISION": dot_precision(dtype),
            }
            pointers = dict.fromkeys(("hidden", "weight", "d_logits"), TYPE_NAMES[dtype])
            rows = ("partials", "lse", "entropy", "d_logprob", "d_entropy")
            pointers |= dict.fromkeys(rows, "fp32") | {"target": "i64"}
            for kernel, further in (
                (triton_kernels.partials_kernel, {"SPLIT": SPLIT}),
                (triton_kernels.gradient_kernel, {"WITH_ENTROPY": True}),
            ):
                constants = tile | further
                yield Variant(
                    label=f"linear_logprob {kernel.__name__} {TYPE_NAMES[dtype]}",
                    kernel=kernel,
                    capability=capability,
                    constants=constants,
                    types=argument_types(kernel, constants, pointers),
                    launch={"num_warps": config.num_warps, "num_stages": config.num_stages},
                )


def decode_variants(
    capabilities: list[int], head_dims: list[int], dtypes: list[torch.dtype]
) -> Iterator[Variant]:
    """Decoding with 28 query on 4 K/V heads: rows' own keys, prompts of 4, 8 and 18 rows, whose keys lie
    transposed; and the joining of their parts."""
    spans = {"SPANS": decode_kernels.SPANS, "UNIT": decode_kernels.SPAN_UNIT}
    rows = dict.fromkeys(("lengths", "first_row", "prompt_of_row"), "i32")
    rows |= dict.fromkeys(("acc_slots", "top_slots", "total_slots"), "fp32")
    for capability in capabilities:
        for d in head_dims:
            head = spans | {"HEADS": 28, "D": d, "BLOCK_D": padded_head_dim(d)}
            for dtype in dtypes:
                pointers = rows | dict.fromkeys(("q", "keys", "values", "out"), TYPE_NAMES[dtype])
                for width in (1, 4, 8, 18):
                    config = decode_config(divmod(capability, 10), d, dtype, 7 * width)
                    constants = head | {
                        "REPEAT": 7,
                        "BLOCK_ROWS": config.rows,
                        "BLOCK_K": config.keys,
                        "SHARED": width > 1,
                        "PRECISION": dot_precision(dtype),
                        # Launching turns a stride of 1 into a constant.
                        "stride_kt" if width > 1 else "stride_kd": 1,
                        "stride_vd": 1,
                    }
                    yield Variant(
                        label=f"decode {'prompt' if width > 1 else 'own'} d={d} {TYPE_NAMES[dtype]} "
                        f"{config.rows}x{config.keys} w{config.num_warps} s{config.num_stages}",
                        kernel=decode_kernels.partial_kernel,
                        capability=capability,
                        constants=constants,
                        types=argument_types(decode_kernels.partial_kernel, constants, pointers),
                        launch={"num_warps": config.num_warps, "num_stages": config.num_stages},
                    )
                kernel, constants = (
                    decode_kernels.merge_kernel,
                    head | {"KV_HEADS": 4, "BLOCK_SLOTS": BLOCK_SLOTS},
                )
                types = argument_types(kernel, constants, pointers)
                label = f"decode merge d={d} {TYPE_NAMES[dtype]}"
                yield Variant(label, kernel, capability, constants, types, DEFAULTS)


def elementwise_variants(
    capabilities: list[int], head_dims: list[int], dtypes: list[torch.dtype]
) -> Iterator[Variant]:
    """Rotary embeddings of 28 heads, and SwiGLU; with the warps and stages of Triton's defaults, as launched."""
    for capability in capabilities:
        for dtype in dtypes:
            name = TYPE_NAMES[dtype]
            for d in head_dims:
                columns, rows = rotary_tile(d)
                for backward in (False, True):
                    constants = {
                        "HEADS": 28,
                        "HALF": d // 2,
                        "BLOCK_HALF": columns,
                        "BLOCK_ROWS": rows,
                        "BACKWARD": backward,
                    }
                    kernel = rotary_kernels.rotate_kernel
                    pointers = {"x": name, "out": name, "cos": "fp32", "sin": "fp32"}
                    types = argument_types(kernel, constants, pointers)
                    label = f"rotary {'backward' if backward else 'forward'} d={d} {name}"
                    yield Variant(label, kernel, capability, constants, types, DEFAULTS)
            for kernel in (swiglu_kernels.forward_kernel, swiglu_kernels.backward_kernel):
                constants = {"BLOCK": SWIGLU_BLOCK}
                pointers = dict.fromkeys(("gate_up", "out", "dout", "d_gate_up"), name)
                types = argument_types(kernel, constants, pointers)
                label = f"swiglu {kernel.__name__} {name}"
                yield Variant(label, kernel, capability, constants, types, DEFAULTS)


def compile_variant(variant: Variant) -> Compiled:
    """Pointers and strides are taken to be multiples of 16, as Triton finds them at launch for usual sizes."""
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(variant.kernel.arg_names)
        if variant.types[name].startswith("*")
        or (name.startswith("stride") and name not in variant.constants)
    }
    compiled = triton.compile(
        ASTSource(variant.kernel, variant.types, variant.constants, attributes),
        target=GPUTarget("cuda", variant.capability, 32),
        options=variant.launch,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        code = _cuobjdump("-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no REG and STACK:\n{usage}")
    return Compiled(
        registers=int(found[1]),
        stack=int(found[2]),
        shared_bytes=compiled.metadata.shared,
        instructions={name: len(re.findall(rf"\b{name}", code)) for name in INSTRUCTIONS},
    )


def _cuobjdump(option: str, path: str) -> str:
    return subprocess.run([str(CUOBJDUMP), option, path], capture_output=True, text=True, check=True).stdout


def problem(variant: Variant, result: Compiled) -> str:
    """What a shipped configuration must not have, or nothing."""
    if result.stack:
        return "SPILLS"
    if variant.constants.get("PRECISION") != "tf32":
        return ""  # fp32, or no matrix product
    found = result.instructions
    if not found["HMMA"] + found["HGMMA"]:
        return "NO TENSOR CORES"
    if variant.launch["num_stages"] > 1 and not found["LDGSTS"] + found["UTMA"]:
        return "NO ASYNCHRONOUS COPIES"
    return ""


def save(head: dict[str, str], lines: list[dict[str, Any]], complete: bool, out: Path) -> None:
    """Written after every variant, so that a run that is cut short leaves what it has."""
    rows = ",\n".join("  " + json.dumps(line) for line in lines)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        f'{{\n "measured": {json.dumps(head)},\n "complete": {json.dumps(complete)},\n'
        f' "configurations": [\n{rows}\n ]\n}}\n'
    )


_compile_here: list[Variant] = []


def _compile(index: int) -> Compiled:
    return compile_variant(_compile_here[index])


def report(variants: list[Variant], out: Path | None = None) -> int:
    """Prints a line a variant, and writes them to `out`; the number of those with a problem."""
    print(f"Triton {triton.__version__}")
    print(f"{'sm':>2} {'reg':>4} {'stack':>5} {'shared':>7}  {'instructions':<28} kernel")
    head = measured(" ".join(["python tools/kernel_report.py", *sys.argv[1:]]))
    head |= {"triton": triton.__version__, "gpu": "none: compiled only, GPU speed not yet measured"}
    problems = 0
    lines = []
    # Forked: kernels cannot be sent to other processes, only inherited.
    fork = get_context("fork")
    with ProcessPoolExecutor(os.cpu_count(), fork, _compile_here.extend, (variants,)) as pool:
        for variant, result in zip(variants, pool.map(_compile, range(len(variants))), strict=True):
            used = " ".join(f"{name} {count}" for name, count in result.instructions.items() if count)
            wrong = problem(variant, result)
            print(
                f"{variant.capability:>2} {result.registers:>4} {result.stack:>5} {result.shared_bytes:>7}  "
                f"{used or '-':<28} {variant.label}" + (f"  {wrong}" if wrong else ""),
                flush=True,
            )
            problems += bool(wrong)
            lines.append({"sm": variant.capability, "kernel": variant.label, **asdict(result)})
            if out is not None:
                save(head, lines, len(lines) == len(variants), out)
    return problems


def all_variants() -> Iterator[Variant]:
    """Every shipped configuration. What a head dimension pads to and sm_86's smaller memory are configurations too."""
    dims, half, full = [64, 128, 256], [torch.bfloat16], [torch.float32]
    dims_full = [d for d in dims if d <= MAX_HEAD_DIM_FP32]
    for capability in (80, 90, 86):
        yield from attention_variants([capability], dims, half, [False, True])
        yield from attention_variants([capability], dims_full, full, [False, True])
        yield from prepare_variants([capability], dims, [*half, *full])
        yield from logprob_variants([capability], [*half, *full])
        yield from decode_variants([capability], dims, half)
        yield from decode_variants([capability], dims_full, full)
        yield from elementwise_variants([capability], dims, [*half, *full])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default="", help="compile only variants whose sm and label match this regex"
    )
    parser.add_argument("--out", type=Path, default=None, help="file of results to write (JSON)")
    arguments = parser.parse_args()
    labelled = {f"sm{x.capability} {x.label}": x for x in all_variants()}  # once, whoever else has it
    variants = [x for name, x in labelled.items() if re.search(arguments.only, name)]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        problems = report(variants, arguments.out)
    if problems:
        sys.exit(f"{problems} of {len(variants)} configurations have a problem")
    print(f"none of {len(variants)} configurations has a problem")


if __name__ == "__main__":
    main()
