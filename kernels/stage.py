"""Run a shared-weight stage: ``repeats`` passes of a pre-norm transformer block through one set of weights.

    x = x + scales[r, 0] * proj(attention(qkv(norm1(x))))
    x = x + scales[r, 1] * fc2(GELU(fc1(norm2(x))))            for r = 0 ... repeats - 1

The whole stage is one autograd node, made of `add_layer_norm`, `packed_attention`, `linear_gelu` and cuBLAS. Each of
the first three can be computed by another provider (`providers.py`). An ordinary block is a stage with one repeat.

Shapes: B samples, T tokens, D width, H heads, F hidden width, N = B * T rows.

    x, y                      [B, T, D]   fp32, fp16 or bf16; the weights have the same dtype
    scales                    [repeats, 2, B]  any of these dtypes, or None: factors of the attention's and the MLP's
                                          branch at each position, such as drop-path's 0 or 1/keep
    qkv                       [B, T, 3, H, D / H]
    z                         [N, F]      the argument of GELU

Sharing the weights allows an exact sum: each weight's gradient is summed over the repeats in fp32 and is rounded to the
weight's dtype once. Autograd over unrolled copies would round the share of every repeat and add the rounded shares.

Saved for the backward, for each repeat: x, qkv, the attention's output and log-sums, the stream between the two
branches, z, and the norms' statistics. For F = 4 D these are 10 tensors of [N, D]. The outputs of the norms and of GELU
are recomputed from their saved inputs. With ``recompute`` only x is saved (1 tensor), and each repeat is run again
before its backward: the 10 tensors of only one repeat are alive at a time, for a third more arithmetic.

Parameters are saved as they came and read again in the backward, so that DeepSpeed's ZeRO-3 may free them in between
and gather them again.

Source: Xia et al. 2024, arXiv 2404.16897 (stages); the block is timm's, without layer scale.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sws_kernels.add_layer_norm import MAX_WIDTH, add_layer_norm_reference
from sws_kernels.column_sum import column_sum, scale_and_sum
from sws_kernels.common import Backend, check_triton, is_triton, weight_gradient
from sws_kernels.mlp import check_mlp, mlp_reference
from sws_kernels.packed_attention import HEAD_DIMS, packed_attention_reference
from sws_kernels.providers import (
    ADD_LAYER_NORM,
    ATTENTION,
    LINEAR_GELU,
    TRITON,
    AddLayerNorm,
    Attention,
    LinearGelu,
    Providers,
    provider_obstacle,
)


class StageWeights(NamedTuple):
    """One block's weights, with the names, the order and the shapes of timm's Block."""

    norm1_weight: Tensor  # [D]
    norm1_bias: Tensor  # [D]
    qkv_weight: Tensor  # [3 D, D]
    qkv_bias: Tensor | None  # [3 D]
    proj_weight: Tensor  # [D, D]
    proj_bias: Tensor  # [D]
    norm2_weight: Tensor  # [D]
    norm2_bias: Tensor  # [D]
    fc1_weight: Tensor  # [F, D]
    fc1_bias: Tensor  # [F]
    fc2_weight: Tensor  # [D, F]
    fc2_bias: Tensor  # [D]


class StagePlan(NamedTuple):
    """Hold the arguments of a stage that are not tensors; `stage` describes them."""

    repeats: int
    num_heads: int
    eps: float = 1e-6
    recompute: bool = False
    providers: Providers = TRITON

    @property
    def attention(self) -> Attention:
        return ATTENTION[self.providers.attention]

    @property
    def linear_gelu(self) -> LinearGelu:
        return LINEAR_GELU[self.providers.linear_gelu]

    @property
    def add_layer_norm(self) -> AddLayerNorm:
        return ADD_LAYER_NORM[self.providers.add_layer_norm]


class SavedTensors(NamedTuple):
    """The tensors that one repeat saves for its backward."""

    x: Tensor  # [B, T, D], the stream at the start of the repeat
    norm1_mean: Tensor  # [N] fp32
    norm1_rstd: Tensor  # [N] fp32
    qkv: Tensor  # [B, T, 3, H, D / H]
    attention: Tensor  # [B, T, D], the attention's output
    lse: Tensor  # [B, H, T] fp32
    middle: Tensor  # [B, T, D], the stream between the two branches
    norm2_mean: Tensor  # [N] fp32
    norm2_rstd: Tensor  # [N] fp32
    z: Tensor  # [N, F]


# ---------------------------------------------------------------------------------------------------- forward


def stage_forward(
    x: Tensor, weights: StageWeights, scales: Tensor | None, plan: StagePlan
) -> tuple[Tensor, list[Tensor]]:
    """Run the stage for training. Inputs are those of `stage`, with x contiguous, and are not checked again.

    Returns:
        (y, saved): y like x, and the tensors that `stage_backward` needs: the `SavedTensors` of all repeats one after
        another, or with ``plan.recompute`` the x of each repeat.
    """
    if not plan.recompute:
        y, all_saved = _run(x, weights, scales, plan, save=True)
        return y, [tensor for saved in all_saved for tensor in saved]
    streams = [x]  # a repeat's other tensors are freed at its end
    for r in range(plan.repeats):
        own_scales = None if scales is None else scales[r : r + 1]
        streams.append(_run(streams[-1], weights, own_scales, plan._replace(repeats=1), save=False)[0])
    return streams[-1], streams[:-1]


def _run(
    x: Tensor, weights: StageWeights, scales: Tensor | None, plan: StagePlan, save: bool
) -> tuple[Tensor, list[SavedTensors]]:
    """Return (y, the saved tensors of each repeat, or an empty list unless ``save``)."""
    all_saved = []
    normed, mean, rstd = _first_norm(x, weights, plan)
    for r in range(plan.repeats):
        saved, branch = _repeat_forward(x, normed, mean, rstd, weights, _scale(scales, r, 0), plan, save)
        if save:
            all_saved.append(saved)
        middle, scale = saved.middle, _scale(scales, r, 1)
        del saved  # unless it was appended, its tensors are freed here
        if r + 1 < plan.repeats:
            x, normed, mean, rstd = plan.add_layer_norm.add_norm(
                middle, branch, scale, weights.norm1_weight, weights.norm1_bias, plan.eps
            )
        else:
            x = middle + branch if scale is None else plan.add_layer_norm.add(middle, branch, scale)
    return x, all_saved


def _first_norm(x: Tensor, weights: StageWeights, plan: StagePlan) -> tuple[Tensor, Tensor, Tensor]:
    """Return (normed, mean, rstd) of the first repeat's norm1, which has nothing to add."""
    return plan.add_layer_norm.norm(x, weights.norm1_weight, weights.norm1_bias, plan.eps)


