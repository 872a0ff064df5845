"""Define the Triton kernels of `add_layer_norm`: scaled residual add and LayerNorm in one pass, and its backward.

Shapes: B samples, T tokens, D width, N = B * T rows. A program handles tiles of R rows. A row is three chunks of W
columns, where W is a power of two. The ViT widths 192, 384 and 768 are 3 x 2^k, so their three chunks hold the row
exactly; other widths mask the rest. The chunks stay in registers, so a row is read once.

Statistics and sums are fp32. LayerNorm reads new_residual *as rounded and stored*, because the backward recomputes
from the stored tensor and must differentiate the very function that the forward computed.

Traffic in [N, D] tensors: the forward reads 2 and writes 2; without a branch it is LayerNorm alone, reads 1 and writes
1. The backward reads 3 and writes 1, or 2 with a scale, because the branch's gradient then differs from the residual's,
and one more where it also computes normed again.
"""

import triton
import triton.language as tl

# ----------------------------------------------------------------------------------------- helpers in kernels


@triton.jit
def _mask(row_mask, CHUNK: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    """Return which elements of a chunk exist: [R, W], or [R, 1] where the chunks hold the row exactly."""
    mask = row_mask[:, None]
    if 3 * W != D:
        mask = mask & (CHUNK * W + tl.arange(0, W) < D)[None, :]
    return mask


@triton.jit
def _load(ptr, rows, row_mask, D: tl.constexpr, W: tl.constexpr):
    """Load rows of a [N, D] tensor as three fp32 chunks [R, W]. Elements that do not exist are zero."""
    at = ptr + rows.to(tl.int64)[:, None] * D + tl.arange(0, W)[None, :]  # int64: N * D may exceed 2^31
    x0 = tl.load(at, mask=_mask(row_mask, 0, D, W), other=0.0).to(tl.float32)
    x1 = tl.load(at + W, mask=_mask(row_mask, 1, D, W), other=0.0).to(tl.float32)
    x2 = tl.load(at + 2 * W, mask=_mask(row_mask, 2, D, W), other=0.0).to(tl.float32)
    return x0, x1, x2


@triton.jit
def _store(ptr, x0, x1, x2, rows, row_mask, D: tl.constexpr, W: tl.constexpr):
    """Store three chunks [R, W] to rows of a [N, D] tensor, rounded to its dtype."""
    at = ptr + rows.to(tl.int64)[:, None] * D + tl.arange(0, W)[None, :]
    dtype = ptr.dtype.element_ty
    tl.store(at, x0.to(dtype), mask=_mask(row_mask, 0, D, W))
    tl.store(at + W, x1.to(dtype), mask=_mask(row_mask, 1, D, W))
    tl.store(at + 2 * W, x2.to(dtype), mask=_mask(row_mask, 2, D, W))


@triton.jit
def _load_vector(ptr, D: tl.constexpr, W: tl.constexpr):
    """Load a [D] vector as three fp32 chunks [1, W]."""
    row = tl.zeros([1], tl.int32)
    return _load(ptr, row, row == 0, D, W)


# --------------------------------------------------------------------------------------------- forward kernel


@triton.jit
def add_layer_norm_forward_kernel(
    residual_ptr,  # [N, D]
    branch_ptr,  # [N, D], or None to normalise residual as it is
    scale_ptr,  # [B] or None
    weight_ptr,  # [D], or None to add only; then these four are None too
    bias_ptr,  # [D]
    new_residual_ptr,  # [N, D] out, or None without a branch
    normed_ptr,  # [N, D] out
    mean_ptr,  # [N] fp32 out
    rstd_ptr,  # [N] fp32 out
    num_rows,
    tokens,
    eps,
    D: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
):
    """Add, store the sum, normalise it as stored, and store the statistics for the backward."""
    rows = tl.program_id(0) * R + tl.arange(0, R)
    row_mask = rows < num_rows

    x0, x1, x2 = _load(residual_ptr, rows, row_mask, D, W)
    if branch_ptr is not None:
        b0, b1, b2 = _load(branch_ptr, rows, row_mask, D, W)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + rows // tokens, mask=row_mask, other=0.0).to(tl.float32)[:, None]
            b0, b1, b2 = b0 * scale, b1 * scale, b2 * scale
        # Round once, to the dtype that is stored, and normalise the rounded values.
        dtype = new_residual_ptr.dtype.element_ty
        x0 = (x0 + b0).to(dtype).to(tl.float32)
        x1 = (x1 + b1).to(dtype).to(tl.float32)
        x2 = (x2 + b2).to(dtype).to(tl.float32)
        _store(new_residual_ptr, x0, x1, x2, rows, row_mask, D, W)

    if weight_ptr is not None:
        # The row is in registers, so the variance is taken about the mean, which avoids cancellation.
        mean = tl.sum(x0 + x1 + x2, axis=1) / D
        x0 = tl.where(_mask(row_mask, 0, D, W), x0 - mean[:, None], 0.0)
        x1 = tl.where(_mask(row_mask, 1, D, W), x1 - mean[:, None], 0.0)
        x2 = tl.where(_mask(row_mask, 2, D, W), x2 - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(x0 * x0 + x1 * x1 + x2 * x2, axis=1) / D + eps)
        tl.store(mean_ptr + rows, mean, mask=row_mask)
        tl.store(rstd_ptr + rows, rstd, mask=row_mask)

        w0, w1, w2 = _load_vector(weight_ptr, D, W)
        b0, b1, b2 = _load_vector(bias_ptr, D, W)
        r = rstd[:, None]
        _store(normed_ptr, x0 * r * w0 + b0, x1 * r * w1 + b1, x2 * r * w2 + b2, rows, row_mask, D, W)


# -------------------------------------------------------------------------------------------- backward kernel


@triton.jit
def add_layer_norm_backward_kernel(
    d_new_residual_ptr,  # [N, D]
    d_normed_ptr,  # [N, D]
    new_residual_ptr,  # [N, D]
    scale_ptr,  # [B] or None
    weight_ptr,  # [D]
    bias_ptr,  # [D], or None to leave out normed and the sums of d_branch
    mean_ptr,  # [N] fp32
    rstd_ptr,  # [N] fp32
    d_residual_ptr,  # [N, D] out
    d_branch_ptr,  # [N, D] out, or None where it equals d_residual
    normed_ptr,  # [N, D] out, or None without a bias
    partials_ptr,  # [2, P, D] fp32 out, or [3, P, D] with a bias
    num_rows,
    tokens,
    D: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
):
    """Compute all gradients in one pass, which reads every input once.

    With h = (x - mean) * rstd and a = d_normed * weight,
    dx = d_new_residual + rstd * (a - mean(a) - h * mean(a * h)).
    Each of the P programs leaves one row of d_weight = sum(d_normed * h) and one of d_bias = sum(d_normed).

    With a bias it also stores the forward's normed = h * weight + bias, and one row of sum(d_branch): the linear layers
    on either side of the norm need them for their weights' gradients, and all of it is at hand here.
    """
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    w0, w1, w2 = _load_vector(weight_ptr, D, W)
    # The sums stay [R, W] until the end: adding tiles needs no exchange between threads, and only one reduction over R
    # does.
    dw0 = tl.zeros([R, W], tl.float32)
    dw1 = tl.zeros([R, W], tl.float32)
    dw2 = tl.zeros([R, W], tl.float32)
    db0 = tl.zeros([R, W], tl.float32)
    db1 = tl.zeros([R, W], tl.float32)
    db2 = tl.zeros([R, W], tl.float32)
    if bias_ptr is not None:
        b0, b1, b2 = _load_vector(bias_ptr, D, W)
        ds0 = tl.zeros([R, W], tl.float32)
        ds1 = tl.zeros([R, W], tl.float32)
        ds2 = tl.zeros([R, W], tl.float32)

    for tile in range(program, tl.cdiv(num_rows, R), num_programs):
        rows = tile * R + tl.arange(0, R)
        row_mask = rows < num_rows
        h0, h1, h2 = _load(new_residual_ptr, rows, row_mask, D, W)
        a0, a1, a2 = _load(d_normed_ptr, rows, row_mask, D, W)
        mean = tl.load(mean_ptr + rows, mask=row_mask, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=row_mask, other=0.0)[:, None]

        # Elements that do not exist have d_normed = 0, so they add nothing to the sums below.
        h0, h1, h2 = (h0 - mean) * rstd, (h1 - mean) * rstd, (h2 - mean) * rstd
        dw0 += a0 * h0
        dw1 += a1 * h1
        dw2 += a2 * h2
        db0 += a0
        db1 += a1
        db2 += a2
        if bias_ptr is not None:
            _store(normed_ptr, h0 * w0 + b0, h1 * w1 + b1, h2 * w2 + b2, rows, row_mask, D, W)
        a0, a1, a2 = a0 * w0, a1 * w1, a2 * w2
        mean_a = (tl.sum(a0 + a1 + a2, axis=1) / D)[:, None]
        mean_ah = (tl.sum(a0 * h0 + a1 * h1 + a2 * h2, axis=1) / D)[:, None]

        d0, d1, d2 = _load(d_new_residual_ptr, rows, row_mask, D, W)
        d0 += rstd * (a0 - mean_a - h0 * mean_ah)
        d1 += rstd * (a1 - mean_a - h1 * mean_ah)
        d2 += rstd * (a2 - mean_a - h2 * mean_ah)
        _store(d_residual_ptr, d0, d1, d2, rows, row_mask, D, W)
        if d_branch_ptr is not None:
            if scale_ptr is not None:
                scale = tl.load(scale_ptr + rows // tokens, mask=row_mask, other=0.0).to(tl.float32)[:, None]
                d0, d1, d2 = d0 * scale, d1 * scale, d2 * scale
            _store(d_branch_ptr, d0, d1, d2, rows, row_mask, D, W)
        if bias_ptr is not None:
            # A row that does not exist has rstd = 0 and d = 0; a column that does not exist has d = -rstd * mean_a and
            # is summed into columns that are not stored.
            ds0 += d0
            ds1 += d1
            ds2 += d2

    row = program + tl.zeros([1], tl.int32)
    always = row >= 0
    dw0, dw1, dw2 = tl.sum(dw0, axis=0), tl.sum(dw1, axis=0), tl.sum(dw2, axis=0)
    db0, db1, db2 = tl.sum(db0, axis=0), tl.sum(db1, axis=0), tl.sum(db2, axis=0)
    _store(partials_ptr, dw0[None, :], dw1[None, :], dw2[None, :], row, always, D, W)
    _store(partials_ptr, db0[None, :], db1[None, :], db2[None, :], row + num_programs, always, D, W)
    if bias_ptr is not None:
        ds0, ds1, ds2 = tl.sum(ds0, axis=0), tl.sum(ds1, axis=0), tl.sum(ds2, axis=0)
        _store(partials_ptr, ds0[None, :], ds1[None, :], ds2[None, :], row + 2 * num_programs, always, D, W)
