"""Write one small image file of every kind that docs/data.md has a rule for, with the pixels that the rule gives."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin
from sklearn.datasets import load_sample_image

SIDE = 40
"""Height and width of every image: the pipelines decode it without resizing at this size."""
PHOTO: np.ndarray = load_sample_image("china.jpg")[100 : 100 + SIDE, 200 : 200 + SIDE].copy()
"""[40, 40, 3] uint8."""
GREY: np.ndarray = np.asarray(Image.fromarray(PHOTO).convert("L"))
DEEP: np.ndarray = PHOTO.astype(np.uint16) * 256 + np.random.default_rng(0).integers(0, 256, PHOTO.shape, np.uint16)
"""The photograph with 16 bits a channel."""
ALPHA: np.ndarray = (np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % 256).astype(np.uint8)
"""From transparent to opaque; the first pixel is transparent."""

Write = Callable[[Path], np.ndarray]
"""A function that writes a file, and returns its pixels by the rule, [40, 40, 3] uint8."""


def _image(pixels: np.ndarray = PHOTO) -> Image.Image:
    return Image.fromarray(pixels)


def _with_alpha(mode: str) -> Image.Image:
    image = _image().convert(mode)
    image.putalpha(_image(ALPHA))
    return image


def _rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def _to_8_bits(deep: np.ndarray) -> np.ndarray:
    """Apply the rule for 16 bits: the value divided by 257, rounded."""
    return ((deep.astype(np.int64) + 128) // 257).astype(np.uint8)


def _save(image: Image.Image, kind: str, pixels: np.ndarray | None = None, **options: Any) -> Write:
    """Write with Pillow. Without ``pixels`` the rule is what Pillow reads: alpha goes, the colours under it stay."""

    def write(file: Path) -> np.ndarray:
        image.save(file, kind, **options)
        if pixels is not None:
            return pixels
        with Image.open(file) as opened:
            return np.asarray(opened.convert("RGB"))

    return write


def _bytes(content: bytes, pixels: np.ndarray) -> Write:
    def write(file: Path) -> np.ndarray:
        file.write_bytes(content)
        return pixels

    return write


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_file(
    height: int, width: int, chunks: bytes, depth: int = 8, colour_type: int = 2, interlaced: bool = False
) -> bytes:
    """Return a PNG file with ``chunks`` between its header and its end."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, int(interlaced))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + chunks + _chunk(b"IEND", b"")


def _png(pixels: np.ndarray, colour_type: int, depth: int, before: bytes = b"", interlaced: bool = False) -> bytes:
    """Encode pixels [H, W(, C)], or packed rows, as PNG without filters."""
    passes = [pixels]
    if interlaced:
        starts = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
        passes = [pixels[y::down, x::right] for y, x, down, right in starts]
    rows = b"".join(b"\0" + row.astype(f">u{row.itemsize}").tobytes() for part in passes for row in part)
    return png_file(SIDE, SIDE, before + _chunk(b"IDAT", zlib.compress(rows)), depth, colour_type, interlaced)


def _packed(values: np.ndarray, bits: int) -> np.ndarray:
    """Pack small values [H, W] into rows of bytes."""
    return np.packbits(np.unpackbits(values[..., None], axis=2)[..., 8 - bits :].reshape(SIDE, -1), axis=1)


def _long_text(packed: bool) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("notes", "x" * 2_000_000, zip=packed)
    return info


def _bmp(pixels: np.ndarray, bits: int, compression: int, header: int, masks: tuple[int, ...]) -> bytes:
    data = pixels[::-1].tobytes()
    body = struct.pack("<IiiHHIIiiII", header, SIDE, SIDE, 1, bits, compression, len(data), 0, 0, 0, 0)
    body = (body + struct.pack(f"<{len(masks)}I", *masks)).ljust(header, b"\0")
    return b"BM" + struct.pack("<IHHI", 14 + len(body) + len(data), 0, 0, 14 + len(body)) + body + data


def _without_adobe(file: Path) -> np.ndarray:
    _image().convert("CMYK").save(file, "JPEG")
    data = file.read_bytes()
    at = data.find(b"\xff\xee")
    file.write_bytes(data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4]) :])
    return PHOTO


def _ycck(file: Path) -> np.ndarray:
    """Call the four channels of a CMYK file YCCK; Pillow and DALI have to agree on the odd colours."""
    _image().convert("CMYK").save(file, "JPEG", quality=95)
    data = bytearray(file.read_bytes())
    data[data.find(b"Adobe") + 11] = 2
    file.write_bytes(data)
    with Image.open(file) as opened:
        return np.asarray(opened.convert("RGB"))


