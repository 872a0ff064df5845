"""Name the files that are kept about a split: the list of its images, and the index of its shards."""

from __future__ import annotations

import os
from pathlib import Path


def kept_file(place: Path, ending: str) -> Path:
    """Return the path of a file about a split: ``<split>.<ending>``, beside the split.

    Args:
        place: the split: its folder or its list.
    """
    place = Path(os.path.abspath(place))  # data.train_split may be . or end in a slash
    return place.with_name(f"{place.name}.{ending}")
