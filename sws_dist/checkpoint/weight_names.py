"""Find a model's weights in a file that another program wrote, and give them the names that the model has.

    file = read_weight_file("checkpoint.pth")
    weights, dropped = convert_weights(file, model)    # chosen, renamed, resampled; the log says what was taken

The model's own names decide which dictionary of the file is meant, and which prefix (``module.``, ``backbone.``,
``teacher.backbone.``, ...) its keys carry: the one under which most of the model's names are found. Nothing is
loaded here; ``load_weights_strict`` checks that every tensor found its partner.
"""

from __future__ import annotations

import inspect
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple
from unittest.mock import patch

import timm
import torch
from torch import Tensor, nn

from sws_dist.checkpoint.weight_file import WeightFile

_AVERAGED = re.compile(r"(?:^|[._])(?:ema|swa|avg|averaged?|shadow|teacher|target|momentum|encoder_k)(?=$|[._])")
"""Matches the places of averaged weights: ``model_ema``, ``state_dict_ema``, DINO's ``teacher``, ..."""
_NO_WEIGHTS = re.compile(r"optim|sched|scaler|loss|metric|callback")
"""Matches the places of dictionaries that are no model's weights."""
_INSIDE = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Matches the parts that torch.compile, FSDP and activation checkpointing put into names, at any place."""
_WRAPPERS = ("module", "model", "backbone", "encoder", "net", "network", "student", "teacher")
"""First parts of keys that are no part of a model, where all keys have them."""
_TRAINING_ONLY = re.compile(
    r"decoder|mask_token$|n_averaged$|(?:head|fc)\.(?:mlp|last_layer|\d+)\.|(?:dino|ibot|lm)_head\."
    r"|project(?:or|ion)|predict(?:or|ion)"
)
"""Matches names of parts that only pre-training uses: MAE's decoder, DINO's and MoCo's projection heads."""
_ENOUGH = 0.5
"""Share of a model's names that a prefix must lead to; below it, the file is of a layout that timm has to convert."""

log = logging.getLogger(__name__)


class Converted(NamedTuple):
    """The weights of a file under a model's names, and which of the file's tensors are not among them."""

    weights: dict[str, Tensor]
    dropped: list[str]
    """Those that timm's conversion leaves out."""


class _Fate(NamedTuple):
    """What timm's conversion made of a tensor of a file."""

    name: str
    shape: tuple[int, ...]
    new_name: str | None
    """None: the tensor was left out, or is a part of one with another name."""
    new_shape: tuple[int, ...]
    """Empty where there is no new name."""

    @property
    def is_resampled(self) -> bool:
        """True if the tensor has other numbers than before, and not only another shape."""
        return self.new_name is not None and math.prod(self.new_shape) != math.prod(self.shape)


class _Place(NamedTuple):
    """A dictionary of a file, and the prefix of the keys that are meant."""

    group: str
    prefix: str

    def __str__(self) -> str:
        return ".".join(part for part in (self.group, self.prefix.rstrip(".")) if part) or "its own keys"

    @property
    def is_averaged(self) -> bool:
        return _AVERAGED.search(str(self)) is not None


def convert_weights(file: WeightFile, model: nn.Module, *, use_ema: bool = True) -> Converted:
    """Choose the weights of ``file`` that ``model`` needs, under the model's names, and log what was taken.

    Args:
        model: may be on the meta device; its names, position embedding and input size are looked at.
        use_ema: take averaged weights where the file has them beside others.

    Returns:
        The weights, with what timm converts converted: names of official files, position embeddings of another size.

    Raises:
        ValueError: several sets of weights fit equally well, timm cannot convert them, or their patches are of another
            size than the model's.
    """
    own = model.state_dict()
    given = select_weights(file, own.keys(), use_ema=use_ema)
    if "patch_embed.0.c.weight" in given.keys() - own.keys():  # SHViT's parts are called as official LeViT's
        given = _rename_official_levit(given)
    try:
        weights = _apply_timm_filter(model, dict(given))
    except Exception as error:  # each architecture's filter fails in its own way on what it does not know
        raise ValueError(
            f"{file.path}: timm cannot convert these weights for {type(model).__name__} "
            f"({error or type(error).__name__}); are they of another model, or the images too small?"
        ) from None
    fates = _follow(given, weights)
    _require_same_patches(file, model, fates)
    for fate in fates:
        if fate.is_resampled and fate.new_name in own:
            log.info(f"{file.path}: {fate.name} resampled from {fate.shape} to {fate.new_shape}")
    unused = [name for name in given | weights if name not in own and _TRAINING_ONLY.match(name)]
    _log_left_out(file, unused)
    dropped = [fate.name for fate in fates if fate.new_name is None and fate.name not in unused]
    _log_dropped(file, dropped, merged=len(weights) > len(fates) - len(dropped))
    return Converted({name: tensor for name, tensor in weights.items() if name not in unused}, dropped)


