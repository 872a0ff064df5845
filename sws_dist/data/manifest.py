"""What is in a data folder: every image's path, label, height and width.

The layout is ImageNet's: ``<root>/<split>/<class>/<image>``; labels are the sorted class folders. Sizes come from
the files' headers, so that crop windows can be drawn for a whole batch before anything is decoded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Manifest:
    """``paths`` [N] relative to ``folder``; ``labels`` [N] int64; ``sizes`` [N, 2] int32 (height, width)."""

    folder: Path
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    labels: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def file(self, index: int) -> Path:
        return self.folder / self.paths[index]


def scan(root: str | Path, split: str, classes: Sequence[str] | None = None, num_threads: int = 16) -> Manifest:
    """List ``<root>/<split>`` and read every image's header.

    Args:
        classes: the label order to use (a validation split takes the training split's).

    Raises:
        ValueError: a missing or empty folder, a class that ``classes`` does not have, files that are no images.
    """
    folder = Path(root) / split
    if not folder.is_dir():
        raise ValueError(f"data.root {root}: there is no folder {folder}; expected {split}/<class>/<image>")
    found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise ValueError(f"{folder}: holds no class folders; expected {split}/<class>/<image>")
    foreign = sorted(set(found) - set(classes)) if classes is not None else []
    if foreign:
        raise ValueError(f"{folder}: {len(foreign)} class(es) that the training split does not have: {foreign[:5]}")
    classes = tuple(classes if classes is not None else found)

    paths, labels = [], []
    for label, name in enumerate(classes):
        entries = sorted(os.listdir(folder / name)) if name in found else []
        images = [f"{name}/{entry}" for entry in entries if Path(entry).suffix.lower() in EXTENSIONS]
        paths += images
        labels += [label] * len(images)
    if not paths:
        raise ValueError(f"{folder}: no images in its {len(found)} class folders ({', '.join(sorted(EXTENSIONS))})")
    return Manifest(folder, classes, tuple(paths), np.array(labels, dtype=np.int64), _sizes(folder, paths, num_threads))


def _sizes(folder: Path, paths: Sequence[str], num_threads: int) -> np.ndarray:
    def size(path: str) -> tuple[int, int]:
        try:
            with Image.open(folder / path) as image:  # the header only
                return image.height, image.width
        except Exception:  # Pillow raises a dozen types; all mean that this is no image
            return 0, 0

    with ThreadPoolExecutor(num_threads) as pool:
        sizes = np.array(list(pool.map(size, paths, chunksize=64)), dtype=np.int32)
    bad = np.flatnonzero(sizes[:, 0] == 0)
    if len(bad):
        names = ", ".join(str(folder / paths[i]) for i in bad[:5])
        raise ValueError(f"{len(bad)} of {len(paths)} files in {folder} are not readable images: {names}")
    return sizes
