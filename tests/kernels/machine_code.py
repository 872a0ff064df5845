"""Compiles one kernel for a GPU that is not there and reads what the machine code needs. For compile_table."""

import os
import re
import subprocess
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

OPTIONS = ("num_warps", "num_stages", "maxnreg")  # what a launch passes that is not the kernel's own


def compile_for(arch: int, kernel: Any, dtype: str, launch: dict, fp32_names: Collection[str]) -> dict[str, int]:
    """Registers a thread, spills, shared memory in bytes, threads a program, tensor-core instructions.

    launch: constexprs and options together, as the launcher passes them. Pointers are to dtype, those in
    fp32_names to fp32; other arguments are fp32 where named so, or int32. HGMMA are Hopper's matrix
    instructions, for four warps together; HMMA are one warp's, on either GPU.
    """
    options = {name: launch[name] for name in OPTIONS if name in launch}
    constants = {name: value for name, value in launch.items() if name not in options}

    def argument_type(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name.endswith("_ptr"):
            return "*fp32" if name in fp32_names else f"*{dtype}"
        return "fp32" if name in fp32_names else "i32"

    signature = {name: argument_type(name) for name in kernel.arg_names}
    # At run time Triton sees that PyTorch's allocations are 16-byte aligned; without it the code is another.
    pointers = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in pointers})
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage, code = _disassemble(compiled.asm["cubin"])
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "shared_bytes": compiled.metadata.shared,
        "threads": 32 * options["num_warps"],
        "hmma": len(re.findall(r"\bHMMA\b", code)),
        "hgmma": len(re.findall(r"\bHGMMA\b", code)),
    }


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
