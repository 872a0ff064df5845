"""Check that a file is an image which the decoders can read, and find its size.

A file that is not one is described by one reason of a few words: ``empty``, ``truncated``, ``not an image``, ...
"""

from __future__ import annotations

import io
from typing import BinaryIO

from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
"""The formats that both Pillow and DALI decode."""
_END_MARKERS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}  # the last bytes of a complete file
_TAIL_BYTES = 16


class BadImageError(ValueError):
    """A file cannot be used as an image. The message is the reason."""


def check_image(data: bytes) -> tuple[int, int]:
    """Decode every pixel of an encoded image.

    Returns:
        Its height and width.

    Raises:
        BadImageError: the image cannot be decoded.
    """
    size = _read_header(io.BytesIO(data), data)
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except Exception as error:  # Pillow raises a dozen types
        raise BadImageError("truncated" if "truncated" in str(error) else f"damaged: {error}") from None
    return size


def check_image_header(file: BinaryIO, num_bytes: int) -> tuple[int, int]:
    """Read an image's header, and decode all of it only if it does not end as its format does.

    A file that is damaged in the middle passes.

    Args:
        file: an open file, at the image's first byte.
        num_bytes: length of the encoded image.

    Returns:
        Its height and width.

    Raises:
        BadImageError: the header or the end is not that of an image.
    """
    start = file.tell()
    head = file.read(min(num_bytes, 64))
    file.seek(start + max(0, num_bytes - _TAIL_BYTES))
    tail = file.read(_TAIL_BYTES)
    file.seek(start)
    if not head.strip(b"\0") or not tail.endswith(tuple(_END_MARKERS.values())):
        return check_image(file.read(num_bytes))
    return _read_header(file, head)


def _read_header(file: BinaryIO, head: bytes) -> tuple[int, int]:
    """Return height and width from the header. ``head`` holds the first bytes, which make the reason more exact."""
    if not head:
        raise BadImageError("empty")
    if not head.strip(b"\0"):
        raise BadImageError("zeros")
    try:
        with Image.open(file) as image:
            found, height, width = image.format, image.height, image.width
    except Exception as error:
        text = "truncated" if "truncated" in str(error).lower() else "not an image"
        known = head.startswith((b"\xff\xd8\xff", b"\x89PNG"))
        raise BadImageError("truncated" if known else text) from None
    if found not in FORMATS:
        raise BadImageError(f"{found}, which DALI does not decode")
    if not height or not width:
        raise BadImageError("damaged: without height or width")
    return height, width
