"""Time the launches that kernels/launch_config.py could choose, on one GPU, to see which it should.

    python -m benchmarks.kernels.tune [--size S] [--only packed_attention_backward] [--out tune.json]

A candidate is compiled in a process of its own, all of them in parallel, and then timed alone on the GPU. Its results
are compared with those of the launch that is chosen now: a candidate that is wrong or does not fit has a row that says
so. The first row of a kernel is the current choice.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.kernels.__main__ import SIZES
from benchmarks.kernels.measure import Machine, Row, Size
from sws_dist.provenance import collect_provenance
from sws_kernels import add_layer_norm_kernels, launch_config, linear_gelu_kernels, packed_attention_kernels
from sws_kernels.add_layer_norm import add_layer_norm_backward, add_layer_norm_forward
from sws_kernels.launch_config import Launch
from sws_kernels.linear_gelu import linear_gelu_backward, linear_gelu_forward
from sws_kernels.packed_attention import packed_attention_backward, packed_attention_forward

Run = Callable[[], tuple[Tensor, ...]]
SMALL_BATCH = 16  # for compiling: it has the divisibility of the real batch, on which the machine code depends
TOLERANCE = 0.02


@dataclass(frozen=True)
class Candidate:
    """Hold what differs from the current launches of an operator."""

    launches: dict[str, Launch]

    def __str__(self) -> str:
        parts = (" ".join([f"{name}:", *(f"{k}={v}" for k, v in new.items())]) for name, new in self.launches.items())
        return ", ".join(parts) or "as it is"


CURRENT = Candidate({})


@contextmanager
def chosen(operator: str, candidate: Candidate) -> Iterator[None]:
    """Let `launch_config` return the current launches of ``operator`` with the candidate's values put over them."""
    original = getattr(launch_config, operator)

    def launches(*args: Any, **kwargs: Any) -> dict[str, Launch]:
        found = original(*args, **kwargs)
        return found | {name: found.get(name, {}) | launch for name, launch in candidate.launches.items()}

    with mock.patch.object(launch_config, operator, launches):
        yield


def _tiles(name: str, keys: str, *rows: tuple[Any, ...]) -> list[Candidate]:
    return [Candidate({name: dict(zip(keys.split(), row, strict=True))}) for row in rows]


def _two_passes(keys: tuple[Any, ...], queries: tuple[Any, ...]) -> Candidate:
    """Return the backward of attention in two passes. Both take blocks of as many rows: keys' N, queries' M."""
    names = ["M", "N", "num_warps", "num_stages", "maxnreg"]
    first = {"SINGLE_KV_BLOCK": False, **dict(zip(names, keys, strict=True))}
    return Candidate({"backward_keys": first, "backward_queries": {"D": 64, **dict(zip(names, queries, strict=True))}})


TILE = "BM BN BK num_warps num_stages maxnreg"
LINEAR_TILES = [
    *[(128, 128, 64, warps, stages, None) for warps, stages in product((4, 8), (3, 4))],
    *[(*tile, 64, 4, stages, None) for tile, stages in product([(64, 128), (128, 64)], (3, 4))],
    *[(*tile, 64, 8, 3, None) for tile in [(64, 256), (128, 256), (256, 128), (256, 64)]],
]
CANDIDATES: dict[str, list[Candidate]] = {
    "add_layer_norm_forward": _tiles("forward", "R num_warps", (1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 8)),
    "add_layer_norm_backward": _tiles(
        "backward", "R num_warps maxnreg", (4, 4, None), (2, 4, None), (8, 8, 128), (2, 2, None), (4, 8, None)
    ),
    "linear_gelu_forward": _tiles("forward", TILE, *LINEAR_TILES),
    "linear_gelu_backward": _tiles("backward", TILE, *LINEAR_TILES),
    "packed_attention_forward": _tiles(
        "forward", "SINGLE_KV_BLOCK M N num_warps num_stages",
        *[(True, 64, 256, 4, 3)],
        *[(False, rows, 32, 4, stages) for rows, stages in product((64, 128), (3, 4, 5))],
        *[(False, 128, 32, 8, 4), (False, 128, 64, 8, 3), (False, 128, 64, 8, 4), (False, 64, 64, 4, 4)],
        *[(False, 64, 16, 4, 4), (False, 128, 16, 4, 4), (False, 256, 32, 8, 3), (False, 64, 32, 2, 3)],
    ),
    "packed_attention_backward": [
        *[
            _two_passes(keys, queries)
            for keys, queries in product(
                [(32, 64, 4, 3, 128), (32, 64, 4, 3, 168), (16, 64, 4, 3, 128), (32, 64, 4, 4, None)],
                [(64, 32, 4, 3, None), (64, 32, 4, 4, None)],
            )
        ],
        *[
            _two_passes(keys, queries)
            for keys, queries in product(
                [(32, 128, 8, 2, 128), (32, 128, 8, 3, 128), (16, 128, 8, 3, 128), (16, 128, 4, 3, None)],
                [(128, 32, 8, 3, None), (128, 32, 4, 3, None), (128, 64, 8, 3, None)],
            )
        ],
    ],
}  # fmt: skip


