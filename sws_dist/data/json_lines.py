"""Write and read files with one JSON value on each line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sws_dist.atomic import atomic_write_text
from sws_dist.text import read_text


def write_json_lines(path: Path, entries: Iterable[Any]) -> Path:
    """Write one JSON value a line; the file appears whole or not at all. Dataclasses become objects."""
    plain = (dataclasses.asdict(e) if dataclasses.is_dataclass(e) and not isinstance(e, type) else e for e in entries)
    return atomic_write_text(path, "".join(json.dumps(entry) + "\n" for entry in plain))


def read_json_lines(path: Path) -> list[Any]:
    """Read a file that ``write_json_lines`` wrote.

    Raises:
        ValueError: any other file.
    """
    try:
        return [json.loads(line) for line in read_text(path).splitlines()]
    except ValueError as error:
        raise ValueError(f"{path}: not a file that this trainer wrote ({error}); remove it") from None
