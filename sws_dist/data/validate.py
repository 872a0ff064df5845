"""Check that a file is an image which training can decode to the right colours, and find its size.

Training's own decoder says what is good. Pillow reads the header, which holds the size and names the kinds of files
whose colours DALI gets wrong (the table in docs/data.md), and it finds the words for what DALI cannot decode.
A file that cannot be used is described by one reason of a few words: ``empty``, ``truncated``, ``not an image``, ...
"""

from __future__ import annotations

import io
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from sws_dist.data.decoder import decode_size, describe_error

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "TIFF", "PPM")
"""Pillow's names of the formats that have a rule in docs/data.md."""
MAX_PIXELS = 2**29
"""A larger image is refused: decoded, it would take more than 1.6 GB."""
Image.MAX_IMAGE_PIXELS = None  # Pillow refuses at a third of that; ``MAX_PIXELS`` takes its place

_JPEG, _PNG = (b"\xff\xd8\xff", b"\xff\xd9"), (b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82")
"""The first and the last bytes of a complete file."""
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_TIFF_MODES = {"1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I;16B"}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _EXTRA_SAMPLES = 258, 262, 338  # TIFF's numbers of its tags
_WHITE_IS_ZERO, _PREMULTIPLIED = 0, 1  # values of the second and the third


class BadImageError(ValueError):
    """A file cannot be used as an image. The message is the reason."""


def check_image(data: bytes) -> tuple[int, int]:
    """Decode an encoded image as training does.

    Returns:
        Its height and width.

    Raises:
        BadImageError: the image cannot be decoded, or is of a kind whose colours would be wrong.
    """
    if not data:
        raise BadImageError("empty")
    if not data.strip(b"\0"):
        raise BadImageError("zeros")
    _read_header(io.BytesIO(data))
    try:
        return decode_size(data)
    except RuntimeError as error:
        raise BadImageError(_explain(data, error)) from None


def check_image_header(file: BinaryIO, num_bytes: int) -> tuple[int, int]:
    """Read the header of a JPEG or PNG file that ends as its format does, and decode any other file.

    A file that is damaged in the middle passes.

    Args:
        file: an open file, at the image's first byte.
        num_bytes: length of the encoded image.

    Returns:
        Its height and width.

    Raises:
        BadImageError: see ``check_image``.
    """
    start = file.tell()
    longest = max(map(len, _JPEG + _PNG))
    head = file.read(longest)
    file.seek(start + max(0, num_bytes - longest))
    tail = file.read(longest)
    file.seek(start)
    if any(head.startswith(first) and tail.endswith(last) for first, last in (_JPEG, _PNG)):
        size = _read_header(file)
        if size is not None:
            return size
        file.seek(start)
    return check_image(file.read(num_bytes))


def _read_header(file: BinaryIO) -> tuple[int, int] | None:
    """Return height and width as the header has them, or None if Pillow cannot read it, which DALI may yet do.

    Raises:
        BadImageError: an image of a kind that is refused.
    """
    start = file.tell()
    try:
        with Image.open(file) as image:
            reason = _refuse(image)
            size = image.height, image.width
    except Exception:  # Pillow raises a dozen types
        file.seek(start)
        # Of a TIFF file that Pillow does not know nobody has compared the colours.
        reason, size = "TIFF of an unknown kind" if file.read(4) in _TIFF_STARTS else None, None
    if reason is not None:
        raise BadImageError(reason)
    return size


def _refuse(image: Image.Image) -> str | None:
    """Return the reason why images of this kind are refused, from their header; None for all others."""
    kind, mode, (width, height) = image.format, image.mode, image.size
    if kind not in FORMATS:
        return f"{kind}, a format that is not read"
    if width * height > MAX_PIXELS:
        return f"too large: {width} x {height} pixels, at most {MAX_PIXELS} are decoded"
    if not width * height:
        return "damaged: without height or width"
    codec, _, _, arguments = image.tile[0]  # type: ignore[attr-defined]
    if kind == "JPEG" and mode == "CMYK" and "adobe" not in image.info:
        return "CMYK without Adobe's marker, which would say whether 0 is white or black"
    if kind == "BMP" and arguments[0] in ("BGR;15", "BGR;16"):
        return "BMP of 16 bits a pixel"
    if kind == "PPM" and codec != "raw":
        return "PPM in text, or with another maximum than 255"
    return _refuse_tiff(image) if kind == "TIFF" else None


def _refuse_tiff(image: Image.Image) -> str | None:
    tags = image.tag_v2  # type: ignore[attr-defined]
    if image.mode not in _TIFF_MODES or not set(tags.get(_BITS_PER_SAMPLE, (1,))) <= {1, 8, 16}:
        return f"TIFF of mode {image.mode}, for whose colours there is no rule"
    if image.mode.startswith("I;16") and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        return "TIFF of 16 bits in which 0 is white"
    if _PREMULTIPLIED in tags.get(_EXTRA_SAMPLES, ()):
        return "TIFF whose colours are multiplied by alpha"
    return None


def _explain(data: bytes, error: RuntimeError) -> str:
    """Return the reason why DALI refused an image with ``error``: Pillow's, if Pillow cannot decode it either."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            kind = f"{image.format} of mode {image.mode}"
    except UnidentifiedImageError:
        known = data.startswith((_JPEG[0], _PNG[0]))
        return "truncated or damaged in its header" if known else "not an image"
    except Exception as found:  # Pillow raises a dozen types
        return "truncated" if "truncated" in str(found).lower() else f"damaged: {found}"
    return f"{kind}, which DALI cannot decode ({describe_error(error)}); save it anew"
