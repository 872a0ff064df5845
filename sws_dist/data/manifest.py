"""List the images of a data set with labels and sizes, and the files that are left out with the reasons.

The sizes are needed before anything is decoded, to draw the crop windows of a whole batch. ``sws scan`` decodes every
file once and keeps what it found in ``<root>/<split>.manifest.jsonl``: one line for each image (path, label, height,
width, bytes) or bad file (path, label, bytes, reason). ``scan`` uses these lines for the files that are unchanged, and
reads the headers of all others. ``<root>/<split>.images.safetensors`` beside it is the list of the good images as a run
uses it, which ``load_scanned`` takes as it is.
"""

from __future__ import annotations

import dataclasses
import io
import json
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sws_dist.config.schema import MAX_BAD_SHARE
from sws_dist.data import sources
from sws_dist.data.json_lines import read_json_lines, write_json_lines
from sws_dist.data.kept_files import kept_file, require_writable
from sws_dist.data.labels import are_numbers, check_classes
from sws_dist.data.mapped_arrays import MappedFile, map_arrays, save_arrays
from sws_dist.data.packed_names import PackedNames
from sws_dist.data.sources import Source
from sws_dist.data.tar_shards import DEFAULT_KEYS, SampleKeys
from sws_dist.data.validate import BadImageError, check_image, check_image_header
from sws_dist.progress import track

_CHUNK = 4096
"""Number of files that are handed to the threads at once."""
_UNREADABLE = "unreadable: "
"""Beginning of the reason where reading failed: too many open files, a network file system that was away, ..."""

ReadSize = Callable[[Source, int, int], tuple[int, int]]
"""A function of a source, an image's index and its number of bytes. It returns height and width, or raises
``BadImageError``."""


@dataclass(frozen=True)
class BadFile:
    """A file that cannot be used as an image."""

    path: str
    reason: str

    @property
    def is_unread(self) -> bool:
        """Return True if reading it failed, which says nothing about what it holds: it may succeed next time."""
        return self.reason.startswith(_UNREADABLE)


