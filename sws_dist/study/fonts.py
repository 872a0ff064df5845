"""Draw a data set of characters in which the validation fonts never occur in training.

    python -m sws_dist.study.font_files --help        # where the fonts come from
    python -m sws_dist.study.fonts data/characters --fonts fonts

Each image is <split>/<class>/<number>.jpg, 64 x 64 pixels, RGB: one character of its class, in a drawn font, size,
place, rotation, colour and background, blurred and with noise. Families are split, not files: the italic of a training
font is no validation font. The same seed and the same fonts give the same bytes, whatever --processes.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageFilter, features

from sws_dist.cli.common import SEED, make_parser, parse_args, run_command, whole_number
from sws_dist.progress import track
from sws_dist.study.characters import CLASSES
from sws_dist.study.dataset_folder import write_dataset
from sws_dist.study.font_files import HOW_TO_GET, FontFile, draw_glyph, find_fonts, group_families, load_font

SIZE = 64
"""Height and width of an image, in pixels."""
VAL_FAMILIES = 0.2
"""Share of the families that is for validation."""
_GLYPH_SIDE = (24, 50)  # of a character's longer side, in pixels
_ROTATION = 15.0  # degrees, at most
_CONTRAST = 70  # of 255, at least, between character and background
_DETAIL = 2  # factor by which characters are drawn larger, and then scaled down

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Hold what one split is drawn from."""

    name: str
    seed: tuple[int, int]
    families: list[list[tuple[str, str]]]
    """Families of fonts: the path of each, and the characters that it has."""


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("out", type=Path, help="folder to write, for example data/characters")
    parser.add_argument("--fonts", type=Path, required=True, help="folder of TrueType and OpenType fonts, however deep")
    parser.add_argument("--train", type=whole_number(), default=60_000, help="training images (default 60000)")
    parser.add_argument("--val", type=whole_number(), default=10_000, help="validation images (default 10000)")
    parser.add_argument("--seed", type=SEED, default=0, help="of everything that is drawn (default 0)")
    parser.add_argument(
        "--processes", type=whole_number(1, 1024), default=os.cpu_count(), help="that draw (default: one a core)"
    )
    args = parse_args(parser, one_process=True)
    draw_dataset(args.out, args.fonts, {"train": args.train, "val": args.val}, args.seed, args.processes)


def draw_dataset(out: Path, folder: Path, images: dict[str, int], seed: int, processes: int = 1) -> None:
    """Write ``<out>/train`` and ``<out>/val``, whole or not at all.

    Args:
        out: the folder to write; one that holds the same already stays as it is.
        folder: of the fonts.
        images: number of images of each split, spread evenly over the classes.
        seed: of the split of the families, and of the images.

    Raises:
        ValueError: fewer images than classes, too few fonts, or another ``out``.
    """
    for split, number in images.items():
        if number < len(CLASSES):
            raise ValueError(f"--{split} {number}: expected at least one image of each of the {len(CLASSES)} classes")
    with _workers(processes) as run:
        fonts = find_fonts(folder, run)
        families = group_families(fonts)
        splits = split_families(folder, fonts, families, seed)
        facts = {
            "dataset": "characters in unseen fonts",
            "images": images,
            "seed": seed,
            "fonts": f"{len(fonts)} files in {len(families)} families",
            "fonts_sha256": hashlib.sha256("".join(sorted(font.sha256 for font in fonts)).encode()).hexdigest(),
            "drawn_by": f"Pillow {PIL.__version__}, FreeType {features.version('freetype2')}",
        }
        log.info(f"{folder}: {facts['fonts']}, {len(splits[1].families)} of them for validation")

        def write(root: Path) -> None:
            for split in splits:
                for label in CLASSES:
                    (root / split.name / label).mkdir(parents=True)
                drawn = run(partial(draw_image, root, split), range(images[split.name]))
                for _ in track(drawn, f"drawing {split.name}", images[split.name], "images"):
                    pass

        write_dataset(out, facts, write)


