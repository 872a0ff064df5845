"""Expand a learngene into a descendant: turn a plan into layers.

``map_weights`` says where each weight of a descendant comes from, before anything is loaded; ``expand_learngene``
copies them into a state dict under timm's names. ``sharded_init.py`` uses the same mapping for models whose weights lie
sharded over many ranks. Source: SWS (IJCAI 2024), section 3.3; for TLEG's learngene, ``models/tleg.py``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import get_init_weights_vit
from torch import Tensor, nn

from sws_dist.checkpoint.load_model import set_input_description
from sws_dist.checkpoint.model_file import ModelInfo, load_weights_strict, misfit
from sws_dist.config.schema import IMAGE_SIZES
from sws_dist.learngene.file import BLOCK, Learngene, describe_model, is_linear
from sws_dist.learngene.plan import expansion_plan, is_whole
from sws_dist.models import SWSVisionTransformer, branch_scale, geometry
from sws_dist.models.tleg import linear_expansion

HEAD = ("head.weight", "head.bias")
BRANCH_OUTPUTS = ("attn.proj.weight", "attn.proj.bias", "mlp.fc2.weight", "mlp.fc2.bias")
"""The tensors of a layer that a factor of its branches can be multiplied into."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightMapping:
    """Sources of a descendant's weights: which of its tensors are copies of which of the learngene's."""

    layers: tuple[int, ...]
    """The expansion plan: the stage of each layer."""
    copies: dict[str, tuple[str, ...]]
    """For each tensor of the learngene, in its order: the descendant's tensors that are copies of it; none where its
    stage is dropped. With TLEG each is the sum of it and of its layer's share of the tensor in ``slopes``."""
    scales: tuple[float, ...]
    """For each layer, what the outputs of its branches are multiplied by (``branch_scale``)."""
    slopes: dict[str, str]
    """For each tensor of TLEG's theta_A, the one of theta_B; empty where layers are copies."""
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
        return resample_abs_pos_embed(
            _at_least_fp32(tensor), new_size=list(self.grid), num_prefix_tokens=self.prefix_tokens
        )

    def sources(self, name: str) -> tuple[str, ...]:
        """Return the tensors that those of ``copies[name]`` are made of: ``name`` and, with TLEG, its slope."""
        return (name, self.slopes[name]) if name in self.slopes else (name,)

    def compute(self, target: str, base: Tensor, slope: Tensor | None = None) -> Tensor:
        """Return the descendant's tensor ``target``, or a slice of it, from the same of its ``sources``.

        It is computed and returned in fp32 where the learngene is in half precision.
        """
        base, slope = _at_least_fp32(base), None if slope is None else _at_least_fp32(slope)
        match = BLOCK.match(target)
        if match is None:
            return base
        layer = int(match[1])
        tensor = base if slope is None else linear_expansion(base, slope, layer, len(self.layers))
        return tensor * self.scales[layer] if match[2] in BRANCH_OUTPUTS and self.scales[layer] != 1 else tensor

    @property
    def dropped(self) -> list[int]:
        """Stages of the learngene that no layer is copied from."""
        stages = {int(match[1]) for name in self.copies if (match := BLOCK.match(name))}
        return sorted(stages - set(self.layers))


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def plan_layers(info: ModelInfo, depth: int, kind: str | Sequence[int] = "even") -> tuple[int, ...]:
    """Return the expansion plan of a descendant of ``depth`` layers, for ``kind`` see ``expansion_plan``.

    Raises:
        ValueError: a plan that this learngene cannot follow, or one that ``expansion_plan`` refuses.
    """
    schedule = info.kwargs["schedule"]
    if is_linear(info) and kind != "even":
        raise ValueError(f"plan {kind}: TLEG's layers are not copied from stages, so there is no plan; leave it out")
    if info.kind == "model" and kind in ("even", "proportional"):
        raise ValueError(
            f"plan {kind}: the file holds a model, not a learngene: its {len(schedule)} layers share nothing; the plan "
            "spaced takes layers of it at even distances, a list such as 0,2,4 those that it names"
        )
    return expansion_plan(schedule, depth, kind)


