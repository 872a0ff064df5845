"""Compile every kernel for GPUs that are not there and read what its machine code needs.

    python -m tests.kernels.machine_code           compile all cases and write benchmarks/results/machine-code.md
    python -m tests.kernels.machine_code --json    compile the cases of test_machine_code.py and print them as JSON

No GPU is needed: Triton compiles to a cubin for a named target, and the cuobjdump in its package reads it. The
interpreter replaces the compiler for a whole process, so this must run without TRITON_INTERPRET.

Where cuxray (PyPI) is installed, it reads the accesses to memory too: for Hopper in bf16, in the tests of a ViT-S only.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sws_kernels import launch_config
from sws_kernels.common import INTERPRETED

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "machine-code.md"
WIDTHS = (192, 384, 768)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ARCHITECTURES = (80, 90)  # A100; H100 and H200
VARIANTS = {
    "norm only": ("branch_ptr", "scale_ptr", "new_residual_ptr"),
    "add only": ("weight_ptr", "bias_ptr", "normed_ptr", "mean_ptr", "rstd_ptr"),
    "backward without normed": ("bias_ptr", "normed_ptr"),
    "backward without a scale": ("scale_ptr", "d_branch_ptr"),
}
# What a multiprocessor has, from the CUDA C++ Programming Guide, "Compute Capabilities".
REGISTERS, THREADS = 65_536, 2048
SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024}
RESERVED_SHARED_BYTES = 1024  # CUDA's own, of each program

OPTIONS = ("num_warps", "num_stages", "maxnreg")  # entries of a launch that are not arguments of the kernel
# Arguments that are fp32, or point to fp32, whatever the dtype of the rest.
FP32 = {"mean_ptr", "rstd_ptr", "lse_ptr", "delta_ptr", "partials_ptr", "eps", "scale"}


MATRIX_INSTRUCTIONS = {"mma": "mma.sync.aligned", "wgmma": "wgmma.mma_async"}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"  # cuobjdump and nvdisasm, as Triton's package has them
CUXRAY = find_spec("cuxray") is not None
VIT_S = ("width 384", "577 tokens, heads of 64")  # the beginnings of its cases' shapes
Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Hold one kernel at one shape, for one GPU. `launch` has constexprs and options as the launcher passes them."""

    kernel: str  # the function's name without "_kernel"
    shape: str
    dtype: str
    arch: int
    launch: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.kernel}, {self.shape}, {self.dtype}, sm_{self.arch}"

    @property
    def operator(self) -> str:
        return re.sub(r"_(forward|backward).*", "", self.kernel)

    @property
    def function(self) -> Any:
        return getattr(importlib.import_module(f"sws_kernels.{self.operator}_kernels"), f"{self.kernel}_kernel")


# ------------------------------------------------------------------------------------------------------ cases


def cases(*, full: bool = False) -> Iterator[Case]:
    """Yield the variant of each kernel that holds and writes the most: with a scale, with z saved, with a bias.

    bf16, in which models train, comes at every shape. fp16 and fp32 come at one shape a kernel unless ``full``: they
    differ from bf16 by their instructions, and shapes by their tiles and loops. What leaves a part out also comes at
    one shape, or on one GPU.
    """
    for width, dtype, arch in product(WIDTHS, DTYPES, ARCHITECTURES):
        if full or dtype == "bf16" or width == WIDTHS[-1]:
            yield from _add_layer_norm_cases(width, dtype, arch, variants=dtype == "bf16" and (full or width == 384))
            yield from _linear_gelu_cases(width, dtype, arch)
    for head_dim, dtype, arch in product((32, 64, 128), DTYPES, ARCHITECTURES):
        if full or dtype == "bf16" or head_dim == 64:
            yield from _packed_attention_cases(head_dim, dtype, arch, plain=dtype == "bf16" and (full or arch == 90))


def _add_layer_norm_cases(width: int, dtype: str, arch: int, variants: bool) -> Iterator[Case]:
    launches = launch_config.add_layer_norm(width)
    for name, launch in launches.items():
        yield Case(f"add_layer_norm_{name}", f"width {width}", dtype, arch, launch)
    if variants:  # they leave a part out; Triton's interpreter does not see what fails to compile
        for part, absent in VARIANTS.items():
            name = "backward" if "backward" in part else "forward"
            without = launches[name] | dict.fromkeys(absent)
            yield Case(f"add_layer_norm_{name}", f"width {width}, {part}", dtype, arch, without)
    scaled = {"F": width} | launch_config.column_sum(width)
    yield Case("column_sum", f"width {width}", dtype, arch, scaled)
    if dtype == "fp32":
        second = {"scale_ptr": None, "scaled_ptr": None, "F": width} | launch_config.sum_partials()
        yield Case("column_sum", f"width {width}, second stage", dtype, arch, second)


def _linear_gelu_cases(width: int, dtype: str, arch: int) -> Iterator[Case]:
    for name, launch in launch_config.linear_gelu(width, 4 * width, DTYPES[dtype], hopper=arch == 90).items():
        yield Case(f"linear_gelu_{name}", f"width {width}", dtype, arch, launch)


def _packed_attention_cases(head_dim: int, dtype: str, arch: int, plain: bool) -> Iterator[Case]:
    """Yield each tile setting once with a bias and, if ``plain``, once without one, as a stage calls it.

    577 and 196 tokens come in all dtypes, fewer tokens in bf16 only.
    """
    seen = []
    for tokens in (577, 196, 100, 50) if dtype == "bf16" else (577, 196):
        launches = launch_config.packed_attention(tokens, head_dim, DTYPES[dtype], hopper=arch == 90)
        if launches in seen:
            continue
        seen.append(launches)
        for bias in (True, False) if plain else (True,):
            shape = f"{tokens} tokens, heads of {head_dim}" + (", bias" if bias else "")
            for name, launch in launches.items():
                case = Case(f"packed_attention_{name}", shape, dtype, arch, dict(launch))
                absent = set() if bias else {"bias_ptr", "partials_ptr"}
                absent |= {"delta_ptr"} if launch.get("SINGLE_KV_BLOCK") else set()
                case.launch.update(dict.fromkeys(absent & set(case.function.arg_names)))
                yield case


