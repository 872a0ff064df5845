"""Describe what a model of ours computes: the arguments that build it again, here or in plain timm."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

from timm.layers import LayerNorm
from timm.models.vision_transformer import Block

if TYPE_CHECKING:
    from sws_dist.models.vit import SWSVisionTransformer


def geometry(model: SWSVisionTransformer) -> dict[str, Any]:
    """Return the constructor arguments that reproduce what the model computes, JSON-ready.

    Arguments that matter in training alone, such as drop-path, are not among them.
    """
    block = next(module for module in model.modules() if isinstance(module, Block))
    embed = model.patch_embed
    return {
        "schedule": list(model.schedule),
        "img_size": list(embed.img_size),
        "patch_size": list(embed.patch_size),
        "in_chans": model.in_chans,
        "embed_dim": model.embed_dim,
        "num_heads": block.attn.num_heads,
        "mlp_ratio": _mlp_ratio(block.mlp.fc1.out_features, model.embed_dim),
        "qkv_bias": block.attn.qkv.bias is not None,
        "class_token": model.has_class_token,
        "global_pool": model.global_pool,
        "norm_eps": model.norm_eps,
        "branch_scaling": model.branch_scaling,
        "num_classes": model.num_classes,
    }


def _mlp_ratio(hidden: int, width: int) -> float:
    """Return the ratio from which timm's ``int(width * ratio)`` makes ``hidden`` again, which may need a last bit."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def timm_arguments(geometry: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return name and arguments for ``timm.create_model`` of the plain ViT that a descendant's weights fit.

    Raises:
        ValueError: a geometry whose stages share weights.
    """
    arguments = dict(geometry)
    schedule = arguments.pop("schedule")
    eps = arguments.pop("norm_eps")
    arguments.pop("branch_scaling", None)  # of no effect where layers do not repeat
    if max(schedule) > 1:
        raise ValueError(f"schedule {schedule}: layers share weights; expand the learngene first")
    if eps != 1e-6:  # timm's default
        arguments["norm_layer"] = partial(LayerNorm, eps=eps)
    return "vit_base_patch16_224", arguments | {"depth": len(schedule), "fc_norm": False}


def timm_call(geometry: dict[str, Any], num_classes: int) -> str:
    """Return the line of Python that builds the plain timm ViT of ``timm_arguments``, for the user to copy.

    Raises:
        ValueError: a geometry whose stages share weights.
    """
    name, arguments = timm_arguments(geometry | {"num_classes": num_classes})
    if arguments.pop("norm_layer", None):
        arguments["norm_layer"] = _PythonSource(f"partial(torch.nn.LayerNorm, eps={geometry['norm_eps']})")
    return f"timm.create_model({name!r}, {', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


class _PythonSource(str):
    """Python source that ``repr`` shows without quotes."""

    __slots__ = ()
    __repr__ = str.__str__