def _repeat_forward(
    x: Tensor, normed: Tensor, mean: Tensor, rstd: Tensor, weights: StageWeights, scale: Tensor | None,
    plan: StagePlan, save: bool,
) -> tuple[SavedTensors, Tensor]:  # fmt: skip
    """Run one repeat up to the MLP's branch.

    Args:
        normed, mean, rstd: the results of norm1 on x.
        scale: [B] or None, of the attention's branch.

    Returns:
        (saved, branch): the repeat's tensors, with an empty z unless ``save``, and the MLP's branch [B, T, D].
    """
    w, head_dim = weights, x.shape[2] // plan.num_heads
    qkv = F.linear(normed, w.qkv_weight, w.qkv_bias).view(*x.shape[:2], 3, plan.num_heads, head_dim)
    attention, lse = plan.attention.forward(qkv, head_dim**-0.5)
    branch = F.linear(attention, w.proj_weight, w.proj_bias)
    middle, normed, *statistics = plan.add_layer_norm.add_norm(x, branch, scale, w.norm2_weight, w.norm2_bias, plan.eps)
    h, z = plan.linear_gelu.forward(normed, w.fc1_weight, w.fc1_bias, save)
    branch = F.linear(h, w.fc2_weight, w.fc2_bias)
    return SavedTensors._make((x, mean, rstd, qkv, attention, lse, middle, *statistics, z)), branch


def _scale(scales: Tensor | None, r: int, branch: int) -> Tensor | None:
    return None if scales is None else scales[r, branch]


# --------------------------------------------------------------------------------------------------- backward


def stage_backward(
    dy: Tensor, weights: StageWeights, scales: Tensor | None, saved: Sequence[Tensor], plan: StagePlan
) -> tuple[Tensor, list[Tensor | None]]:
    """Compute all gradients of the stage from dy [B, T, D], what `stage_forward` saved, and its other arguments.

    Returns:
        (dx, d_weights): dx like x; the weights' gradients in their order and dtype, None for a weight that is None.
    """
    size = len(saved) // plan.repeats
    totals: list[Tensor | None] = [None] * len(weights)
    dx = dy.contiguous()
    last_scale = _scale(scales, plan.repeats - 1, 1)
    if last_scale is None:
        d_branch, d_branch_sum = dx, column_sum(dx.flatten(0, -2))
    else:
        d_branch, d_branch_sum = scale_and_sum(dx, last_scale)
    for r in reversed(range(plan.repeats)):
        scale, own = _scale(scales, r, 0), saved[r * size : (r + 1) * size]
        repeat = _run_again(own[0], weights, scale, plan) if plan.recompute else SavedTensors(*own)
        scale_before = _scale(scales, r - 1, 1) if r else None
        dx, d_branch, d_branch_sum, shares = _repeat_backward(
            dx, d_branch, d_branch_sum, repeat, weights, scale, scale_before, plan
        )
        totals = [_added(total, share) for total, share in zip(totals, shares, strict=True)]
    d_weights = [
        None if total is None or weight is None else total.to(weight.dtype)
        for total, weight in zip(totals, weights, strict=True)
    ]
    return dx, d_weights


