"""Matrix products with GELU in their epilogue: the first half of an MLP, and its backward.

    forward     z  = x W^T + b,  h = GELU(z)                        one kernel
    backward    dz = (dy V) * GELU'(z),  db = sum(dz),  h again     one kernel; V is the layer's that follows

Shapes. N rows (batch x tokens), K width, F hidden width; a program makes tiles of BM rows and BN columns of an
[N, F] matrix, BK of the inner dimension at a time.

    x                         [..., K]     one dtype for all tensors: fp32, fp16 or bf16
    weight, bias              [F, K], [F]
    dy, weight (backward)     [..., K], [K, F]
    z, h, dz                  [N, F]       that dtype too
    partials                  [N / BM, F]  fp32, each row tile's share of db

GELU is not monotonic, so z cannot be had from h; h can be had from z for one multiplication, since the backward
needs Phi(z) anyway: it writes h once more for the next layer's weight gradient. The forward takes GELU of z *as
rounded and stored*, so that the h of the backward is the very h of the forward, bit for bit.

GELU(z) = z Phi(z), GELU'(z) = Phi(z) + z phi(z), Phi the normal distribution function: the exact definition, not
the tanh approximation. In fp32 Phi goes through tl.erf. In fp16 and bf16 it is an odd polynomial of degree 13,
within 7.4e-5 of Phi everywhere (11 instructions; erf takes 34 and spills): at most 2.9e-4 absolute in GELU and
7.4e-5 in GELU'. Relative to GELU that is below half a rounding step of fp16 for z > -1 and of bf16 for z > -1.7;
further left, where GELU vanishes, only the absolute bound holds. Exactly 0 and 1 beyond |z| = 3.85.

Source: Hendrycks and Gimpel 2016, arXiv 1606.08415 (GELU).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sws_kernels import tiles

WIDTH_MULTIPLE = 32  # the inner dimension is cut into whole tiles of 64 or 32


# --------------------------------------------------------------------------------------------- GELU in kernels

# Minimax on |z| <= 3.85 in Phi's absolute error, with Phi(3.85) tied to 1 + 2e-6: whatever the rounding, the
# clamp to [0, 1] (free: a modifier of the last instruction) then makes both tails exact.
PHI_BOUND = tl.constexpr(3.85)
PHI_1 = tl.constexpr(0.398642033)
PHI_3 = tl.constexpr(-0.0656399727)
PHI_5 = tl.constexpr(0.00926568452)
PHI_7 = tl.constexpr(-0.000917894416)
PHI_9 = tl.constexpr(5.89343435e-05)
PHI_11 = tl.constexpr(-2.16608032e-06)
PHI_13 = tl.constexpr(3.41962263e-08)
SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def normal_cdf(z, EXACT: tl.constexpr):
    """Phi(z), fp32: by erf, or within 7.4e-5 by a polynomial."""
    if EXACT:
        return 0.5 + 0.5 * tl.erf(z * SQRT_HALF)
    u = tl.minimum(tl.maximum(z, -PHI_BOUND), PHI_BOUND)
    t = u * u
    p = t * PHI_13 + PHI_11
    p = p * t + PHI_9
    p = p * t + PHI_7
    p = p * t + PHI_5
    p = p * t + PHI_3
    p = p * t + PHI_1
    return tl.minimum(tl.maximum(p * u + 0.5, 0.0), 1.0)


@triton.jit
def normal_pdf(z):
    return tl.exp(-0.5 * z * z) * INV_SQRT_2PI


# ------------------------------------------------------------------------------- the matrix product in kernels


@triton.jit
def _place(tile, num_row_tiles, num_col_tiles, GROUP: tl.constexpr):
    """(row tile, column tile): down GROUP row tiles before the next column, so a group's operands stay in L2."""
    in_group = GROUP * num_col_tiles
    first = tile // in_group * GROUP
    height = tl.minimum(num_row_tiles - first, GROUP)
    return first + tile % in_group % height, tile % in_group // height


