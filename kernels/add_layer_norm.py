"""Residual add, with drop-path's per-sample scale, and LayerNorm in one pass over memory.

    new_residual = residual + scale * branch        (the stream that goes on)
    normed       = LayerNorm(new_residual)          (what the next attention or MLP reads)

Shapes. B samples, T tokens, D width, N = B * T rows; a program handles tiles of R rows; a row is three chunks
of W columns, W a power of two. ViT widths 192, 384 and 768 are 3 x 2^k, so the three chunks hold the row
exactly; other widths mask the rest. The chunks stay in registers, so a row is read once.

    residual, branch          [B, T, D]  fp32, fp16 or bf16, each its own
    scale                     [B]        any of these, or None: no drop-path
    gamma, beta               [D]        any of these
    new_residual              [B, T, D]  residual's dtype
    normed                    [B, T, D]  branch's dtype: the dtype of the next matrix product
    mean, rstd                [N]        fp32, kept for the backward
    partials                  [2, P, D]  fp32, the P backward programs' shares of dgamma and dbeta

Statistics and sums are fp32. LayerNorm reads new_residual *as rounded and stored*, so that the backward,
which recomputes from the stored tensor, differentiates the very function that the forward computed.

Traffic in [N, D] tensors: the forward reads 2 and writes 2; the backward reads 3 and writes 1, or 2 with a
scale, where the branch's gradient differs from the residual's.

Source: Ba et al. 2016, arXiv 1607.06450 (LayerNorm); Huang et al. 2016, arXiv 1603.09382 (stochastic depth).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from sws_kernels import tiles
from sws_kernels.common import Backend, check_triton, contiguous, is_triton

WIDTH_MULTIPLE = 32  # keeps every row 16-byte aligned in every dtype; also what the matrix products take
MAX_WIDTH = 3072  # three chunks of 1024: beyond it the backward would no longer fit in registers


# ----------------------------------------------------------------------------------------- helpers in kernels


@triton.jit
def _mask(live, CHUNK: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    """Which elements of a chunk exist: [R, W], or [R, 1] where the chunks hold the row exactly."""
    mask = live[:, None]
    if 3 * W != D:
        mask = mask & (CHUNK * W + tl.arange(0, W) < D)[None, :]
    return mask


@triton.jit
def _load(ptr, rows, live, D: tl.constexpr, W: tl.constexpr):
    """Rows of a [N, D] tensor as three fp32 chunks [R, W]; zero where nothing exists."""
    at = ptr + rows.to(tl.int64)[:, None] * D + tl.arange(0, W)[None, :]  # int64: N * D may pass 2^31
    x0 = tl.load(at, mask=_mask(live, 0, D, W), other=0.0).to(tl.float32)
    x1 = tl.load(at + W, mask=_mask(live, 1, D, W), other=0.0).to(tl.float32)
    x2 = tl.load(at + 2 * W, mask=_mask(live, 2, D, W), other=0.0).to(tl.float32)
    return x0, x1, x2


@triton.jit
def _store(ptr, x0, x1, x2, rows, live, D: tl.constexpr, W: tl.constexpr):
    """Three chunks [R, W] to rows of a [N, D] tensor, rounded to its dtype."""
    at = ptr + rows.to(tl.int64)[:, None] * D + tl.arange(0, W)[None, :]
    dtype = ptr.dtype.element_ty
    tl.store(at, x0.to(dtype), mask=_mask(live, 0, D, W))
    tl.store(at + W, x1.to(dtype), mask=_mask(live, 1, D, W))
    tl.store(at + 2 * W, x2.to(dtype), mask=_mask(live, 2, D, W))


@triton.jit
def _load_vector(ptr, D: tl.constexpr, W: tl.constexpr):
    """A [D] vector as three fp32 chunks [1, W]."""
    row = tl.zeros([1], tl.int32)
    return _load(ptr, row, row == 0, D, W)


# --------------------------------------------------------------------------------------------- forward kernel


@triton.jit
def _forward_kernel(
    residual_ptr,  # [N, D]
    branch_ptr,  # [N, D]
    scale_ptr,  # [B] or None
    gamma_ptr,  # [D]
    beta_ptr,  # [D]
    new_residual_ptr,  # [N, D] out
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
    rows = tl.program_id(0) * R + tl.arange(0, R)
    live = rows < num_rows

    x0, x1, x2 = _load(residual_ptr, rows, live, D, W)
    b0, b1, b2 = _load(branch_ptr, rows, live, D, W)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + rows // tokens, mask=live, other=0.0).to(tl.float32)[:, None]
        b0, b1, b2 = b0 * scale, b1 * scale, b2 * scale

    # Round once, to what is stored, and normalise that.
    dtype = new_residual_ptr.dtype.element_ty
    x0 = (x0 + b0).to(dtype).to(tl.float32)
    x1 = (x1 + b1).to(dtype).to(tl.float32)
    x2 = (x2 + b2).to(dtype).to(tl.float32)
    _store(new_residual_ptr, x0, x1, x2, rows, live, D, W)

    # The row is in registers, so the variance can be taken about the mean: no cancellation.
    mean = tl.sum(x0 + x1 + x2, axis=1) / D
    x0 = tl.where(_mask(live, 0, D, W), x0 - mean[:, None], 0.0)
    x1 = tl.where(_mask(live, 1, D, W), x1 - mean[:, None], 0.0)
    x2 = tl.where(_mask(live, 2, D, W), x2 - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(x0 * x0 + x1 * x1 + x2 * x2, axis=1) / D + eps)
    tl.store(mean_ptr + rows, mean, mask=live)
    tl.store(rstd_ptr + rows, rstd, mask=live)

    g0, g1, g2 = _load_vector(gamma_ptr, D, W)
    b0, b1, b2 = _load_vector(beta_ptr, D, W)
    r = rstd[:, None]
    _store(normed_ptr, x0 * r * g0 + b0, x1 * r * g1 + b1, x2 * r * g2 + b2, rows, live, D, W)


# -------------------------------------------------------------------------------------------- backward kernel


@triton.jit
def _backward_kernel(
    d_new_residual_ptr,  # [N, D]
    d_normed_ptr,  # [N, D]
    new_residual_ptr,  # [N, D]
    scale_ptr,  # [B] or None
    gamma_ptr,  # [D]
    mean_ptr,  # [N] fp32
    rstd_ptr,  # [N] fp32
    d_residual_ptr,  # [N, D] out
    d_branch_ptr,  # [N, D] out, or None: equal to d_residual
    partials_ptr,  # [2, P, D] fp32 out
    num_rows,
    tokens,
    D: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
):
    """One pass: every input is read once, and each of the P programs leaves one row of dgamma and of dbeta.

    With h = (x - mean) * rstd and a = d_normed * gamma,
    dx = d_new_residual + rstd * (a - mean(a) - h * mean(a * h)).
    """
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    g0, g1, g2 = _load_vector(gamma_ptr, D, W)
    # Kept as [R, W] until the end: adding tiles needs no exchange between threads, one reduction over R does.
    dg0 = tl.zeros([R, W], tl.float32)
    dg1 = tl.zeros([R, W], tl.float32)
    dg2 = tl.zeros([R, W], tl.float32)
    db0 = tl.zeros([R, W], tl.float32)
    db1 = tl.zeros([R, W], tl.float32)
    db2 = tl.zeros([R, W], tl.float32)

    for tile in range(program, tl.cdiv(num_rows, R), num_programs):
        rows = tile * R + tl.arange(0, R)
        live = rows < num_rows
        h0, h1, h2 = _load(new_residual_ptr, rows, live, D, W)
        a0, a1, a2 = _load(d_normed_ptr, rows, live, D, W)
        mean = tl.load(mean_ptr + rows, mask=live, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=live, other=0.0)[:, None]

        # Elements that do not exist have d_normed = 0 and so add nothing to any of the sums below.
        h0, h1, h2 = (h0 - mean) * rstd, (h1 - mean) * rstd, (h2 - mean) * rstd
        dg0 += a0 * h0
        dg1 += a1 * h1
        dg2 += a2 * h2
        db0 += a0
        db1 += a1
        db2 += a2
        a0, a1, a2 = a0 * g0, a1 * g1, a2 * g2
        mean_a = (tl.sum(a0 + a1 + a2, axis=1) / D)[:, None]
        mean_ah = (tl.sum(a0 * h0 + a1 * h1 + a2 * h2, axis=1) / D)[:, None]

        d0, d1, d2 = _load(d_new_residual_ptr, rows, live, D, W)
        d0 += rstd * (a0 - mean_a - h0 * mean_ah)
        d1 += rstd * (a1 - mean_a - h1 * mean_ah)
        d2 += rstd * (a2 - mean_a - h2 * mean_ah)
        _store(d_residual_ptr, d0, d1, d2, rows, live, D, W)
        if d_branch_ptr is not None:
            if scale_ptr is not None:
                scale = tl.load(scale_ptr + rows // tokens, mask=live, other=0.0).to(tl.float32)[:, None]
                d0, d1, d2 = d0 * scale, d1 * scale, d2 * scale
            _store(d_branch_ptr, d0, d1, d2, rows, live, D, W)

    row = program + tl.zeros([1], tl.int32)
    one = row >= 0
    dg0, dg1, dg2 = tl.sum(dg0, axis=0), tl.sum(dg1, axis=0), tl.sum(dg2, axis=0)
    db0, db1, db2 = tl.sum(db0, axis=0), tl.sum(db1, axis=0), tl.sum(db2, axis=0)
    _store(partials_ptr, dg0[None, :], dg1[None, :], dg2[None, :], row, one, D, W)
    _store(partials_ptr, db0[None, :], db1[None, :], db2[None, :], row + num_programs, one, D, W)


# -------------------------------------------------------------------------------------------------- launchers


def _num_backward_programs(num_tiles: int, device: torch.device) -> int:
    """P. It fixes the order in which dgamma and dbeta are summed: equal shapes, equal GPUs, equal bits."""
    return min(num_tiles, tiles.BACKWARD_PROGRAMS_PER_SM * tiles.num_multiprocessors(device))


@torch.library.custom_op("sws_kernels::add_layer_norm", mutates_args=())
def _forward(
    residual: Tensor, branch: Tensor, scale: Tensor | None, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(new_residual, normed, mean, rstd): shapes and dtypes in the legend.

    custom_op, opaque to torch.compile, rather than triton_op: Inductor fuses nothing into a Triton kernel of
    ours and cannot trace the interpreter's, so the tests without a GPU would test another path.
    """
    num_samples, tokens, width = residual.shape
    num_rows = num_samples * tokens
    new_residual = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    normed = torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
    mean = torch.empty(num_rows, dtype=torch.float32, device=residual.device)
    rstd = torch.empty_like(mean)
    tile = tiles.add_layer_norm(width)["forward"]
    grid = (triton.cdiv(num_rows, tile["R"]),)
    if num_rows:
        with torch.cuda.device_of(residual):  # Triton launches on the current device, not on the tensors'
            _forward_kernel[grid](
                contiguous(residual), contiguous(branch), contiguous(scale), contiguous(gamma),
                contiguous(beta), new_residual, normed, mean, rstd, num_rows, tokens, eps, **tile,
            )  # fmt: skip
    return new_residual, normed, mean, rstd


