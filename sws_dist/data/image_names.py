"""Tell by its name whether a file may hold an image."""

from __future__ import annotations

import os

EXTENSIONS = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".gif"),
}
"""File name endings of images. GIF is among them so that such a file is named as unusable instead of overlooked."""


def is_image_name(name: str) -> bool:
    """Return True if a file of this name, without its folders, is taken for an image."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Return True for what file systems, archivers and photo servers leave behind, such as ``._a.jpg``."""
    return name.startswith(".") or name in ("__MACOSX", "@eaDir")
