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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

WIDTHS = (192, 384, 768)
DTYPES = ("bf16", "fp16", "fp32")
ARCHITECTURES = (80, 90)  # A100; H100 and H200

add_layer_norm = importlib.import_module("sws_kernels.add_layer_norm")  # the package's name is the function
INT_ARGUMENTS = {"num_rows": "i32", "tokens": "i32"}
FP32_POINTERS = {"mean_ptr", "rstd_ptr", "partials_ptr"}


def cases() -> Iterator[dict]:
    """With a scale: the variant that holds and writes the most."""
    for operator in ("add_layer_norm_forward", "add_layer_norm_backward"):
        for width in WIDTHS:
            for dtype in DTYPES:
                for arch in ARCHITECTURES:
                    yield {"kernel": operator, "width": width, "dtype": dtype, "arch": arch}


def compile_case(case: dict) -> dict:
    """The case with registers a thread, spills, shared memory in bytes and threads a program added."""
    kernel = getattr(add_layer_norm, case["kernel"].removeprefix("add_layer_norm") + "_kernel")
    constants = add_layer_norm.tile_shape(case["width"])
    num_warps = constants.pop("num_warps")
    signature = {name: _argument_type(name, case["dtype"], constants) for name in kernel.arg_names}
    # At run time Triton sees that PyTorch's allocations are 16-byte aligned; without it the code is another.
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": num_warps}
    if case["kernel"].endswith("backward"):
        options["maxnreg"] = add_layer_norm.MAX_BACKWARD_REGISTERS
    compiled = triton.compile(source, target=GPUTarget("cuda", case["arch"], 32), options=options)
    usage, code = _disassemble(compiled.asm["cubin"])
    return {
        **case,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "shared_bytes": compiled.metadata.shared,
        "threads": 32 * num_warps,
    }


def _argument_type(name: str, dtype: str, constants: dict[str, int]) -> str:
    if name in constants:
        return "constexpr"
    if name.endswith("_ptr"):
        return "*fp32" if name in FP32_POINTERS else f"*{dtype}"
    return INT_ARGUMENTS.get(name, "fp32")


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