def describe_layers(info: ModelInfo, layers: Sequence[int]) -> str:
    """Return a part of a log message: where the layers of a descendant come from."""
    if is_linear(info):
        return f"{len(layers)} layers theta_A + i/{len(layers)} theta_B"
    of_what = "stages" if info.kind == "learngene" else "layers"
    return f"{len(layers)} layers from {of_what} {','.join(map(str, layers))}"


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
    _require_same_geometry(info, model, layers)
    targets: dict[str, list[str]] = {name: [] for name in shapes}
    renamed = classes is not None and bool(info.classes) and list(classes) != info.classes
    fresh = HEAD if renamed or info.num_classes != model.num_classes else ()
    resampled = list(model.patch_embed.img_size) != info.kwargs["img_size"]
    slopes: dict[str, str] = {}
    problems = []
    for name, parameter in model.named_parameters():
        if name in fresh:
            continue
        sources = _sources(name, layers, is_linear(info))
        for source in sources:
            if source not in shapes:
                problems.append(f"{source}: missing in the learngene")
            elif not (resampled and name == "pos_embed") and tuple(shapes[source]) != tuple(parameter.shape):
                problems.append(
                    f"{name}: {tuple(shapes[source])} in the learngene, {tuple(parameter.shape)} in the model"
                )
        targets.setdefault(sources[0], []).append(name)
        if len(sources) == 2:
            slopes[sources[0]] = sources[1]
    problems += [
        f"{name}: not in the model"
        for name, copies in targets.items()
        if not copies and not BLOCK.match(name) and name not in fresh
    ]
    if problems:
        raise misfit("the learngene", problems)
    return WeightMapping(
        layers=tuple(layers),
        copies={name: tuple(copies) for name, copies in targets.items()},
        scales=_branch_scales(info.kwargs, layers),
        slopes=slopes,
        fresh=fresh,
        grid=tuple(model.patch_embed.grid_size) if resampled else None,
        prefix_tokens=model.num_prefix_tokens,
    )


def _require_same_geometry(info: ModelInfo, model: SWSVisionTransformer, layers: Sequence[int]) -> None:
    """Raise ValueError, naming what differs, if ``model`` would not compute what the learngene does."""
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


def _sources(name: str, layers: Sequence[int], linear: bool) -> list[str]:
    """Return the learngene's tensor that a descendant's tensor is copied from, or those of theta_A and theta_B."""
    match = BLOCK.match(name)
    if match is None:
        return [name]
    if linear:
        return [f"blocks.0.{part}.{match[2]}" for part in ("base", "slope")]
    return [f"blocks.{layers[int(match[1])]}.{match[2]}"]


def _branch_scales(geometry: Mapping[str, Any], layers: Sequence[int]) -> tuple[float, ...]:
    """Return the factor of each layer's branches: that of its stage, which runs as often as the plan has it."""
    exponent, schedule = geometry.get("branch_scaling", 0.0), geometry["schedule"]
    if not exponent:
        return (1.0,) * len(layers)
    return tuple(branch_scale(exponent, schedule[stage], layers.count(stage)) for stage in layers)


def untrained_depth(info: ModelInfo, depth: int) -> str | None:
    """Return a log message if the learngene's auxiliary model was never trained at ``depth``, or None."""
    own = len(info.kwargs["schedule"])
    trained_depths = info.trained_depths or ([own, own] if info.kind == "model" else [])
    if not trained_depths or trained_depths[0] <= depth <= trained_depths[1]:
        return None
    low, high = trained_depths
    trained = f"{low} layers alone" if low == high else f"{low} to {high} layers"
    if info.kwargs.get("branch_scaling"):
        remedy = "has branches scaled for that depth; its score shows whether it needs fine-tuning"
    else:
        remedy = "needs fine-tuning before it is used"
    return f"the learngene was trained at {trained}: a descendant of {depth} {remedy}"


