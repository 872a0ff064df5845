"""Expand a learngene into a descendant: turn a plan into layers.

``map_weights`` says where each weight of a descendant comes from, before anything is loaded; ``expand_learngene``
copies them into a state dict under timm's names. ``sharded_init.py`` uses the same mapping for models whose weights lie
sharded over many ranks. Source: SWS (IJCAI 2024), section 3.3.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import get_init_weights_vit
from torch import Tensor, nn

from sws_dist.checkpoint.model_file import ModelInfo
from sws_dist.learngene.file import BLOCK, describe_model
from sws_dist.models import SWSVisionTransformer, geometry

HEAD = ("head.weight", "head.bias")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightMapping:
    """Sources of a descendant's weights: which of its tensors are copies of which of the learngene's."""

    layers: tuple[int, ...]
    """The expansion plan: the stage of each layer."""
    copies: dict[str, tuple[str, ...]]
    """For each tensor of the learngene, in its order: the descendant's tensors that are copies of it; none where its
    stage is dropped."""
    fresh: tuple[str, ...]
    """The head's tensors, where the learngene's head is of other labels; else empty."""
    grid: tuple[int, int] | None
    """Rows and columns of patches that the position embedding is resampled to, or None."""
    prefix_tokens: int
    """Tokens in front of the patches (class token) that resampling leaves alone."""

    def adapt(self, name: str, tensor: Tensor) -> Tensor:
        """Return the learngene's tensor ``name`` as the descendant has it; a position embedding may be resampled."""
        if name != "pos_embed" or self.grid is None:
            return tensor
        return resample_abs_pos_embed(tensor, new_size=list(self.grid), num_prefix_tokens=self.prefix_tokens)

    @property
    def dropped(self) -> list[int]:
        """Stages of the learngene that no layer is copied from."""
        stages = {int(match[1]) for name in self.copies if (match := BLOCK.match(name))}
        return sorted(stages - set(self.layers))


def map_weights(
    info: ModelInfo,
    shapes: Mapping[str, Sequence[int]],
    model: SWSVisionTransformer,
    layers: Sequence[int],
    classes: Sequence[str] | None = None,
) -> WeightMapping:
    """Map the weights of a learngene to those of ``model``; nothing is read or copied yet.

    Args:
        info, shapes: the learngene's metadata, and the shape of each of its tensors.
        model: the descendant, on any device: only names and shapes are looked at (``meta`` will do).
        layers: the expansion plan.
        classes: names of the descendant's labels, if they may be others than the learngene's.

    Raises:
        ValueError: a geometry that would not compute what the learngene does, or tensors that do not fit.
    """
    ours, theirs = geometry(model), info.kwargs
    fixed = ("patch_size", "in_chans", "embed_dim", "num_heads", "qkv_bias", "class_token", "global_pool", "norm_eps")
    differ = [
        f"{key}: {theirs[key]} there, {ours[key]} here" for key in fixed if key in theirs and ours[key] != theirs[key]
    ]
    if len(layers) != len(model.blocks):
        differ.append(f"{len(layers)} layers in the plan, {len(model.blocks)} in the model")
    if model.is_shared:
        differ.append(f"schedule {ours['schedule']}: a descendant's layers do not repeat")
    if differ:
        raise ValueError(f"the learngene is of another model: {'; '.join(differ)}")
    targets: dict[str, list[str]] = {name: [] for name in shapes}
    renamed = classes is not None and bool(info.classes) and list(classes) != info.classes
    fresh = HEAD if renamed or info.num_classes != model.num_classes else ()
    resampled = ours["img_size"] != theirs["img_size"]
    problems = []
    for name, parameter in model.named_parameters():
        match = BLOCK.match(name)
        source = f"blocks.{layers[int(match[1])]}.{match[2]}" if match else name
        if name in fresh:
            continue
        if source not in shapes:
            problems.append(f"{source}: missing in the learngene")
        elif not (resampled and name == "pos_embed") and tuple(shapes[source]) != tuple(parameter.shape):
            problems.append(f"{name}: {tuple(shapes[source])} in the learngene, {tuple(parameter.shape)} in the model")
        else:
            targets[source].append(name)
    problems += [
        f"{name}: not in the model"
        for name, copies in targets.items()
        if not copies and not BLOCK.match(name) and name not in fresh
    ]
    if problems:
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError("the learngene does not fit the model:\n  " + "\n  ".join(problems[:8]) + more)
    return WeightMapping(
        layers=tuple(layers),
        copies={name: tuple(copies) for name, copies in targets.items()},
        fresh=fresh,
        grid=tuple(model.patch_embed.grid_size) if resampled else None,
        prefix_tokens=model.num_prefix_tokens,
    )


