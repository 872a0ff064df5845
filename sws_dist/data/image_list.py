"""Read a list of images with their labels: lines of ``<path> <label>``, tab-separated, or CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from sws_dist.data.image_names import EXTENSIONS
from sws_dist.text import read_text

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_PATH_COLUMNS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path", "img")
_LABEL_COLUMNS = ("label", "class", "class_name", "category", "target", "label_name")
_END_OF_PATH = re.compile(rf"(?:{'|'.join(map(re.escape, sorted(EXTENSIONS)))})\s+", re.IGNORECASE)


def read_image_list(file: Path) -> tuple[list[str], list[str], list[str]]:
    """Read a list of images.

    ``.csv`` and ``.tsv`` files have two columns, or a header that names the columns of path and label. In all others a
    line is split at its tab, else behind the image's file name ending, else at its only space.

    Returns:
        Paths, labels as they are written, and log messages.

    Raises:
        ValueError: a line that cannot be split, named by its number, or no images.
    """
    text = read_text(file)
    delimiter = _DELIMITERS.get(file.suffix.lower())
    notes: list[str] = []
    rows = _read_table(file, text, delimiter, notes) if delimiter else _read_lines(file, text)
    pairs = []
    for path, label, number in rows:
        if not path.strip() or not label.strip():
            raise ValueError(f"{file}, line {number}: the {'label' if path.strip() else 'path'} is empty")
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
            parts = [line[: cuts[0]], line[cuts[0] :]] if cuts else line.split(" ")
        if len(parts) != 2:
            raise ValueError(f"{file}, line {number}: expected '<path> <label>', found {line!r}; a tab parts the two")
        yield parts[0], parts[1], number


def _read_table(file: Path, text: str, delimiter: str, notes: list[str]) -> Iterator[tuple[str, str, int]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    columns: tuple[int, int] | None = None
    for row in reader:
        if not any(field.strip() for field in row):
            continue
        if columns is None:
            columns = _find_named_columns(row)
            if columns is not None:
                path, label = (row[column].strip() for column in columns)
                notes.append(f"{file}: paths are in column {path!r}, labels in column {label!r}")
                continue
            columns = 0, 1
            if len(row) != 2:
                raise ValueError(
                    f"{file}, line {reader.line_num}: {len(row)} columns; expected a path and a label, or a header "
                    f"with one of {', '.join(_PATH_COLUMNS)}, and one of {', '.join(_LABEL_COLUMNS)}"
                )
        if len(row) <= max(columns):
            raise ValueError(f"{file}, line {reader.line_num}: expected a path and a label, found {row}")
        yield row[columns[0]], row[columns[1]], reader.line_num


def _find_named_columns(row: Sequence[str]) -> tuple[int, int] | None:
    """Return the columns of path and label in a header; None for a row that is no header."""
    names = [field.strip().lower() for field in row]
    path = next((names.index(name) for name in _PATH_COLUMNS if name in names), None)
    label = next((names.index(name) for name in _LABEL_COLUMNS if name in names), None)
    return None if path is None or label is None else (path, label)
