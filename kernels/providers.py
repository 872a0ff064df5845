"""Choose who computes each operator of a stage: our Triton kernels, or PyTorch's own operators.

A provider is a forward and a backward, called as one autograd node calls them: the backward gets what the forward has
returned, and nothing is recorded. To put in a rival, write these functions and add them to the operator's table; to
take it where it wins, name it in `auto_providers`.

    ATTENTION       triton      `packed_attention`
                    cudnn       cuDNN's attention, on a GPU in fp16 or bf16
                    flash       PyTorch's FlashAttention: on a GPU in fp16 or bf16 (version 2, or the one that
                                `torch.nn.attention.activate_flash_attention_impl` has chosen), on a CPU in any dtype
    LINEAR_GELU     triton      `linear_gelu`
                    torch       a product, then GELU
    ADD_LAYER_NORM  triton      `add_layer_norm`
                    torch       an add, then LayerNorm

Shapes are those of the operators' own files. What else a stage needs (matrix products, `column_sum`) has one provider.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sws_kernels.add_layer_norm import (
    NormGradients,
    add_layer_norm_backward,
    add_layer_norm_forward,
    layer_norm_forward,
    scaled_add,
)
from sws_kernels.column_sum import column_sum, scale_and_sum
from sws_kernels.linear_gelu import linear_gelu_backward, linear_gelu_forward
from sws_kernels.packed_attention import packed_attention_backward, packed_attention_forward


class Attention(NamedTuple):
    """Hold one way to compute attention on packed QKV [B, T, 3, H, D]."""

    forward: Callable[[Tensor, float], tuple[Tensor, Tensor]]
    """(qkv, scale) -> (out [B, T, H*D], lse): lse is whatever the backward needs of each row."""
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
    """(d_out, qkv, out, lse, scale) -> d_qkv, like qkv."""


class LinearGelu(NamedTuple):
    """Hold one way to compute what `linear_gelu_forward` and `linear_gelu_backward` do."""

    forward: Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
    """(x, weight, bias, save) -> (h, z)."""
    backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    """(dy, weight, z) -> (dz, h, d_bias)."""


class AddLayerNorm(NamedTuple):
    """Hold one way to compute what the launchers of `add_layer_norm` do."""

    norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]
    """(x, weight, bias, eps) -> (normed, mean, rstd)."""
    add_norm: Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor, Tensor]]
    """(residual, branch, scale, weight, bias, eps) -> (new_residual, normed, mean, rstd)."""
    add: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(residual, branch, scale) -> new_residual."""
    backward: Callable[..., NormGradients]
    """(d_new_residual, d_normed, new_residual, scale, weight, bias, eps, mean, rstd) -> all of `NormGradients`."""


class Providers(NamedTuple):
    """Name the provider of each operator of a stage. Each name is a key of the operator's table."""

    attention: str = "triton"
    linear_gelu: str = "triton"
    add_layer_norm: str = "triton"

    def __str__(self) -> str:
        """Return for example "attention cudnn, linear_gelu triton, add_layer_norm triton"."""
        return ", ".join(f"{operator} {name}" for operator, name in self._asdict().items())


TRITON = Providers()


def auto_providers(device: torch.device, dtype: torch.dtype) -> Providers:
    """Return what is fastest on ``device`` in ``dtype``, as far as it was measured: our kernels everywhere."""
    return TRITON


