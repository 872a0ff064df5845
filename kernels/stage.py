"""A shared-weight stage: ``repeats`` passes of a pre-norm transformer block through one set of weights.

    x = x + s[r, 0] * proj(attention(qkv(LayerNorm1(x))))
    x = x + s[r, 1] * fc2(GELU(fc1(LayerNorm2(x))))            for r = 0 ... repeats - 1

One autograd node for all of it, made of `add_layer_norm`, packed attention, `mlp` and cuBLAS. An ordinary block
is the stage with one repeat.

Shapes. B samples, T tokens, D width, H heads, F hidden width, N = B * T rows.

    x, y                      [B, T, D]   fp32, fp16 or bf16; the weights too
    scales                    [repeats, 2, B]  any of these, or None: drop-path's 0 or 1/keep of each position,
                                          for the attention's and for the MLP's branch apart, as timm draws them
    qkv                       [B, T, 3, H, D / H]
    z                         [N, F]      what GELU is taken of

What sharing buys: each weight's gradient is summed over the repeats in fp32 and leaves in the weight's dtype
once. Autograd over unrolled copies would round every repeat's share and add the rounded ones.

Kept for the backward, per repeat: x, qkv, the attention's output and log-sums, the stream between the two
branches, z, the norms' statistics: 10 tensors of [N, D] for F = 4 D. What the norms and GELU return is made again
when needed (their inputs are there). With ``recompute`` x alone is kept, 1 tensor, and each repeat is run again
before its backward: one repeat's 10 are alive at a time, for a third more arithmetic.

Parameters are saved as they came and read anew in the backward, so that DeepSpeed's ZeRO-3 may free them in
between and gather them again.

Source: Xia et al. 2024, arXiv 2404.16897 (stages); the block is timm's, without layer scale.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sws_kernels.add_layer_norm import MAX_WIDTH, _branch_gradient_differs, add_layer_norm_reference
from sws_kernels.add_layer_norm import _backward as add_layer_norm_backward
from sws_kernels.add_layer_norm import _forward as add_layer_norm_forward
from sws_kernels.common import Backend, bias_gradient, check_triton, is_triton, weight_gradient
from sws_kernels.mlp import check_mlp, mlp_backward, mlp_forward, mlp_reference
from sws_kernels.packed_attention import HEAD_DIMS, packed_attention_reference
from sws_kernels.packed_attention import _backward as packed_attention_backward
from sws_kernels.packed_attention import _forward as packed_attention_forward


class StageWeights(NamedTuple):
    """One block's weights, in the order and with the shapes of timm's Block."""

    gamma1: Tensor  # [D]
    beta1: Tensor  # [D]
    w_qkv: Tensor  # [3 D, D]
    b_qkv: Tensor | None  # [3 D]
    w_proj: Tensor  # [D, D]
    b_proj: Tensor  # [D]
    gamma2: Tensor  # [D]
    beta2: Tensor  # [D]
    w1: Tensor  # [F, D]
    b1: Tensor  # [F]
    w2: Tensor  # [D, F]
    b2: Tensor  # [D]


class _Kept(NamedTuple):
    """One repeat's tensors for its backward."""

    x: Tensor  # [B, T, D], the stream at the repeat's start
    mean1: Tensor  # [N] fp32
    rstd1: Tensor  # [N] fp32
    qkv: Tensor  # [B, T, 3, H, D / H]
    attended: Tensor  # [B, T, D]
    lse: Tensor  # [B, H, T] fp32
    middle: Tensor  # [B, T, D], the stream between the two branches
    mean2: Tensor  # [N] fp32
    rstd2: Tensor  # [N] fp32
    z: Tensor  # [N, F]


# ---------------------------------------------------------------------------------------------------- forward


