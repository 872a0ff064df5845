"""Turn the labels of a data set, as they are written, into class names and label numbers."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from sws_dist.text import read_text

MAX_LABEL = 10_000_000
"""The largest number that is accepted as a label: every number from 0 to the largest label becomes a class."""
_NAMED = 5
"""Number of classes that a message names."""
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?")


def read_classes(path: str | Path) -> tuple[str, ...]:
    """Read class names from a file, one a line, in the order of the labels.

    Raises:
        ValueError: no names, or one that appears twice.
    """
    names = [line.strip() for line in read_text(path).splitlines()]
    names = [name for name in names if name]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if not names or twice:
        raise ValueError(f"data.classes {path}: " + (f"named twice: {', '.join(twice[:5])}" if twice else "is empty"))
    return tuple(names)


def number_labels(
    labels: Sequence[str], classes: Sequence[str] | None, origin: Path
) -> tuple[tuple[str, ...], np.ndarray]:
    """Turn labels as they are written into class names and label numbers [N] int64.

    Written numbers are the label numbers; a written name has the number of its place in ``classes``.

    Raises:
        ValueError: a label that ``classes`` does not have, or numbers that are negative or fractions.
    """
    written = set(labels)
    are_names = bool(written & set(classes or ())) and not are_numbers(classes or ())
    if all(label.isdecimal() for label in written) and not are_names:
        largest = max(written, key=int)
        if int(largest) > MAX_LABEL:
            raise ValueError(f"{origin}: has label {largest}; labels go up to {MAX_LABEL}")
        numbers = np.array([int(label) for label in labels], dtype=np.int64)
        names = tuple(classes) if classes is not None else tuple(str(i) for i in range(numbers.max() + 1))
        if numbers.max() >= len(names):
            raise ValueError(f"{origin}: has label {numbers.max()}, but there are {len(names)} classes")
        return names, numbers
    if all(_NUMBER.fullmatch(label) for label in written) and not are_names:
        wrong = sorted(label for label in written if not label.isdecimal())
        raise ValueError(f"{origin}: labels are whole numbers from 0, or names; found {join_names(wrong)}")
    check_classes(written, classes, origin)
    names = tuple(classes) if classes is not None else tuple(sorted(written))
    number = {name: i for i, name in enumerate(names)}
    return names, np.array([number[label] for label in labels], dtype=np.int64)


def are_numbers(classes: Sequence[str]) -> bool:
    """Return True for the names that numbered labels get: 0, 1, 2, ..., however their data writes them (007)."""
    return all(name == str(label) for label, name in enumerate(classes))


def check_classes(found: Collection[str], classes: Sequence[str] | None, origin: Path) -> None:
    """Raise ValueError if a class was found that ``classes`` does not have."""
    foreign = sorted(set(found) - set(classes)) if classes is not None else []
    if foreign:
        raise ValueError(
            f"{origin}: {len(foreign)} class(es) that the training split (or data.classes) does not have: {foreign[:5]}"
        )


def describe_empty_classes(classes: Sequence[str], labels: np.ndarray, origin: Path) -> list[str]:
    """Return a log message about the classes that have no image here; none if there are none."""
    counts = np.bincount(labels, minlength=len(classes))
    empty = [classes[label] for label in np.flatnonzero(counts == 0).tolist()]
    if not empty:
        return []
    hint = "; do the labels count from 1?" if empty == ["0"] else ""
    return [f"{origin}: {len(empty)} of {len(classes)} classes have no image here: {join_names(empty)}{hint}"]


def join_names(names: Sequence[str]) -> str:
    """Return the first few names, separated by commas."""
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
