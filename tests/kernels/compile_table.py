"""Compiles the kernels for GPUs that are not there and reads what the machine code needs.

    python -m tests.kernels.compile_table           prints the table of docs/kernels.md (Markdown)
    python -m tests.kernels.compile_table --json    the same as JSON, for test_compile.py

No GPU is needed: Triton compiles to a cubin for a named target, and the cuobjdump in its package reads it.
Spills are counted in the machine code, as stores to and loads from local memory. An operator whose cases are not
widths has them in a file of its own, as packed_attention. The interpreter replaces the compiler for a whole process,
so this must run without TRITON_INTERPRET.
"""

import argparse
import importlib
import json
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, product
from typing import Any

import torch
import triton

from sws_kernels import tiles
from sws_kernels.common import INTERPRETED
from tests.kernels import packed_attention_compile
from tests.kernels.machine_code import compile_for

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
    fp32: tuple[str, ...] = ()  # arguments that are fp32, or point to it, whatever the dtype
    only: Collection[tuple[str, int]] | None = None  # dtypes and architectures, where not all


def _layer_norm(kernel: str) -> Callable[[int, str, int], dict]:
    return lambda width, dtype, arch: tiles.add_layer_norm(width)[kernel]


def _linear_gelu(kernel: str, persistent: bool = False) -> Callable[[int, str, int], dict]:
    def launch(width: int, dtype: str, arch: int) -> dict:
        options = {"hopper": arch == 90, "persistent": persistent}
        return tiles.linear_gelu(width, 4 * width, DTYPES[dtype], **options)[kernel]

    return launch


# With a scale, with z stored: the variants that hold and write the most.
STATISTICS = ("mean_ptr", "rstd_ptr", "partials_ptr", "eps")
PERSISTENT = {("bf16", 90), ("fp16", 90)}
KERNELS = {
    "add_layer_norm_forward": Kernel(add_layer_norm._forward_kernel, _layer_norm("forward"), STATISTICS),
    "add_layer_norm_backward": Kernel(add_layer_norm._backward_kernel, _layer_norm("backward"), STATISTICS),
    "linear_gelu_forward": Kernel(linear_gelu._forward_kernel, _linear_gelu("forward")),
    "linear_gelu_backward": Kernel(linear_gelu._backward_kernel, _linear_gelu("backward"), ("partials_ptr",)),
    "linear_gelu_forward_persistent": Kernel(
        linear_gelu._forward_kernel, _linear_gelu("forward", persistent=True), only=PERSISTENT
    ),
    "linear_gelu_backward_persistent": Kernel(
        linear_gelu._backward_kernel, _linear_gelu("backward", persistent=True), ("partials_ptr",), PERSISTENT
    ),
}


def cases() -> Iterator[dict]:
    for operator, width, dtype, arch in product(KERNELS, WIDTHS, DTYPES, ARCHITECTURES):
        only = KERNELS[operator].only
        if only is not None and (dtype, arch) not in only:
            continue
        yield {"kernel": operator, "width": width, "dtype": dtype, "arch": arch}
    yield from packed_attention_compile.cases()


def compile_case(case: dict) -> dict:
    """The case with what `machine_code.compile_for` reads."""
    if case["kernel"].startswith("packed_attention"):
        return packed_attention_compile.compile_case(case)
    kernel = KERNELS[case["kernel"]]
    launch = kernel.launch(case["width"], case["dtype"], case["arch"])
    return {**case, **compile_for(case["arch"], kernel.function, case["dtype"], launch, kernel.fp32)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    arguments = parser.parse_args()
    if INTERPRETED:
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
