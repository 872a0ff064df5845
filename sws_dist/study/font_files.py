"""Find out what fonts can draw, and which of them are of one family.

mkdir fonts && cd fonts
apt-get download $(python -m sws_dist.study.font_files)          # needs no root; 128 packages, 28 MB
for package in *.deb; do dpkg -x $package .; done
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from string import ascii_letters, digits
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sws_dist.study.characters import CLASSES

PACKAGES = """
    3270 adf-accanthis adf-baskervald adf-berenis adf-gillius adf-ikarius adf-irianis adf-libris adf-mekanus
    adf-oldania adf-romande adf-solothurn adf-switzera adf-tribun adf-universalis adf-verana agave allerta
    anonymous-pro apropal arapey atarismall averia-gwf b612 bajaderka bebas-neue beteckna blankenburg breip cabin
    cabinsketch campania cantarell cardo century-catalogue cherrybomb clear-sans comfortaa comic-neue courier-prime
    crosextra-caladea dancingscript dejavu-core dkg-handwriting dosis dustin ebgaramond ecolier-court engadget
    essays1743 eurofurence fantasma fanwood femkeklaver firacode gamaliel georgewilliams gfs-artemisia gfs-didot
    gfs-neohellenic gnutypewriter go gotico-antiqua goudybookletter hack-ttf havana hermit inconsolata isabella
    jetbrains-mono joscelyn junction jura karla kaushanscript klaudia-berenika kristi lato league-spartan leckerli-one
    lemonada levien-museum levien-typoscript liberation libfinal lindenhill lobster lobstertwo manrope monofur monoid
    mononoki mph-2b-damase national-park ocr-a ocr-b okolaks oldstandard open-sans opendin opendyslexic osifont oxygen
    paratype pc play povray prociono quattrocento quicksand radisnoir roadgeek roboto-slab routed-gothic rufscript
    sil-gentium-basic sjfonts sora staypuft summersby tlwg-purisa-ttf tlwg-typewriter-ttf tomsontalks triod-postnaja
    tuffy ubuntu-title vollkorn yanone-kaffeesatz
""".split()  # noqa: SIM905
"""Debian's packages (bookworm) with the study's fonts, without ``fonts-``."""
HOW_TO_GET = "python -m sws_dist.study.font_files --help says how to get the study's fonts"
SAME_DESIGN = 0.92
"""Fonts whose letters correlate more than this are of one family, whatever their names are. Copies (Yrsa and Rasa) and
derived fonts (Carlito from Lato) have 0.94 to 1; the nearest of independent design have 0.91 (Inter and Manrope)."""
ONE_CASE = 0.9
"""A font in which one of ``_TELLING`` correlates more than this with its capital has one case: small capitals, or
capitals that are small letters (Ubuntu Title). Of its letters only those are drawn whose class has both cases."""
_TELLING = "abdeghnqrt"
_ALPHABET = ascii_letters + digits
_BOX = 24
_NO_CHARACTER = "\uffff"  # no font has a glyph for it, so .notdef is drawn


@dataclass(frozen=True)
class FontFile:
    """A font, and what it can draw."""

    path: str
    """Relative to the folder of fonts."""
    family: str
    sha256: str
    characters: str
    """Those of the study's classes that it has a glyph of its own for."""
    alphabet: np.ndarray
    """[62, 576] float32: letters and digits in boxes of 24 x 24 pixels, each with mean 0 and norm 1."""


