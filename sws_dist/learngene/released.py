"""Read auxiliary models of the paper's released code as learngenes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from sws_dist.checkpoint.model_file import ModelInfo, load_weights_strict
from sws_dist.config.schema import DEFAULT_CROP_PCT, IMAGENET_MEAN, IMAGENET_STD
from sws_dist.learngene.file import BLOCK, describe_model
from sws_dist.models import SWSVisionTransformer

_IMAGE_SIZE = 224


def convert_released(
    weights: Mapping[str, Tensor], schedule: tuple[int, ...], num_heads: int
) -> tuple[ModelInfo, dict[str, Tensor]]:
    """Convert the weights of the paper's released code into a learngene.

    There the layer of stage i stands under ``blocks.block.<part>.instances.i``. The file says neither the repeats
    nor the heads, so both are asked for. Its LayerNorms have epsilon 1e-5, and its images are normalised as ImageNet's.

    Returns:
        The learngene's metadata, and its tensors under timm's names.

    Raises:
        ValueError: a tensor that the layout does not know, or a schedule or head count that does not fit.
    """
    renamed = {_timm_name(name): tensor for name, tensor in weights.items()}
    stages = {int(match[1]) for name in renamed if (match := BLOCK.match(name))}
    if stages != set(range(len(schedule))):
        raise ValueError(f"schedule {list(schedule)} has {len(schedule)} stages, the checkpoint has {len(stages)}")
    for name in ("patch_embed.proj.weight", "pos_embed", "head.weight", "blocks.0.mlp.fc1.weight"):
        if name not in renamed:
            raise ValueError(f"the checkpoint has no {name}: not an auxiliary model of the released code")
    width, channels, *patch = renamed["patch_embed.proj.weight"].shape
    if width % num_heads:
        raise ValueError(f"{num_heads} heads do not divide the width {width}")
    model = SWSVisionTransformer(
        schedule=schedule,
        img_size=_IMAGE_SIZE,
        patch_size=tuple(patch),
        in_chans=channels,
        embed_dim=width,
        num_heads=num_heads,
        mlp_ratio=renamed["blocks.0.mlp.fc1.weight"].shape[0] / width,
        qkv_bias="blocks.0.attn.qkv.bias" in renamed,
        num_classes=renamed["head.weight"].shape[0],
        norm_eps=1e-5,
    )
    load_weights_strict(model, renamed, "the released checkpoint")
    preprocessing = {
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "image_size": _IMAGE_SIZE,
        "crop_pct": DEFAULT_CROP_PCT,
        "interpolation": "bicubic",
    }
    return describe_model(model, "learngene", preprocessing=preprocessing), renamed


def _timm_name(name: str) -> str:
    """Return timm's name of a tensor that the released code calls ``name``."""
    shared = re.fullmatch(r"(?:module\.)?blocks\.block\.(.+)\.instances\.(\d+)\.(weight|bias)", name)
    if shared:
        part, stage, kind = shared.groups()
        return f"blocks.{stage}.{part}.{kind}"
    return name.removeprefix("module.")
