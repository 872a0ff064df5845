"""What is in a data set: every usable image with its label, height and width, and which files are left out and why.

Sizes are needed before anything is decoded, to draw the crop windows of a whole batch. ``launcher/scan.py`` reads
every file once and keeps what it found in ``<root>/<split>.manifest.jsonl``: a line for each image (path, label,
height, width, bytes) or bad file (path, label, bytes, reason). ``scan`` takes what that file knows of files that are
unchanged, and looks at the headers of all others.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sws_dist.atomic import atomic_write
from sws_dist.config.schema import MAX_BAD_SHARE
from sws_dist.data import sources
from sws_dist.data.sources import Source
from sws_dist.data.validate import BadImageError, check_header, check_whole

_CHUNK = 4096  # files handed to the threads at once


@dataclass(frozen=True)
class BadFile:
    path: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Manifest(Source):
    """``sizes`` [N, 2] int32: height, width. ``bad``: files that are left out. ``notes``: what a user should hear."""

    sizes: np.ndarray
    bad: tuple[BadFile, ...] = ()
    notes: tuple[str, ...] = ()

    def save(self, path: Path) -> Path:
        """Keep everything but the notes in one ``.npz`` file, whole or not at all."""
        texts: dict[str, Any] = {"folder": str(self.folder), "classes": self.classes, "paths": self.paths}
        texts |= {"shards": self.shards, "bad": [[file.path, file.reason] for file in self.bad]}
        arrays: dict[str, Any] = {"texts": np.frombuffer(json.dumps(texts).encode(), np.uint8), "labels": self.labels}
        arrays |= {"sizes": self.sizes} | ({} if self.spans is None else {"spans": self.spans})

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.savez_compressed(file, **arrays)

        return atomic_write(path, write)

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """What ``save`` kept. ValueError for anything else."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                texts = json.loads(arrays["texts"].tobytes())
                return cls(
                    folder=Path(texts["folder"]),
                    classes=tuple(texts["classes"]),
                    paths=tuple(texts["paths"]),
                    shards=tuple(texts["shards"]),
                    bad=tuple(BadFile(*entry) for entry in texts["bad"]),
                    labels=arrays["labels"],
                    sizes=arrays["sizes"],
                    spans=arrays.get("spans"),
                )
        except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: not a list of images that this trainer wrote ({error})") from None


def scan(
    root: str | Path,
    split: str,
    classes: Sequence[str] | None = None,
    num_threads: int = 16,
    max_bad_share: float = MAX_BAD_SHARE,
) -> Manifest:
    """The images of ``<root>/<split>`` (see ``sources``), without those that are known or seen to be bad.

    Raises:
        ValueError: no images, a class that ``classes`` does not have, or more than ``max_bad_share`` bad files.
    """
    source, notes = sources.find(root, split, classes, num_threads)
    kept = path_of(root, split)
    known = {entry["path"]: entry for entry in sources.read_lines(kept)} if kept.is_file() else {}
    entries = list(_in_parallel(partial(_entry, source, known, _examine_quick), len(source), num_threads))
    found = _manifest(source, entries, [*notes, *_changes(source, known, entries, kept)])
    refuse_too_many(len(found.bad), len(source), max_bad_share, f"{source.folder}: ", found.bad)
    return found


def scan_whole(root: str | Path, split: str, num_threads: int, bar: tqdm[Any]) -> tuple[Manifest, Path | None]:
    """Read and decode every file, moving ``bar``; the images, and the manifest's file (None: not to be written)."""
    source, notes = sources.find(root, split, None, num_threads)
    bar.reset(total=len(source))
    entries = []
    for entry in _in_parallel(partial(_entry, source, {}, _examine_whole), len(source), num_threads):
        entries.append(entry)
        bar.update()
    kept: Path | None = path_of(root, split)
    try:
        sources.write_lines(path_of(root, split), entries)
    except OSError as error:
        notes.append(f"{kept}: cannot be written ({error.strerror})")
        kept = None
    return _manifest(source, entries, notes), kept


def path_of(root: str | Path, split: str) -> Path:
    """Where the manifest of a split is kept."""
    return Path(root) / f"{split}.manifest.jsonl"


def refuse_too_many(count: int, total: int, max_share: float, where: str, bad: Sequence[BadFile]) -> None:
    """ValueError when ``count`` of ``total`` files are bad and that is more than ``max_share`` of them, or all."""
    if count > max_share * total or count == total:
        named = "; ".join(f"{entry.path}: {entry.reason}" for entry in bad[:5])
        raise ValueError(
            f"{where}{count} of {total} images are bad, more than data.max_bad_share {max_share:g} allows. {named}"
        )


def _examine_quick(source: Source, index: int, num_bytes: int) -> tuple[int, int]:
    if source.spans is not None:
        return check_header(io.BytesIO(source.read(index)), num_bytes)
    with source.file(index).open("rb") as file:
        return check_header(file, num_bytes)


def _examine_whole(source: Source, index: int, num_bytes: int) -> tuple[int, int]:
    return check_whole(source.read(index))


def _entry(
    source: Source, known: dict[str, Any], look: Callable[[Source, int, int], tuple[int, int]], index: int
) -> dict[str, Any]:
    """One file's line: what is known of it, if it still has that many bytes, else what ``look`` finds."""
    path = source.paths[index]
    entry: dict[str, Any] = {"path": path, "label": int(source.labels[index])}
    try:
        entry["bytes"] = source.num_bytes(index)
        if known.get(path, {}).get("bytes") == entry["bytes"]:
            return known[path]
        entry["height"], entry["width"] = look(source, index, entry["bytes"])
    except BadImageError as error:
        entry["reason"] = str(error)
    except OSError as error:
        entry["reason"] = "missing" if isinstance(error, FileNotFoundError) else f"unreadable: {error.strerror}"
    return entry


def _in_parallel(function: Callable[[int], Any], count: int, num_threads: int) -> Iterator[Any]:
    """``function`` of 0 to count - 1, in order, in threads: Pillow and the file system release Python's lock."""
    with ThreadPoolExecutor(num_threads) as pool:
        for start in range(0, count, _CHUNK):  # a future each for millions of files would take gigabytes
            yield from pool.map(function, range(start, min(start + _CHUNK, count)))


def _manifest(source: Source, entries: list[dict[str, Any]], notes: list[str]) -> Manifest:
    good = np.array([i for i, entry in enumerate(entries) if "reason" not in entry], dtype=np.int64)
    bad = tuple(BadFile(entry["path"], entry["reason"]) for entry in entries if "reason" in entry)
    sizes = np.array([(entries[i]["height"], entries[i]["width"]) for i in good], dtype=np.int32).reshape(-1, 2)
    fields = {"folder": source.folder, "classes": source.classes, "shards": source.shards, **source.keep(good)}
    return Manifest(**fields, sizes=sizes, bad=bad, notes=tuple(notes))


def _changes(source: Source, known: dict[str, Any], entries: list[dict[str, Any]], kept: Path) -> list[str]:
    """What differs between the folder and the manifest's file, in one line."""
    if not known:
        return []
    new = sum(path not in known for path in source.paths)
    changed = sum(known.get(entry["path"], entry) != entry for entry in entries)
    gone = len(known) - (len(source) - new)
    if not (new or changed or gone):
        return []
    return [
        f"{source.folder} has changed since {kept.name} was written: {new} file(s) new, {changed} changed, "
        f"{gone} gone. New and changed ones were looked at again; run launcher/scan.py to read them whole"
    ]