# -------------------------------------------------------------------------------------------------- compiling


def compile_case(case: Case, *, full: bool = False) -> Row:
    """Return the case with what a program of it needs: registers, stack and shared memory, threads, instructions.

    Registers that do not fit are spilled to the stack, so stack_bytes is 0 in code without spills. wgmma are Hopper's
    matrix instructions, for four warps together; mma are one warp's, on either GPU. Both are counted in PTX.

    full: whether to count the machine instructions of a thread too, outside and inside of the kernel's loop, and to
        read the accesses to memory of all sizes.
    """
    kernel, launch = case.function, case.launch
    options = {name: launch[name] for name in OPTIONS if name in launch}
    constants = {name: value for name, value in launch.items() if name not in options}

    def argument_type(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name.endswith("_ptr"):
            return "*fp32" if name in FP32 else f"*{case.dtype}"
        return "fp32" if name in FP32 else "i32"

    signature = {name: argument_type(name) for name in kernel.arg_names}
    # At run time Triton sees that PyTorch's allocations are 16-byte aligned; without that it generates other code.
    pointers = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in pointers})
    compiled = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)
    row = {name: getattr(case, name) for name in ("kernel", "shape", "dtype", "arch")}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        row["registers"], row["stack_bytes"] = _resource_usage(cubin.name)
        row |= {"shared_bytes": compiled.metadata.shared, "threads": 32 * options["num_warps"]}
        row["programs"] = resident_programs(row)
        row |= {name: compiled.asm["ptx"].count(text) for name, text in MATRIX_INSTRUCTIONS.items()}
        if full:
            row["instructions"], row["in_loop"] = _instructions(cubin.name)
        if CUXRAY and case.arch == 90 and case.dtype == "bf16" and (full or case.shape.startswith(VIT_S)):
            row |= _accesses(cubin.name, row["threads"])
    return row


def resident_programs(row: Row) -> int:
    """Return how many programs of a row's kernel fit on a multiprocessor. Registers are given out by eights."""
    registers = -(-row["registers"] // 8) * 8 * row["threads"]
    shared = row["shared_bytes"] + RESERVED_SHARED_BYTES
    return min(REGISTERS // registers, SHARED_BYTES[row["arch"]] // shared, THREADS // row["threads"])


def _cuobjdump(*arguments: str) -> str:
    return subprocess.run(
        [TOOLS / "cuobjdump", *arguments], check=True, capture_output=True, text=True, timeout=600
    ).stdout


def _resource_usage(cubin: str) -> tuple[int, int]:
    """Return (registers a thread, bytes of stack a thread)."""
    usage = _cuobjdump("--dump-resource-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return int(found[1]), int(found[2])


def _instructions(cubin: str) -> tuple[int, int]:
    """Return how many instructions are outside and inside of loops: from the target of a branch back to the branch."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", _cuobjdump("-sass", cubin))
    code = [(int(address, 16), text) for address, text in found if not text.startswith("NOP")]
    targets = ((address, re.search(r"BRA.*?0x([0-9a-f]+)", text)) for address, text in code)
    loops = [(int(target[1], 16), address) for address, target in targets if target and int(target[1], 16) < address]
    inside = sum(any(first <= address <= last for first, last in loops) for address, _ in code)
    return len(code) - inside, inside


def _accesses(cubin: str, threads: int) -> Row:
    """Return what cuxray finds: shared accesses whose banks conflict, global ones that do not coalesce.

    ``followed`` is the percentage of accesses whose addresses cuxray could follow. It says nothing about the others.
    """
    options = ["--fast", "--no-cache", "--json", "--threads", str(threads)]
    done = subprocess.run(
        [sys.executable, "-m", "cuxray", "report", *options, cubin],
        env=os.environ | {"CUXRAY_NO_FETCH": "1", "CUXRAY_TOOLCHAIN": str(TOOLS)},
        check=True, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    (unit,) = json.loads(done.stdout)["units"]
    access = unit["kernels"][0]["access"]
    followed = access["analyzed_count"] / (access["analyzed_count"] + access["unanalyzed_count"])
    return {
        "bank_conflicts": access["conflicted_shared_accesses"],
        "uncoalesced": access["uncoalesced_global_accesses"],
        "followed": round(100 * followed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the tests' cases as JSON instead of writing a table")
    arguments = parser.parse_args()
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set, so nothing would be compiled; unset it")
    with ThreadPoolExecutor(max_workers=2) as pool:
        rows = list(pool.map(partial(compile_case, full=not arguments.json), cases(full=not arguments.json)))
    if arguments.json:
        print(json.dumps(rows))
    else:
        RESULTS.write_text(_page(rows))
        print(f"wrote {RESULTS}")


def _page(rows: list[Row]) -> str:
    columns = dict.fromkeys(name for row in rows for name in row)
    lines = [
        "# What the kernels' machine code needs",
        "",
        f"Written by `python -m tests.kernels.machine_code` with triton {triton.__version__}; no GPU is needed.",
        "docs/kernels.md explains the columns.",
        "",
        "| " + " | ".join(columns) + " |",
        "|---" * len(columns) + "|",
        *("| " + " | ".join(str(row.get(name, "")) for name in columns) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
