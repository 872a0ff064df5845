"""Run the stages of a model through the Triton kernels, where that is asked for and possible.

``sws_kernels`` is imported where it is used, since importing triton takes a second and the reference path does not need
it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sws_dist.config.schema import OperatorsConfig

Kernels = Literal["auto", "triton", "reference"]

ALL_AUTO = OperatorsConfig()
MIN_CAPABILITY = (8, 0)
"""The lowest CUDA compute capability whose tensor cores compute in bf16."""


def select_kernels(
    kernels: Kernels,
    model: Any,
    device: torch.device,
    dtype: torch.dtype,
    operators: OperatorsConfig = ALL_AUTO,
) -> str:
    """Let ``model`` run its stages as ``kernels`` and ``operators`` ask.

    Args:
        kernels: the config key ``model.kernels``.
        model: any model; only ours can use the kernels.
        device, dtype: where and in what precision the model will run.
        operators: the config key ``model.operators``.

    Returns:
        A log message that names the choice, and with ``auto`` the reason.

    Raises:
        ValueError: ``triton``, or the provider of an operator, where it cannot run, because of the device, the
            precision or the architecture.
    """
    if kernels == "reference":
        return "kernels: PyTorch's"
    obstacle = _device_obstacle(kernels, device, dtype) or model_obstacle(model)
    if obstacle is not None:
        require_not_asked_for(kernels, operators, obstacle)
        return f"kernels: PyTorch's ({obstacle})"
    providers = choose_providers(kernels, operators, device, dtype)
    model.use_kernels("triton", providers)
    return "kernels: Triton's" + _rivals(providers)


def require_not_asked_for(kernels: Kernels, operators: OperatorsConfig, obstacle: str) -> None:
    """Check that nobody asked for kernels that cannot run.

    Raises:
        ValueError: ``kernels`` is ``triton``, or an operator has a provider; the message gives the ``obstacle``.
    """
    if kernels == "triton":
        raise ValueError(f"model.kernels: triton was asked for, but {obstacle}; set model.kernels to reference or auto")
    if operators != ALL_AUTO:
        raise ValueError(f"model.operators needs the Triton kernels, but {obstacle}; leave model.operators out")


def choose_providers(kernels: Kernels, operators: OperatorsConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """Return the ``sws_kernels.Providers`` of stages that the kernels run.

    Raises:
        ValueError: one that was asked for cannot run on ``device`` in ``dtype``.
    """
    from sws_kernels import Providers, auto_providers, provider_obstacle

    asked = {operator: name for operator, name in asdict(operators).items() if name != "auto"}
    fastest = auto_providers(device, dtype) if kernels == "auto" else Providers()
    providers = fastest._replace(**asked)
    obstacle = provider_obstacle(providers, device, dtype)
    if obstacle is not None:
        raise ValueError(f"model.operators: {obstacle}; choose another or auto")
    return providers


def _rivals(providers: Any) -> str:
    """Return the part of a log message that names the operators that are not Triton's."""
    rivals = [f"{operator} by {name}" for operator, name in providers._asdict().items() if name != "triton"]
    return f", but {', '.join(rivals)}" if rivals else ""


def enable_cuda_graphs(model: Any, device: torch.device, repeats: Iterable[Sequence[int]] = ()) -> str:
    """Let the stages of ``model`` train as CUDA graphs, which are captured at the first step.

    Args:
        repeats: how often each stage runs, for every depth that is trained; none for the model's own depth alone.

    Returns:
        A part of a log message.

    Raises:
        ValueError: the stages do not run through the kernels, or not on a GPU.
    """
    obstacle = None
    if not (hasattr(model, "use_kernels") and model.blocks[0].kernels == "triton"):
        obstacle = "the stages run PyTorch's code, not the kernels (model.kernels)"
    elif device.type != "cuda":
        obstacle = f"the device is {device.type}"
    if obstacle is not None:
        raise ValueError(f"model.cuda_graphs: true was asked for, but {obstacle}; set it to false")
    from sws_kernels import GraphedStage, GraphPool

    with torch.cuda.device(device):
        pool = GraphPool()
    every_depth = list(repeats) or [model.schedule]
    for stage, counts in zip(model.blocks, zip(*every_depth, strict=True), strict=True):
        stage.graphed = GraphedStage(pool, counts)
    return "each stage's forward and backward a CUDA graph"


