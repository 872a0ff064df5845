"""Compute non-causal attention from packed QKV, as the projection wrote it; the backward writes packed dQKV.

    x = qkv + bias;  q, k, v = x[:, :, 0], x[:, :, 1], x[:, :, 2]
    out = softmax(scale * q k^T) v          for each sample and head

Shapes: B samples, T tokens, H heads of D, P blocks of tokens in the backward.

    qkv, d_qkv                [B, T, 3, H, D]  fp32, fp16 or bf16
    bias                      [3*H*D]          any of these dtypes, or None where the projection has added it
    out, d_out                [B, T, H*D]      qkv's dtype; the next matrix product reads out as it is
    lse                       [B, H, T]        fp32, log2 of the sum of exp of the scaled scores, saved for the backward
    delta                     [B, H, T]        fp32, sum of out * d_out over a head; lives between two passes only
    partials                  [B, P, 3, H, D]  fp32, sums of d_qkv over each block of tokens, for d_bias

The kernels, and the two structures they have, are in `packed_attention_kernels.py`.

Source: Dao et al. 2022, arXiv 2205.14135 and Dao 2023, arXiv 2307.08691 (FlashAttention, FlashAttention-2).
"""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from sws_kernels import launch_config
from sws_kernels.column_sum import sum_partials
from sws_kernels.common import Backend, check_triton, contiguous, is_triton
from sws_kernels.packed_attention_kernels import (
    packed_attention_backward_keys_kernel,
    packed_attention_backward_queries_kernel,
    packed_attention_forward_kernel,
)

HEAD_DIMS = (32, 64, 128)


# -------------------------------------------------------------------------------------------------- launchers


def _launches(qkv: Tensor) -> dict[str, launch_config.Launch]:
    _, tokens, _, _, head_dim = qkv.shape
    return launch_config.packed_attention(tokens, head_dim, qkv.dtype, hopper=launch_config.is_hopper(qkv.device))


