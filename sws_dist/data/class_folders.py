"""List the images of class folders: ``<class>/<image>``, also in folders inside a class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sws_dist.data.image_names import EXTENSIONS, is_hidden, is_image_name
from sws_dist.data.labels import check_classes, join_names
from sws_dist.progress import track


@dataclass(frozen=True)
class ClassFolders:
    """The images of a folder of class folders."""

    images: dict[str, list[str]]
    """Class -> its images, sorted, relative to the folder. Only classes that have images, sorted."""
    notes: list[str]
    """Log messages about what is left out."""


def list_class_folders(folder: Path, num_threads: int) -> ClassFolders:
    """List the images of all class folders; a folder without images is no class.

    Args:
        num_threads: number of class folders that are read at once.

    Raises:
        OSError: a folder cannot be read.
    """
    with os.scandir(folder) as entries:
        visible = sorted((entry for entry in entries if not is_hidden(entry.name)), key=lambda entry: entry.name)
    names = [entry.name for entry in visible if _is_folder(entry)]
    with ThreadPoolExecutor(num_threads) as pool:
        walks = pool.map(lambda name: sorted(list_below(folder / name, f"{name}/")), names)
        found = list(track(walks, f"listing {folder.name}", len(names), "folders"))
    images = {name: paths for name, paths in zip(names, found, strict=True) if paths}
    notes = []
    if images and len(images) < len(names):
        empty = [name for name in names if name not in images]
        notes.append(f"{folder}: {len(empty)} folder(s) without images are no classes: {join_names(empty)}")
    loose = [entry.name for entry in visible if is_image_name(entry.name) and not _is_folder(entry)]
    if images and loose:
        notes.append(f"{folder}: {len(loose)} image(s) in no class folder are left out: {join_names(loose)}")
    return ClassFolders(images, notes)


def label_class_folders(
    folder: Path, found: ClassFolders, classes: Sequence[str] | None
) -> tuple[tuple[str, ...], list[str], list[int], list[str]]:
    """Number the classes.

    Returns:
        Class names, images in the order of their labels, their labels, and log messages.

    Raises:
        ValueError: a class that ``classes`` does not have.
    """
    check_classes(found.images, classes, folder)
    notes = list(found.notes)
    if classes is None:
        notes += _describe_order(folder, list(found.images))
    if len(found.images) == 1:
        (name, images), *_ = found.images.items()
        if all(path.count("/") > 1 for path in images):
            notes.append(f"{folder}: {name} is the only class; if the folders in it are classes, name it as the split")
    names = tuple(classes if classes is not None else found.images)
    paths, labels = [], []
    for label, name in enumerate(names):
        images = found.images.get(name, [])
        paths += images
        labels += [label] * len(images)
    return names, paths, labels, notes


def explain_no_images(folder: Path) -> str:
    """Return why a folder has no images in class folders, for a message."""
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not is_hidden(entry.name)]
    loose = sum(is_image_name(entry.name) for entry in visible)
    if loose:
        return f"its {loose} image(s) lie in no class folder; expected {folder.name}/<class>/<image>"
    folders = sum(map(_is_folder, visible))
    if not folders:
        return f"holds no class folders; expected {folder.name}/<class>/<image>"
    return f"no images in its {folders} folder(s) ({', '.join(sorted(EXTENSIONS))})"


def list_below(folder: Path, prefix: str, above: frozenset[tuple[int, int]] = frozenset()) -> list[str]:
    """Return the images of a folder and of those inside it.

    Args:
        prefix: what the names begin with.
        above: identify the folders around this one, where a link may lead back.

    Raises:
        OSError: a folder cannot be read.
    """
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return []
    paths = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            if _is_folder(entry):
                paths += list_below(folder / entry.name, f"{prefix}{entry.name}/", above | {here})
            elif is_image_name(entry.name) and (entry.is_symlink() or entry.is_file()):  # a pipe would never end
                paths.append(prefix + entry.name)
    return paths


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _describe_order(folder: Path, names: list[str]) -> list[str]:
    """Return log messages about names whose order, or whose number, may surprise."""
    notes = []
    if all(name.isdecimal() for name in names):
        wrong = next((label for label, name in enumerate(names) if int(name) != label), None)
        if wrong is not None:
            notes.append(
                f"{folder}: the class folders are whole numbers and sort as text: {join_names(names)}. So "
                f"label {wrong} is folder {names[wrong]}; data.classes gives another order"
            )
    folded: dict[str, list[str]] = {}
    for name in names:
        folded.setdefault(name.casefold(), []).append(name)
    alike = [" and ".join(group) for group in folded.values() if len(group) > 1]
    if alike:
        notes.append(f"{folder}: classes that differ in upper and lower case alone: {join_names(alike)}")
    return notes
