"""Find the images of a split: class folders, a list of files, or WebDataset tar shards. A ``Source`` hides which.

``<root>/<split>`` is one of these:
  a folder of class folders     ImageNet's layout, ``<class>/<image>``; labels are the sorted class folders
  a text file                   lines of ``<path> <label>``, paths relative to its folder; labels are numbers or names
  a folder of ``*.tar`` files   WebDataset shards: ``<key>.jpg`` with ``<key>.cls``, the label as a number or name
A list of class names gives the labels another order, in each of them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sws_dist.atomic import atomic_write_text
from sws_dist.text import read_text

EXTENSIONS = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".gif"),
}
"""File name endings of images. GIF is among them so that such a file is named as unusable instead of overlooked."""
_LABEL_EXTENSION = ".cls"


@dataclass(frozen=True)
class Source:
    """N encoded images with their labels."""

    folder: Path
    classes: tuple[str, ...]
    """Names of the labels."""
    paths: tuple[str, ...]
    """Names of the N images, relative to ``folder``."""
    labels: np.ndarray
    """[N] int64: indices into ``classes``."""
    shards: tuple[str, ...] = ()
    """Names of the tar files, relative to ``folder``."""
    spans: np.ndarray | None = None
    """[N, 3] int64: each image's shard (an index into ``shards``), offset and length in bytes. None: each image is a
    file of its own."""

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.paths)

    def file(self, index: int) -> Path:
        """Return the path of an image that is a file of its own."""
        return self.folder / self.paths[index]

    def num_bytes(self, index: int) -> int:
        """Return the length of an encoded image. Raises OSError if its file is gone."""
        return self.file(index).stat().st_size if self.spans is None else int(self.spans[index, 2])

    def read(self, index: int) -> bytes:
        """Read an encoded image. Raises OSError if it is gone."""
        if self.spans is None:
            return self.file(index).read_bytes()
        shard, offset, length = self.spans[index].tolist()
        # The variable keeps the file open: the cache may drop it before the read.
        opened = _open_shard(self.folder / self.shards[shard])
        return os.pread(opened.fileno(), length, offset)

    def encoded(self, indices: np.ndarray, run: Callable[..., Iterable[Any]] = map) -> list[np.ndarray]:
        """Return what DALI is given for each image.

        Args:
            indices: [B] images.
            run: maps the reads over the images; an executor's ``map`` reads several at once.

        Returns:
            For each image, uint8: the path of its file, or the encoded image itself if it lies in a shard.
        """
        if self.spans is None:
            return [np.frombuffer(os.fsencode(self.file(i)), dtype=np.uint8) for i in indices]
        return [np.frombuffer(data, dtype=np.uint8) for data in run(self._read_or_zero, indices)]

    def _read_or_zero(self, index: int) -> bytes:
        """Read an encoded image, or return a zero byte.

        A shard may vanish in the middle of a run. DALI cannot decode a zero byte, so the image is replaced as a bad
        one.
        """
        try:
            return self.read(index) or b"\0"
        except OSError:
            return b"\0"

    def select_rows(self, rows: np.ndarray) -> dict[str, Any]:
        """Return the fields that hold one row for each image, with only ``rows`` of them."""
        fields: dict[str, Any] = {"paths": tuple(self.paths[i] for i in rows), "labels": self.labels[rows]}
        return fields | {"spans": None if self.spans is None else self.spans[rows]}


@lru_cache(maxsize=64)
def _open_shard(path: Path) -> BinaryIO:
    return path.open("rb", buffering=0)


def find_source(
    root: str | Path, split: str, classes: Sequence[str] | None = None, num_threads: int = 16
) -> tuple[Source, list[str]]:
    """List the images of ``<root>/<split>``, usable or not.

    Args:
        classes: the names of the labels, in order (a validation split takes the training split's); None: the split's
            own.
        num_threads: number of shards that are indexed at once.

    Returns:
        The images, and log messages for the user (for example that an index could not be kept).

    Raises:
        ValueError: nothing there, no images, or a label that ``classes`` does not have.
    """
    place = Path(root) / split
    if place.is_file():
        return _source_from_list(place, classes), []
    if not place.is_dir():
        raise ValueError(f"data.root {root}: there is no folder {place}; expected {split}/<class>/<image>")
    shards = sorted(entry.name for entry in os.scandir(place) if entry.name.endswith(".tar"))
    if shards:
        return _source_from_shards(place, shards, classes, num_threads)
    return _source_from_folders(place, classes), []


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


def _source_from_folders(folder: Path, classes: Sequence[str] | None) -> Source:
    found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise ValueError(f"{folder}: holds no class folders; expected {folder.name}/<class>/<image>")
    _check_classes(set(found), classes, folder)
    present = set(found)
    classes = tuple(classes if classes is not None else found)
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        entries = sorted(os.listdir(folder / name)) if name in present else []
        images = [f"{name}/{entry}" for entry in entries if is_image_name(entry)]
        paths += images
        labels += [label] * len(images)
    if not paths:
        raise ValueError(f"{folder}: no images in its {len(found)} class folders ({', '.join(sorted(EXTENSIONS))})")
    return Source(folder, classes, tuple(paths), np.array(labels, dtype=np.int64))


def is_image_name(name: str) -> bool:
    """Return True if a file of this name is taken for an image."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")


