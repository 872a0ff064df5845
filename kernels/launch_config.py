"""Choose how each kernel is launched: its tile sizes, warps, load stages and register limit.

There is one function for each operator. It takes shapes and a dtype and returns {kernel: launch}, where a launch
holds the constexprs and the options of that kernel's call. All values compile without spills
(benchmarks/results/machine-code.md lists what the machine code needs). Those for Hopper, half precision and 196 tokens
were timed on an H200 (`python -m benchmarks.kernels.tune`, benchmarks/results/tune.json); the others were not.
``hopper`` means compute capability 9.x.
"""

from typing import Any

import torch
import triton

Launch = dict[str, Any]  # constexpr or launch option -> int, bool or None
ROW_TILES_A_GROUP = 8  # linear_gelu: neighbouring programs share the tiles of both operands in the L2 cache
COLUMN_SUM_PROGRAMS_PER_SM = 4  # programs of 128 threads, which hide each other's loads


def is_hopper(device: torch.device) -> bool:
    """Return whether ``device`` has compute capability 9.x. The interpreter counts as Hopper."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9


def num_multiprocessors(device: torch.device) -> int:
    """Return the GPU's number of multiprocessors.

    The interpreter counts as one, so that each of its programs goes over many tiles.
    """
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def add_layer_norm(width: int) -> dict[str, Launch]:
    """Return the launches of "forward" and "backward" for rows of ``width`` elements.

    A row is split into three chunks of W elements, and a program of 128 threads takes tiles of R rows. R * W = 1024
    elements a chunk give each thread of the forward 8 consecutive elements, which is one 16-byte access in half
    precision. Up to W = 256 (width 768) the sums along a row stay inside a warp.

    The backward holds nine sums of a tile's size, so its tiles are half as large, and four programs fit on a
    multiprocessor (65,536 / (4 * 128) = 128 registers a thread). Rows wider than 1536 need more: two programs fit.
    Without a limit ptxas may settle for fewer registers and spill.
    """
    chunk = triton.next_power_of_2(triton.cdiv(width, 3))
    common: Launch = {"D": width, "W": chunk, "num_warps": 4}
    return {
        "forward": common | {"R": max(1, 1024 // chunk)},
        "backward": common | {"R": max(1, 512 // chunk), "maxnreg": min(255, 65_536 // (128 * norm_programs(width)))},
    }


def norm_programs(width: int) -> int:
    """Return how many programs of add_layer_norm's backward fit on a multiprocessor."""
    return 4 if width <= 1536 else 2


def column_sum(width: int) -> Launch:
    """Return the launch for rows of ``width`` elements: blocks of C columns, 16 bytes a thread, in tiles of R rows."""
    columns = min(128, triton.next_power_of_2(width))
    return {"C": columns, "R": 2048 // columns, "num_warps": 4}


def sum_partials() -> Launch:
    """Return the launch for a few hundred rows, which one program for each 32 columns reads in few large tiles."""
    return {"C": 32, "R": 256, "num_warps": 8}


def linear_gelu(inner: int, hidden: int, dtype: torch.dtype, *, hopper: bool) -> dict[str, Launch]:
    """Return the launches of "forward" and "backward" for a product over ``inner`` with ``hidden`` columns.

    A tile has BM rows and BN columns, and the product takes BK elements of ``inner`` at a time. The inner dimension is
    short (3 to 12 steps of 64), so a tile's epilogue is a large part of its time. Two programs of 8 warps fit on a
    multiprocessor (96 KiB of shared memory and at most 128 registers each), so that one multiplies while the other is
    in its epilogue. On Hopper the backward needs the explicit limit of 128 registers. On A100 it needs 166 registers
    and would spill at 128, so one program runs there.

    On an H200 no other tile, no persistent program and no load by TMA descriptors was faster by more than 3 %.

    fp32 cannot use tensor cores at its own accuracy, so it has small tiles and plain arithmetic.
    """
    if dtype == torch.float32:
        tile = {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 2}
    else:
        tile = {"BM": 128, "BN": 128, "BK": 64 if inner % 64 == 0 else 32, "num_warps": 8, "num_stages": 3}
    common: Launch = {"K": inner, "F": hidden, "GROUP": ROW_TILES_A_GROUP, **tile}
    return {"forward": common, "backward": common | {"maxnreg": 128 if hopper else None}}


def packed_attention(tokens: int, head_dim: int, dtype: torch.dtype, *, hopper: bool) -> dict[str, Launch]:
    """Return the launches of "forward", "backward_keys" and, where the backward takes two passes, "backward_queries".

    A tile has M queries and N keys of a head. The registers of a backward program, which hold the fp32 gradients of K
    and V and two tiles of scores, decide whether all keys of a head fit in one block. Hopper's matrix products read K
    and V from shared memory, and a head of 128 x 64 fits 256 threads. On other GPUs K and V pass through registers
    too, and 64 x 64 fits. fp32 uses no tensor cores; its small tiles are there for correctness, not for speed.

    Longer heads go block by block. On an H200, at 196 tokens, that was faster than a single block of 256 keys, which
    leaves room for one program on a multiprocessor: many small programs hide each other's waits.
    """
    block = max(64, triton.next_power_of_2(tokens))
    largest = (128 if hopper else 64) * 64
    single = dtype != torch.float32 and block <= 4 * head_dim and block * head_dim <= largest
    forward: Launch
    keys: Launch
    queries: Launch
    if dtype == torch.float32:
        rows = 32 if head_dim < 128 else 16
        forward = keys = queries = {"M": rows, "N": rows, "num_warps": 8, "num_stages": 1}
    elif single:
        forward = {"M": 64, "N": block, "num_warps": 4, "num_stages": 2}
        keys = queries = {"M": 32 if hopper else 16, "N": block, "num_warps": 8, "num_stages": 2}
    elif hopper and head_dim <= 64:
        forward = {"M": 128, "N": 32, "num_warps": 4, "num_stages": 3}
        keys = {"M": 32, "N": 64, "num_warps": 4, "num_stages": 3}
        queries = {"M": 64, "N": 32, "num_warps": 4, "num_stages": 3}
    else:
        large = head_dim == 128
        rows = 64 if large else 128
        forward = {"M": 128, "N": 32 if large and not hopper else 64, "num_warps": 8, "num_stages": 2 if large else 3}
        keys = {"M": 32, "N": rows, "num_warps": 8, "num_stages": 2}
        queries = {"M": rows, "N": 64, "num_warps": 8, "num_stages": 2}
    launches: dict[str, Launch] = {
        "forward": {"D": head_dim, "SINGLE_KV_BLOCK": single, **forward},
        "backward_keys": {"D": head_dim, "SINGLE_KV_BLOCK": single, **keys},
    }
    if not single:
        launches["backward_queries"] = {"D": head_dim, **queries}
    return launches
