"""Draw what the model sees, for TensorBoard and ``show-batch``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from sws_dist.config.schema import DataConfig
from sws_dist.data.loader import Batch
from sws_dist.data.mixup import denormalise
from sws_dist.logging.recorder import Recorder

_MAX_SHOWN = 32


def labelled_grid(images: Tensor, captions: list[str], columns: int = 8, tile: int = 112) -> np.ndarray:
    """Arrange images in a grid, with a caption of one or more lines under each.

    Args:
        images: [B, 3, S, S] uint8.

    Returns:
        One picture [H, W, 3] uint8.
    """
    rows = -(-len(captions) // columns)
    lines = [caption.split("\n") for caption in captions]
    height = tile + 6 + 12 * max(map(len, lines), default=0)
    picture = Image.new("RGB", (columns * (tile + 4), rows * height), "white")
    draw = ImageDraw.Draw(picture)
    for index, caption in enumerate(lines):
        pixels = images[index].permute(1, 2, 0).cpu().numpy()
        x, y = index % columns * (tile + 4), index // columns * height
        picture.paste(Image.fromarray(pixels).resize((tile, tile), Image.Resampling.NEAREST), (x, y))
        for number, line in enumerate(caption):
            while line and draw.textlength(line) > tile:  # Pillow's font is not of one width
                line = line[:-1]
            draw.text((x + 2, y + tile + 2 + 12 * number), line, fill="black")
    return np.asarray(picture)


def log_first_batch(
    recorder: Recorder,
    images: Tensor,
    batch: Batch,
    teacher_logits: Tensor | None,
    classes: Sequence[str],
    config: DataConfig,
) -> None:
    """Write the first batch as the model sees it, with its labels and the teacher's guesses.

    Args:
        images: [B, 3, S, S], normalised, erased and mixed.
        teacher_logits: [B, classes], or None.
    """
    if not recorder.active:
        return
    count = min(_MAX_SHOWN, len(images))
    captions = [classes[label] for label in batch.labels[:count].tolist()]
    if teacher_logits is not None:
        guesses = teacher_logits[:count].argmax(dim=1).tolist()
        captions = [f"{caption} / {classes[guess]}" for caption, guess in zip(captions, guesses, strict=True)]
    pixels = denormalise(images[:count], config.mean, config.std)
    recorder.image("train/batch (label / teacher)", labelled_grid(pixels, captions), step=0)
