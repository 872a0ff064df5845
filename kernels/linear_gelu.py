"""Compute the first half of an MLP and its backward, as matrix products with GELU in their epilogue.

    forward     z  = x W^T + b,  h = GELU(z)                        one kernel
    backward    dz = (dy V) * GELU'(z),  db = sum(dz),  h again     one kernel; V is the weight of the next layer

These are the two parts of `mlp`, which makes them differentiable. The backward starts from the gradient after the next
layer, because that layer's product is what it fuses GELU' into.

Shapes: N rows (batch x tokens), K width, F hidden width, BM rows of a tile.

    x                         [..., K]     all tensors have one dtype: fp32, fp16 or bf16
    weight, bias              [F, K], [F]
    dy, weight (backward)     [..., K], [K, F]
    z, h, dz                  [N, F]       the same dtype
    partials                  [N / BM, F]  fp32, each row tile's share of db

GELU is not monotonic, so z cannot be computed from h. h can be computed from z for one multiplication, because the
backward needs Phi(z) anyway; it writes h once more for the next layer's weight gradient. The forward takes GELU of z
*as rounded and stored*, so the h of the backward equals the h of the forward bit for bit.

The kernels, and how they compute GELU, are in `linear_gelu_kernels.py`.

Source: Hendrycks and Gimpel 2016, arXiv 1606.08415 (GELU).
"""

import math

import torch
import triton
from torch import Tensor

from sws_kernels import launch_config
from sws_kernels.column_sum import sum_partials
from sws_kernels.linear_gelu_kernels import linear_gelu_backward_kernel, linear_gelu_forward_kernel

WIDTH_MULTIPLE = 32  # the inner dimension is cut into whole tiles of 64 or 32


# --------------------------------------------------------------------------- launchers, the public functions


@torch.library.custom_op("sws_kernels::linear_gelu", mutates_args=())
def linear_gelu_forward(x: Tensor, weight: Tensor, bias: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """Compute GELU(x weight^T + bias). Shapes are not checked; `mlp` does that.

    Args:
        x: [..., K].
        weight, bias: [F, K] and [F], in x's dtype. K and F must be divisible by 32.
        save: whether to return z for the backward.

    Returns:
        (h, z): h [..., F], and the argument of GELU [N, F], which is empty unless ``save``. Both have x's dtype.
    """
    hidden, inner = weight.shape
    rows = x.reshape(-1, inner).contiguous()
    num_rows = rows.shape[0]
    h = x.new_empty((*x.shape[:-1], hidden))
    z = x.new_empty((num_rows, hidden) if save else (0,))
    hopper = launch_config.is_hopper(x.device)
    launch = launch_config.linear_gelu(inner, hidden, x.dtype, hopper=hopper)["forward"]
    if num_rows:
        with torch.cuda.device_of(x):  # Triton launches on the current device, not on the tensors'
            linear_gelu_forward_kernel[_grid(num_rows, launch)](
                rows, weight.contiguous(), bias.contiguous(), h, z if save else None, num_rows, **launch
            )
    return h, z


@linear_gelu_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    h = x.new_empty((*x.shape[:-1], weight.shape[0]))
    return h, x.new_empty((h.numel() // weight.shape[0], weight.shape[0]) if save else (0,))


@torch.library.custom_op("sws_kernels::linear_gelu_backward", mutates_args=())
def linear_gelu_backward(dy: Tensor, weight: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradient of z, the bias gradient and h from the gradient of y = h weight^T + any bias.

    Args:
        dy: [..., K], the gradient of the next layer's output.
        weight: [K, F], the next layer's.
        z: [N, F], as `linear_gelu_forward` returned it.

    Returns:
        (dz, h, d_bias): [N, F] twice in z's dtype and fp32 [F]. h equals what `linear_gelu_forward` returned for this
        z, bit for bit.
    """
    inner, hidden = weight.shape
    num_rows = z.shape[0]
    dz, h = torch.empty_like(z), torch.empty_like(z)
    hopper = launch_config.is_hopper(z.device)
    launch = launch_config.linear_gelu(inner, hidden, z.dtype, hopper=hopper)["backward"]
    partials = z.new_empty((triton.cdiv(num_rows, launch["BM"]), hidden), dtype=torch.float32)
    if num_rows:
        with torch.cuda.device_of(z):
            linear_gelu_backward_kernel[_grid(num_rows, launch)](
                dy.reshape(-1, inner).contiguous(), weight.contiguous(), z, dz, h, partials, num_rows, **launch
            )
    return dz, h, sum_partials(partials)


@linear_gelu_backward.register_fake
def _(dy: Tensor, weight: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(z), torch.empty_like(z), z.new_empty(z.shape[1], dtype=torch.float32)


def _grid(num_rows: int, launch: launch_config.Launch) -> tuple[int]:
    """Return the number of programs: one a tile."""
    return (triton.cdiv(num_rows, launch["BM"]) * triton.cdiv(launch["F"], launch["BN"]),)


# ------------------------------------------------------------------------------------------------- references


def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Compute (h, z) of `linear_gelu_forward` by its formula: the same shapes, any device, fp64 too.

    The arithmetic is fp32, or fp64 for fp64 tensors. GELU reads z as rounded to x's dtype.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    z = (x.to(dtype) @ weight.to(dtype).t() + bias.to(dtype)).to(x.dtype)
    h = z.to(dtype) * torch.special.ndtr(z.to(dtype))  # z Phi(z)
    return h.to(x.dtype), z.flatten(0, -2)


def linear_gelu_backward_reference(dy: Tensor, weight: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (dz, h, d_bias) of `linear_gelu_backward` by its formula: the same shapes, any device, fp64 too."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    exact_z = z.to(dtype)
    cdf = torch.special.ndtr(exact_z)
    pdf = (-exact_z.square() / 2).exp() / math.sqrt(2 * math.pi)
    dz = (dy.flatten(0, -2).to(dtype) @ weight.to(dtype)) * (cdf + exact_z * pdf)
    return dz.to(z.dtype), (exact_z * cdf).to(z.dtype), dz.sum(dim=0)