@triton.jit
def _product(
    a_ptr,  # [N, K]
    b_ptr,  # [F, K] if B_TRANSPOSED, else [K, F]
    rows,
    cols,
    num_rows,
    K: tl.constexpr,
    F: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """A tile of a b^T or a b, fp32 [BM, BN]. Rows that do not exist repeat the last one: no mask in the loop."""
    inner = tl.arange(0, BK)
    a_at = a_ptr + tl.minimum(rows, num_rows - 1).to(tl.int64)[:, None] * K + inner[None, :]  # N * K may pass 2^31
    if B_TRANSPOSED:
        b_at = b_ptr + tl.minimum(cols, F - 1)[None, :] * K + inner[:, None]
    else:
        b_at = b_ptr + inner[:, None] * F + cols[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for _ in range(0, K, BK):
        a = tl.load(a_at)
        b = tl.load(b_at) if B_TRANSPOSED or F % BN == 0 else tl.load(b_at, mask=(cols < F)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")  # says nothing of fp16 and bf16; keeps fp32 from tf32
        a_at += BK
        b_at += BK if B_TRANSPOSED else BK * F
    return acc


@triton.jit
def _exists(rows, cols, num_rows, F: tl.constexpr, BN: tl.constexpr):
    """Which elements of an [N, F] tile exist; BN is the whole program's, though cols may be half of them."""
    mask = (rows < num_rows)[:, None]
    if F % BN != 0:
        mask = mask & (cols < F)[None, :]
    return mask


# --------------------------------------------------------------------------------------------- forward kernel


@triton.jit
def _forward_tile(
    x_ptr, weight_ptr, bias_ptr, h_ptr, z_ptr, num_rows, row_tile, col_tile,
    K: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rows = row_tile * BM + tl.arange(0, BM)
    cols = col_tile * BN + tl.arange(0, BN)
    acc = _product(x_ptr, weight_ptr, rows, cols, num_rows, K, F, True, BM, BN, BK)
    acc += tl.load(bias_ptr + cols, mask=cols < F, other=0.0).to(tl.float32)[None, :]

    dtype = h_ptr.dtype.element_ty
    z = acc.to(dtype)  # rounded once, to what is stored, and GELU is taken of that
    at = rows.to(tl.int64)[:, None] * F + cols[None, :]
    mask = _exists(rows, cols, num_rows, F, BN)
    if z_ptr is not None:
        tl.store(z_ptr + at, z, mask=mask)
    z = z.to(tl.float32)
    tl.store(h_ptr + at, (z * normal_cdf(z, dtype == tl.float32)).to(dtype), mask=mask)


@triton.jit
def _forward_kernel(
    x_ptr,  # [N, K]
    weight_ptr,  # [F, K]
    bias_ptr,  # [F]
    h_ptr,  # [N, F] out
    z_ptr,  # [N, F] out, or None: not wanted
    num_rows,
    K: tl.constexpr,
    F: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PERSISTENT: tl.constexpr,  # a program goes over many tiles, the next one's loads beside this one's epilogue
):
    num_row_tiles, num_col_tiles = tl.cdiv(num_rows, BM), tl.cdiv(F, BN)
    pointers = x_ptr, weight_ptr, bias_ptr, h_ptr, z_ptr
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), num_row_tiles * num_col_tiles, tl.num_programs(0), flatten=True):
            row_tile, col_tile = _place(tile, num_row_tiles, num_col_tiles, GROUP)
            _forward_tile(*pointers, num_rows, row_tile, col_tile, K, F, BM, BN, BK)
    else:
        row_tile, col_tile = _place(tl.program_id(0), num_row_tiles, num_col_tiles, GROUP)
        _forward_tile(*pointers, num_rows, row_tile, col_tile, K, F, BM, BN, BK)


# -------------------------------------------------------------------------------------------- backward kernel


@triton.jit
def _differentiate_half(
    dh, z_ptr, dz_ptr, h_ptr, partials_ptr, num_rows, first_col, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """From dh [BM, BN / 2]: dz, h and the tile's share of the bias gradient. Pointers and num_rows: the tile's."""
    rows = tl.arange(0, BM)
    cols = first_col + tl.arange(0, BN // 2)
    at = rows[:, None] * F + cols[None, :]
    mask = _exists(rows, cols, num_rows, F, BN)
    dtype = h_ptr.dtype.element_ty
    z = tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32)
    cdf = normal_cdf(z, dtype == tl.float32)
    tl.store(h_ptr + at, (z * cdf).to(dtype), mask=mask)
    dz = tl.where(mask, dh * (cdf + z * normal_pdf(z)), 0.0)
    tl.store(dz_ptr + at, dz.to(dtype), mask=mask)
    tl.store(partials_ptr + cols, tl.sum(dz, axis=0), mask=cols < F)


@triton.jit
def _backward_tile(
    dy_ptr, weight_ptr, z_ptr, dz_ptr, h_ptr, partials_ptr, num_rows, row_tile, col_tile,
    K: tl.constexpr, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rows = row_tile * BM + tl.arange(0, BM)
    cols = col_tile * BN + tl.arange(0, BN)
    dh = _product(dy_ptr, weight_ptr, rows, cols, num_rows, K, F, False, BM, BN, BK)

    # Half of the columns at a time: with the whole tile in hand the epilogue would take all 255 registers, and a
    # second program would no longer fit on the multiprocessor.
    left, right = tl.split(tl.permute(tl.reshape(dh, [BM, 2, BN // 2]), [0, 2, 1]))
    row_tile = row_tile.to(tl.int64)
    first = row_tile * BM * F  # int64 once a tile; offsets within it are small
    num_rows_left = num_rows - row_tile * BM
    pointers = z_ptr + first, dz_ptr + first, h_ptr + first, partials_ptr + row_tile * F
    _differentiate_half(left, *pointers, num_rows_left, col_tile * BN, F, BM, BN)
    _differentiate_half(right, *pointers, num_rows_left, col_tile * BN + BN // 2, F, BM, BN)


@triton.jit
def _backward_kernel(
    dy_ptr,  # [N, K]
    weight_ptr,  # [K, F], of the linear layer that follows
    z_ptr,  # [N, F]
    dz_ptr,  # [N, F] out
    h_ptr,  # [N, F] out
    partials_ptr,  # [row tiles, F] fp32 out
    num_rows,
    K: tl.constexpr,
    F: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    num_row_tiles, num_col_tiles = tl.cdiv(num_rows, BM), tl.cdiv(F, BN)
    pointers = dy_ptr, weight_ptr, z_ptr, dz_ptr, h_ptr, partials_ptr
    if PERSISTENT:
        for tile in tl.range(tl.program_id(0), num_row_tiles * num_col_tiles, tl.num_programs(0), flatten=True):
            row_tile, col_tile = _place(tile, num_row_tiles, num_col_tiles, GROUP)
            _backward_tile(*pointers, num_rows, row_tile, col_tile, K, F, BM, BN, BK)
    else:
        row_tile, col_tile = _place(tl.program_id(0), num_row_tiles, num_col_tiles, GROUP)
        _backward_tile(*pointers, num_rows, row_tile, col_tile, K, F, BM, BN, BK)


# -------------------------------------------------------------------------------------------------- launchers


def _grid(num_rows: int, launch: tiles.Launch, device: torch.device) -> tuple[int]:
    num_tiles = triton.cdiv(num_rows, launch["BM"]) * triton.cdiv(launch["F"], launch["BN"])
    return (min(num_tiles, tiles.num_multiprocessors(device)) if launch["PERSISTENT"] else num_tiles,)


@torch.library.custom_op("sws_kernels::linear_gelu", mutates_args=())
def linear_gelu_forward(
    x: Tensor, weight: Tensor, bias: Tensor, save: bool, persistent: bool = False
) -> tuple[Tensor, Tensor]:
    """(h, z): GELU(x weight^T + bias) [..., F], and what GELU was taken of [N, F], empty unless ``save``."""
    hidden, inner = weight.shape
    rows = x.reshape(-1, inner).contiguous()
    num_rows = rows.shape[0]
    h = x.new_empty((*x.shape[:-1], hidden))
    z = x.new_empty((num_rows, hidden) if save else (0,))
    hopper = tiles.is_hopper(x.device)
    launch = tiles.linear_gelu(inner, hidden, x.dtype, hopper=hopper, persistent=persistent)["forward"]
    if num_rows:
        with torch.cuda.device_of(x):  # Triton launches on the current device, not on the tensors'
            _forward_kernel[_grid(num_rows, launch, x.device)](
                rows, weight.contiguous(), bias.contiguous(), h, z if save else None, num_rows, **launch
            )
    return h, z


@linear_gelu_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, save: bool, persistent: bool = False) -> tuple[Tensor, Tensor]:
    h = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return h, x.new_empty((h.numel() // weight.shape[0], weight.shape[0]) if save else (0,))


@torch.library.custom_op("sws_kernels::linear_gelu_backward", mutates_args=())
def linear_gelu_backward(
    dy: Tensor, weight: Tensor, z: Tensor, persistent: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(dz, h, d_bias): [N, F] twice and fp32 [F], from the gradient [..., K] of h weight^T, weight [K, F].

    h is what `linear_gelu_forward` returned for this z, to the bit.
    """
    inner, hidden = weight.shape
    num_rows = z.shape[0]
    dz, h = torch.empty_like(z), torch.empty_like(z)
    hopper = tiles.is_hopper(z.device)
    launch = tiles.linear_gelu(inner, hidden, z.dtype, hopper=hopper, persistent=persistent)["backward"]
    partials = z.new_empty((triton.cdiv(num_rows, launch["BM"]), hidden), dtype=torch.float32)
    if num_rows:
        with torch.cuda.device_of(z):
            _backward_kernel[_grid(num_rows, launch, z.device)](
                dy.reshape(-1, inner).contiguous(), weight.contiguous(), z, dz, h, partials, num_rows, **launch
            )
    # The second stage of the reduction, in a fixed order and without atomics: equal bits on equal GPUs.
    return dz, h, partials.sum(dim=0)


@linear_gelu_backward.register_fake
def _(dy: Tensor, weight: Tensor, z: Tensor, persistent: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(z), torch.empty_like(z), z.new_empty(z.shape[1], dtype=torch.float32)
