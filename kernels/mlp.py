"""Compute a transformer's MLP, GELU(x W1^T + b1) W2^T + b2, with everything elementwise inside a matrix product.

    forward     z  = x W1^T + b1,  h = GELU(z)                     `linear_gelu`
                y  = h W2^T + b2                                   cuBLAS
    backward    dz = (dy W2) * GELU'(z),  db1 = sum(dz),  h again  `linear_gelu`
                dx = dz W1,  dW1 = dz^T x,  dW2 = dy^T h,  db2     cuBLAS

Shapes: N rows (batch x tokens), D width, F hidden width (4 D in a ViT).

    x, y, dx, dy              [..., D]   all tensors have one dtype: fp32, fp16 or bf16
    fc1_weight, fc1_bias      [F, D], [F]    W1, b1
    fc2_weight, fc2_bias      [D, F], [D]    W2, b2
    z                         [N, F]     the same dtype; the only tensor that is saved for the backward

The backward computes h again instead of saving it, so one [N, F] tensor less is alive between forward and backward.

Source: Vaswani et al. 2017, arXiv 1706.03762 (MLP); Hendrycks and Gimpel 2016, arXiv 1606.08415 (GELU).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sws_kernels.column_sum import column_sum
from sws_kernels.common import Backend, check_triton, is_triton, weight_gradient
from sws_kernels.linear_gelu import WIDTH_MULTIPLE, linear_gelu_backward, linear_gelu_forward

# -------------------------------------------------------------------------------------------------- launchers


@torch.library.custom_op("sws_kernels::mlp", mutates_args=())
def mlp_forward(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, save: bool
) -> tuple[Tensor, Tensor]:
    """Compute the MLP. Inputs are those of `mlp` and are not checked again; ``save`` asks for z.

    Returns:
        (y, z): [..., D], and [N, F] or empty unless ``save``. Both have x's dtype.
    """
    h, z = linear_gelu_forward(x, fc1_weight, fc1_bias, save)
    return F.linear(h, fc2_weight, fc2_bias), z


@mlp_forward.register_fake
def _(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor, save: bool
) -> tuple[Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], fc2_weight.shape[0]))
    return y, x.new_empty((x.numel() // x.shape[-1], fc1_weight.shape[0]) if save else (0,))


@torch.library.custom_op("sws_kernels::mlp_backward", mutates_args=())
def mlp_backward(
    dy: Tensor, x: Tensor, fc1_weight: Tensor, fc2_weight: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute all gradients of the MLP from dy [..., D], the forward's inputs and its z [N, F].

    Returns:
        (dx, d_fc1_weight, d_fc1_bias, d_fc2_weight, d_fc2_bias): [..., D] in x's dtype, and the parameters' shapes in
        fp32.
    """
    dz, h, d_fc1_bias = linear_gelu_backward(dy, fc2_weight, z)
    d_fc2_weight = weight_gradient(dy, h)
    del h  # before dx and d_fc1_weight allocate memory
    dx = (dz @ fc1_weight).view(x.shape)
    return dx, weight_gradient(dz, x), d_fc1_bias, d_fc2_weight, column_sum(dy.flatten(0, -2))


@mlp_backward.register_fake
def _(
    dy: Tensor, x: Tensor, fc1_weight: Tensor, fc2_weight: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    width, hidden = fc2_weight.shape

    def gradient(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    return x.new_empty(x.shape), gradient(hidden, width), gradient(hidden), gradient(width, hidden), gradient(width)


# --------------------------------------------------------------------------------------------------- autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, fc1_weight, _, fc2_weight, _, save = inputs
    _, z = output
    if not save:
        raise RuntimeError("sws_kernels::mlp: called with save=False, but a gradient is needed")
    ctx.save_for_backward(x, fc1_weight, fc2_weight, z)
    ctx.mark_non_differentiable(z)


def _differentiate(ctx: Any, dy: Tensor, _dz: Tensor) -> tuple[Tensor | None, ...]:
    x, fc1_weight, fc2_weight, z = ctx.saved_tensors
    dx, *d_parameters = mlp_backward(dy.contiguous(), x, fc1_weight, fc2_weight, z)
    return dx, *(d.to(x.dtype) for d in d_parameters), None


mlp_forward.register_autograd(_differentiate, setup_context=_setup_context)


# -------------------------------------------------------------------------------------------- public function


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    backend: Backend = "reference",
) -> Tensor:
    """Compute GELU(x fc1_weight^T + fc1_bias) fc2_weight^T + fc2_bias. Differentiable once.

    Args:
        x: [..., D].
        fc1_weight, fc1_bias: [F, D] and [F], as in `nn.Linear`.
        fc2_weight, fc2_bias: [D, F] and [D].
        backend: "reference" is plain PyTorch on any device. "triton" needs CUDA tensors (or, for tests,
            TRITON_INTERPRET=1 set before triton is imported), one dtype of fp32, fp16 and bf16, and D and F divisible
            by 32. It never falls back.

    Returns:
        [..., D] in x's dtype.

    Raises:
        ValueError: shapes that do not fit together, an unknown backend, or tensors that backend="triton" does not take.
    """
    _check_shapes(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    if not is_triton("mlp", backend):
        return mlp_reference(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    check_mlp(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    tensors = x, fc1_weight, fc1_bias, fc2_weight, fc2_bias
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return mlp_forward(*tensors, needs_gradient)[0]


def _check_shapes(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> None:
    width, hidden = x.shape[-1], fc1_weight.shape[0]
    for name, tensor, shape in (
        *(("fc1_weight", fc1_weight, (hidden, width)), ("fc1_bias", fc1_bias, (hidden,))),
        *(("fc2_weight", fc2_weight, (width, hidden)), ("fc2_bias", fc2_bias, (width,))),
    ):
        if tensor.shape != shape:
            raise ValueError(f"mlp: {name} must be {list(shape)} for x {list(x.shape)}, got {list(tensor.shape)}")


def check_mlp(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> None:
    """Check devices, dtypes and widths for backend="triton"; `stage` checks its MLP with it.

    Raises:
        ValueError: backend="triton" does not take these tensors.
    """
    parameters = {"fc1_weight": fc1_weight, "fc1_bias": fc1_bias, "fc2_weight": fc2_weight, "fc2_bias": fc2_bias}
    check_triton("mlp", {"x": x, **parameters})
    if any(width % WIDTH_MULTIPLE for width in fc1_weight.shape):
        raise ValueError(
            f"mlp: backend='triton' takes widths divisible by {WIDTH_MULTIPLE}, "
            f"got fc1_weight {list(fc1_weight.shape)}; choose backend='reference'"
        )


# -------------------------------------------------------------------------------------------------- reference


def mlp_reference(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    """Compute `mlp` by its formula: the same shapes, any device, any width, fp64 too.

    The arithmetic is fp32, or fp64 for fp64 tensors.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    z = x.to(dtype) @ fc1_weight.to(dtype).t() + fc1_bias.to(dtype)
    h = z * torch.special.ndtr(z)  # GELU(z) = z Phi(z)
    return (h @ fc2_weight.to(dtype).t() + fc2_bias.to(dtype)).to(x.dtype)