@_forward.register_fake
def _(
    residual: Tensor, branch: Tensor, scale: Tensor | None, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stats = residual.new_empty(residual.shape[0] * residual.shape[1], dtype=torch.float32)
    return residual.new_empty(residual.shape), branch.new_empty(branch.shape), stats, torch.empty_like(stats)


@torch.library.custom_op("sws_kernels::add_layer_norm_backward", mutates_args=())
def _backward(
    d_new_residual: Tensor, d_normed: Tensor, new_residual: Tensor, scale: Tensor | None, gamma: Tensor,
    mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(d_residual, d_branch, d_parameters): [B, T, D] twice, and dgamma and dbeta as one fp32 [2, D].

    d_branch is empty where it equals d_residual: an operator may not return one tensor twice, and writing it
    twice would cost a fifth of the traffic.
    """
    num_samples, tokens, width = new_residual.shape
    num_rows = num_samples * tokens
    tile = tiles.add_layer_norm(width)["backward"]
    num_programs = _num_backward_programs(triton.cdiv(num_rows, tile["R"]), new_residual.device)
    d_residual = torch.empty(new_residual.shape, dtype=new_residual.dtype, device=new_residual.device)
    separate = _branch_gradient_differs(d_normed, new_residual, scale)
    d_branch = d_normed.new_empty(d_normed.shape if separate else (0,))
    partials = new_residual.new_empty((2, num_programs, width), dtype=torch.float32)
    if num_rows:
        with torch.cuda.device_of(new_residual):
            _backward_kernel[(num_programs,)](
                contiguous(d_new_residual), contiguous(d_normed), new_residual, contiguous(scale),
                contiguous(gamma), mean, rstd, d_residual, d_branch if separate else None, partials,
                num_rows, tokens, **tile,
            )  # fmt: skip
    # The second stage of the reduction: a fixed number of rows in a fixed order, no atomics.
    return d_residual, d_branch, partials.sum(dim=1)


@_backward.register_fake
def _(
    d_new_residual: Tensor, d_normed: Tensor, new_residual: Tensor, scale: Tensor | None, gamma: Tensor,
    mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    separate = _branch_gradient_differs(d_normed, new_residual, scale)
    d_branch = d_normed.new_empty(d_normed.shape if separate else (0,))
    d_parameters = gamma.new_empty((2, gamma.shape[0]), dtype=torch.float32)
    return new_residual.new_empty(new_residual.shape), d_branch, d_parameters


def _branch_gradient_differs(d_normed: Tensor, new_residual: Tensor, scale: Tensor | None) -> bool:
    """d_normed has the branch's dtype."""
    return scale is not None or d_normed.dtype != new_residual.dtype


# --------------------------------------------------------------------------------------------------- autograd


def _setup_context(ctx, inputs, output) -> None:
    _, _, scale, gamma, beta, _ = inputs
    new_residual, _, mean, rstd = output
    ctx.save_for_backward(new_residual, scale, gamma, mean, rstd)
    ctx.beta_dtype = beta.dtype
    ctx.mark_non_differentiable(mean, rstd)


def _differentiate(ctx, d_new_residual, d_normed, _d_mean, _d_rstd):
    new_residual, scale, gamma, mean, rstd = ctx.saved_tensors
    d_residual, d_branch, (dgamma, dbeta) = _backward(d_new_residual, d_normed, new_residual, scale, gamma, mean, rstd)
    if not _branch_gradient_differs(d_normed, new_residual, scale):
        d_branch = d_residual
    return d_residual, d_branch, None, dgamma.to(gamma.dtype), dbeta.to(ctx.beta_dtype), None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


# -------------------------------------------------------------------------------------------- public function


def add_layer_norm(
    residual: Tensor,
    branch: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float = 1e-6,
    scale: Tensor | None = None,
    *,
    backend: Backend = "reference",
) -> tuple[Tensor, Tensor]:
    """``(new_residual, normed)`` = ``(residual + scale * branch, LayerNorm(new_residual))``.

    residual, branch: [B, T, D]; gamma, beta: [D]; scale: [B] or None, drop-path's 0 or 1/keep for each
    sample, not differentiated. new_residual has residual's dtype, normed has branch's. Differentiable once.

    backend: "reference" is plain PyTorch on any device. "triton" needs CUDA tensors (or, for tests,
    TRITON_INTERPRET=1 set before triton is imported), fp32, fp16 or bf16, and a width divisible by 32 up to
    3072; anything else is a ValueError, never a fallback.
    """
    _check_shapes(residual, branch, gamma, beta, scale)
    if not is_triton("add_layer_norm", backend):
        return add_layer_norm_reference(residual, branch, gamma, beta, eps, scale)
    tensors = {"residual": residual, "branch": branch, "gamma": gamma, "beta": beta, "scale": scale}
    check_triton("add_layer_norm", tensors, one_dtype=False)
    width = residual.shape[2]
    if width % WIDTH_MULTIPLE or width > MAX_WIDTH:
        raise ValueError(
            f"add_layer_norm: backend='triton' takes widths divisible by {WIDTH_MULTIPLE} up to {MAX_WIDTH}, "
            f"got {width}; choose backend='reference'"
        )
    new_residual, normed, _, _ = _forward(residual, branch, scale, gamma, beta, eps)
    return new_residual, normed


def _check_shapes(residual: Tensor, branch: Tensor, gamma: Tensor, beta: Tensor, scale: Tensor | None) -> None:
    if residual.dim() != 3 or branch.shape != residual.shape:
        raise ValueError(
            "add_layer_norm: residual and branch must have one shape [B, T, D], "
            f"got {list(residual.shape)} and {list(branch.shape)}"
        )
    num_samples, _, width = residual.shape
    if gamma.shape != (width,) or beta.shape != (width,):
        raise ValueError(
            f"add_layer_norm: gamma and beta must be [{width}], got {list(gamma.shape)} and {list(beta.shape)}"
        )
    if scale is not None and (scale.shape != (num_samples,) or scale.requires_grad):
        raise ValueError(
            f"add_layer_norm: scale must be [{num_samples}] and need no gradient, "
            f"got {list(scale.shape)}, requires_grad={scale.requires_grad}"
        )


# -------------------------------------------------------------------------------------------------- reference


def add_layer_norm_reference(
    residual: Tensor,
    branch: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float = 1e-6,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch: shapes and dtypes as `add_layer_norm`, any device, any width, fp64 too."""
    scaled = branch if scale is None else branch * scale.to(branch.dtype)[:, None, None]
    new_residual = (residual + scaled).to(residual.dtype)
    # layer_norm wants one dtype; the wider of the stream's and the parameters' loses nothing.
    dtype = torch.promote_types(new_residual.dtype, torch.promote_types(gamma.dtype, beta.dtype))
    normed = F.layer_norm(new_residual.to(dtype), gamma.shape, gamma.to(dtype), beta.to(dtype), eps)
    return new_residual, normed.to(branch.dtype)