def _device_obstacle(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the kernels cannot run on ``device`` in ``dtype``, or None."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_CAPABILITY:
            return (
                f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, "
                "below 8.0"
            )
        return None
    if kernels == "auto":
        return f"the device is {device.type}"
    from sws_kernels.common import INTERPRETED

    if not INTERPRETED:
        return f"the device is {device.type} (without a GPU, TRITON_INTERPRET=1 runs them, slowly, for tests)"
    return "TRITON_INTERPRET=1 takes no bf16" if dtype == torch.bfloat16 else None


def model_obstacle(model: Any) -> str | None:
    """Return why the kernels cannot run ``model``, or None."""
    if not hasattr(model, "use_kernels"):
        return f"{type(model).__name__} is not one of our models (sws_...)"
    if model.kernel_obstacle is not None:
        return model.kernel_obstacle
    return next((reason for block in model.blocks if (reason := _stage_obstacle(block)) is not None), None)


def _stage_obstacle(stage: Any) -> str | None:
    """Return what in a stage the kernels do not compute, or None.

    A stage is always a plain pre-norm block, since our constructor accepts no other.
    """
    from sws_kernels.add_layer_norm import MAX_WIDTH
    from sws_kernels.linear_gelu import WIDTH_MULTIPLE
    from sws_kernels.packed_attention import HEAD_DIMS

    if any(module.p > 0 for module in stage.modules() if isinstance(module, nn.Dropout)):
        return "the model has dropout (attn_drop_rate, proj_drop_rate)"
    width, hidden, head_dim = stage.norm1.weight.shape[0], stage.mlp.fc1.out_features, stage.attn.head_dim
    if width % WIDTH_MULTIPLE or hidden % WIDTH_MULTIPLE:
        return f"width {width} and MLP width {hidden} are not both divisible by {WIDTH_MULTIPLE}"
    if width > MAX_WIDTH:
        return f"width {width} is more than {MAX_WIDTH}"
    if head_dim not in HEAD_DIMS:
        return f"heads of {head_dim} are not of {', '.join(map(str, HEAD_DIMS))}"
    return None


def fused_stage_forward(stage: Any, x: Tensor, drop_rates: tuple[float, ...]) -> Tensor:
    """Compute as many repeats of a stage as there are ``drop_rates``, for x [batch, tokens, width], by one call of
    ``sws_kernels.stage``.
    """
    from sws_kernels import Providers, StageWeights
    from sws_kernels import stage as run

    attn, mlp = stage.attn, stage.mlp
    # The parameters themselves are passed: ZeRO-3 frees and gathers them between forward and backward.
    weights = StageWeights(
        *(stage.norm1.weight, stage.norm1.bias, attn.qkv.weight, attn.qkv.bias, attn.proj.weight, attn.proj.bias),
        *(stage.norm2.weight, stage.norm2.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias),
    )
    scales = None
    if stage.scales_branches and (stage.training or stage.branch_scale != 1):
        kept = drop_path_scales(x, drop_rates if stage.training else (0.0,) * len(drop_rates))
        scales = kept.float() * stage.branch_scale  # 4/3 would lose 0.2 % in bf16
    arguments = x, weights, len(drop_rates), attn.num_heads, stage.norm1.eps, scales
    options = {"recompute": stage.recompute, "providers": stage.providers or Providers()}
    if stage.training and stage.graphed is not None:
        return stage.graphed(*arguments, **options)
    return run(*arguments, backend="triton", **options)


def drop_path_scales(x: Tensor, rates: tuple[float, ...]) -> Tensor:
    """Draw the factors of drop-path for one pass of a stage, in the order in which timm's ``drop_path`` draws them.

    Args:
        x: [batch, tokens, width]; gives batch size, dtype and device.
        rates: the drop-path rate of each repeat.

    Returns:
        [repeats, 2, batch]: 0 where a branch is dropped, else 1 / (1 - rate). The branches are attention and MLP.
    """
    scales = x.new_ones(len(rates), 2, x.shape[0])
    for scale, rate in zip(scales, rates, strict=True):
        if rate:
            for branch in scale:  # timm draws twice: for the attention, then for the MLP
                branch.bernoulli_(1 - rate)
            scale.div_(1 - rate)
    return scales