def _run_again(x: Tensor, weights: StageWeights, scale: Tensor | None, plan: StagePlan) -> SavedTensors:
    """Return what one repeat saves, from the stream at its start."""
    return _repeat_forward(x, *_first_norm(x, weights, plan), weights, scale, plan, save=True)[0]


def _repeat_backward(
    dx: Tensor, d_branch: Tensor, d_branch_sum: Tensor, saved: SavedTensors, weights: StageWeights,
    scale: Tensor | None, scale_before: Tensor | None, plan: StagePlan,
) -> tuple[Tensor, Tensor, Tensor, StageWeights]:  # fmt: skip
    """Differentiate one repeat.

    Each norm's backward also computes the norm's output again, which the linear layer after it needs for its weight's
    gradient, and the bias gradient of the linear layer before it.

    Args:
        dx, d_branch, d_branch_sum: the gradients of the stream after this repeat, of its MLP's branch, and of that
            branch's bias, which is d_branch's sum.
        scale: [B] or None, of the attention's branch.
        scale_before: [B] or None, of the MLP's branch one repeat before.

    Returns:
        (dx, d_branch, d_branch_sum, d_weights): the gradients of the stream at the repeat's start, of the MLP's branch
        one repeat before and its sum, and of the weights in fp32.
    """
    w, s = weights, saved
    dz, h, d_fc1_bias = plan.linear_gelu.backward(d_branch, w.fc2_weight, s.z)
    d_fc2 = weight_gradient(d_branch, h), d_branch_sum
    del h  # before the next tensors allocate memory
    d_normed = (dz @ w.fc1_weight).view(s.x.shape)
    norm2 = plan.add_layer_norm.backward(
        dx, d_normed, s.middle, scale, w.norm2_weight, w.norm2_bias, plan.eps, s.norm2_mean, s.norm2_rstd
    )
    d_fc1 = weight_gradient(dz, norm2.normed), d_fc1_bias
    del dz

    d_proj = weight_gradient(norm2.d_branch, s.attention), norm2.d_branch_sum
    d_attention = norm2.d_branch @ w.proj_weight
    d_qkv = plan.attention.backward(d_attention, s.qkv, s.attention, s.lse, s.qkv.shape[4] ** -0.5).flatten(2)
    norm1 = plan.add_layer_norm.backward(
        norm2.d_residual, d_qkv @ w.qkv_weight, s.x, scale_before, w.norm1_weight, w.norm1_bias, plan.eps,
        s.norm1_mean, s.norm1_rstd,
    )  # fmt: skip
    d_qkv_bias = None if w.qkv_bias is None else column_sum(d_qkv.flatten(0, -2))
    d_weights = StageWeights(
        norm1.d_weight, norm1.d_bias, weight_gradient(d_qkv, norm1.normed), d_qkv_bias,
        *d_proj, norm2.d_weight, norm2.d_bias, *d_fc1, *d_fc2,
    )  # fmt: skip
    return norm1.d_residual, norm1.d_branch, norm1.d_branch_sum, d_weights


def _added(total: Tensor | None, share: Tensor | None) -> Tensor | None:
    return share if total is None or share is None else total.add_(share)


# --------------------------------------------------------------------------------------------------- autograd


