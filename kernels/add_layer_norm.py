"""Add a branch, with drop-path's per-sample scale, to the residual stream and normalise, in one pass over memory.

    new_residual = residual + scale * branch        (the stream that continues)
    normed       = LayerNorm(new_residual)          (the input of the next attention or MLP)

Shapes: B samples, T tokens, D width, N = B * T rows. The backward runs P programs.

    residual, branch          [B, T, D]  fp32, fp16 or bf16; the two may differ
    scale                     [B]        any of these dtypes, or None without drop-path
    weight, bias              [D]        any of these dtypes
    new_residual              [B, T, D]  residual's dtype
    normed                    [B, T, D]  branch's dtype, which is that of the next matrix product
    mean, rstd                [N]        fp32, saved for the backward
    partials                  [2, P, D]  fp32, each backward program's share of d_weight and d_bias; [3, P, D] where the
                                         sum of d_branch is asked for too

The kernels are in `add_layer_norm_kernels.py`.

Source: Ba et al. 2016, arXiv 1607.06450 (LayerNorm); Huang et al. 2016, arXiv 1603.09382 (stochastic depth).
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sws_kernels import launch_config
from sws_kernels.add_layer_norm_kernels import add_layer_norm_backward_kernel, add_layer_norm_forward_kernel
from sws_kernels.column_sum import sum_partials
from sws_kernels.common import Backend, check_triton, contiguous, is_triton

WIDTH_MULTIPLE = 32  # keeps every row 16-byte aligned in every dtype; the matrix products need the same
MAX_WIDTH = 3072  # three chunks of 1024; the backward of wider rows would not fit in registers


# -------------------------------------------------------------------------------------------------- launchers


@torch.library.custom_op("sws_kernels::add_layer_norm", mutates_args=())
def add_layer_norm_forward(
    residual: Tensor, branch: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward kernel. Inputs are those of `add_layer_norm` and are not checked again.

    This is a custom_op, which is opaque to torch.compile, rather than a triton_op: Inductor fuses nothing into our
    Triton kernels and cannot trace the interpreter's, so the tests without a GPU would test another path.

    Returns:
        (new_residual, normed, mean, rstd): [B, T, D] in residual's dtype, [B, T, D] in branch's, and [N] fp32 twice.
    """
    new_residual = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    normed = torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
    mean, rstd = _launch_forward(residual, branch, scale, weight, bias, eps, new_residual, normed)
    return new_residual, normed, mean, rstd


@torch.library.custom_op("sws_kernels::layer_norm", mutates_args=())
def layer_norm_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel without a branch: LayerNorm of x [B, T, D]. It has no autograd of its own.

    Returns:
        (normed, mean, rstd): like x, and [N] fp32 twice.
    """
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return normed, *_launch_forward(x, None, None, weight, bias, eps, None, normed)


@torch.library.custom_op("sws_kernels::scaled_add", mutates_args=())
def scaled_add(residual: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
    """Launch the forward kernel without its norm: residual + scale * branch. It has no autograd of its own."""
    new_residual = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    _launch_forward(residual, branch, scale, None, None, 0.0, new_residual, None)
    return new_residual


def _launch_forward(
    residual: Tensor, branch: Tensor | None, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    eps: float, new_residual: Tensor | None, normed: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fill new_residual and normed. Return (mean, rstd), which are empty without a norm."""
    num_samples, tokens, width = residual.shape
    num_rows = num_samples * tokens
    mean = torch.empty(0 if weight is None else num_rows, dtype=torch.float32, device=residual.device)
    rstd = torch.empty_like(mean)
    launch = launch_config.add_layer_norm(width)["forward"]
    grid = (triton.cdiv(num_rows, launch["R"]),)
    if num_rows:
        with torch.cuda.device_of(residual):  # Triton launches on the current device, not on the tensors'
            add_layer_norm_forward_kernel[grid](
                contiguous(residual), contiguous(branch), contiguous(scale), contiguous(weight),
                contiguous(bias), new_residual, normed, mean, rstd, num_rows, tokens, eps, **launch,
            )  # fmt: skip
    return mean, rstd


