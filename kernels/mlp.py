"""A transformer's MLP, y = GELU(x W1^T + b1) W2^T + b2, with everything elementwise inside a matrix product.

    forward     z  = x W1^T + b1,  h = GELU(z)                     `linear_gelu`
                y  = h W2^T + b2                                   cuBLAS
    backward    dz = (dy W2) * GELU'(z),  db1 = sum(dz),  h again  `linear_gelu`
                dx = dz W1,  dW1 = dz^T x,  dW2 = dy^T h,  db2     cuBLAS

Shapes. N rows (batch x tokens), D width, F hidden width (4 D in a ViT).

    x, y, dx, dy              [..., D]   one dtype for all tensors: fp32, fp16 or bf16
    w1, b1                    [F, D], [F]
    w2, b2                    [D, F], [D]
    z                         [N, F]     that dtype too; all that is kept for the backward

Between forward and backward an [N, F] tensor less is alive than where h is kept: the backward makes it again.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from sws_kernels.common import Backend, bias_gradient, check_triton, is_triton, weight_gradient
from sws_kernels.linear_gelu import WIDTH_MULTIPLE, linear_gelu_backward, linear_gelu_forward

# -------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("sws_kernels::mlp", mutates_args=())
def mlp_forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """(y [..., D], z [N, F] or empty unless ``save``)."""
    h, z = linear_gelu_forward(x, w1, b1, save)
    return F.linear(h, w2, b2), z


@mlp_forward.register_fake
def _(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], w2.shape[0]))
    return y, x.new_empty((x.numel() // x.shape[-1], w1.shape[0]) if save else (0,))


@torch.library.custom_op("sws_kernels::mlp_backward", mutates_args=())
def mlp_backward(
    dy: Tensor, x: Tensor, w1: Tensor, w2: Tensor, z: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dw1, db1, dw2, db2); the parameters' gradients in fp32."""
    dz, h, db1 = linear_gelu_backward(dy, w2, z)
    dw2 = weight_gradient(dy, h)
    del h  # before dx and dw1 ask for memory
    return (dz @ w1).view(x.shape), weight_gradient(dz, x), db1, dw2, bias_gradient(dy)


@mlp_backward.register_fake
def _(dy: Tensor, x: Tensor, w1: Tensor, w2: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    width, hidden = w2.shape
    shapes = ((hidden, width), (hidden,), (width, hidden), (width,))
    dw1, db1, dw2, db2 = (x.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return x.new_empty(x.shape), dw1, db1, dw2, db2


# --------------------------------------------------------------------------------------------------- autograd


def _setup_context(ctx, inputs, output) -> None:
    x, w1, _, w2, _, save = inputs
    if not save:
        raise RuntimeError("sws_kernels::mlp: called with save=False, but a gradient is needed")
    ctx.save_for_backward(x, w1, w2, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, dy, _dz):
    x, w1, w2, z = ctx.saved_tensors
    dx, *d_parameters = mlp_backward(dy.contiguous(), x, w1, w2, z)
    return dx, *(d.to(x.dtype) for d in d_parameters), None


mlp_forward.register_autograd(_differentiate, setup_context=_setup_context)


# -------------------------------------------------------------------------------------------- public function


def mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, backend: Backend = "reference") -> Tensor:
    """GELU(x w1^T + b1) w2^T + b2: x [..., D], w1 [F, D], b1 [F], w2 [D, F], b2 [D]. Differentiable once.

    backend: "reference" is plain PyTorch on any device. "triton" needs CUDA tensors (or, for tests,
    TRITON_INTERPRET=1 set before triton is imported), one dtype of fp32, fp16 and bf16, and D and F divisible
    by 32; anything else is a ValueError, never a fallback.
    """
    _check_shapes(x, w1, b1, w2, b2)
    if not is_triton("mlp", backend):
        return mlp_reference(x, w1, b1, w2, b2)
    check_mlp(x, w1, b1, w2, b2)
    tensors = (x, w1, b1, w2, b2)
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return mlp_forward(*tensors, needs_gradient)[0]


def _check_shapes(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> None:
    width, hidden = x.shape[-1], w1.shape[0]
    wanted = {"w1": (hidden, width), "b1": (hidden,), "w2": (width, hidden), "b2": (width,)}
    for (name, shape), tensor in zip(wanted.items(), (w1, b1, w2, b2), strict=True):
        if tensor.shape != shape:
            raise ValueError(f"mlp: {name} must be {list(shape)} for x {list(x.shape)}, got {list(tensor.shape)}")


def check_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> None:
    """What backend="triton" asks for; also `stage`'s check of its MLP."""
    check_triton("mlp", {"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2})
    for width in w1.shape:
        if width % WIDTH_MULTIPLE:
            raise ValueError(
                f"mlp: backend='triton' takes widths divisible by {WIDTH_MULTIPLE}, got w1 {list(w1.shape)}; "
                "choose backend='reference'"
            )


# -------------------------------------------------------------------------------------------------- reference


def mlp_reference(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """The same in plain PyTorch: any device, any width, fp64 too."""
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)
