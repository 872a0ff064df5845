"""Compiles the kernels for GPUs that are not there and reads what the machine code needs.

    python -m tests.kernels.compile_table           prints the table of docs/kernels.md (Markdown)
    python -m tests.kernels.compile_table --json    the same as JSON, for test_compile.py

No GPU is needed: Triton compiles to a cubin for a named target, and the cuobjdump in its package reads it.
Spills are counted in the machine code, as stores to and loads from local memory. The interpreter replaces the
compiler for a whole process, so this must run without TRITON_INTERPRET.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

WIDTHS = (192, 384, 768)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ARCHITECTURES = (80, 90)  # A100; H100 and H200

# By import_module: the package's names are the functions.
add_layer_norm = importlib.import_module("sws_kernels.add_layer_norm")
linear_gelu = importlib.import_module("sws_kernels.linear_gelu")


@dataclass(frozen=True)
class Kernel:
    """A kernel and how its operator launches it; `launch` gives constexprs and options together."""

    function: Any
    launch: Callable[[int, str, int], dict]  # from width, dtype, architecture
    fp32_pointers: tuple[str, ...] = ()


def _launch_layer_norm(width: int, dtype: str, arch: int) -> dict:
    return add_layer_norm.tile_shape(width)


def _launch_layer_norm_backward(width: int, dtype: str, arch: int) -> dict:
    return add_layer_norm.tile_shape(width) | {"maxnreg": add_layer_norm.MAX_BACKWARD_REGISTERS}


def _launch_linear_gelu(width: int, dtype: str, arch: int) -> dict:
    return linear_gelu.tile_shape(width, 4 * width, DTYPES[dtype])


def _launch_linear_gelu_backward(width: int, dtype: str, arch: int) -> dict:
    registers = linear_gelu.max_backward_registers((arch // 10, arch % 10))
    return linear_gelu.tile_shape(width, 4 * width, DTYPES[dtype]) | {"maxnreg": registers}


# With a scale, with z stored: the variants that hold and write the most.
STATISTICS = ("mean_ptr", "rstd_ptr", "partials_ptr")
KERNELS = {
    "add_layer_norm_forward": Kernel(add_layer_norm._forward_kernel, _launch_layer_norm, STATISTICS),
    "add_layer_norm_backward": Kernel(add_layer_norm._backward_kernel, _launch_layer_norm_backward, STATISTICS),
    "linear_gelu_forward": Kernel(linear_gelu._forward_kernel, _launch_linear_gelu),
    "linear_gelu_backward": Kernel(linear_gelu._backward_kernel, _launch_linear_gelu_backward, ("partials_ptr",)),
}
OPTIONS = ("num_warps", "num_stages", "maxnreg")


def cases() -> Iterator[dict]:
    for operator, width, dtype, arch in product(KERNELS, WIDTHS, DTYPES, ARCHITECTURES):
        yield {"kernel": operator, "width": width, "dtype": dtype, "arch": arch}


def compile_case(case: dict) -> dict:
    """The case with registers a thread, spills, shared memory in bytes, threads a program and tensor-core code.

    HGMMA are Hopper's instructions for a group of four warps, HMMA those of one warp.
    """
    kernel = KERNELS[case["kernel"]]
    constants = kernel.launch(case["width"], case["dtype"], case["arch"])
    options = {name: constants.pop(name) for name in OPTIONS if name in constants}
    names = kernel.function.arg_names
    signature = {name: _argument_type(name, case["dtype"], constants, kernel.fp32_pointers) for name in names}
    # At run time Triton sees that PyTorch's allocations are 16-byte aligned; without it the code is another.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(kernel.function, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", case["arch"], 32), options=options)
    usage, code = _disassemble(compiled.asm["cubin"])
    return {
        **case,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "shared_bytes": compiled.metadata.shared,
        "threads": 32 * options["num_warps"],
        "hgmma": len(re.findall(r"\bHGMMA\b", code)),
        "hmma": len(re.findall(r"\bHMMA\b", code)),
    }


def _argument_type(name: str, dtype: str, constants: dict[str, Any], fp32_pointers: tuple[str, ...]) -> str:
    if name in constants:
        return "constexpr"
    if name.endswith("_ptr"):
        return "*fp32" if name in fp32_pointers else f"*{dtype}"
    return "fp32" if name == "eps" else "i32"


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, machine code) as text."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        # cuobjdump -sass calls nvdisasm, which lies beside it.
        env = {**os.environ, "PATH": f"{tool.parent}:{os.environ.get('PATH', '')}"}
        return tuple(
            subprocess.run(
                [tool, flag, file.name], check=True, capture_output=True, text=True, env=env, timeout=60
            ).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    arguments = parser.parse_args()
    if add_layer_norm.INTERPRETED:
        parser.error("TRITON_INTERPRET is set, so nothing would be compiled; unset it")
    with ThreadPoolExecutor(max_workers=2) as pool:
        rows = list(pool.map(compile_case, cases()))
    if arguments.json:
        print(json.dumps(rows))
        return
    print(f"triton {triton.__version__}\n")
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    main()