@contextmanager
def _workers(processes: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """Yield what maps a function over items, in their order: ``map``, or that of a pool of processes."""
    if processes == 1:
        yield map
    else:
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            yield partial(pool.map, chunksize=32)


def split_families(folder: Path, fonts: Sequence[FontFile], families: list[list[int]], seed: int) -> list[Split]:
    """Give each family to training or to validation, at random.

    Raises:
        ValueError: a split in which no font has one of the classes.
    """
    order = np.random.default_rng((seed, 0)).permutation(len(families)).tolist()
    num_val = round(VAL_FAMILIES * len(families))
    splits = []
    for number, (name, chosen) in enumerate((("train", order[num_val:]), ("val", order[:num_val])), start=1):
        drawn = [[(str(folder / fonts[i].path), fonts[i].characters) for i in families[family]] for family in chosen]
        known = {character for family in drawn for _, characters in family for character in characters}
        missing = [label for label, characters in CLASSES.items() if not known & set(characters)]
        if missing:
            raise ValueError(
                f"{folder}: {len(families)} families are too few: none of the {len(chosen)} for the split {name} has "
                f"the class {missing[0]}; {HOW_TO_GET}"
            )
        splits.append(Split(name, (seed, number), drawn))
    return splits


def draw_image(root: Path, split: Split, number: int) -> None:
    """Draw one image, which depends on the split's seed and its number alone, and write it."""
    rng = np.random.default_rng((*split.seed, number))
    label = list(CLASSES)[number % len(CLASSES)]
    path, characters = "", ""
    while not characters:  # a font that has none of the class's characters is drawn again
        family = split.families[rng.integers(len(split.families))]
        path, known = family[rng.integers(len(family))]
        characters = "".join(c for c in CLASSES[label] if c in known)
    mask = _draw_mask(rng, path, characters[rng.integers(len(characters))])
    background, colour = _draw_background(rng)
    pixels = background + mask[..., None] * (colour - background)
    image = Image.fromarray(pixels.round().astype(np.uint8)).filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.0)))
    noisy = np.asarray(image) + rng.normal(0, rng.uniform(0, 14), pixels.shape)
    image = Image.fromarray(noisy.clip(0, 255).round().astype(np.uint8))
    image.save(root / split.name / label / f"{number:06d}.jpg", quality=int(rng.integers(70, 96)))


def _draw_mask(rng: np.random.Generator, path: str, character: str) -> np.ndarray:
    """Draw where the character is: [64, 64] from 0 to 1, at a random size, rotation and place."""
    side = _DETAIL * rng.uniform(*_GLYPH_SIDE)
    glyph = draw_glyph(load_font(path, 96), character)
    assert glyph is not None
    scale = side / max(glyph.size)
    glyph = glyph.resize([max(1, round(edge * scale)) for edge in glyph.size], Image.Resampling.LANCZOS)
    glyph = glyph.rotate(rng.uniform(-_ROTATION, _ROTATION), Image.Resampling.BICUBIC, expand=True)
    canvas = Image.new("L", (_DETAIL * SIZE, _DETAIL * SIZE))
    left, top = (_draw_offset(rng, _DETAIL * SIZE - edge) for edge in glyph.size)
    canvas.paste(glyph, (left, top))
    return np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float32) / 255


def _draw_offset(rng: np.random.Generator, room: int) -> int:
    """Draw where something begins that leaves so much room; it is centred if it is too large."""
    return int(rng.integers(room + 1)) if room > 0 else room // 2


def _draw_background(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a background [64, 64, 3], plain, shaded or cloudy, and the colour [3] of a character seen well on it."""
    while True:
        first, second, colour = rng.uniform(0, 255, (3, 3)).astype(np.float32)
        second = first + rng.uniform(0, 0.5) * (second - first)
        brightness = [float(c @ (0.299, 0.587, 0.114)) for c in (first, second, colour)]
        if min(abs(brightness[2] - b) for b in brightness[:2]) >= _CONTRAST:
            break
    kind = rng.integers(3)
    share: np.ndarray = np.zeros((SIZE, SIZE), dtype=np.float32)
    if kind == 1:
        angle = rng.uniform(0, 2 * np.pi)
        x = np.linspace(-1, 1, SIZE, dtype=np.float32)
        share = 0.5 + (x * np.cos(angle) + x[:, None] * np.sin(angle)) / (2 * np.sqrt(2))
    elif kind == 2:
        cells = int(rng.integers(3, 17))
        clouds = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
        share = np.asarray(clouds.resize((SIZE, SIZE), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    return first + share[..., None] * (second - first), colour


if __name__ == "__main__":
    run_command(main)