def operator_of(kernel: str) -> str:
    return kernel.rpartition("_")[0]


def prepare(kernel: str, machine: Machine, size: Size, batch: int) -> Run:
    """Return a call of one kernel's launcher on random tensors of a training step."""
    tokens, width, heads = size.tokens, size.width, size.heads
    stream = (batch, tokens, width)
    scale = torch.ones(batch, device=machine.device, dtype=machine.dtype)
    vectors = machine.normal(width), machine.normal(width)
    if operator_of(kernel) == "add_layer_norm":
        x, branch = machine.normal(*stream), machine.normal(*stream)
        if kernel.endswith("forward"):
            return lambda: add_layer_norm_forward(x, branch, scale, *vectors, 1e-6)
        _, normed, mean, rstd = add_layer_norm_forward(x, branch, scale, *vectors, 1e-6)
        return lambda: add_layer_norm_backward(branch, normed, x, scale, vectors[0], mean, rstd, vectors[1])
    if operator_of(kernel) == "linear_gelu":
        x = machine.normal(batch * tokens, width)
        if kernel.endswith("forward"):
            weight, bias = machine.normal(4 * width, width, deviation=width**-0.5), machine.normal(4 * width)
            return lambda: linear_gelu_forward(x, weight, bias, True)
        z, weight = machine.normal(batch * tokens, 4 * width), machine.normal(width, 4 * width, deviation=width**-0.5)
        return lambda: linear_gelu_backward(x, weight, z)
    qkv = machine.normal(batch, tokens, 3, heads, size.head_dim)
    if kernel.endswith("forward"):
        return lambda: packed_attention_forward(qkv, None, size.head_dim**-0.5)
    out, lse = packed_attention_forward(qkv, None, size.head_dim**-0.5)
    d_out = machine.normal(*stream)
    return lambda: packed_attention_backward(d_out, qkv, None, out, lse, size.head_dim**-0.5)[:1]


def compile_one(kernel: str, candidate: Candidate, size: Size) -> None:
    """Put a candidate's machine code into Triton's cache. What fails here fails again where it is timed."""
    try:
        run = prepare(kernel, Machine(), size, SMALL_BATCH)
        with chosen(operator_of(kernel), candidate):
            run()
        torch.cuda.synchronize()
    except Exception as error:
        print(f"{kernel} {candidate}: {type(error).__name__}", flush=True)


def measure(kernel: str, size: Size, machine: Machine) -> Iterator[Row]:
    """Yield a row for the current launch and one for each candidate."""
    run = prepare(kernel, machine, size, size.batch)
    expected = run()
    for candidate in (CURRENT, *CANDIDATES[kernel]):
        row: Row = {"kernel": kernel, "size": size.name, "launch": str(candidate)}
        try:
            with chosen(operator_of(kernel), candidate):
                for got, want in zip(in_poisoned_memory(run), expected, strict=True):
                    distance = ((got.float() - want.float()).norm() / want.float().norm()).item()
                    if not distance <= TOLERANCE:
                        raise ValueError(f"{distance:.1%} from the current launch's result")
                row |= machine_code(kernel) | {"us": 1e3 * machine.kernel_ms(run)}
        except Exception as error:  # out of shared memory, a compiler's assertion: whatever the candidate meets
            row["error"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        yield row


def in_poisoned_memory(run: Run) -> tuple[Tensor, ...]:
    """Let new tensors start as NaN, so that what a candidate leaves unwritten is not an earlier candidate's result."""
    torch.use_deterministic_algorithms(True)
    try:
        return run()
    finally:
        torch.use_deterministic_algorithms(False)


def machine_code(kernel: str) -> Row:
    """Return registers and spills of the program that was compiled last, for each of the kernel's functions."""
    modules = add_layer_norm_kernels, linear_gelu_kernels, packed_attention_kernels
    functions = [f for module in modules for name, f in vars(module).items() if name.startswith(kernel)]
    compiled = [list(caches[0].values())[-1] for f in functions for caches in f.device_caches.values() if caches[0]]
    return {"registers": [c.n_regs for c in compiled], "spills": [c.n_spills for c in compiled]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="S", help="the model's size (default S)")
    parser.add_argument("--only", choices=CANDIDATES, action="append", help="time only this kernel")
    parser.add_argument("--out", type=Path, help="write the rows here as JSON")
    arguments = parser.parse_args()
    size, kernels = SIZES[arguments.size], arguments.only or list(CANDIDATES)
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), get_context("spawn")) as pool:
        jobs = [(kernel, candidate) for kernel in kernels for candidate in (CURRENT, *CANDIDATES[kernel])]
        list(pool.map(compile_one, *zip(*jobs, strict=True), [size] * len(jobs)))
    rows = []
    for kernel in kernels:
        for row in measure(kernel, size, Machine()):
            rows.append(row)
            print(f"{row.get('us', row.get('error'))}  " + "  ".join(f"{row[k]}" for k in row if k != "us"), flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(collect_provenance() | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