def _source_from_list(file: Path, classes: Sequence[str] | None) -> Source:
    paths, labels = [], []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(" ")
        if not path:
            raise ValueError(f"{file}, line {number}: expected '<path> <label>', found {line!r}")
        paths.append(path.strip())
        labels.append(label)
    if not paths:
        raise ValueError(f"{file}: lists no images; expected lines of '<path> <label>'")
    classes, numbers = _number_labels(labels, classes, file)
    return Source(file.parent, classes, tuple(paths), numbers)


def _number_labels(
    labels: list[str], classes: Sequence[str] | None, origin: Path
) -> tuple[tuple[str, ...], np.ndarray]:
    """Turn labels as they are written into class names and label numbers [N] int64.

    Written numbers are the label numbers; a written name has the number of its place in ``classes``.
    """
    written = set(labels)
    if all(label.isdecimal() for label in written) and not written & set(classes or ()):
        numbers = np.array([int(label) for label in labels], dtype=np.int64)
        names = tuple(classes) if classes is not None else tuple(str(i) for i in range(numbers.max() + 1))
        if numbers.max() >= len(names):
            raise ValueError(f"{origin}: has label {numbers.max()}, but there are {len(names)} classes")
        return names, numbers
    _check_classes(written, classes, origin)
    names = tuple(classes) if classes is not None else tuple(sorted(written))
    number = {name: i for i, name in enumerate(names)}
    return names, np.array([number[label] for label in labels], dtype=np.int64)


def _check_classes(found: set[str], classes: Sequence[str] | None, origin: Path) -> None:
    """Raise ValueError if a class was found that ``classes`` does not have."""
    foreign = sorted(found - set(classes)) if classes is not None else []
    if foreign:
        raise ValueError(
            f"{origin}: {len(foreign)} class(es) that the training split (or data.classes) does not have: {foreign[:5]}"
        )


# ---- Shards ----


def _source_from_shards(
    folder: Path, shards: list[str], classes: Sequence[str] | None, num_threads: int
) -> tuple[Source, list[str]]:
    """List the images of tar shards. ``<split>.index.jsonl`` beside the folder keeps the list for the next time."""
    index = folder.with_name(f"{folder.name}.index.jsonl")
    known = {entry["shard"]: entry for entry in read_json_lines(index)} if index.is_file() else {}
    stamps = {shard: _file_stamp(folder / shard) for shard in shards}
    missing = [shard for shard in shards if known.get(shard, {}).get("stamp") != stamps[shard]]
    with ThreadPoolExecutor(num_threads) as pool:
        members = pool.map(lambda shard: _list_shard(folder / shard), missing)
        for shard, found in zip(missing, members, strict=True):
            known[shard] = {"shard": shard, "stamp": stamps[shard], "members": found}
    notes = []
    if missing:
        try:
            write_json_lines(index, (known[shard] for shard in shards))
        except OSError as error:
            notes.append(f"{index}: cannot be written ({error.strerror}); the shards will be indexed again next time")
    rows = [(number, shard, *member) for number, shard in enumerate(shards) for member in known[shard]["members"]]
    if not rows:
        raise ValueError(f"{folder}: no <key>.jpg with a <key>.cls in its {len(shards)} tar file(s)")
    names, labels = _number_labels([label for *_, label in rows], classes, folder)
    spans = np.array([(number, offset, length) for number, _, _, offset, length, _ in rows], dtype=np.int64)
    paths = tuple(f"{shard}/{name}" for _, shard, name, *_ in rows)
    return Source(folder, names, paths, labels, tuple(shards), spans), notes


def _file_stamp(path: Path) -> list[int]:
    """Return size and time of the last change: a shard with the same ones is not indexed again."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _list_shard(path: Path) -> list[tuple[str, int, int, str]]:
    """List name, offset, length and label of every image of a shard, in its order."""
    images: list[tuple[str, int, int]] = []
    labels: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, extension = _split_key(member.name)
                if not member.isfile():
                    continue
                if extension == _LABEL_EXTENSION:
                    content = tar.extractfile(member)
                    assert content is not None
                    labels[key] = content.read().decode().strip()
                elif is_image_name(os.path.basename(member.name)):
                    images.append((member.name, member.offset_data, member.size))
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a whole tar file ({error}); write it again or remove it") from None
    unlabelled = [name for name, *_ in images if _split_key(name)[0] not in labels]
    if unlabelled:
        example = unlabelled[0]
        raise ValueError(f"{path}: {len(unlabelled)} image(s) without a {_LABEL_EXTENSION}, for example {example}")
    return [(name, offset, length, labels[_split_key(name)[0]]) for name, offset, length in images]


def _split_key(name: str) -> tuple[str, str]:
    """Split a member's name into key and extension; as in WebDataset, the key ends at the file name's first dot."""
    folder, _, base = name.rpartition("/")
    key, dot, extension = base.partition(".")
    return f"{folder}/{key}", (dot + extension).lower()


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