@torch.library.custom_op("sws_kernels::packed_attention", mutates_args=())
def packed_attention_forward(qkv: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel. Inputs are those of `packed_attention` and are not checked again.

    It is a custom_op rather than a triton_op for the reasons given in `add_layer_norm_forward`.

    Returns:
        (out, lse): [B, T, H*D] in qkv's dtype and [B, H, T] fp32 in units of log2. lse does not include
        k's bias.
    """
    num_samples, tokens, _, heads, head_dim = qkv.shape
    out = torch.empty((num_samples, tokens, heads * head_dim), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((num_samples, heads, tokens), dtype=torch.float32, device=qkv.device)
    if out.numel():
        launch = _launches(qkv)["forward"]
        num_blocks = 1 if launch["SINGLE_KV_BLOCK"] else triton.cdiv(tokens, launch["M"])
        with torch.cuda.device_of(qkv):  # Triton launches on the current device, not on the tensors'
            packed_attention_forward_kernel[(num_blocks * num_samples * heads,)](
                contiguous(qkv), contiguous(bias), out, lse, tokens, heads, scale, **launch
            )
    return out, lse


@packed_attention_forward.register_fake
def _(qkv: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    num_samples, tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty((num_samples, tokens, heads * head_dim))
    return out, qkv.new_empty((num_samples, heads, tokens), dtype=torch.float32)


def packed_attention_backward(
    d_out: Tensor, qkv: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Launch the backward kernels.

    Args:
        d_out: [B, T, H*D], qkv's dtype.
        qkv, bias, scale: the forward's.
        out, lse: results of `packed_attention_forward`, which are not changed.

    Returns:
        (d_qkv, d_bias): [B, T, 3, H, D] in qkv's dtype, and fp32 [3*H*D] or None without a bias.
    """
    d_qkv, d_bias = _backward_op(d_out, qkv, bias, out, lse, scale)
    return d_qkv, None if bias is None else d_bias


@torch.library.custom_op("sws_kernels::packed_attention_backward", mutates_args=())
def _backward_op(
    d_out: Tensor, qkv: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return (d_qkv, d_bias). d_bias is empty without a bias, because an operator may not return None."""
    num_samples, tokens, _, heads, head_dim = qkv.shape
    launches = _launches(qkv)
    keys, queries = launches["backward_keys"], launches.get("backward_queries")
    num_blocks = triton.cdiv(tokens, keys["N"])
    d_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    delta = torch.empty_like(lse) if queries else None
    width = 3 * heads * head_dim
    partials = None if bias is None else lse.new_empty((num_samples * num_blocks, width))
    if d_qkv.numel():
        grid = (num_blocks * num_samples * heads,)
        d_out, qkv, bias, out = d_out.contiguous(), qkv.contiguous(), contiguous(bias), out.contiguous()
        sizes = tokens, heads, scale
        with torch.cuda.device_of(qkv):
            if queries:
                packed_attention_backward_queries_kernel[grid](
                    d_out, qkv, bias, out, lse, delta, d_qkv, partials, *sizes, **queries
                )
            packed_attention_backward_keys_kernel[grid](d_out, qkv, bias, lse, delta, d_qkv, partials, *sizes, **keys)
    return d_qkv, lse.new_empty(0) if partials is None else sum_partials(partials)


@_backward_op.register_fake
def _(d_out: Tensor, qkv: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), lse.new_empty(0 if bias is None else bias.shape[0])


# --------------------------------------------------------------------------------------------------- autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, bias, scale = inputs
    out, lse = output
    ctx.save_for_backward(qkv, bias, out, lse)
    ctx.scale = scale
    ctx.mark_non_differentiable(lse)


def _differentiate(ctx: Any, d_out: Tensor, _d_lse: Tensor) -> tuple[Tensor | None, ...]:
    qkv, bias, out, lse = ctx.saved_tensors
    d_qkv, d_bias = packed_attention_backward(d_out, qkv, bias, out, lse, ctx.scale)
    return d_qkv, None if d_bias is None else d_bias.to(bias.dtype), None


packed_attention_forward.register_autograd(_differentiate, setup_context=_setup_context)


# -------------------------------------------------------------------------------------------- public function


def packed_attention(
    qkv: Tensor, bias: Tensor | None = None, scale: float | None = None, *, backend: Backend = "reference"
) -> Tensor:
    """Compute softmax(scale * q k^T) v of every head, without a causal mask. Differentiable once.

    Args:
        qkv: [B, T, 3, H, D], as the projection wrote it.
        bias: [3*H*D], added to qkv here, or None where the projection has added it.
        scale: positive; D**-0.5 where it is None.
        backend: "reference" is plain PyTorch on any device. "triton" needs CUDA tensors (or, for tests,
            TRITON_INTERPRET=1 set before triton is imported), fp32, fp16 or bf16, and heads of 32, 64 or 128. It never
            falls back.

    Returns:
        [B, T, H*D] in qkv's dtype.

    Raises:
        ValueError: shapes that do not fit together, a scale that is not positive and finite, an unknown backend, or
            tensors that backend="triton" does not take.
    """
    _check_shapes(qkv, bias)
    scale = qkv.shape[4] ** -0.5 if scale is None else float(scale)
    if not (0 < scale < math.inf):
        raise ValueError(f"packed_attention: scale must be positive and finite, got {scale}")
    if not is_triton("packed_attention", backend):
        return packed_attention_reference(qkv, bias, scale)
    check_triton("packed_attention", {"qkv": qkv, "bias": bias}, one_dtype=False)
    _check_size(qkv)
    return packed_attention_forward(qkv, bias, scale)[0]


def _check_shapes(qkv: Tensor, bias: Tensor | None) -> None:
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"packed_attention: qkv must be [B, T, 3, H, D], got {list(qkv.shape)}")
    width = 3 * qkv.shape[3] * qkv.shape[4]
    if bias is not None and bias.shape != (width,):
        raise ValueError(f"packed_attention: bias must be [3*H*D] = [{width}], got {list(bias.shape)}")


def _check_size(qkv: Tensor) -> None:
    _, tokens, _, heads, head_dim = qkv.shape
    if head_dim not in HEAD_DIMS:
        raise ValueError(
            f"packed_attention: backend='triton' takes heads of {', '.join(map(str, HEAD_DIMS))}, "
            f"got D={head_dim}; choose backend='reference'"
        )
    if tokens * 3 * heads * head_dim >= 2**31:  # offsets inside a sample are 32-bit, samples' are 64-bit
        raise ValueError(
            f"packed_attention: backend='triton' takes samples of fewer than 2^31 elements, got T={tokens}, "
            f"H={heads}, D={head_dim}; choose backend='reference'"
        )


# -------------------------------------------------------------------------------------------------- reference


def packed_attention_reference(qkv: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Compute `packed_attention` by its formula: the same shapes, any device, any head size, fp64 too.

    The arithmetic is fp32, or fp64 for fp64 tensors.
    """
    num_samples, tokens, _, heads, head_dim = qkv.shape
    x = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    if bias is not None:
        x = x + bias.to(x.dtype).view(3, heads, head_dim)
    q, k, v = x.permute(2, 0, 3, 1, 4)  # [B, H, T, D] each
    scores = q @ k.transpose(-2, -1) * (head_dim**-0.5 if scale is None else scale)
    out = scores.softmax(dim=-1) @ v
    return out.transpose(1, 2).reshape(num_samples, tokens, heads * head_dim).to(qkv.dtype)
