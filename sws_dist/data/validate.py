"""Is this file an image that the decoders can read, and how large? A size, or one reason why not."""

from __future__ import annotations

import io
from typing import BinaryIO

from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # what DALI decodes of what Pillow knows
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}  # the last bytes of a whole file
_TAIL = 16


class BadImageError(ValueError):
    """The message is the reason, a few words: ``empty``, ``truncated``, ``not an image``, ..."""


def check_whole(data: bytes) -> tuple[int, int]:
    """Height and width of an encoded image, every pixel of which has been decoded.

    Raises:
        BadImageError: with the reason.
    """
    size = _open(io.BytesIO(data), data)
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    except Exception as error:  # Pillow raises a dozen types
        raise BadImageError("truncated" if "truncated" in str(error) else f"damaged: {error}") from None
    return size


def check_header(file: BinaryIO, num_bytes: int) -> tuple[int, int]:
    """Height and width from the header; a file that does not end as its format does is decoded as well.

    Raises:
        BadImageError: with the reason. A file that is damaged in the middle passes.
    """
    start = file.tell()
    head = file.read(min(num_bytes, 64))
    file.seek(start + max(0, num_bytes - _TAIL))
    tail = file.read(_TAIL)
    file.seek(start)
    if not head.strip(b"\0") or not tail.endswith(tuple(_ENDS.values())):
        return check_whole(file.read(num_bytes))
    return _open(file, head)


def _open(file: BinaryIO, head: bytes) -> tuple[int, int]:
    """The size from the header; ``head`` are the first bytes, for a better reason."""
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