def _tiff(pixels: np.ndarray, photometric: int, bits: int, extra: int | None = None) -> bytes:
    """Encode pixels [H, W, C] as an uncompressed TIFF file."""
    data, channels = pixels.astype(f"<u{pixels.itemsize}").tobytes(), pixels.shape[2]
    tags = {256: SIDE, 257: SIDE, 258: bits, 259: 1, 262: photometric, 273: 8, 277: channels, 278: SIDE, 279: len(data)}
    tags |= {} if extra is None else {338: extra}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    if channels > 1:  # the bits of each channel, behind the entries
        at = 8 + len(data) + 2 + 12 * len(tags) + 4
        entries = entries.replace(struct.pack("<HHII", 258, 4, 1, bits), struct.pack("<HHII", 258, 3, channels, at))
    content = struct.pack("<H", len(tags)) + entries + bytes(4) + struct.pack(f"<{channels}H", *[bits] * channels)
    return b"II" + struct.pack("<HI", 42, 8 + len(data)) + data + content


def turned(kind: str) -> dict[str, Any]:
    """Return Pillow's options for an orientation tag that asks for a turn by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return {"tiffinfo": {274: 6}} if kind == "TIFF" else {"exif": exif}


def _two_frames() -> dict[str, Any]:
    return {"save_all": True, "append_images": [_image().rotate(180)]}


_PALETTE = _image().quantize(64)
_PALETTE_RGB = np.asarray(_PALETTE.convert("RGB"))
_FIRST_PIXEL = {2: struct.pack(">3H", *map(int, PHOTO[0, 0])), 0: struct.pack(">H", int(GREY[0, 0]))}
_BGRA = np.dstack([PHOTO[..., ::-1], ALPHA])
_BYTES_OF_RGBA = (0xFF0000, 0xFF00, 0xFF, 0xFF000000)

READ: dict[str, Write] = {
    "jpeg": _save(_image(), "JPEG", quality=92),
    "jpeg 4:1:1": _save(_image(), "JPEG", subsampling="4:1:1"),
    "jpeg progressive": _save(_image(), "JPEG", progressive=True),
    "jpeg grey": _save(_image(GREY), "JPEG"),
    "jpeg of RGB": _save(_image(), "JPEG", keep_rgb=True),
    "jpeg CMYK of Adobe": _save(_image().convert("CMYK"), "JPEG"),
    "jpeg YCCK of Adobe": _ycck,
    "jpeg turned": _save(_image(), "JPEG", **turned("JPEG")),
    "mpo": _save(_image(), "MPO", **_two_frames()),
    "png": _bytes(_png(PHOTO, 2, 8), PHOTO),
    "png interlaced": _bytes(_png(PHOTO, 2, 8, interlaced=True), PHOTO),
    "png grey": _bytes(_png(GREY, 0, 8), _rgb(GREY)),
    "png grey, 4 bits": _bytes(_png(_packed(GREY >> 4, 4), 0, 4), _rgb((GREY >> 4) * 17)),
    "png grey, 2 bits": _bytes(_png(_packed(GREY >> 6, 2), 0, 2), _rgb((GREY >> 6) * 85)),
    "png grey, 1 bit": _bytes(_png(_packed(GREY >> 7, 1), 0, 1), _rgb((GREY >> 7) * 255)),
    "png grey, 16 bits": _bytes(_png(DEEP[..., 0], 0, 16), _rgb(_to_8_bits(DEEP[..., 0]))),
    "png 16 bits": _bytes(_png(DEEP, 2, 16), _to_8_bits(DEEP)),
    "png grey and alpha": _bytes(_png(np.dstack([GREY, ALPHA]), 4, 8), _rgb(GREY)),
    "png grey and alpha, 16 bits": _bytes(_png(DEEP[..., :2].copy(), 4, 16), _rgb(_to_8_bits(DEEP[..., 0]))),
    "png colours under alpha": _bytes(_png(np.dstack([PHOTO, ALPHA]), 6, 8), PHOTO),
    "png colours under no alpha": _bytes(_png(np.dstack([PHOTO, ALPHA * 0]), 6, 8), PHOTO),
    "png alpha, 16 bits": _bytes(_png(np.dstack([DEEP, DEEP[..., :1]]), 6, 16), _to_8_bits(DEEP)),
    "png alpha, interlaced": _bytes(_png(np.dstack([PHOTO, ALPHA]), 6, 8, interlaced=True), PHOTO),
    "png transparent colour": _bytes(_png(PHOTO, 2, 8, _chunk(b"tRNS", _FIRST_PIXEL[2])), PHOTO),
    "png transparent grey": _bytes(_png(GREY, 0, 8, _chunk(b"tRNS", _FIRST_PIXEL[0])), _rgb(GREY)),
    "png palette": _save(_PALETTE, "PNG"),
    "png palette, 2 colours": _save(_image().quantize(2), "PNG", bits=1),
    "png palette and alpha": _save(_PALETTE, "PNG", transparency=bytes(range(0, 256, 4))),
    "png gamma": _bytes(_png(PHOTO, 2, 8, _chunk(b"gAMA", struct.pack(">I", 100000))), PHOTO),
    "png turned": _save(_image(), "PNG", **turned("PNG")),
    "png animated": _save(_image(), "PNG", **_two_frames()),
    "png with 2 MB of text": _save(_image(), "PNG", PHOTO, pnginfo=_long_text(packed=False)),
    "png with 2 MB of packed text": _save(_image(), "PNG", PHOTO, pnginfo=_long_text(packed=True)),
    "webp": _save(_image(), "WEBP"),
    "webp lossless": _save(_image(), "WEBP", lossless=True),
    "webp alpha": _save(_with_alpha("RGBA"), "WEBP", lossless=True, exact=True),
    "webp turned": _save(_image(), "WEBP", **turned("WEBP")),
    "webp animated": _save(_image(), "WEBP", **_two_frames()),
    "bmp": _save(_image(), "BMP"),
    "bmp grey": _save(_image(GREY), "BMP"),
    "bmp 1 bit": _save(_image().convert("1"), "BMP"),
    "bmp palette": _save(_PALETTE, "BMP"),
    "bmp alpha": _bytes(_bmp(_BGRA, 32, 3, 108, _BYTES_OF_RGBA), PHOTO),
    "bmp 32 bits": _bytes(_bmp(_BGRA, 32, 3, 52, _BYTES_OF_RGBA[:3]), PHOTO),
    "ppm": _save(_image(), "PPM"),
    "pgm": _save(_image(GREY), "PPM"),
    "pbm": _save(_image().convert("1"), "PPM"),
    "pgm, 16 bits": _bytes(
        b"P5 %d %d 65535\n" % (SIDE, SIDE) + DEEP[..., 0].astype(">u2").tobytes(), _rgb(_to_8_bits(DEEP[..., 0]))
    ),
    "tiff": _save(_image(), "TIFF"),
    "tiff lzw": _save(_image(), "TIFF", compression="tiff_lzw"),
    "tiff deflate": _save(_image(), "TIFF", compression="tiff_adobe_deflate"),
    "tiff jpeg": _save(_image(), "TIFF", compression="jpeg"),
    "tiff fax": _save(_image().convert("1"), "TIFF", compression="group4"),
    "tiff grey": _save(_image(GREY), "TIFF"),
    "tiff grey, 16 bits": _save(_image(DEEP[..., 0].copy()), "TIFF", _rgb(_to_8_bits(DEEP[..., 0]))),
    "tiff palette": _save(_PALETTE, "TIFF"),
    "tiff alpha": _save(_with_alpha("RGBA"), "TIFF"),
    "tiff CMYK": _save(_image().convert("CMYK"), "TIFF"),
    "tiff YCbCr": _save(_image().convert("YCbCr"), "TIFF"),
    "tiff of two pages": _save(_image(), "TIFF", **_two_frames()),
    "tiff turned": _save(_image(), "TIFF", PHOTO, **turned("TIFF")),
}
"""Kind -> how it is written, for the files that training reads."""

_LAB = ImageCms.profileToProfile(
    _image(), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
)
_FOUR = np.dstack([PHOTO, ALPHA])
_BGR565 = np.full((SIDE, SIDE), 0x1234, dtype=np.uint16)

REFUSED: dict[str, tuple[Write, str]] = {
    "jpeg CMYK of others": (_without_adobe, "CMYK without Adobe's marker"),
    "gif": (_save(_image(), "GIF"), "GIF, a format that is not read"),
    "gif animated": (_save(_image(), "GIF", **_two_frames()), "GIF, a format that is not read"),
    "jpeg 2000": (_save(_image(), "JPEG2000"), "JPEG2000, a format that is not read"),
    "avif": (_save(_image(), "AVIF"), "AVIF, a format that is not read"),
    "bmp 16 bits": (_bytes(_bmp(_BGR565, 16, 3, 52, (0xF800, 0x7E0, 0x1F)), PHOTO), "BMP of 16 bits a pixel"),
    "pgm of 100 levels": (_bytes(b"P5 40 40 100\n" + bytes(1600), PHOTO), "PPM in text, or with another maximum"),
    "ppm in text": (_bytes(b"P3 40 40 255\n" + b"7 " * 4800, PHOTO), "PPM in text, or with another maximum"),
    "tiff 1 bit": (_save(_image().convert("1"), "TIFF"), "TIFF of mode 1, which DALI cannot decode"),
    "tiff grey and alpha": (_save(_with_alpha("LA"), "TIFF"), "TIFF of mode LA"),
    "tiff premultiplied": (_bytes(_tiff(_FOUR, 2, 8, extra=1), PHOTO), "TIFF whose colours are multiplied by alpha"),
    "tiff inverse, 16 bits": (_bytes(_tiff(DEEP[..., :1], 0, 16), PHOTO), "TIFF of 16 bits in which 0 is white"),
    "tiff of floats": (_save(_image((GREY / 255).astype(np.float32)), "TIFF"), "TIFF of mode F"),
    "tiff of integers": (_save(_image(GREY.astype(np.int32)), "TIFF"), "TIFF of mode I"),
    "tiff lab": (_save(_LAB, "TIFF"), "TIFF of mode LAB"),
    "tiff of three floats": (_bytes(_tiff((PHOTO / 255).astype(np.float32).view(np.uint32), 2, 32), PHOTO), "TIFF of"),
}
"""Kind -> how it is written, and the beginning of the reason why it is refused."""
