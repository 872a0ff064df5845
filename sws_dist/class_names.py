"""Find out which of a model's labels each class of a data set is, by the classes' names."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset

from sws_dist.data.labels import read_classes
from sws_dist.data.sources import find_source
from sws_dist.data.tar_shards import DEFAULT_KEYS, SampleKeys

log = logging.getLogger(__name__)

_REMEDY = (
    "--classes FILE names the model's labels, one a line in their order, as the folders are called; --numeric-classes "
    "takes folder 10 for label 10"
)


def name_labels(
    model: Any,
    model_name: str,
    data: Path,
    *,
    classes: str | Path | Sequence[str] | None = None,
    numeric: bool = False,
    keys: SampleKeys = DEFAULT_KEYS,
) -> tuple[str, ...]:
    """Return the name of each of a model's labels, as the classes of ``data`` are called, and log which are there.

    The first of these decides: ``classes``, ``numeric``, the names that the model knows (``label_names`` of its
    ``pretrained_cfg``), ImageNet's synsets (``n01440764``, ...) for as many labels as one of its versions has, and the
    sorted names of the data's classes, if they are as many as the labels.

    Args:
        model: a classifier with ``num_classes`` and ``pretrained_cfg``, as timm's have them.
        model_name: names the model in messages.
        data: a folder of class folders or of tar shards, or a list.
        classes: names of the labels, or a file with one a line.
        numeric: the classes are called by the numbers of their labels.
        keys: of samples in tar shards.

    Raises:
        ValueError: it is not clear which labels some classes are; the message says what would help.
    """
    found, num_labels = find_source(data.parent, data.name, keys=keys)[0].classes, model.num_classes
    # Numbers in a list or in shards are labels; a folder's name may be any number.
    numbers_are_labels = all(name.isdecimal() for name in found) and not (data / found[0]).is_dir()
    known = known_names(model, found)
    if classes is not None:
        names = tuple(read_classes(classes) if isinstance(classes, (str, Path)) else classes)
        if len(names) != num_labels:
            raise ValueError(f"--classes has {len(names)} names, {model_name} knows {num_labels} labels")
    elif numeric or (numbers_are_labels and known is None):
        names = _names_from_numbers(found, num_labels, data, model_name)
    else:
        names = known or _sorted_names(found, num_labels, data, model_name)
    unknown = sorted(set(found) - set(names))
    if unknown and not numbers_are_labels:
        raise ValueError(
            f"{data}: {len(unknown)} of its {len(found)} classes are not among the {num_labels} labels of "
            f"{model_name}: {', '.join(unknown[:5])}; those are called {', '.join(names[:3])}, ... . {_REMEDY}"
        )
    if len(found) < num_labels:
        listed = ", ".join(found[:10]) + (", ..." if len(found) > 10 else "")
        log.info(f"{data} has {len(found)} of the {num_labels} classes that {model_name} tells apart: {listed}")
    return names


def describe_labels(model: Any) -> tuple[str, ...]:
    """Return what to call each of a model's labels: as the model does, by ImageNet's descriptions, or by number."""
    if known := own_names(model):
        return known
    subset = infer_imagenet_subset({"num_classes": model.num_classes})
    if not subset:
        log.info("the model does not say what its labels are called: they are shown as numbers")
        return tuple(map(str, range(model.num_classes)))
    log.info("the model does not say what its labels are called: they are taken for ImageNet's, which are as many")
    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(label) for label in range(model.num_classes))


def own_names(model: Any) -> tuple[str, ...] | None:
    """Return what the model's labels are called, as its file says; None if it does not."""
    names = model.pretrained_cfg.get("label_names") or ()
    return tuple(names) if len(names) == model.num_classes else None


def known_names(model: Any, found: Sequence[str]) -> tuple[str, ...] | None:
    """Return the labels' names as the model knows them, or ImageNet's if the data has some of those."""
    if known := own_names(model):
        return known
    subset = infer_imagenet_subset({"num_classes": model.num_classes})
    synsets = tuple(ImageNetInfo(subset).label_names()) if subset else ()
    return synsets if not set(synsets).isdisjoint(found) else None


def _names_from_numbers(found: Sequence[str], num_labels: int, data: Path, model_name: str) -> tuple[str, ...]:
    """Return the labels' numbers as the classes write them: ``7`` or ``007``."""
    names = {label: str(label) for label in range(num_labels)}
    wrong = [name for name in found if not name.isdecimal() or int(name) >= num_labels]
    twice = len({int(name) for name in found if name.isdecimal()}) < len(found) - len(wrong)
    if wrong or twice:
        what = f"{', '.join(wrong[:5])} is none" if wrong else "one of them is there twice, with leading zeros"
        raise ValueError(f"{data}: classes from 0 to {num_labels - 1} are needed, the labels of {model_name}; {what}")
    return tuple((names | {int(name): name for name in found}).values())


def _sorted_names(found: Sequence[str], num_labels: int, data: Path, model_name: str) -> tuple[str, ...]:
    if len(found) != num_labels:
        raise ValueError(
            f"{data} has {len(found)} class folders, {model_name} knows {num_labels} labels and not their names; which "
            f"label is which folder cannot be told. {_REMEDY}"
        )
    if all(name.isdecimal() for name in found) and sorted(found) != sorted(found, key=int):
        raise ValueError(
            f"{data}: its folders are numbers, which sort as text ({', '.join(sorted(found)[:4])}, ...), and "
            f"{model_name} does not say what its labels are called. {_REMEDY}"
        )
    log.info(f"{model_name} does not say what its labels are called: the folders of {data}, sorted, are taken for them")
    return tuple(sorted(found))