@add_layer_norm_forward.register_fake
def _(
    residual: Tensor, branch: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stats = residual.new_empty(residual.shape[0] * residual.shape[1], dtype=torch.float32)
    return residual.new_empty(residual.shape), branch.new_empty(branch.shape), stats, torch.empty_like(stats)


@layer_norm_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    stats = x.new_empty(x.shape[0] * x.shape[1], dtype=torch.float32)
    return x.new_empty(x.shape), stats, torch.empty_like(stats)


@scaled_add.register_fake
def _(residual: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
    return residual.new_empty(residual.shape)


class NormGradients(NamedTuple):
    """Hold what `add_layer_norm_backward` computes. d_residual and d_branch are one tensor where they are equal."""

    d_residual: Tensor  # [B, T, D], residual's dtype
    d_branch: Tensor  # [B, T, D], branch's dtype
    d_weight: Tensor  # [D] fp32
    d_bias: Tensor  # [D] fp32
    normed: Tensor  # [B, T, D], branch's dtype: the forward's, up to rounding; empty unless it was asked for
    d_branch_sum: Tensor  # [D] fp32, over all rows: the bias gradient of what made the branch; empty likewise


def add_layer_norm_backward(
    d_new_residual: Tensor, d_normed: Tensor, new_residual: Tensor, scale: Tensor | None, weight: Tensor,
    mean: Tensor, rstd: Tensor, bias: Tensor | None = None,
) -> NormGradients:  # fmt: skip
    """Launch the backward kernel.

    Args:
        d_new_residual: [B, T, D], residual's dtype.
        d_normed: [B, T, D], branch's dtype.
        new_residual, mean, rstd: results of `add_layer_norm_forward`, which are not changed.
        scale, weight: [B] or None, and [D]; the forward's.
        bias: [D], the forward's, to also compute normed again and the sum of d_branch.
    """
    arguments = d_new_residual, d_normed, new_residual, scale, weight, bias, mean, rstd
    d_residual, d_branch, normed, sums = _backward_op(*arguments)
    if not _branch_gradient_differs(d_normed, new_residual, scale):
        d_branch = d_residual
    d_branch_sum = sums.new_empty(0) if bias is None else sums[2]
    return NormGradients(d_residual, d_branch, sums[0], sums[1], normed, d_branch_sum)


@torch.library.custom_op("sws_kernels::add_layer_norm_backward", mutates_args=())
def _backward_op(
    d_new_residual: Tensor, d_normed: Tensor, new_residual: Tensor, scale: Tensor | None, weight: Tensor,
    bias: Tensor | None, mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (d_residual, d_branch, normed, the sums as one fp32 [2 or 3, D]).

    The sums are d_weight, d_bias and, with a bias, that of d_branch; normed is empty without a bias. d_branch is empty
    where it equals d_residual: an operator may not return one tensor twice, and writing it twice would cost a fifth of
    the traffic.
    """
    num_samples, tokens, width = new_residual.shape
    num_rows = num_samples * tokens
    launch = launch_config.add_layer_norm(width)["backward"]
    # P fixes the order in which the sums are added up, so equal shapes on equal GPUs give equal bits.
    resident = launch_config.norm_programs(width) * launch_config.num_multiprocessors(new_residual.device)
    num_programs = min(triton.cdiv(num_rows, launch["R"]), resident)
    d_residual = torch.empty(new_residual.shape, dtype=new_residual.dtype, device=new_residual.device)
    separate = _branch_gradient_differs(d_normed, new_residual, scale)
    d_branch = d_normed.new_empty(d_normed.shape if separate else (0,))
    normed = d_normed.new_empty((0,) if bias is None else d_normed.shape)
    partials = new_residual.new_empty((2 if bias is None else 3, num_programs, width), dtype=torch.float32)
    if num_rows:
        with torch.cuda.device_of(new_residual):
            add_layer_norm_backward_kernel[(num_programs,)](
                contiguous(d_new_residual), contiguous(d_normed), new_residual, contiguous(scale),
                contiguous(weight), contiguous(bias), mean, rstd, d_residual, d_branch if separate else None,
                None if bias is None else normed, partials, num_rows, tokens, **launch,
            )  # fmt: skip
    return d_residual, d_branch, normed, sum_partials(partials)


@_backward_op.register_fake
def _(
    d_new_residual: Tensor, d_normed: Tensor, new_residual: Tensor, scale: Tensor | None, weight: Tensor,
    bias: Tensor | None, mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    separate = _branch_gradient_differs(d_normed, new_residual, scale)
    d_branch = d_normed.new_empty(d_normed.shape if separate else (0,))
    normed = d_normed.new_empty((0,) if bias is None else d_normed.shape)
    sums = weight.new_empty((2 if bias is None else 3, weight.shape[0]), dtype=torch.float32)
    return new_residual.new_empty(new_residual.shape), d_branch, normed, sums


def _branch_gradient_differs(d_normed: Tensor, new_residual: Tensor, scale: Tensor | None) -> bool:
    """Return whether d_branch differs from d_residual in value or dtype. d_normed has the branch's dtype."""
    return scale is not None or d_normed.dtype != new_residual.dtype


# --------------------------------------------------------------------------------------------------- autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, scale, weight, bias, _ = inputs
    new_residual, _, mean, rstd = output
    ctx.save_for_backward(new_residual, scale, weight, mean, rstd)
    ctx.bias_dtype = bias.dtype
    ctx.mark_non_differentiable(mean, rstd)


def _differentiate(
    ctx: Any, d_new_residual: Tensor, d_normed: Tensor, _d_mean: Tensor, _d_rstd: Tensor
) -> tuple[Tensor | None, ...]:
    weight = ctx.saved_tensors[2]
    g = add_layer_norm_backward(d_new_residual, d_normed, *ctx.saved_tensors)
    return g.d_residual, g.d_branch, None, g.d_weight.to(weight.dtype), g.d_bias.to(ctx.bias_dtype), None


add_layer_norm_forward.register_autograd(_differentiate, setup_context=_setup_context)


# -------------------------------------------------------------------------------------------- public function


def add_layer_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    scale: Tensor | None = None,
    *,
    backend: Backend = "reference",
) -> tuple[Tensor, Tensor]:
    """Add a scaled branch to the residual stream and normalise the sum. Differentiable once.

    Args:
        residual: [B, T, D].
        branch: [B, T, D]; its dtype may differ from residual's.
        weight, bias: [D], LayerNorm's.
        eps: added to the variance.
        scale: [B], drop-path's 0 or 1/keep for each sample, or None. It is not differentiated.
        backend: "reference" is plain PyTorch on any device. "triton" needs CUDA tensors (or, for tests,
            TRITON_INTERPRET=1 set before triton is imported), fp32, fp16 or bf16, and a width divisible by 32 up to
            3072. It never falls back.

    Returns:
        (new_residual, normed), both [B, T, D]; new_residual has residual's dtype, normed has branch's.

    Raises:
        ValueError: shapes that do not fit together, a scale that needs a gradient, an unknown backend, or tensors that
            backend="triton" does not take.
    """
    _check_shapes(residual, branch, weight, bias, scale)
    if not is_triton("add_layer_norm", backend):
        return add_layer_norm_reference(residual, branch, weight, bias, eps, scale)
    tensors = {"residual": residual, "branch": branch, "weight": weight, "bias": bias, "scale": scale}
    check_triton("add_layer_norm", tensors, one_dtype=False)
    width = residual.shape[2]
    if width % WIDTH_MULTIPLE or width > MAX_WIDTH:
        raise ValueError(
            f"add_layer_norm: backend='triton' takes widths divisible by {WIDTH_MULTIPLE} up to {MAX_WIDTH}, "
            f"got {width}; choose backend='reference'"
        )
    new_residual, normed, _, _ = add_layer_norm_forward(residual, branch, scale, weight, bias, eps)
    return new_residual, normed


def _check_shapes(residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None) -> None:
    if residual.dim() != 3 or branch.shape != residual.shape:
        raise ValueError(
            "add_layer_norm: residual and branch must have one shape [B, T, D], "
            f"got {list(residual.shape)} and {list(branch.shape)}"
        )
    num_samples, _, width = residual.shape
    if weight.shape != (width,) or bias.shape != (width,):
        raise ValueError(
            f"add_layer_norm: weight and bias must be [{width}], got {list(weight.shape)} and {list(bias.shape)}"
        )
    if scale is not None and (scale.shape != (num_samples,) or scale.requires_grad):
        raise ValueError(
            f"add_layer_norm: scale must be [{num_samples}] and need no gradient, "
            f"got {list(scale.shape)}, requires_grad={scale.requires_grad}"
        )


# -------------------------------------------------------------------------------------------------- reference


def add_layer_norm_reference(
    residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `add_layer_norm` by its formula: the same shapes and dtypes, any device, any width, fp64 too.

    The arithmetic is fp32, or fp64 for fp64 tensors. LayerNorm reads the sum as rounded to residual's dtype.
    """
    dtype = torch.promote_types(residual.dtype, torch.float32)
    added = branch.to(dtype) if scale is None else branch.to(dtype) * scale.to(dtype)[:, None, None]
    new_residual = (residual.to(dtype) + added).to(residual.dtype)
    x = new_residual.to(dtype)
    centered = x - x.mean(dim=-1, keepdim=True)
    variance = centered.square().mean(dim=-1, keepdim=True)
    normed = centered / (variance + eps).sqrt() * weight.to(dtype) + bias.to(dtype)
    return new_residual, normed.to(branch.dtype)
