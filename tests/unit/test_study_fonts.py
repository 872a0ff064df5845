"""Test the data set of characters with the fonts that matplotlib brings, and with fonts built here."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fontTools", reason="needs fonttools (pip install 'sws-dist[study]')")
import matplotlib
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from sws_dist.data.sources import find_source
from sws_dist.study.characters import CLASSES
from sws_dist.study.font_files import FontFile, draw_glyph, find_fonts, group_families, load_font
from sws_dist.study.fonts import draw_dataset, split_families

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy DejaVu in five styles, one of them a second time under the name of another family: three families."""
    folder = tmp_path_factory.mktemp("fonts")
    for name in ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Italic"):
        shutil.copy(FONTS / f"{name}.ttf", folder)
    return folder


def rename_family(source: Path, target: Path, family: str) -> None:
    """Write a copy of a font under the name of another family."""
    from fontTools.ttLib import TTFont

    with TTFont(source) as font:
        for record in list(font["name"].names):
            if record.nameID in (1, 16):
                font["name"].setName(family, record.nameID, record.platformID, record.platEncID, record.langID)
        font.save(target)


def build_font(path: Path, characters: str, blank: str = "") -> None:
    """Build a font: characters are triangles of different shapes, ``blank`` ones empty, .notdef another triangle."""
    glyphs, cmap = {}, {}
    for number, character in enumerate(["", *characters]):
        pen = TTGlyphPen(None)
        if character not in blank or not character:
            width, height = (500, 500) if not character else (100 + 13 * number, 900 - 11 * number)
            pen.moveTo((0, 0))
            for point in ((0, height) if character else (width, height), (width, 0)):
                pen.lineTo(point)
            pen.closePath()
        name = f"glyph{number}" if character else ".notdef"
        glyphs[name] = pen.glyph()
        if character:
            cmap[ord(character)] = name
    builder = FontBuilder(1000)
    builder.setupGlyphOrder(list(glyphs))
    builder.setupCharacterMap(cmap)
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


def test_the_classes() -> None:
    assert len(CLASSES) >= 64
    assert list(CLASSES) == sorted(CLASSES)
    assert CLASSES["letter-o"] == "Oo0"
    characters = "".join(CLASSES.values())
    assert len(set(characters)) == len(characters)


def test_families_are_fonts_of_one_name_or_of_one_look(folder: Path, tmp_path: Path) -> None:
    for name in ("DejaVuSans", "DejaVuSerif"):
        shutil.copy(folder / f"{name}.ttf", tmp_path)
    rename_family(FONTS / "DejaVuSerif.ttf", tmp_path / "copy.ttf", "Another Serif")
    rename_family(FONTS / "STIXGeneral.ttf", tmp_path / "stix.ttf", "Fourth")
    fonts = find_fonts(tmp_path)
    assert [font.family for font in fonts] == ["DejaVu Sans", "DejaVu Serif", "Another Serif", "Fourth"]
    assert sorted(group_families(fonts)) == [[0, 1, 2], [3]]


def test_only_characters_with_a_glyph_of_their_own_are_drawn(tmp_path: Path) -> None:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    build_font(tmp_path / "blank.ttf", f"{letters}!?", blank="?")
    build_font(tmp_path / "few.ttf", letters[1:])
    (tmp_path / "page.ttf").write_text("<!doctype html>")  # what a failed download leaves
    (font,) = find_fonts(tmp_path)
    assert font.path == "blank.ttf"
    assert "!" in font.characters  # known and visible
    assert "?" not in font.characters  # known, and nothing to see
    assert "#" not in font.characters  # not known: a box would be drawn
    assert draw_glyph(load_font(str(tmp_path / "blank.ttf"), 96), "#") is not None


def test_a_font_of_one_case_has_no_lower_case_letters(tmp_path: Path) -> None:
    from fontTools.ttLib import TTFont

    with TTFont(FONTS / "DejaVuSans.ttf") as font:
        for table in font["cmap"].tables:
            for code in range(ord("a"), ord("z") + 1):
                if code in table.cmap:
                    table.cmap[code] = table.cmap[code - 32]
        font.save(tmp_path / "capitals.ttf")
    shutil.copy(FONTS / "DejaVuSerif.ttf", tmp_path)
    serif, capitals = find_fonts(tmp_path)
    assert {"A", "a", "c"} <= set(serif.characters)
    assert {"A", "a"}.isdisjoint(capitals.characters)
    assert {"C", "c", "7", "&"} <= set(capitals.characters)


def test_no_family_is_on_both_sides() -> None:
    everything = "".join(CLASSES.values())
    fonts = [FontFile(f"{i}.ttf", f"family{i // 3}", "", everything, np.zeros((62, 576))) for i in range(60)]
    train, val = split_families(Path("fonts"), fonts, [list(range(i, i + 3)) for i in range(0, 60, 3)], seed=1)
    paths = [{path for family in split.families for path, _ in family} for split in (train, val)]
    assert (len(train.families), len(val.families)) == (16, 4)
    assert paths[0].isdisjoint(paths[1])
    assert len(paths[0] | paths[1]) == 60
    other, _ = split_families(Path("fonts"), fonts, [list(range(i, i + 3)) for i in range(0, 60, 3)], seed=2)
    assert other.families != train.families


def test_the_bytes_depend_on_the_seed_and_not_on_the_processes(tmp_path: Path) -> None:
    fonts = tmp_path / "fonts"
    fonts.mkdir()
    for number, name in enumerate(("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "DejaVuSerif-Italic")):
        rename_family(FONTS / f"{name}.ttf", fonts / f"{name}.ttf", f"Family{number}")
    images = {"train": 100, "val": 80}

    def written(name: str, seed: int, processes: int) -> dict[str, bytes]:
        out = tmp_path / name
        draw_dataset(out, fonts, images, seed, processes)
        return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.glob("*/*/*.jpg")}

    one, two, other = written("one", 3, 1), written("two", 3, 2), written("other", 4, 1)
    assert len(one) == 180
    assert one == two
    assert all(one[path] != other[path] for path in one.keys() & other.keys())
    found, notes = find_source(tmp_path / "one", "train")
    assert (found.classes, notes) == (tuple(CLASSES), [])
    assert np.bincount(found.labels).tolist() == [2] * 22 + [1] * 56
    with Image.open(found.file(0)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))


def test_what_cannot_be_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--val 5: expected at least one image of each of the 78 classes"):
        draw_dataset(tmp_path / "out", folder, {"train": 100, "val": 5}, 0)
    with pytest.raises(ValueError, match=r"1 families are too few: none of the 0 for the split val"):
        draw_dataset(tmp_path / "out", folder, {"train": 100, "val": 80}, 0)
    with pytest.raises(ValueError, match=r"holds no font with all letters and digits; .*font_files --help"):
        draw_dataset(tmp_path / "out", tmp_path, {"train": 100, "val": 80}, 0)
    assert not list(tmp_path.iterdir())