def find_fonts(folder: Path, run: Callable[..., Iterable[Any]] = map) -> list[FontFile]:
    """Read the TrueType and OpenType fonts below a folder that have all letters and digits, ordered by path.

    Args:
        run: maps over files; a pool's ``map`` reads several at once.

    Raises:
        ValueError: no such fonts.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".ttf", ".otf"))
    files = [path for path in files if not path.is_symlink()]
    found = [font for font in run(_read_font, [(folder, path) for path in files]) if font is not None]
    if not found:
        raise ValueError(f"{folder}: holds no font with all letters and digits; {HOW_TO_GET}")
    return found


def group_families(fonts: list[FontFile]) -> list[list[int]]:
    """Group fonts whose family names begin with the same word (PT Sans, PT Serif), or whose letters look the same.

    Returns:
        For each group the indices of its fonts, rising.
    """
    parent = list(range(len(fonts)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, font in enumerate(fonts):
        parent[root(i)] = root(first.setdefault(font.family.split()[0].casefold(), i))
    letters = np.stack([font.alphabet.ravel() for font in fonts])
    for a, b in np.argwhere(np.triu(letters @ letters.T / len(_ALPHABET) > SAME_DESIGN, 1)).tolist():
        parent[root(a)] = root(b)
    groups: dict[int, list[int]] = {}
    for i in range(len(fonts)):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())


@lru_cache(maxsize=256)
def load_font(path: str, size: int) -> ImageFont.FreeTypeFont:
    """Open a font at a size in pixels, with the layout that every Pillow has."""
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def draw_glyph(font: ImageFont.FreeTypeFont, character: str) -> Image.Image | None:
    """Draw a character in white on black (mode L), cut to its outline; None if there is nothing to see."""
    left, top, right, bottom = (int(edge) for edge in font.getbbox(character))
    if right <= left or bottom <= top:
        return None
    glyph = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(glyph).text((-left, -top), character, font=font, fill=255)
    box = glyph.getbbox()
    return glyph.crop(box) if box else None


def _read_font(place: tuple[Path, Path]) -> FontFile | None:
    """Read a font; None for one that is damaged, or has not every letter and digit."""
    from fontTools.ttLib import TTFont, TTLibError

    logging.getLogger("fontTools").setLevel(logging.ERROR)  # it remarks on fonts that are a few bytes too long
    folder, path = place
    try:
        with TTFont(path, lazy=True, fontNumber=0) as file:
            known = set(file.getBestCmap() or ())
            family = file["name"].getBestFamilyName() or path.stem
        font = load_font(str(path), 96)
    except (TTLibError, OSError, KeyError):
        return None
    missing = _in_box(font, _NO_CHARACTER)
    wanted = dict.fromkeys(_ALPHABET + "".join(CLASSES.values()))
    boxes = {c: box for c in wanted if ord(c) in known and (box := _in_box(font, c)) is not None}
    boxes = {c: box for c, box in boxes.items() if missing is None or not np.array_equal(box, missing)}
    if not boxes.keys() >= set(_ALPHABET):
        return None
    has_two_cases = all(np.vdot(boxes[c], boxes[c.upper()]) <= ONE_CASE for c in _TELLING)
    drawn = [
        character
        for characters in CLASSES.values()
        for character in characters
        if character in boxes and (has_two_cases or len(characters) > 1 or not character.isalpha())
    ]
    return FontFile(
        path=path.relative_to(folder).as_posix(),
        family=family,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        characters="".join(drawn),
        alphabet=np.stack([boxes[c].ravel() for c in _ALPHABET]),
    )


def _in_box(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray | None:
    """Return a glyph scaled to the box, [24, 24] float32 with mean 0 and norm 1; None if there is nothing to see."""
    glyph = draw_glyph(font, character)
    if glyph is None:
        return None
    scale = _BOX / max(glyph.size)
    glyph = glyph.resize([max(1, round(side * scale)) for side in glyph.size], Image.Resampling.BOX)
    box = Image.new("L", (_BOX, _BOX))
    box.paste(glyph, ((_BOX - glyph.width) // 2, (_BOX - glyph.height) // 2))
    pixels = np.asarray(box, dtype=np.float32)
    pixels = pixels - pixels.mean()
    norm = float(np.linalg.norm(pixels))
    return pixels / norm if norm else None


if __name__ == "__main__":
    from sws_dist.cli.common import make_parser

    make_parser(__doc__).parse_args()
    print(*(f"fonts-{package}" for package in PACKAGES))