def untrained_depth(info: ModelInfo, depth: int) -> str | None:
    """Return a log message if the learngene's auxiliary model was never trained at ``depth``, or None."""
    if not info.trained_depths or info.trained_depths[0] <= depth <= info.trained_depths[1]:
        return None
    low, high = info.trained_depths
    trained = f"{low} layers alone" if low == high else f"{low} to {high} layers"
    return f"the learngene was trained at {trained}: a descendant of {depth} needs fine-tuning before it is used"


def fresh_head(model: SWSVisionTransformer, seed: int) -> dict[str, Tensor]:
    """Draw a new classifier in fp32 on the CPU, initialised as timm does it.

    The draws depend on ``seed`` and the layer's name alone: every rank of any world draws the same.
    """
    layer = nn.Linear(model.head.in_features, model.head.out_features, bias=model.head.bias is not None, device="meta")
    layer = layer.to_empty(device="cpu")
    mode = model.weight_init_mode
    initialise = get_init_weights_vit(mode, head_bias=-math.log(model.num_classes) if "nlhb" in mode else 0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(sha256(f"{seed} head".encode()).digest()[:7], "big"))
        layer.reset_parameters()
        initialise(layer, "head")
    return {f"head.{name}": tensor.detach() for name, tensor in layer.named_parameters()}


def expand_learngene(
    info: ModelInfo,
    learngene: Mapping[str, Tensor],
    layers: Sequence[int],
    *,
    num_classes: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
) -> tuple[ModelInfo, dict[str, Tensor]]:
    """Expand a learngene into a descendant's metadata and weights.

    Args:
        info, learngene: what ``load_learngene`` returned.
        layers: the expansion plan (``expansion_plan``).
        num_classes: another count than the learngene's gives a fresh head, drawn from ``seed``.
        image_size: another size than the learngene's resamples the position embedding as timm does.

    Returns:
        Metadata for ``save_model_file``, and a state dict that fits plain timm's ViT.
    """
    if (note := untrained_depth(info, len(layers))) is not None:
        log.info(note)
    size = info.kwargs["img_size"] if image_size is None else [image_size, image_size]
    changed: dict[str, Any] = {"schedule": [1] * len(layers), "img_size": size}
    with torch.device("meta"):
        model = SWSVisionTransformer(
            **(info.kwargs | changed), num_classes=info.num_classes if num_classes is None else num_classes
        )
    mapping = map_weights(info, {name: tensor.shape for name, tensor in learngene.items()}, model, layers)
    if mapping.dropped:
        log.warning("a depth of %d drops stages %s: their layers are not used", len(layers), mapping.dropped)
    weights = fresh_head(model, seed) if mapping.fresh else {}
    for source, targets in mapping.copies.items():
        adapted = mapping.adapt(source, learngene[source])
        weights |= {name: adapted.clone() for name in targets}
    described = describe_model(
        model,
        "model",
        preprocessing=info.preprocessing | {"image_size": size[0]},
        classes=[] if mapping.fresh else info.classes,
        provenance={"plan": list(layers), "fresh_head": bool(mapping.fresh), "learngene": info.provenance},
    )
    return described, {name: weights[name] for name, _ in model.named_parameters()}
