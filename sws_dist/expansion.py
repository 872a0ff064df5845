"""From a learngene to a descendant: which stage's layer goes where, and the copying.

``plan`` is pure and checked before anything is loaded; ``expand`` makes a state dict under timm's names.
Source: SWS (IJCAI 2024), section 3.3 and the one published map (12 layers: 0,0,0,1,1,1,2,2,3,3,4,4).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from sws_dist import model_file
from sws_dist.learngene import BLOCK, describe
from sws_dist.model_file import ModelInfo
from sws_dist.models import SWSVisionTransformer


def plan(schedule: Sequence[int], depth: int, kind: str | Sequence[int] = "even") -> tuple[int, ...]:
    """The expansion plan: for each of the descendant's ``depth`` layers, the stage that it is copied from.

    Args:
        schedule: repeats of each stage of the auxiliary model.
        kind: ``even`` gives each stage depth // stages layers and the remainder to the earliest stages; at the
            auxiliary's own depth it is the auxiliary's own schedule. ``proportional`` follows the schedule by
            largest remainder. A sequence is an explicit plan.

    Raises:
        ValueError: a depth below 1, or a plan of the wrong length, range or order.
    """
    stages = len(schedule)
    if depth < 1:
        raise ValueError(f"depth {depth}: a descendant needs at least one layer")
    if not isinstance(kind, str):
        return _check(tuple(kind), depth, stages)
    if kind == "even":
        counts = list(schedule) if depth == sum(schedule) else _even(stages, depth)
    elif kind == "proportional":
        counts = _proportional(schedule, depth)
    else:
        raise ValueError(f"plan {kind!r}: expected even, proportional, or stage numbers such as 0,0,1,2,3,4")
    return tuple(stage for stage, count in enumerate(counts) for _ in range(count))


def parse_plan(text: str) -> str | tuple[int, ...]:
    """``plan``'s ``kind`` from a command line: a name, or comma-separated stage numbers."""
    if text in ("even", "proportional"):
        return text
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"plan {text!r}: expected even, proportional, or stage numbers such as 0,0,1,2,3,4") from None


def expand(
    info: ModelInfo,
    learngene: Mapping[str, Tensor],
    layers: Sequence[int],
    *,
    num_classes: int | None = None,
    image_size: int | None = None,
    seed: int = 0,
) -> tuple[ModelInfo, dict[str, Tensor]]:
    """A descendant's metadata and weights.

    Args:
        info, learngene: what ``learngene.load`` returned.
        layers: the expansion plan.
        num_classes: another count than the learngene's gives a fresh head, drawn from ``seed``.
        image_size: another size than the learngene's resamples the position embedding as timm does.
    """
    num_classes = info.num_classes if num_classes is None else num_classes
    size = info.kwargs["img_size"] if image_size is None else [image_size, image_size]
    kwargs = info.kwargs | {"schedule": [1] * len(layers), "img_size": size}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SWSVisionTransformer(**kwargs, num_classes=num_classes)
    dropped = sorted(set(range(len(info.kwargs["schedule"]))) - set(layers))
    if dropped:
        warnings.warn(f"a depth of {len(layers)} drops stages {dropped}: their layers are not used", stacklevel=2)

    weights = {name: tensor for name, tensor in learngene.items() if not BLOCK.match(name)}
    for layer, stage in enumerate(layers):
        prefix = f"blocks.{stage}."
        for name, tensor in learngene.items():
            if name.startswith(prefix):
                weights[f"blocks.{layer}.{name.removeprefix(prefix)}"] = tensor.clone()
    if size != info.kwargs["img_size"]:
        weights["pos_embed"] = resample_abs_pos_embed(
            weights["pos_embed"],
            new_size=list(model.patch_embed.grid_size),
            num_prefix_tokens=model.num_prefix_tokens,
        )
    fresh_head = num_classes != info.num_classes
    if fresh_head:
        weights |= {name: tensor for name, tensor in model.state_dict().items() if name.startswith("head.")}
    model_file.load_into(model, weights, "the learngene")
    provenance = {"plan": list(layers), "fresh_head": fresh_head, "learngene": info.provenance}
    described = describe(
        model,
        "model",
        pixels=info.pixels | {"image_size": size[0]},
        classes=[] if fresh_head else info.classes,
        provenance=provenance,
    )
    return described, weights


def _even(stages: int, depth: int) -> list[int]:
    share, extra = divmod(depth, stages)
    return [share + (stage < extra) for stage in range(stages)]


def _proportional(schedule: Sequence[int], depth: int) -> list[int]:
    """Largest remainder; where remainders tie, the earlier stage gets the layer."""
    exact = [depth * repeats / sum(schedule) for repeats in schedule]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda stage: (counts[stage] - exact[stage], stage))
    for stage in by_remainder[: depth - sum(counts)]:
        counts[stage] += 1
    return counts


def _check(layers: tuple[int, ...], depth: int, stages: int) -> tuple[int, ...]:
    if len(layers) != depth:
        raise ValueError(f"plan {list(layers)} has {len(layers)} layers, but the depth is {depth}")
    for layer, stage in enumerate(layers):
        if not 0 <= stage < stages:
            raise ValueError(f"plan {list(layers)}: layer {layer} takes stage {stage}; stages are 0 to {stages - 1}")
    if list(layers) != sorted(layers):
        raise ValueError(f"plan {list(layers)}: stages must not decrease from one layer to the next")
    return layers