def provider_obstacle(providers: Providers, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why one of the providers is unknown or cannot run on ``device`` in ``dtype``, or None.

    On the meta device each gives shapes and no values.
    """
    for operator, name in providers._asdict().items():
        if name not in TABLES[operator]:
            return f"{operator} has no provider {name!r} (it has {', '.join(TABLES[operator])})"
    attention = providers.attention
    if attention == "cudnn" and device.type == "cpu":
        return "cudnn's attention needs a GPU, and the device is cpu"
    if attention in ("cudnn", "flash") and device.type == "cuda" and dtype == torch.float32:
        return f"{attention}'s attention takes fp16 and bf16, not fp32"
    return None


# ------------------------------------------------------------------------------------------------- attention


def _triton_attention_forward(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return packed_attention_forward(qkv, None, scale)


def _triton_attention_backward(d_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    return packed_attention_backward(d_out, qkv, None, out, lse, scale)[0]


def _cudnn_forward(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = _heads_first(qkv)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)
    return _packed(out), lse


def _cudnn_backward(d_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    q, k, v = _heads_first(qkv)
    tensors = _unpacked(d_out, qkv), q, k, v, _unpacked(out, qkv), lse
    seed, tokens = _no_dropout(qkv), qkv.shape[1]
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *tensors, seed, seed, None, None, None, tokens, tokens, 0.0, False, scale=scale
    )
    return _packed_gradient(gradients)


def _flash_forward(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = _heads_first(qkv)
    if qkv.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    return _packed(out), lse


def _flash_backward(d_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    q, k, v = _heads_first(qkv)
    tensors = _unpacked(d_out, qkv), q, k, v, _unpacked(out, qkv), lse
    if qkv.device.type == "cpu":
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return _packed_gradient(backward(*tensors, 0.0, False, scale=scale))
    seed, tokens = _no_dropout(qkv), qkv.shape[1]
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        *tensors, None, None, tokens, tokens, 0.0, False, seed, seed, scale=scale
    )
    return _packed_gradient(gradients)


def _heads_first(qkv: Tensor) -> tuple[Tensor, ...]:
    """Return q, k and v as [B, H, T, D] views."""
    return qkv.permute(2, 0, 3, 1, 4).unbind()


def _packed(out: Tensor) -> Tensor:
    """Return [B, H, T, D] as [B, T, H*D], which is a view where the operator kept the layout of q."""
    return out.transpose(1, 2).flatten(2)


def _unpacked(out: Tensor, qkv: Tensor) -> Tensor:
    """Return [B, T, H*D] as a [B, H, T, D] view."""
    return out.unflatten(2, qkv.shape[3:]).transpose(1, 2)


def _packed_gradient(gradients: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Copy the three gradients [B, H, T, D] into one [B, T, 3, H, D]."""
    return torch.stack([gradient.transpose(1, 2) for gradient in gradients], dim=2)


def _no_dropout(qkv: Tensor) -> Tensor:
    """Return a tensor in the place of a random state, which is not read where nothing is dropped."""
    return qkv.new_empty(0, dtype=torch.int64)


# ----------------------------------------------------------------------------------------------- linear, GELU


def _torch_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    z = F.linear(x, weight, bias)
    return F.gelu(z), z.flatten(0, -2) if save else z.new_empty(0)


def _torch_linear_gelu_backward(dy: Tensor, weight: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dz = torch.ops.aten.gelu_backward(dy.flatten(0, -2) @ weight, z)
    return dz, F.gelu(z), column_sum(dz)


# -------------------------------------------------------------------------------------------- add, LayerNorm


def _torch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    normed, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
    return normed, mean.flatten(), rstd.flatten()


def _torch_add_norm(
    residual: Tensor, branch: Tensor, scale: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new_residual = residual + branch if scale is None else _torch_add(residual, branch, scale)
    return new_residual, *_torch_norm(new_residual, weight, bias, eps)


def _torch_add(residual: Tensor, branch: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(residual, branch, scale.to(branch.dtype)[:, None, None])


def _torch_norm_backward(
    d_new_residual: Tensor, d_normed: Tensor, new_residual: Tensor, scale: Tensor | None, weight: Tensor,
    bias: Tensor, eps: float, mean: Tensor, rstd: Tensor,
) -> NormGradients:  # fmt: skip
    """Differentiate, and run the norm again for its output. PyTorch rounds d_weight and d_bias to weight's dtype."""
    statistics = (statistic.view(*new_residual.shape[:2], 1) for statistic in (mean, rstd))
    d_residual, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
        d_normed, new_residual, weight.shape, *statistics, weight, bias, [True] * 3
    )
    d_residual += d_new_residual
    if scale is None:
        d_branch, d_branch_sum = d_residual, column_sum(d_residual.flatten(0, -2))
    else:
        d_branch, d_branch_sum = scale_and_sum(d_residual, scale)
    normed = F.layer_norm(new_residual, weight.shape, weight, bias, eps)
    return NormGradients(d_residual, d_branch, d_weight.float(), d_bias.float(), normed, d_branch_sum)


def _triton_norm_backward(
    d_new_residual: Tensor, d_normed: Tensor, new_residual: Tensor, scale: Tensor | None, weight: Tensor,
    bias: Tensor, _eps: float, mean: Tensor, rstd: Tensor,
) -> NormGradients:  # fmt: skip
    return add_layer_norm_backward(d_new_residual, d_normed, new_residual, scale, weight, mean, rstd, bias)


# ---------------------------------------------------------------------------------------------------- tables

ATTENTION = {
    "triton": Attention(_triton_attention_forward, _triton_attention_backward),
    "cudnn": Attention(_cudnn_forward, _cudnn_backward),
    "flash": Attention(_flash_forward, _flash_backward),
}
LINEAR_GELU = {
    "triton": LinearGelu(linear_gelu_forward, linear_gelu_backward),
    "torch": LinearGelu(_torch_linear_gelu, _torch_linear_gelu_backward),
}
ADD_LAYER_NORM = {
    "triton": AddLayerNorm(layer_norm_forward, add_layer_norm_forward, scaled_add, _triton_norm_backward),
    "torch": AddLayerNorm(_torch_norm, _torch_add_norm, _torch_add, _torch_norm_backward),
}
TABLES: dict[str, dict[str, Any]] = {
    "attention": ATTENTION, "linear_gelu": LINEAR_GELU, "add_layer_norm": ADD_LAYER_NORM,
}  # fmt: skip