@dataclass(frozen=True, kw_only=True)
class Manifest(Source):
    """The N usable images of a split, and the files that are left out."""

    sizes: np.ndarray
    """[N, 2]: height and width in pixels; uint16 in a list that is mapped from its file."""
    bad: tuple[BadFile, ...] = ()
    """Files that are left out."""
    notes: tuple[str, ...] = ()
    """Log messages for the user, for example that the folder has changed."""

    def sizes_of(self, images: np.ndarray) -> np.ndarray:
        """Return height and width, [n, 2] int32, of ``images`` [n]."""
        return self.sizes[images].astype(np.int32)

    def save(self, path: Path, **more: Any) -> Path:
        """Write everything but the notes to one file, whole or not at all, and ``more`` that JSON can hold."""
        texts: dict[str, Any] = {"folder": str(self.folder), "classes": self.classes, "shards": self.shards, **more}
        texts |= {"bad": [[file.path, file.reason] for file in self.bad]}
        arrays = {"names": self.paths.data, "name_ends": self.paths.ends}
        arrays |= {"labels": _narrow(self.labels), "sizes": _narrow(self.sizes)}
        return save_arrays(path, arrays | ({} if self.spans is None else {"spans": self.spans}), texts)

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Map a file that ``save`` wrote: the processes of a node share it, and read of it what they need.

        The ``.npz`` files of earlier versions are read as well, whole.

        Raises:
            ValueError: any other file.
        """
        try:
            arrays, texts, offsets = _read_npz(path) if path.suffix == ".npz" else map_arrays(path)
            file = path.open("rb", buffering=0) if offsets else None
            return cls(
                folder=Path(texts["folder"]),
                classes=tuple(texts["classes"]),
                paths=PackedNames(arrays["names"], arrays["name_ends"], file, offsets.get("names", 0)),
                shards=tuple(texts["shards"]),
                bad=tuple(BadFile(*entry) for entry in texts["bad"]),
                labels=arrays["labels"],
                sizes=arrays["sizes"],
                spans=arrays.get("spans"),
            )
        except (KeyError, TypeError, ValueError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: not a list of images that this trainer wrote ({error})") from None


def _read_npz(path: Path) -> MappedFile:
    """Read a list of an earlier version, whole."""
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    texts = json.loads(arrays.pop("texts").tobytes())
    names = PackedNames.pack(texts["paths"])
    return MappedFile(arrays | {"names": names.data, "name_ends": names.ends}, texts, {})


def _narrow(array: np.ndarray) -> np.ndarray:
    """Use two bytes for each number where they suffice, else four."""
    return array.astype(np.uint16 if not array.size or array.max() < 1 << 16 else np.int32)


def load_scanned(
    root: str | Path,
    split: str,
    classes: Sequence[str] | None = None,
    max_bad_share: float = MAX_BAD_SHARE,
    keys: SampleKeys = DEFAULT_KEYS,
    lists: Path | None = None,
) -> Manifest:
    """Map the list that ``sws scan`` has kept of ``<root>/<split>``, without a look at the files themselves.

    Args:
        classes, max_bad_share, keys, lists: see ``scan``.

    Raises:
        ValueError: there is none, it has a class that ``classes`` does not have, shards were scanned with other
            ``keys``, or the scan found too many bad files.
    """
    file = list_path(root, split, lists)
    if not file.is_file():
        command = f"sws scan --data {root}" + (f" --lists {lists}" if lists else "")
        raise ValueError(f"data.trust_manifest: there is no {file}; {command} writes it")
    found = Manifest.load(file)
    scanned = map_arrays(file).texts.get("keys", keys.plain)
    if found.spans is not None and scanned != keys.plain:
        raise ValueError(
            f"data.trust_manifest: {file} was written with --image-extensions {' '.join(scanned[0])} --label-key "
            f"{scanned[1]}; set data.image_extensions and data.label_key to that, or scan again"
        )
    check_bad_share(len(found.bad), len(found) + len(found.bad), max_bad_share, f"{file}: ", found.bad)
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime(file.stat().st_mtime))
    note = f"{file}: {len(found)} images as they were on {written}; what has changed since is not noticed"
    if unread := sum(bad.is_unread for bad in found.bad):
        note += f"; {unread} file(s) that could not be read then are left out until sws scan is run again"
    # The data may have moved as a whole since it was scanned.
    found = dataclasses.replace(found, folder=sources.folder_of(Path(root) / split), notes=(note,))
    if classes is None or tuple(classes) == found.classes:
        return found
    is_numbered = are_numbers(found.classes) and not (found.folder / found.classes[0]).is_dir()
    if is_numbered and len(found.classes) <= len(classes) and not set(found.classes) & set(classes):
        return dataclasses.replace(found, classes=tuple(classes))
    check_classes(found.classes, classes, file)
    number = {name: label for label, name in enumerate(classes)}
    labels = np.array([number[name] for name in found.classes])[found.labels]
    return dataclasses.replace(found, classes=tuple(classes), labels=labels)


def scan(
    root: str | Path,
    split: str,
    classes: Sequence[str] | None = None,
    num_threads: int = 16,
    max_bad_share: float = MAX_BAD_SHARE,
    keys: SampleKeys = DEFAULT_KEYS,
    lists: Path | None = None,
) -> Manifest:
    """List the images of ``<root>/<split>`` (see ``sources.py``), without those that are bad.

    Sizes come from the manifest's file where it has them, else from the images' headers.

    Args:
        classes: the names of the labels, in order (a validation split takes the training split's); None: the split's
            own.
        num_threads: number of files that are read at once.
        max_bad_share: largest share of bad files.
        keys: where a sample of a tar shard has its image and its label.
        lists: the folder of the kept files (``data.lists``); None: they lie beside the split.

    Raises:
        ValueError: no images, a class that ``classes`` does not have, or more than ``max_bad_share`` bad files.
    """
    source, notes = sources.find_source(root, split, classes, num_threads, keys, lists)
    file = manifest_path(root, split, lists)
    known = {entry["path"]: entry for entry in read_json_lines(file)} if file.is_file() else {}
    examined = _map_in_threads(partial(_examine, source, known, _size_from_header), len(source), num_threads)
    entries = list(track(examined, f"reading headers, {split}", len(source), "files"))
    found = _build_manifest(source, entries, [*notes, *_describe_changes(source, known, entries, file)])
    check_bad_share(len(found.bad), len(source), max_bad_share, f"{source.folder}: ", found.bad)
    return found


def list_files(files: Sequence[str], num_threads: int = 16) -> Manifest:
    """List single image files, in their order. All have label 0, of one class without a name."""
    source = Source(Path(), ("",), PackedNames.pack(files), np.zeros(len(files), dtype=np.int64))
    entries = list(_map_in_threads(partial(_examine, source, {}, _size_from_header), len(source), num_threads))
    return _build_manifest(source, entries, [])


def scan_and_decode(
    root: str | Path, split: str, num_threads: int, keys: SampleKeys = DEFAULT_KEYS, lists: Path | None = None
) -> tuple[Manifest, Path | None]:
    """Decode every file of ``<root>/<split>``, and write the manifest's file.

    Args:
        num_threads, keys, lists: see ``scan``.

    Returns:
        The manifest and the path of its file, or None if writing it failed after all.

    Raises:
        ValueError: no images, or nowhere to keep their list.
    """
    source, notes = sources.find_source(root, split, None, num_threads, keys, lists)
    file = manifest_path(root, split, lists)
    require_writable(file)
    examined = _map_in_threads(partial(_examine, source, {}, _size_by_decoding), len(source), num_threads)
    entries = list(track(examined, f"scanning {split}", len(source), "files"))
    found = _build_manifest(source, entries, notes)
    try:
        write_json_lines(file, entries)
        found.save(list_path(root, split, lists), keys=keys.plain)
    except OSError as error:
        note = f"{file}: cannot be written ({error.strerror})"
        return dataclasses.replace(found, notes=(*found.notes, note)), None
    return found, file


def manifest_path(root: str | Path, split: str, lists: Path | None = None) -> Path:
    """Return the path of a split's manifest file."""
    return kept_file(Path(root) / split, "manifest.jsonl", lists)


def list_path(root: str | Path, split: str, lists: Path | None = None) -> Path:
    """Return the path of the list of a split's good images, which ``data.trust_manifest`` takes."""
    return kept_file(Path(root) / split, "images.safetensors", lists)


def check_bad_share(count: int, total: int, max_share: float, where: str, bad: Sequence[BadFile]) -> None:
    """Raise ValueError if ``count`` of ``total`` files are bad and that is all of them, or more than ``max_share``.

    Args:
        where: beginning of the message.
        bad: bad files, of which the message names the first five.
    """
    if count > max_share * total or count == total:
        named = "; ".join(f"{entry.path}: {entry.reason}" for entry in bad[:5])
        raise ValueError(
            f"{where}{count} of {total} images are bad, more than data.max_bad_share {max_share:g} allows. {named}"
        )


def _size_from_header(source: Source, index: int, num_bytes: int) -> tuple[int, int]:
    if source.spans is not None:
        return check_image_header(io.BytesIO(source.read(index)), num_bytes)
    with source.file(index).open("rb") as file:
        return check_image_header(file, num_bytes)


def _size_by_decoding(source: Source, index: int, num_bytes: int) -> tuple[int, int]:
    return check_image(source.read(index))


def _examine(source: Source, known: dict[str, Any], read_size: ReadSize, index: int) -> dict[str, Any]:
    """Return the manifest's entry of one file: the known one if the file was read and has as many bytes, else a new."""
    path = source.paths[index]
    entry: dict[str, Any] = {"path": path, "label": int(source.labels[index])}
    try:
        entry["bytes"] = source.num_bytes(index)
        before = known.get(path, {})
        if before.get("bytes") == entry["bytes"] and not before.get("reason", "").startswith(_UNREADABLE):
            return before
        entry["height"], entry["width"] = read_size(source, index, entry["bytes"])
    except BadImageError as error:
        entry["reason"] = str(error)
    except OSError as error:
        entry["reason"] = "missing" if isinstance(error, FileNotFoundError) else f"{_UNREADABLE}{error.strerror}"
    return entry


def _map_in_threads(function: Callable[[int], Any], count: int, num_threads: int) -> Iterator[Any]:
    """Yield ``function`` of 0 to count - 1, in order.

    Threads make it faster, since Pillow and the file system release Python's lock.
    """
    with ThreadPoolExecutor(num_threads) as pool:
        for start in range(0, count, _CHUNK):  # one future for each of millions of files would take gigabytes
            yield from pool.map(function, range(start, min(start + _CHUNK, count)))


def _build_manifest(source: Source, entries: list[dict[str, Any]], notes: list[str]) -> Manifest:
    good = np.array([i for i, entry in enumerate(entries) if "reason" not in entry], dtype=np.int64)
    bad = tuple(BadFile(entry["path"], entry["reason"]) for entry in entries if "reason" in entry)
    sizes = np.array([(entries[i]["height"], entries[i]["width"]) for i in good], dtype=np.int32).reshape(-1, 2)
    fields = {"folder": source.folder, "classes": source.classes, "shards": source.shards, **source.select_rows(good)}
    return Manifest(**fields, sizes=sizes, bad=bad, notes=tuple(notes))


def _describe_changes(source: Source, known: dict[str, Any], entries: list[dict[str, Any]], file: Path) -> list[str]:
    """Return one log message about what differs between the folder and the manifest's file; none if nothing does."""
    if not known:
        return []
    listed = set(source.paths)  # a list may repeat an image
    new = len(listed - known.keys())
    changed = sum(known.get(entry["path"], entry) != entry for entry in entries)
    gone = len(known.keys() - listed)
    if not (new or changed or gone):
        return []
    return [
        f"{source.folder} has changed since {file.name} was written: {new} file(s) new, {changed} changed, "
        f"{gone} gone. New and changed ones were looked at again; run sws scan to read them whole"
    ]