class _Stage(torch.autograd.Function):
    """Make the stage one node of the autograd graph. Differentiable once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: Tensor | None, plan: StagePlan, *weights: Any) -> Tensor:
        y, saved = stage_forward(x, StageWeights(*weights), scales, plan)
        ctx.save_for_backward(scales, *weights, *saved)
        ctx.plan = plan
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        scales, *rest = ctx.saved_tensors
        count = len(StageWeights._fields)
        dx, d_weights = stage_backward(dy, StageWeights(*rest[:count]), scales, rest[count:], ctx.plan)
        return dx, None, None, *d_weights


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
    providers: Providers = TRITON,
) -> Tensor:
    """Run ``repeats`` passes of a pre-norm block through one set of weights. Differentiable once.

    Args:
        x: [B, T, D].
        weights: the block's weights, with the shapes that `StageWeights` gives.
        repeats: the number of passes, 1 or more.
        num_heads: must divide D.
        eps: of both norms.
        scales: [repeats, 2, B] or None, the factors of each sample at each position, for the attention's branch and
            for the MLP's, such as drop-path's 0 or 1/keep. They are not differentiated.
        recompute: save one tensor a repeat for the backward and run the rest again. The gradients are the same up to
            rounding.
        backend: "reference" is plain PyTorch on any device. "triton" needs CUDA tensors (or, for tests,
            TRITON_INTERPRET=1 set before triton is imported), one dtype of fp32, fp16 and bf16, D and F divisible by
            32, and heads of 32, 64 or 128. It never falls back.
        providers: with backend="triton", who computes each operator; all of it is Triton by default.

    Returns:
        [B, T, D] in x's dtype.

    Raises:
        ValueError: shapes that do not fit together, an unknown backend or provider, or tensors that backend="triton" or
            a provider does not take.
    """
    plan = StagePlan(repeats, num_heads, eps, recompute, providers)
    if not is_triton("stage", backend):
        _check_shapes(x, weights, repeats, num_heads, scales)
        return stage_reference(x, weights, repeats, num_heads, eps, scales)
    check_stage(x, weights, scales, plan)
    x = x.contiguous()  # it is saved, and the norm's backward reads it as rows
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *weights))):
        return _run(x, weights, scales, plan, save=False)[0]
    return _Stage.apply(x, scales, plan, *weights)


def check_stage(x: Tensor, weights: StageWeights, scales: Tensor | None, plan: StagePlan) -> None:
    """Check all that `stage` with backend="triton" requires of its arguments.

    Raises:
        ValueError: as `stage` does.
    """
    _check_shapes(x, weights, plan.repeats, plan.num_heads, scales)
    check_triton("stage", {"x": x, **weights._asdict()})
    check_mlp(x, weights.fc1_weight, weights.fc1_bias, weights.fc2_weight, weights.fc2_bias)
    width, head_dim = x.shape[2], x.shape[2] // plan.num_heads
    if width > MAX_WIDTH or head_dim not in HEAD_DIMS:
        raise ValueError(
            f"stage: backend='triton' takes widths up to {MAX_WIDTH} and heads of {', '.join(map(str, HEAD_DIMS))}, "
            f"got {width} and {head_dim}; choose backend='reference'"
        )
    obstacle = provider_obstacle(plan.providers, x.device, x.dtype)
    if obstacle is not None:
        raise ValueError(f"stage: {obstacle}; choose another provider")


def _check_shapes(x: Tensor, weights: StageWeights, repeats: int, num_heads: int, scales: Tensor | None) -> None:
    if x.dim() != 3 or repeats < 1:
        raise ValueError(f"stage: expected x [B, T, D] and repeats of 1 or more, got {list(x.shape)} and {repeats}")
    width, hidden = x.shape[2], weights.fc1_weight.shape[0]
    if width % num_heads:
        raise ValueError(f"stage: width {width} is not divisible by {num_heads} heads")
    expected = {"qkv_weight": (3 * width, width), "qkv_bias": (3 * width,), "proj_weight": (width, width)}
    expected |= {"fc1_weight": (hidden, width), "fc1_bias": (hidden,), "fc2_weight": (width, hidden)}
    for name, tensor in weights._asdict().items():
        shape = expected.get(name, (width,))
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
    """Compute `stage` from the operators' references: the same shapes, any device, any width, fp64 too.

    The arithmetic is fp32, or fp64 for fp64 tensors.
    """
    dtype, (num_samples, tokens, width) = x.dtype, x.shape
    x = x.to(torch.promote_types(dtype, torch.float32))
    w = StageWeights._make(None if weight is None else weight.to(x.dtype) for weight in weights)
    normed = F.layer_norm(x, (width,), w.norm1_weight, w.norm1_bias, eps)
    for r in range(repeats):
        qkv = F.linear(normed, w.qkv_weight, w.qkv_bias).view(num_samples, tokens, 3, num_heads, width // num_heads)
        branch = F.linear(packed_attention_reference(qkv), w.proj_weight, w.proj_bias)
        x, normed = add_layer_norm_reference(x, branch, w.norm2_weight, w.norm2_bias, eps, _scale(scales, r, 0))
        branch = mlp_reference(normed, w.fc1_weight, w.fc1_bias, w.fc2_weight, w.fc2_bias)
        x, normed = add_layer_norm_reference(x, branch, w.norm1_weight, w.norm1_bias, eps, _scale(scales, r, 1))
    return x.to(dtype)
