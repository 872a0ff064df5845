"""Read a list of images with their labels: lines of ``<path> <label>``, tab-separated, or CSV."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from sws_dist.data.image_names import EXTENSIONS, is_image_name

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path", "img")
_LABEL_COLUMNS = ("label", "class", "class_name", "category", "target", "label_name")
_END_OF_PATH = re.compile(rf"(?:{'|'.join(map(re.escape, sorted(EXTENSIONS)))})(?:\s*,\s*|\s+)", re.IGNORECASE)


def read_image_list(file: Path) -> tuple[list[str], list[str], list[str]]:
    """Read a list of images.

    ``.csv`` and ``.tsv`` files have two columns, or a header that names the columns of path and label. In all others a
    line is split at its tab, else behind the image's file name ending, else at its only space.

    Returns:
        Paths, labels as they are written, and log messages.

    Raises:
        ValueError: a line that cannot be split, named by its number, or no images.
    """
    # A name in it that is not UTF-8 is a file's name all the same.
    text = file.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    if "\0" in text:
        raise ValueError(f"{file}: not a text file in UTF-8")
    delimiter = _DELIMITERS.get(file.suffix.lower())
    if delimiter == "," and ";" in (first := text.partition("\n")[0]) and "," not in first:
        delimiter = ";"
    notes: list[str] = []
    rows = _read_table(file, text, delimiter, notes) if delimiter else _read_lines(file, text)
    pairs = []
    for path, label, number in rows:
        if not path.strip() or not label.strip():
            raise ValueError(f"{file}, line {number}: the {'label' if path.strip() else 'path'} is empty")
        if is_image_name(os.path.basename(label)):
            raise ValueError(f"{file}, line {number}: the label is the name of an image, {label!r}; expected it last")
        pairs.append((path.strip(), label.strip()))
    if not pairs:
        raise ValueError(f"{file}: lists no images; expected lines of '<path> <label>'")
    return [path for path, _ in pairs], [label for _, label in pairs], notes + _describe_repeats(file, pairs)


def _describe_repeats(file: Path, pairs: Sequence[tuple[str, str]]) -> list[str]:
    notes = []
    images = len({path for path, _ in pairs})
    if images < len(pairs):
        notes.append(f"{file}: its {len(pairs)} lines name {images} images; those that repeat are trained on as often")
    if images < len(set(pairs)):
        notes.append(f"{file}: {len(set(pairs)) - images} image(s) are listed with more than one label")
    return notes


def _read_lines(file: Path, text: str) -> Iterator[tuple[str, str, int]]:
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip()
        if not line:
            continue
        if "\t" in line:
            parts = line.split("\t")
        else:
            cuts = [match.end() for match in _END_OF_PATH.finditer(line)]
            if len(cuts) > 1:
                raise ValueError(
                    f"{file}, line {number}: {line!r} can be split in two ways; put a tab before the label"
                )
            parts = [line[: cuts[0]].rstrip(", \t"), line[cuts[0] :]] if cuts else line.split(" ")
            if number == 1 and len(parts) == 2 and _find_named_columns(parts) is not None:
                continue  # a header
        if len(parts) != 2:
            raise ValueError(f"{file}, line {number}: expected '<path> <label>', found {line!r}; a tab parts the two")
        yield parts[0], parts[1], number


def _read_table(file: Path, text: str, delimiter: str, notes: list[str]) -> Iterator[tuple[str, str, int]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    rows = [(reader.line_num, [field.strip() for field in row]) for row in reader if any(map(str.strip, row))]
    if not rows:
        return
    first = rows[0][1]
    named = _find_named_columns(first)
    if named is None and len(first) != 2:
        raise ValueError(
            f"{file}, line {rows[0][0]}: {len(first)} columns; expected a path and a label, or a header with one of "
            f"{', '.join(_PATH_COLUMNS)}, and one of {', '.join(_LABEL_COLUMNS)}"
        )
    path, label = named or (0, 1)
    unnamed = not _holds_image_name(first) and len(rows) > 1 and _holds_image_name(rows[1][1])
    if named is not None or unnamed:
        notes.append(f"{file}: paths are in column {first[path]!r}, labels in column {first[label]!r}")
        rows = rows[1:]
    for number, row in rows:
        if len(row) <= max(path, label):
            raise ValueError(f"{file}, line {number}: expected a path and a label, found {row}")
        yield row[path], row[label], number


def _holds_image_name(row: Sequence[str]) -> bool:
    return any(is_image_name(os.path.basename(field)) for field in row)


def _find_named_columns(row: Sequence[str]) -> tuple[int, int] | None:
    """Return the columns of path and label in a header; None for a row that is no header."""
    names = [field.strip().lower() for field in row]
    path = next((names.index(name) for name in _PATH_COLUMNS if name in names), None)
    label = next((names.index(name) for name in _LABEL_COLUMNS if name in names), None)
    return None if path is None or label is None else (path, label)
