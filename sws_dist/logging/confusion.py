"""Show which classes are taken for which: a picture for TensorBoard, and a table beside it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

MAX_CLASSES = 1000
"""A matrix of more classes is not drawn."""
_SIDE = 640
_LEAST_FOR_NAMES, _LEAST_FOR_NUMBERS = 12, 24
"""Pixels of a cell from which on names and numbers fit."""
_MAX_NAME = 16


def confusion_table(counts: np.ndarray, classes: Sequence[str]) -> str:
    """Write a confusion matrix as CSV: a row for each label, a column for each class that it is taken for.

    Args:
        counts: [labels, guesses].
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["label / guess", *classes])
    rows.writerows([name, *row] for name, row in zip(classes, counts.tolist(), strict=True))
    return text.getvalue()


def draw_confusion(counts: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Draw a confusion matrix: rows are labels, columns guesses, blue are hits and red the mistakes.

    A cell's colour is the root of its share of the row, so that rare mistakes are seen.

    Args:
        counts: [labels, guesses].

    Returns:
        A picture [H, W, 3] uint8.
    """
    cell = min(48, max(1, _SIDE // len(classes)))
    shade = np.sqrt(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))[..., None]
    hit = np.eye(len(classes), dtype=bool)[..., None]
    pixels = 255 - shade * np.where(hit, (205.0, 130.0, 40.0), (30.0, 175.0, 185.0))
    cells = Image.fromarray(pixels.round().astype(np.uint8).repeat(cell, axis=0).repeat(cell, axis=1))
    if cell < _LEAST_FOR_NAMES:
        return np.asarray(cells)
    names = [name[:_MAX_NAME] for name in classes]
    margin = 8 + round(max(ImageDraw.Draw(cells).textlength(name) for name in names))
    picture = Image.new("RGB", (margin + cells.width, margin + cells.height), "white")
    picture.paste(_sideways(names, cell, margin), (margin, 0))
    picture.paste(cells, (margin, margin))
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(names):
        draw.text((4, margin + (row + 0.5) * cell), name, fill="black", anchor="lm")
    if cell >= _LEAST_FOR_NUMBERS:
        for row, column in np.argwhere(counts).tolist():
            place = (margin + (column + 0.5) * cell, margin + (row + 0.5) * cell)
            draw.text(place, str(counts[row, column]), fill="black", anchor="mm")
    return np.asarray(picture)


def _sideways(names: Sequence[str], cell: int, margin: int) -> Image.Image:
    """Write names that read upwards, one in each column."""
    picture = Image.new("RGB", (margin, cell * len(names)), "white")
    draw = ImageDraw.Draw(picture)
    for row, name in enumerate(names):
        draw.text((4, (row + 0.5) * cell), name, fill="black", anchor="lm")
    return picture.rotate(90, expand=True)