def _follow(given: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[_Fate]:
    """Find each tensor of a file after the conversion: by its name, or by its memory where it has a new name."""
    renamed = {tensor.data_ptr(): name for name, tensor in weights.items() if name not in given}
    fates = []
    for name, tensor in given.items():
        new_name = name if name in weights else renamed.get(tensor.data_ptr())
        new_shape = () if new_name is None else tuple(weights[new_name].shape)
        fates.append(_Fate(name, tuple(tensor.shape), new_name, new_shape))
    return fates


def _require_same_patches(file: WeightFile, model: nn.Module, fates: Iterable[_Fate]) -> None:
    """Raise ``ValueError`` if timm has resampled the patches, of whose size the model was trained to make its tokens.

    FlexiViT is trained with patches of many sizes.
    """
    if (getattr(model, "pretrained_cfg", None) or {}).get("architecture", "").startswith("flexivit"):
        return
    for fate in fates:
        if fate.is_resampled and str(fate.new_name).endswith("patch_embed.proj.weight"):
            theirs, ours = ("x".join(map(str, shape[2:])) for shape in (fate.shape, fate.new_shape))
            raise ValueError(
                f"{file.path}: is of a model with patches of {theirs} pixels, and this one's are {ours}; name a model "
                "with those patches (--model, model.name), or set patch_size in model.kwargs"
            )


def select_weights(file: WeightFile, names: Collection[str] = (), *, use_ema: bool = True) -> dict[str, Tensor]:
    """Choose one set of weights of a file, without the prefix that its keys carry, and log which.

    Args:
        names: of the model's tensors; none: the largest dictionary is taken.

    Raises:
        ValueError: several sets fit equally well, or only averaged ones where ``use_ema`` is False.
    """
    groups = {
        group: {_INSIDE.sub("", name): tensor for name, tensor in tensors.items()}
        for group, tensors in file.groups.items()
    }
    found = _count_names(groups, names)
    if not found or max(found.values()) < _ENOUGH * len(names):
        found = Counter({_common_wrapper(group, tensors): len(tensors) for group, tensors in groups.items()})
        found = Counter({p: n for p, n in found.items() if not _NO_WEIGHTS.search(p.group)}) or found
    place = _choose(file, found, use_ema)
    tensors = groups[place.group]
    if place.prefix:
        _log_left_out(file, [name for name in tensors if not name.startswith(place.prefix)])
    return {n.removeprefix(place.prefix): tensor for n, tensor in tensors.items() if n.startswith(place.prefix)}


def _count_names(groups: Mapping[str, Iterable[str]], names: Collection[str]) -> Counter[_Place]:
    """Count, for every dictionary and prefix, the model's names that are found there."""
    wanted, found = set(names), Counter[_Place]()
    for group, keys in groups.items():
        for key in keys:
            parts = key.split(".")
            for start in range(len(parts)):
                if ".".join(parts[start:]) in wanted:
                    found[_Place(group, "".join(f"{part}." for part in parts[:start]))] += 1
    return found


def _common_wrapper(group: str, names: Iterable[str]) -> _Place:
    """Return a dictionary's place with the wrappers that all its keys carry: ``module.``, ``model.module.``, ..."""
    names, prefix = list(names), ""
    while True:
        first = names[0].removeprefix(prefix).partition(".")[0]
        if first not in _WRAPPERS or not all(name.startswith(f"{prefix}{first}.") for name in names):
            return _Place(group, prefix)
        prefix += f"{first}."


def _choose(file: WeightFile, found: Counter[_Place], use_ema: bool) -> _Place:
    """Choose among the places that hold the most: the averaged one, or (without ``use_ema``) the other."""
    most = max(found.values())
    best = [place for place, count in found.items() if count == most]
    for place, count in found.items():
        if place.is_averaged and use_ema and most > count >= _ENOUGH * most:
            log.warning(f"{file.path}: {place} holds only {count} of {most} tensors and is not taken")
    averaged, plain = ([place for place in best if place.is_averaged is kind] for kind in (True, False))
    chosen, others = (averaged, plain) if use_ema and averaged else (plain, averaged)
    if not chosen:
        raise ValueError(f"{file.path}: holds averaged weights alone ({others[0]}); leave out --no-ema to take them")
    if len(chosen) > 1:
        raise ValueError(
            f"{file.path}: holds several sets of weights, and which one is meant cannot be told: "
            f"{', '.join(map(str, chosen))}; save one of them alone"
        )
    (place,) = chosen
    if others and place.is_averaged:
        log.info(f"{file.path}: the averaged weights ({place}) are taken; --no-ema takes the others ({others[0]})")
    elif others:
        log.info(f"{file.path}: the weights of {place} are taken, not the averaged ones ({others[0]})")
    elif place != ("", ""):
        log.info(f"{file.path}: the weights of {place} are taken")
    return place


def _log_left_out(file: WeightFile, names: list[str]) -> None:
    parts = Counter(name.partition(".")[0] for name in names)
    if parts:
        listed = ", ".join(f"{part} ({count} tensors)" if count > 1 else part for part, count in parts.items())
        log.info(f"{file.path}: left out, since the model has no such part: {listed}")


def _log_dropped(file: WeightFile, names: list[str], *, merged: bool) -> None:
    """Log what is not among the converted weights; ``merged``: some of it may be a part of tensors made of several."""
    if names:
        kinds = Counter(re.sub(r"\d+", "*", name) for name in names)
        listed = ", ".join(f"{kind} ({count} tensors)" if count > 1 else kind for kind, count in kinds.items())
        log.info(f"{file.path}: timm's conversion {'merges or ' * merged}leaves out: {listed}")


# ---- names of official files -----------------------------------------------------------------------------------------


def _apply_timm_filter(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict as timm does for this architecture: renamed, resampled, without what was never a weight."""
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    filter_fn = _timm_filter(architecture) if timm.is_model(architecture or "") else None
    if filter_fn is None:
        return weights
    one_argument = len(inspect.signature(filter_fn).parameters) == 1
    return filter_fn(weights) if one_argument else filter_fn(weights, model)


@cache
def _timm_filter(architecture: str) -> Callable[..., dict[str, Tensor]] | None:
    """Return the function that timm itself calls on an architecture's weights, with the arguments that it binds.

    timm hands it to nothing but ``load_pretrained``, and each architecture finds its own. So a model is built, on the
    meta device, whose ``load_pretrained`` is ours.
    """
    found = []

    def catch(*_: Any, filter_fn: Any = None, **__: Any) -> None:
        found.append(filter_fn)

    with patch.object(timm.models._builder, "load_pretrained", catch), torch.device("meta"):
        timm.create_model(architecture, pretrained=True)
    return found[0] if found else None


def _rename_official_levit(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of LeViT's official files, whose blocks stand in one row, to timm's stages.

    A row of the official ``blocks`` holds an attention (``m.qkv``) or an MLP (``m.0``, ``m.2``), in turn; between two
    stages a shrinking attention (``kv``) comes before one more MLP.
    """
    parts = ((r"\.c\.", ".linear."), (r"\.l\.", ".linear."), (r"(proj|q)\.1\.", r"\1.ln."))
    rows: dict[int, list[str]] = {}
    renamed = {}
    for name, tensor in weights.items():
        if match := re.match(r"blocks\.(\d+)\.", name):
            rows.setdefault(int(match[1]), []).append(name)
        elif match := re.match(r"patch_embed\.(\d+)\.", name):
            renamed[f"stem.conv{int(match[1]) // 2 + 1}.{name[match.end() :]}"] = tensor
        else:
            renamed[name] = tensor
    stage, block, parent = 0, -1, ""
    for row in sorted(rows):
        start = f"blocks.{row}."
        inside = {name: name.removeprefix(start).removeprefix("m.") for name in rows[row]}
        if f"{start}kv.c.weight" in inside:
            stage, block = stage + 1, -1
            parent = f"stages.{stage}.downsample."
            target = f"{parent}attn_downsample."
        elif f"{start}m.qkv.c.weight" in inside:
            block += 1
            parent = f"stages.{stage}.blocks.{block}."
            target = f"{parent}attn."
        else:
            target = f"{parent}mlp."
            inside = {name: re.sub(r"^([02])\.", lambda m: f"ln{int(m[1]) // 2 + 1}.", n) for name, n in inside.items()}
        renamed |= {target + inner: weights[name] for name, inner in inside.items()}
    for pattern, replacement in parts:
        renamed = {re.sub(pattern, replacement, name): tensor for name, tensor in renamed.items()}
    return renamed