def _first_norm(x: Tensor, w: StageWeights, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(normed, mean, rstd) where there is nothing to add: PyTorch's own."""
    normed, mean, rstd = torch.native_layer_norm(x, w.gamma1.shape, w.gamma1, w.beta1, eps)
    return normed, mean.float().view(-1), rstd.float().view(-1)


def _repeat_forward(
    x: Tensor, normed: Tensor, w: StageWeights, scale: Tensor | None, num_heads: int, eps: float, save: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(the MLP's branch, `_Kept` from qkv on) of one pass, from the stream and what LayerNorm1 made of it."""
    head_dim = x.shape[2] // num_heads
    qkv = F.linear(normed, w.w_qkv, w.b_qkv).view(*x.shape[:2], 3, num_heads, head_dim)
    attended, lse = packed_attention_forward(qkv, None, head_dim**-0.5)
    branch = F.linear(attended, w.w_proj, w.b_proj)
    middle, normed, mean, rstd = add_layer_norm_forward(x, branch, scale, w.gamma2, w.beta2, eps)
    branch, z = mlp_forward(normed, w.w1, w.b1, w.w2, w.b2, save)
    return branch, (qkv, attended, lse, middle, mean, rstd, z)


def _forward(
    x: Tensor, w: StageWeights, scales: Tensor | None, repeats: int, num_heads: int, eps: float, save: bool
) -> tuple[Tensor, list[_Kept]]:
    """(y, what each repeat keeps: nothing unless ``save``)."""
    kept = []
    normed, mean, rstd = _first_norm(x, w, eps)
    for r in range(repeats):
        branch, rest = _repeat_forward(x, normed, w, _scale(scales, r, 0), num_heads, eps, save)
        if save:
            kept.append(_Kept(x, mean, rstd, *rest))
        middle, scale = rest[3], _scale(scales, r, 1)
        if r + 1 < repeats:
            x, normed, mean, rstd = add_layer_norm_forward(middle, branch, scale, w.gamma1, w.beta1, eps)
        else:
            x = middle + _scaled(branch, scale)
    return x, kept


def _scale(scales: Tensor | None, r: int, branch: int) -> Tensor | None:
    return None if scales is None else scales[r, branch]


def _scaled(branch: Tensor, scale: Tensor | None) -> Tensor:
    return branch if scale is None else branch * scale.to(branch.dtype)[:, None, None]


# --------------------------------------------------------------------------------------------------- backward


def _repeat_backward(
    d_x: Tensor, d_branch: Tensor, kept: _Kept, w: StageWeights, scale: Tensor | None, scale_before: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, list[Tensor | None]]:  # fmt: skip
    """(gradient of the stream, of the MLP's branch one repeat before, of the weights in fp32).

    d_x, d_branch: of the stream after this repeat, and of its MLP's branch.
    """
    width = w.gamma1.shape
    normed = F.layer_norm(kept.middle, width, w.gamma2, w.beta2, eps)
    d_normed, dw1, db1, dw2, db2 = mlp_backward(d_branch, normed, w.w1, w.w2, kept.z)
    d_x, d_branch, (dgamma2, dbeta2) = _norm_backward(
        d_x, d_normed, kept.middle, scale, w.gamma2, kept.mean2, kept.rstd2
    )
    dw_proj, db_proj = weight_gradient(d_branch, kept.attended), bias_gradient(d_branch)
    d_attended, scale_qk = d_branch @ w.w_proj, kept.qkv.shape[4] ** -0.5
    d_qkv, _ = packed_attention_backward(d_attended, kept.qkv, None, kept.attended, kept.lse, scale_qk)
    d_qkv = d_qkv.flatten(2)
    normed = F.layer_norm(kept.x, width, w.gamma1, w.beta1, eps)
    dw_qkv, db_qkv = weight_gradient(d_qkv, normed), None if w.b_qkv is None else bias_gradient(d_qkv)
    d_x, d_branch, (dgamma1, dbeta1) = _norm_backward(
        d_x, d_qkv @ w.w_qkv, kept.x, scale_before, w.gamma1, kept.mean1, kept.rstd1
    )
    d_weights = [dgamma1, dbeta1, dw_qkv, db_qkv, dw_proj, db_proj, dgamma2, dbeta2, dw1, db1, dw2, db2]
    return d_x, d_branch, d_weights


def _norm_backward(
    d_x: Tensor, d_normed: Tensor, x: Tensor, scale: Tensor | None, gamma: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(of the stream before the add, of the branch, [dgamma, dbeta] in fp32); see `add_layer_norm`."""
    d_residual, d_branch, d_parameters = add_layer_norm_backward(d_x, d_normed, x, scale, gamma, mean, rstd)
    return d_residual, d_branch if _branch_gradient_differs(d_normed, x, scale) else d_residual, d_parameters


def _added(total: Tensor | None, share: Tensor | None) -> Tensor | None:
    return share if total is None or share is None else total.add_(share)


def stage_forward(
    x: Tensor, w: StageWeights, scales: Tensor | None, repeats: int, num_heads: int, eps: float, recompute: bool
) -> tuple[Tensor, list[Tensor]]:
    """(y, what `stage_backward` needs): all that the repeats keep, or with ``recompute`` where each began."""
    if not recompute:
        y, kept = _forward(x, w, scales, repeats, num_heads, eps, save=True)
        return y, [tensor for repeat in kept for tensor in repeat]
    streams = [x]  # a repeat's other tensors die with it
    for r in range(repeats):
        part = None if scales is None else scales[r : r + 1]
        streams.append(_forward(streams[-1], w, part, 1, num_heads, eps, save=False)[0])
    return streams[-1], streams[:-1]


def stage_backward(
    dy: Tensor, w: StageWeights, scales: Tensor | None, kept: Sequence[Tensor],
    repeats: int, num_heads: int, eps: float, recompute: bool,
) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
    """(dx, the weights' gradients in their dtype and order, None for what is None); arguments of `stage_forward`."""
    size = len(kept) // repeats
    totals: list[Tensor | None] = [None] * len(w)
    d_x = dy.contiguous()
    d_branch = _scaled(d_x, _scale(scales, repeats - 1, 1))
    for r in reversed(range(repeats)):
        own = kept[r * size : (r + 1) * size]
        scale = _scale(scales, r, 0)
        repeat = _run_again(own[0], w, scale, num_heads, eps) if recompute else _Kept(*own)
        before = _scale(scales, r - 1, 1) if r else None
        d_x, d_branch, shares = _repeat_backward(d_x, d_branch, repeat, w, scale, before, eps)
        totals = [_added(total, share) for total, share in zip(totals, shares, strict=True)]
    d_weights = [
        None if total is None or weight is None else total.to(weight.dtype)
        for total, weight in zip(totals, w, strict=True)
    ]
    return d_x, d_weights


def _run_again(x: Tensor, w: StageWeights, scale: Tensor | None, num_heads: int, eps: float) -> _Kept:
    normed, mean, rstd = _first_norm(x, w, eps)
    return _Kept(x, mean, rstd, *_repeat_forward(x, normed, w, scale, num_heads, eps, save=True)[1])


# --------------------------------------------------------------------------------------------------- autograd


class _Stage(torch.autograd.Function):
    """The stage as one node of the graph. Differentiable once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scales: Tensor | None, repeats: int, num_heads: int, eps: float, recompute: bool,
        *weights: Any,
    ) -> Tensor:  # fmt: skip
        y, kept = stage_forward(x, StageWeights(*weights), scales, repeats, num_heads, eps, recompute)
        ctx.save_for_backward(scales, *weights, *kept)
        ctx.plan = repeats, num_heads, eps, recompute
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        scales, *rest = ctx.saved_tensors
        count = len(StageWeights._fields)
        d_x, d_weights = stage_backward(dy, StageWeights(*rest[:count]), scales, rest[count:], *ctx.plan)
        return d_x, None, None, None, None, None, *d_weights


# -------------------------------------------------------------------------------------------- public function


def stage(
    x: Tensor,
    weights: StageWeights,
    repeats: int,
    num_heads: int,
    eps: float = 1e-6,
    scales: Tensor | None = None,
    *,
    recompute: bool = False,
    backend: Backend = "reference",
) -> Tensor:
    """``repeats`` passes of a pre-norm block through one set of weights: x [B, T, D] to the same shape.

    scales: [repeats, 2, B] or None, drop-path's 0 or 1/keep of each sample at each position, for the
    attention's branch and the MLP's; not differentiated. recompute: keep one tensor a repeat for the backward
    and run the rest again; the gradients are the same up to rounding. Differentiable once.

    backend: "reference" is plain PyTorch on any device. "triton" needs CUDA tensors (or, for tests,
    TRITON_INTERPRET=1 set before triton is imported), one dtype of fp32, fp16 and bf16, D and F divisible
    by 32, heads of 32, 64 or 128; anything else is a ValueError, never a fallback.
    """
    _check_shapes(x, weights, repeats, num_heads, scales)
    if not is_triton("stage", backend):
        return stage_reference(x, weights, repeats, num_heads, eps, scales)
    _check_triton(x, weights, num_heads)
    x = x.contiguous()  # it is kept, and the norm's backward reads it as rows
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *weights))):
        return _forward(x, weights, scales, repeats, num_heads, eps, save=False)[0]
    return _Stage.apply(x, scales, repeats, num_heads, eps, recompute, *weights)


def check_stage(x: Tensor, weights: StageWeights, repeats: int, num_heads: int, scales: Tensor | None) -> None:
    """All that `stage` with backend="triton" asks of its arguments."""
    _check_shapes(x, weights, repeats, num_heads, scales)
    _check_triton(x, weights, num_heads)


def _check_triton(x: Tensor, weights: StageWeights, num_heads: int) -> None:
    check_triton("stage", {"x": x, **weights._asdict()})
    check_mlp(x, weights.w1, weights.b1, weights.w2, weights.b2)
    width, head_dim = x.shape[2], x.shape[2] // num_heads
    if width > MAX_WIDTH or head_dim not in HEAD_DIMS:
        raise ValueError(
            f"stage: backend='triton' takes widths up to {MAX_WIDTH} and heads of {', '.join(map(str, HEAD_DIMS))}, "
            f"got {width} and {head_dim}; choose backend='reference'"
        )


def _check_shapes(x: Tensor, w: StageWeights, repeats: int, num_heads: int, scales: Tensor | None) -> None:
    if x.dim() != 3 or repeats < 1:
        raise ValueError(f"stage: expected x [B, T, D] and repeats of 1 or more, got {list(x.shape)} and {repeats}")
    width, hidden = x.shape[2], w.w1.shape[0]
    if width % num_heads:
        raise ValueError(f"stage: width {width} is not divisible by {num_heads} heads")
    wanted = {"w_qkv": (3 * width, width), "b_qkv": (3 * width,), "w_proj": (width, width)}
    wanted |= {"w1": (hidden, width), "b1": (hidden,), "w2": (width, hidden)}
    for name, tensor in w._asdict().items():
        shape = wanted.get(name, (width,))
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"stage: {name} must be {list(shape)} for x {list(x.shape)}, got {list(tensor.shape)}")
    if scales is not None and (scales.shape != (repeats, 2, x.shape[0]) or scales.requires_grad):
        raise ValueError(
            f"stage: scales must be {[repeats, 2, x.shape[0]]} and need no gradient, "
            f"got {list(scales.shape)}, requires_grad={scales.requires_grad}"
        )


# -------------------------------------------------------------------------------------------------- reference


def stage_reference(
    x: Tensor, weights: StageWeights, repeats: int, num_heads: int, eps: float = 1e-6, scales: Tensor | None = None
) -> Tensor:
    """The same in plain PyTorch: any device, any width, fp64 too."""
    w, (num_samples, tokens, width) = weights, x.shape
    normed = F.layer_norm(x, (width,), w.gamma1, w.beta1, eps)
    for r in range(repeats):
        qkv = F.linear(normed, w.w_qkv, w.b_qkv).view(num_samples, tokens, 3, num_heads, width // num_heads)
        branch = F.linear(packed_attention_reference(qkv), w.w_proj, w.b_proj)
        x, normed = add_layer_norm_reference(x, branch, w.gamma2, w.beta2, eps, _scale(scales, r, 0))
        branch = mlp_reference(normed, w.w1, w.b1, w.w2, w.b2)
        x, normed = add_layer_norm_reference(x, branch, w.gamma1, w.beta1, eps, _scale(scales, r, 1))
    return x
