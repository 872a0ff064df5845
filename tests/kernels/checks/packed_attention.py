"""Make the inputs and the checks of packed_attention."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from sws_kernels.packed_attention import packed_attention, packed_attention_reference
from tests.kernels.checks.numerics import Checks, Inputs, Tensors


def make_inputs(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: str,
    *,
    bias: bool = False,
    bias_dtype: torch.dtype | None = None,
) -> Inputs:
    """Return qkv [B, T, 3, H, D], the output's gradient [B, T, H*D] and perhaps a bias [3*H*D], for (B, T, H, D)."""
    generator = torch.Generator().manual_seed(sum(shape))
    num_samples, tokens, heads, head_dim = shape

    def normal(*size: int, of: torch.dtype) -> Tensor:
        return torch.randn(size, generator=generator).to(device, of)

    inputs = {
        "qkv": normal(num_samples, tokens, 3, heads, head_dim, of=dtype),
        "d_out": normal(num_samples, tokens, heads * head_dim, of=dtype),
    }
    if bias:
        inputs["bias"] = normal(3 * heads * head_dim, of=bias_dtype or dtype)
    return inputs


def pytorch(qkv: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Compute the operator by PyTorch's scaled_dot_product_attention in qkv's dtype."""
    if bias is not None:
        qkv = (qkv + bias.view(qkv.shape[2:])).to(qkv.dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, T, D] each
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


def run(inputs: Inputs, function: Callable[..., Tensor], scale: float | None = None) -> Tensors:
    """Return the output and the gradients by name. d_qkv comes as its three parts, each held to its own size."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in ("qkv", "bias") if name in inputs}
    out = function(leaves["qkv"], leaves.get("bias"), scale)
    gradients = torch.autograd.grad(out, list(leaves.values()), inputs["d_out"])
    d_q, d_k, d_v = gradients[0].unbind(2)
    results = {"out": out.detach(), "d_q": d_q, "d_k": d_k, "d_v": d_v}
    return results | ({"d_bias": gradients[1]} if "bias" in inputs else {})


triton = partial(packed_attention, backend="triton")
check = Checks(run, triton, pytorch, packed_attention_reference)