def log_depth(info: ModelInfo, layers: Sequence[int], dropped: Sequence[int]) -> None:
    """Log what may be wrong with a depth: that it or its plan was not trained, and stages that it leaves out."""
    trained_plan = info.provenance.get("elastic_plan")  # files from before it was written do not say
    if (note := untrained_depth(info, len(layers))) is not None:
        log.info(note)
    elif trained_plan and tuple(layers) != expansion_plan(info.kwargs["schedule"], len(layers), trained_plan):
        log.warning(
            "the learngene was trained with the %s plan, which has other layers at a depth of %d: this descendant "
            "needs fine-tuning before it is used; the plan %s needs none",
            *(trained_plan, len(layers), trained_plan),
        )
    if dropped and info.kind == "learngene":
        log.warning("a depth of %d drops stages %s: their layers are not used", len(layers), dropped)


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
    branch_scaling: float | None = None,
) -> tuple[ModelInfo, dict[str, Tensor]]:
    """Expand a learngene into a descendant's metadata and weights.

    Args:
        info, learngene: what ``load_learngene`` returned.
        layers: the expansion plan (``plan_layers``).
        num_classes: another count than the learngene's gives a fresh head, drawn from ``seed``.
        image_size: another size than the learngene's resamples the position embedding as timm does.
        branch_scaling: exponent of the branches' factors (``branch_scale``). Default: the auxiliary model's.

    Raises:
        ValueError: an argument out of its range, or what ``map_weights`` refuses.

    Returns:
        Metadata for ``save_model_file``, and a state dict that fits plain timm's ViT, in fp32 for a learngene in half
        precision too.
    """
    smallest, largest = IMAGE_SIZES
    if num_classes is not None and not (is_whole(num_classes) and num_classes >= 1):
        raise ValueError(f"num_classes {num_classes!r}: expected a whole number from 1")
    if image_size is not None and not (is_whole(image_size) and smallest <= image_size <= largest):
        raise ValueError(f"image_size {image_size!r}: expected a whole number from {smallest} to {largest}")
    if branch_scaling is not None:
        if not (isinstance(branch_scaling, (int, float)) and 0 <= branch_scaling <= 2):
            raise ValueError(f"branch_scaling {branch_scaling!r}: expected a number from 0 to 2")
        info = replace(info, kwargs=info.kwargs | {"branch_scaling": branch_scaling})
    size = info.kwargs["img_size"] if image_size is None else [image_size, image_size]
    changed: dict[str, Any] = {"schedule": [1] * len(layers), "branch_scaling": 0.0, "img_size": size}
    with torch.device("meta"):
        model = SWSVisionTransformer(
            **(info.kwargs | changed), num_classes=info.num_classes if num_classes is None else num_classes
        )
    mapping = map_weights(info, {name: tensor.shape for name, tensor in learngene.items()}, model, layers)
    log_depth(info, layers, mapping.dropped)
    weights = fresh_head(model, seed) if mapping.fresh else {}
    for source, targets in mapping.copies.items():
        adapted = [mapping.adapt(name, learngene[name]) for name in mapping.sources(source)]
        weights |= {name: mapping.compute(name, *adapted).clone() for name in targets}
    described = describe_model(
        model,
        "model",
        preprocessing=info.preprocessing | {"image_size": size[0]},
        classes=[] if mapping.fresh else info.classes,
        provenance={
            "plan": "linear" if mapping.slopes else list(layers),
            "branch_scaling": info.kwargs.get("branch_scaling", 0.0),
            "fresh_head": bool(mapping.fresh),
            "learngene": info.provenance,
        },
    )
    return described, {name: weights[name] for name, _ in model.named_parameters()}


def build_descendant(
    learngene: Learngene, layers: Sequence[int], **options: Any
) -> tuple[ModelInfo, SWSVisionTransformer]:
    """Build a learngene's descendant, with its weights and ``pretrained_cfg``, on the CPU.

    Args:
        layers, options: arguments of ``expand_learngene``.
    """
    info, weights = expand_learngene(*learngene, layers, **options)
    model = info.build()
    load_weights_strict(model, weights, "the learngene")
    set_input_description(model, info)
    return info, model
