"""Inputs and checks of packed_attention, shared by the interpreter's tests and the GPU's."""

import torch
from torch import Tensor

from sws_kernels.packed_attention import packed_attention
from tests.kernels import numerics
from tests.kernels.numerics import Tensors


def make_inputs(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: str,
    *,
    bias: bool = False,
    bias_dtype: torch.dtype | None = None,
) -> Tensors:
    """qkv [B, T, 3, H, D], the output's gradient [B, T, H*D] and perhaps a bias [3*H*D], for (B, T, H, D)."""
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


def run(inputs: Tensors, backend: str, function=packed_attention, scale: float | None = None) -> Tensors:
    """The output and the gradients, by name."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in ("qkv", "bias") if name in inputs}
    out = function(leaves["qkv"], leaves.get("bias"), scale, backend=backend)
    gradients = torch.autograd.grad(out, list(leaves.values()), inputs["d_out"])
    named = {"out": out} | {f"d_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {name: value.detach() for name, value in named.items()}


def split(results: Tensors) -> Tensors:
    """d_qkv as its three parts, so that each is held to its own size."""
    d_q, d_k, d_v = results["d_qkv"].unbind(2)
    rest = {name: value for name, value in results.items() if name != "d_qkv"}
    return rest | {"d_q": d_q, "d_k": d_k, "d_v": d_v}


def check_accuracy(inputs: Tensors, scale: float | None = None) -> None:
    numerics.check_accuracy(lambda inputs, backend: split(run(inputs, backend, scale=scale)), inputs)


def check_bitwise_repeatable(inputs: Tensors) -> None:
    numerics.check_bitwise_repeatable(run, inputs)


def check_compiled(inputs: Tensors, compiler: str) -> None:
    numerics.check_compiled(run, inputs, packed_attention, compiler)
