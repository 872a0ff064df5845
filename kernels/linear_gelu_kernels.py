"""Define the Triton kernels of `linear_gelu`: matrix products with GELU, or its derivative, in their epilogue.

Shapes: N rows (batch x tokens), K width, F hidden width. A program makes tiles of BM rows and BN columns of an [N, F]
matrix and takes BK elements of the inner dimension at a time.

GELU(z) = z Phi(z) and GELU'(z) = Phi(z) + z phi(z), where Phi is the normal distribution function. This is the exact
definition, not the tanh approximation. In fp32 Phi is computed by tl.erf. In fp16 and bf16 it is an odd polynomial of
degree 13, which is within 7.4e-5 of Phi everywhere and takes 11 instructions (erf takes 34 and spills). The error is at
most 2.9e-4 absolute in GELU and 7.4e-5 in GELU'. Relative to GELU that is below half a rounding step of fp16 for z > -1
and of bf16 for z > -1.7; further left, where GELU vanishes, only the absolute bound holds. Beyond |z| = 3.85 the
polynomial is exactly 0 or 1.
"""

import triton
import triton.language as tl

# --------------------------------------------------------------------------------------------- GELU in kernels

# The polynomial is minimax on |z| <= 3.85 in Phi's absolute error, with Phi(3.85) tied to 1 + 2e-6. The clamp to [0, 1]
# then makes both tails exact whatever the rounding, and it is free: a modifier of the last instruction.
PHI_BOUND = tl.constexpr(3.85)
PHI_1 = tl.constexpr(0.398642033)
PHI_3 = tl.constexpr(-0.0656399727)
PHI_5 = tl.constexpr(0.00926568452)
PHI_7 = tl.constexpr(-0.000917894416)
PHI_9 = tl.constexpr(5.89343435e-05)
PHI_11 = tl.constexpr(-2.16608032e-06)
PHI_13 = tl.constexpr(3.41962263e-08)
SQRT_HALF = tl.constexpr(0.7071067811865476)
LOG2_E = tl.constexpr(1.4426950408889634)  # the hardware has exp2
LOG2_INV_SQRT_2PI = tl.constexpr(-1.3257480647361593)


@triton.jit
def normal_cdf(z, EXACT: tl.constexpr):
    """Compute Phi(z) in fp32: by erf if EXACT, otherwise within 7.4e-5 by a polynomial."""
    if EXACT:
        return 0.5 + 0.5 * tl.erf(z * SQRT_HALF)
    t = tl.minimum(z * z, PHI_BOUND * PHI_BOUND)  # beyond the bound |p * z| grows past 1/2, and the last clamp acts
    p = t * PHI_13 + PHI_11
    p = p * t + PHI_9
    p = p * t + PHI_7
    p = p * t + PHI_5
    p = p * t + PHI_3
    p = p * t + PHI_1
    return tl.minimum(tl.maximum(p * z + 0.5, 0.0), 1.0)


@triton.jit
def normal_pdf(z):
    """Compute phi(z), the normal density, in fp32."""
    return tl.exp2(z * z * (-0.5 * LOG2_E) + LOG2_INV_SQRT_2PI)


# ------------------------------------------------------------------------------- the matrix product in kernels


