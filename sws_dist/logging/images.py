"""TODO: say what this module does."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from sws_dist.data.loader import Batch
from sws_dist.data.mixup import denormalise


def labelled_grid(images: Tensor, captions: list[str], columns: int = 8, tile: int = 112) -> np.ndarray:
    """images [B, 3, S, S] uint8 with a caption of one or more lines under each -> one picture [H, W, 3] uint8."""
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


def log_first_batch(trainer: Any, images: Tensor, batch: Batch, teacher_logits: Tensor | None) -> None:
    """The first batch as the model sees it, with its labels and the teacher's guess, for TensorBoard."""
    if not trainer.world.is_main:
        return
    count = min(32, len(images))
    pixels = denormalise(images[:count], trainer.config.data.mean, trainer.config.data.std)
    names = trainer.train_set.classes
    captions = [names[label] for label in batch.labels[:count].tolist()]
    if teacher_logits is not None:
        guesses = teacher_logits[:count].argmax(dim=1).tolist()
        captions = [f"{caption} / {names[guess]}" for caption, guess in zip(captions, guesses, strict=True)]
    trainer.recorder.image("train/batch (label / teacher)", labelled_grid(pixels, captions), trainer.step)
