"""How each kernel is launched: the tile a program makes, its warps, its stages of loading, its registers.

One function an operator, from shapes and dtype to {kernel: launch}: the constexprs and options of that kernel's call.
All were found by compiling without spills (docs/kernels.md has what the machine code needs) and none by timing: this
is the file to tune on a GPU. ``hopper`` is compute capability 9.x.
"""

import torch
import triton

Launch = dict[str, int | bool | None]
ROW_TILES_A_GROUP = 8  # linear_gelu: programs side by side share both operands' tiles in the L2 cache
BACKWARD_PROGRAMS_PER_SM = 2  # add_layer_norm: two resident programs hide each other's loads
# What that leaves a thread: 65,536 / (2 * 128), less one. Without a figure ptxas may settle for 128 and spill.
MAX_BACKWARD_REGISTERS = 255


def is_hopper(device: torch.device) -> bool:
    """The interpreter, which has no registers, plays one."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9


def num_multiprocessors(device: torch.device) -> int:
    """Of the GPU; the interpreter has one, so that its programs go over many tiles each."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def add_layer_norm(width: int) -> dict[str, Launch]:
    """Rows of ``width`` as three chunks of W; a program takes tiles of R rows.

    R * W = 1024 elements a chunk on 128 threads: 8 consecutive ones a thread, one 16-byte access in half
    precision, and up to W = 256 (width 768) the sums along a row stay inside a warp.
    """
    chunk = triton.next_power_of_2(triton.cdiv(width, 3))
    forward: Launch = {"D": width, "W": chunk, "R": max(1, 1024 // chunk), "num_warps": 4}
    return {"forward": forward, "backward": forward | {"maxnreg": MAX_BACKWARD_REGISTERS}}


def linear_gelu(
    inner: int, hidden: int, dtype: torch.dtype, *, hopper: bool, persistent: bool = False
) -> dict[str, Launch]:
    """A product over ``inner`` with ``hidden`` columns, in tiles of BM rows, BN columns and BK of ``inner``.

    The inner dimension is short (3 to 12 steps of 64), so a tile's epilogue is a large part of its time. Two
    programs of 8 warps are meant to fit on a multiprocessor (96 KiB of shared memory and at most 128 registers
    each), so that one multiplies while the other is in its epilogue. The backward must be told of the 128 on
    Hopper; on A100 it needs 166 and would spill: one program there.

    ``persistent``, for Hopper only (on A100 it spills), is the other way to hide the epilogue: one program a
    multiprocessor, which loads the next tile meanwhile. It has 255 registers to spend, in the forward on tiles
    twice as wide. Which is faster is for benchmarks/kernels to say.

    fp32 has no tensor cores at its own accuracy: small tiles, plain arithmetic.

    Raises:
        ValueError: ``persistent`` elsewhere than on Hopper.
    """
    if persistent and not hopper:
        raise ValueError("linear_gelu: persistent=True is for Hopper; elsewhere its tiles do not fit in registers")
    if dtype == torch.float32:
        tile = {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 2}
    else:
        tile = {"BM": 128, "BN": 128, "BK": 64 if inner % 64 == 0 else 32, "num_warps": 8, "num_stages": 3}
    common: Launch = {"K": inner, "F": hidden, "GROUP": ROW_TILES_A_GROUP, "PERSISTENT": persistent, **tile}
    wide: Launch = {"BN": 2 * tile["BN"]} if persistent and dtype != torch.float32 else {}
    return {
        "forward": common | wide,
        "backward": common | {"maxnreg": 128 if hopper and not persistent else None},
    }


def packed_attention(tokens: int, head_dim: int, dtype: torch.dtype, *, hopper: bool, bias: bool) -> dict[str, Launch]:
    """M queries by N keys of a head; "backward_queries" only where the backward takes two passes.

    What a backward program's registers hold (K and V's gradients and two tiles of scores, fp32) draws the line
    between whole and blocks. Hopper's matrix products read K and V from shared memory, and a head of 256 x 64
    fits 256 threads of 255 registers; elsewhere K and V pass through registers too, and 64 x 64 fits. Heads of
    32 go no further than 128 keys: at 256 the forward spilled in fp16. fp32 uses no tensor cores; its small
    tiles are there to be right.
    """
    block = max(64, triton.next_power_of_2(tokens))
    largest = (256 if hopper else 64) * 64
    whole = dtype != torch.float32 and block <= 4 * head_dim and block * head_dim <= largest
    if dtype == torch.float32:
        rows = 32 if head_dim < 128 else 16
        forward = keys = queries = {"M": rows, "N": rows, "num_warps": 8, "num_stages": 1}
    elif whole:
        forward = {"M": 64, "N": block, "num_warps": 4, "num_stages": 2}
        few = not hopper or (bias and block * head_dim == largest)  # nothing is left for 32 queries and a bias
        keys = queries = {"M": 16 if few else 32, "N": block, "num_warps": 8, "num_stages": 2}
    else:
        large = head_dim == 128
        rows = 64 if large else 128
        forward = {"M": 128, "N": 32 if large and not hopper else 64, "num_warps": 8, "num_stages": 2 if large else 3}
        keys = {"M": 32, "N": rows, "num_warps": 8, "num_stages": 2}
        queries = {"M": rows, "N": 64, "num_warps": 8, "num_stages": 2}
    launches: dict[str, Launch] = {
        "forward": {"D": head_dim, "WHOLE": whole, **forward},
        "backward_keys": {"D": head_dim, "WHOLE": whole, **keys},
    }
    if not whole:
        launches["backward_queries"] = {"D": head_dim, **queries}
    return launches
