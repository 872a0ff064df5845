"""Write real image files of many kinds for the data tests: photographs, drawings, noise, in odd sizes and encodings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_image


def photograph(name: str, top: int, left: int, height: int, width: int) -> Image.Image:
    """Return a window of ``china`` or ``flower`` (427 x 640 pixels each)."""
    pixels = load_sample_image(f"{name}.jpg")[top : top + height, left : left + width]
    assert pixels.shape[:2] == (height, width)
    return Image.fromarray(pixels)


def drawing(height: int, width: int) -> Image.Image:
    """Draw thin lines and hard edges in pure colours, which show the errors of a resampling filter first."""
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for i in range(0, width, 9):
        draw.line((i, 0, width - i, height), fill=("red", "black", "blue")[i % 3], width=1)
    draw.ellipse((width // 4, height // 4, width // 2, height // 2), fill="lime", outline="black")
    draw.rectangle((width // 2, height // 2, width - 8, height - 8), outline="magenta", width=3)
    return image


def noise(height: int, width: int) -> Image.Image:
    """Draw uniform noise."""
    pixels = np.random.default_rng(7).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_sample_images(folder: Path) -> list[Path]:
    """Write one file of each of twelve kinds into ``folder``. Returns them sorted by name."""
    folder.mkdir(parents=True, exist_ok=True)
    rotated = Image.Exif()
    rotated[0x0112] = 6  # orientation: to be turned by 90 degrees, which neither Pillow nor the loaders do

    photograph("china", 0, 0, 427, 639).save(folder / "420.jpg", quality=90, subsampling="4:2:0")
    photograph("flower", 31, 77, 333, 501).save(folder / "422.jpg", quality=80, subsampling="4:2:2")
    photograph("flower", 0, 100, 427, 255).save(folder / "444.jpg", quality=95, subsampling="4:4:4")
    photograph("china", 50, 1, 301, 449).convert("CMYK").save(folder / "cmyk.jpg", quality=90)
    drawing(367, 291).save(folder / "drawing.jpg", quality=75)
    photograph("flower", 10, 10, 201, 333).save(folder / "exif.jpg", quality=90, exif=rotated)
    photograph("china", 90, 200, 303, 245).convert("L").save(folder / "grey.jpg", quality=85)
    noise(155, 201).save(folder / "noise.jpg", quality=60)
    photograph("china", 200, 3, 97, 635).save(folder / "panorama.jpg", quality=85)
    photograph("flower", 100, 200, 211, 187).save(folder / "png.jpg", format="PNG")
    photograph("flower", 40, 40, 259, 263).save(folder / "progressive.jpg", quality=85, progressive=True)
    photograph("china", 120, 333, 31, 45).save(folder / "small.jpg", quality=90)
    return sorted(folder.iterdir())