@triton.jit
def _place(tile, num_row_tiles, num_col_tiles, GROUP: tl.constexpr):
    """Return (row tile, column tile) of a tile number.

    The order goes down GROUP row tiles before it takes the next column, so that a group's operands stay in L2.
    """
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
    """Compute a tile of a b^T or a b, fp32 [BM, BN].

    Rows that do not exist repeat the last one, so that the loop needs no mask.
    """
    inner = tl.arange(0, BK)
    a_at = a_ptr + tl.minimum(rows, num_rows - 1).to(tl.int64)[:, None] * K + inner[None, :]  # N * K may exceed 2^31
    if B_TRANSPOSED:
        b_at = b_ptr + tl.minimum(cols, F - 1)[None, :] * K + inner[:, None]
    else:
        b_at = b_ptr + inner[:, None] * F + cols[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for _ in range(0, K, BK):
        a = tl.load(a_at)
        b = tl.load(b_at) if B_TRANSPOSED or F % BN == 0 else tl.load(b_at, mask=(cols < F)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")  # keeps fp32 from tf32; has no effect on fp16 and bf16
        a_at += BK
        b_at += BK if B_TRANSPOSED else BK * F
    return acc


@triton.jit
def _exists(rows, cols, num_rows, F: tl.constexpr, BN: tl.constexpr):
    """Return which elements of an [N, F] tile exist. BN is the whole program's, though cols may be half of them."""
    mask = (rows < num_rows)[:, None]
    if F % BN != 0:
        mask = mask & (cols < F)[None, :]
    return mask


# --------------------------------------------------------------------------------------------- forward kernel


@triton.jit
def linear_gelu_forward_kernel(
    x_ptr,  # [N, K]
    weight_ptr,  # [F, K]
    bias_ptr,  # [F]
    h_ptr,  # [N, F] out
    z_ptr,  # [N, F] out, or None where it is not saved
    num_rows,
    K: tl.constexpr,
    F: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Compute z = x weight^T + bias and h = GELU(z)."""
    row_tile, col_tile = _place(tl.program_id(0), tl.cdiv(num_rows, BM), tl.cdiv(F, BN), GROUP)
    rows = row_tile * BM + tl.arange(0, BM)
    cols = col_tile * BN + tl.arange(0, BN)
    acc = _product(x_ptr, weight_ptr, rows, cols, num_rows, K, F, True, BM, BN, BK)
    acc += tl.load(bias_ptr + cols, mask=cols < F, other=0.0).to(tl.float32)[None, :]

    dtype = h_ptr.dtype.element_ty
    z = acc.to(dtype)  # rounded once, to the dtype that is stored; GELU reads the rounded values
    at = rows.to(tl.int64)[:, None] * F + cols[None, :]
    mask = _exists(rows, cols, num_rows, F, BN)
    if z_ptr is not None:
        tl.store(z_ptr + at, z, mask=mask)
    z = z.to(tl.float32)
    tl.store(h_ptr + at, (z * normal_cdf(z, dtype == tl.float32)).to(dtype), mask=mask)


# -------------------------------------------------------------------------------------------- backward kernel


@triton.jit
def _differentiate_half(
    dh, z_ptr, dz_ptr, h_ptr, partials_ptr, num_rows, first_col, F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Store dz, h and the tile's share of the bias gradient, computed from dh [BM, BN / 2].

    The pointers and num_rows are relative to the tile.
    """
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
def linear_gelu_backward_kernel(
    dy_ptr,  # [N, K]
    weight_ptr,  # [K, F], the weight of the linear layer that follows
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
):
    """Compute dz = (dy weight) * GELU'(z), h = GELU(z) and each row tile's share of the bias gradient sum(dz)."""
    row_tile, col_tile = _place(tl.program_id(0), tl.cdiv(num_rows, BM), tl.cdiv(F, BN), GROUP)
    rows = row_tile * BM + tl.arange(0, BM)
    cols = col_tile * BN + tl.arange(0, BN)
    dh = _product(dy_ptr, weight_ptr, rows, cols, num_rows, K, F, False, BM, BN, BK)

    # The epilogue takes half of the columns at a time. With the whole tile it would need all 255 registers, and a
    # second program would no longer fit on the multiprocessor.
    left, right = tl.split(tl.permute(tl.reshape(dh, [BM, 2, BN // 2]), [0, 2, 1]))
    row_tile = row_tile.to(tl.int64)
    first = row_tile * BM * F  # int64 once a tile; offsets within the tile are small
    num_rows_left = num_rows - row_tile * BM
    pointers = z_ptr + first, dz_ptr + first, h_ptr + first, partials_ptr + row_tile * F
    _differentiate_half(left, *pointers, num_rows_left, col_tile * BN, F, BM, BN)
    _differentiate_half(right, *pointers, num_rows_left, col_tile * BN + BN // 2, F, BM, BN)
