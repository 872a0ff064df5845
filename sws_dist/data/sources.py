"""Find the images of a split: class folders, a list of files, or WebDataset tar shards. A ``Source`` hides which.

``<root>/<split>`` is one of these:
  a folder of class folders     ImageNet's layout, ``<class>/<image>``; labels are the sorted class folders
  a text, .tsv or .csv file     paths with labels, paths relative to its folder; labels are numbers or names
  a folder of ``*.tar`` files   WebDataset shards: ``<key>.jpg`` with ``<key>.cls``, the label as a number or name
A list of class names gives the labels another order, in each of them.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sws_dist.data.class_folders import explain_no_images, label_class_folders, list_class_folders
from sws_dist.data.image_list import read_image_list
from sws_dist.data.labels import describe_empty_classes, join_names, number_labels
from sws_dist.data.packed_names import PackedNames
from sws_dist.data.tar_shards import DEFAULT_KEYS, SampleKeys, find_shards, list_samples


@dataclass(frozen=True)
class Source:
    """N encoded images with their labels."""

    folder: Path
    classes: tuple[str, ...]
    """Names of the labels."""
    paths: PackedNames
    """Names of the N images, relative to ``folder``."""
    labels: np.ndarray
    """[N]: indices into ``classes``; int64, or uint16 in a list that is mapped from its file."""
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
        fields: dict[str, Any] = {"paths": self.paths.select_rows(rows), "labels": self.labels[rows]}
        return fields | {"spans": None if self.spans is None else self.spans[rows]}


def _most_open_shards() -> int | None:
    """Return half of the files that this process may have open, at least 64; None if any number.

    A full shuffle reads every shard in turn: an image of a shard that is not open costs an open and a close.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if limit == resource.RLIM_INFINITY else max(64, limit // 2)


@lru_cache(maxsize=_most_open_shards())
def _open_shard(path: Path) -> BinaryIO:
    return path.open("rb", buffering=0)


def folder_of(place: Path) -> Path:
    """Return what a split's paths are relative to: the folder itself, or the one that a list lies in."""
    return place.parent if place.is_file() else place


def find_source(
    root: str | Path,
    split: str,
    classes: Sequence[str] | None = None,
    num_threads: int = 16,
    keys: SampleKeys = DEFAULT_KEYS,
    lists: Path | None = None,
) -> tuple[Source, list[str]]:
    """List the images of ``<root>/<split>``, usable or not.

    Args:
        classes: the names of the labels, in order (a validation split takes the training split's); None: the split's
            own.
        num_threads: number of folders or shards that are read at once.
        keys: where a sample of a tar shard has its image and its label.
        lists: the folder that keeps the index of tar shards (``data.lists``); None: it lies beside the split.

    Returns:
        The images, and log messages for the user, for example about what is left out.

    Raises:
        ValueError: nothing there, no images, or a label that ``classes`` does not have.
        OSError: a folder or file cannot be read.
    """
    place = Path(root) / split
    if place.is_file():
        source, notes = _source_from_list(place, classes)
    elif place.is_dir():
        source, notes = _source_from_folder(place, classes, num_threads, keys, lists)
    else:
        raise ValueError(f"data.root {root}: there is no folder {place}; expected {split}/<class>/<image>")
    return source, notes + describe_empty_classes(source.classes, source.labels, place)


def _source_from_list(file: Path, classes: Sequence[str] | None) -> tuple[Source, list[str]]:
    paths, labels, notes = read_image_list(file)
    names, numbers = number_labels(labels, classes, file)
    return Source(file.parent, names, PackedNames.pack(paths), numbers), notes


def _source_from_folder(
    folder: Path, classes: Sequence[str] | None, num_threads: int, keys: SampleKeys, lists: Path | None
) -> tuple[Source, list[str]]:
    """List class folders or shards; where both are there, the class folders."""
    shards, compressed = find_shards(folder)
    found = list_class_folders(folder, num_threads)
    unused = [*shards, *compressed] if found.images else compressed
    if found.images:
        names, paths, labels, notes = label_class_folders(folder, found, classes)
        if unused:
            notes.append(
                f"{folder}: the images of its {len(found.images)} class folders are taken; {len(unused)} tar file(s) "
                f"beside them are not read: {join_names(unused)}"
            )
        return Source(folder, names, PackedNames.pack(paths), np.array(labels, dtype=np.int64)), notes
    if not shards and compressed:
        raise ValueError(
            f"{folder}: its {len(compressed)} shard(s) are compressed ({join_names(compressed)}), and images are read "
            "by their offset, which compression hides; unpack them to .tar (images themselves are compressed already)"
        )
    if not shards:
        raise ValueError(f"{folder}: {explain_no_images(folder)}")
    samples = list_samples(folder, shards, keys, num_threads, lists)
    names, numbers = number_labels(samples.labels, classes, folder)
    notes = list(samples.notes)
    if unused:
        notes.append(f"{folder}: {len(unused)} compressed shard(s) are not read: {join_names(unused)}")
    return Source(folder, names, PackedNames.pack(samples.paths), numbers, tuple(shards), samples.spans), notes
