"""Compiles the kernels for GPUs that are not there and reads what the machine code needs.

    python -m tests.kernels.compile_table           prints the table of docs/kernels.md (Markdown)
    python -m tests.kernels.compile_table --json    the same as JSON, for test_compile.py

No GPU is needed: Triton compiles to a cubin for a named target, and the cuobjdump in its package reads it.
Spills are counted in the machine code, as stores to and loads from local memory. An operator's cases may lie in
a file of their own, as packed_attention's do. The interpreter replaces the
compiler for a whole process, so this must run without TRITON_INTERPRET.
"""

import argparse
import importlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import triton

from tests.kernels import packed_attention_compile
from tests.kernels.machine_code import compile_for

WIDTHS = (192, 384, 768)
DTYPES = ("bf16", "fp16", "fp32")
ARCHITECTURES = (80, 90)  # A100; H100 and H200

add_layer_norm = importlib.import_module("sws_kernels.add_layer_norm")  # the package's name is the function
FP32 = {"mean_ptr", "rstd_ptr", "partials_ptr", "eps"}


def cases() -> Iterator[dict]:
    """add_layer_norm's, with a scale, the variant that holds and writes the most; then other operators'."""
    for operator in ("add_layer_norm_forward", "add_layer_norm_backward"):
        for width in WIDTHS:
            for dtype in DTYPES:
                for arch in ARCHITECTURES:
                    yield {"kernel": operator, "width": width, "dtype": dtype, "arch": arch}
    yield from packed_attention_compile.cases()


def compile_case(case: dict) -> dict:
    """The case with what machine_code.compile_for reads."""
    if case["kernel"].startswith("packed_attention"):
        return packed_attention_compile.compile_case(case)
    kernel = getattr(add_layer_norm, case["kernel"].removeprefix("add_layer_norm") + "_kernel")
    launch = add_layer_norm.tile_shape(case["width"])
    if case["kernel"].endswith("backward"):
        launch["maxnreg"] = add_layer_norm.MAX_BACKWARD_REGISTERS
    return {**case, **compile_for(case["arch"], kernel, case["dtype"], launch, FP32)}


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
    print(f"triton {triton.__version__}")
    for columns, table in groupby(rows, key=tuple):  # an operator whose cases have other columns starts a new table
        print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
        for row in table:
            print("| " + " | ".join(str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    main()
