"""Name the files that are kept about a split: the list of its images, and the index of its shards."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def kept_file(place: Path, ending: str, lists: Path | None = None) -> Path:
    """Return the path of a file about a split: ``<split>.<ending>``, beside the split or in ``lists``.

    Args:
        place: the split: its folder or its list.
        lists: a folder of such files (``data.lists``). In it a split keeps its whole path, so that no two splits meet:
            that of ``/data/pets/train`` is ``<lists>/data/pets/train.<ending>``.
    """
    place = Path(os.path.abspath(place))  # data.train_split may be . or end in a slash
    if lists is not None:
        place = lists / place.relative_to(place.anchor)
    return place.with_name(f"{place.name}.{ending}")


def require_writable(file: Path) -> None:
    """Check that a file can be written, before the work whose result it will be.

    Raises:
        ValueError: it cannot.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"{file}: cannot be written ({error.strerror}); --lists FOLDER keeps it elsewhere, where runs find it by "
            "data.lists"
        ) from None
