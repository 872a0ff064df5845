"""Write a folder of images that appears whole or not at all, and says what it holds."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sws_dist.atomic import atomic_write_json, fsync_path
from sws_dist.text import read_json

FACTS = "dataset.json"
"""Name the file, beside the splits, that says what a data set was made from."""

log = logging.getLogger(__name__)


def write_dataset(out: Path, facts: dict[str, Any], write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a hidden folder beside ``out``, flush it to disk, and rename it to ``out``.

    A full disk, a kill or a power cut leaves no ``out``. A data set that is there already, made from the same facts,
    stays as it is.

    Args:
        out: the folder to write.
        facts: what decides the data set's every byte, as JSON values. ``out`` keeps them in ``dataset.json``.
        write: fills the folder that it is given.

    Raises:
        ValueError: ``out`` is another data set, or no data set at all.
    """
    if out.exists():
        require_same(out, facts)
        log.info(f"{out}: already there, made from the same")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        partial.mkdir()
        write(partial)
        atomic_write_json(partial / FACTS, facts)
        os.sync()  # one for all: tens of thousands of small files, flushed one by one, take minutes
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    fsync_path(out.parent)


def require_same(out: Path, facts: dict[str, Any]) -> None:
    """Raise ValueError unless ``out`` is a data set that was made from ``facts``."""
    if not (out / FACTS).is_file():
        raise ValueError(f"{out}: already there, and not written by this command; name a folder that does not exist")
    there, wanted = read_json(out / FACTS), json.loads(json.dumps(facts))
    if there != wanted:
        keys = sorted(key for key in there.keys() | wanted.keys() if there.get(key) != wanted.get(key))
        differences = ", ".join(f"{key} is {there.get(key)}, not {wanted.get(key)}" for key in keys)
        raise ValueError(f"{out}: already there, but made from something else ({differences}); name another folder")
