"""Run a model on images as an evaluation does: the same reading, the same normalisation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from sws_dist.config.schema import DEFAULT_CROP_PCT, DEFAULT_NUM_THREADS, DataConfig

if TYPE_CHECKING:
    from sws_dist.data.bad_images import BadImages
    from sws_dist.data.manifest import Manifest


def input_config(
    model: Any,
    name: str,
    root: Path,
    image_size: int | None = None,
    crop_pct: float | None = None,
    num_threads: int = DEFAULT_NUM_THREADS,
) -> DataConfig:
    """Return how images are read for ``model``.

    Args:
        model: has timm's ``pretrained_cfg``.
        name: names the model in messages.
        root: the folder above the images.
        image_size, crop_pct: other values than the model's own.
        num_threads: threads that decode.

    Raises:
        ValueError: a model that does not say how it wants its images.
    """
    about = getattr(model, "pretrained_cfg", None)
    if not about:
        raise ValueError(
            f"{name} has no pretrained_cfg, which says how it wants its images; models of timm.create_model and of "
            "sws_dist have one"
        )
    missing = [key for key in ("mean", "std", "input_size") if not about.get(key)]
    if missing:
        raise ValueError(f"{name}: does not say its {', '.join(missing)}; convert it again")
    try:
        return DataConfig(
            root=str(root),
            image_size=about["input_size"][-1] if image_size is None else image_size,
            mean=tuple(about["mean"]),
            std=tuple(about["std"]),
            crop_pct=(about.get("crop_pct") or DEFAULT_CROP_PCT) if crop_pct is None else crop_pct,
            crop_mode=about.get("crop_mode") or "center",
            interpolation=about.get("interpolation") or "bicubic",
            num_threads=num_threads,
        )
    except ValidationError as error:
        wrong = [f"{e['loc'][-1]} {e['input']!r}: {e['msg'][0].lower()}{e['msg'][1:]}" for e in error.errors()]
        raise ValueError("; ".join(wrong)) from None


def read_images(
    images: Manifest, rows: np.ndarray, config: DataConfig, device: torch.device, batch_size: int, bad: BadImages
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Yield images as an evaluation reads them, on this rank alone.

    Args:
        rows: [n]: which of ``images``, in their order.
        bad: collects those that cannot be read.

    Yields:
        The rows [b] of those that could be read, and the images [b, 3, height, width], float32, normalised.
    """
    from sws_dist.data import pipeline  # needs DALI

    parts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    batches = [(part, np.ones(len(part), dtype=bool)) for part in parts]
    for batch in pipeline.eval_loader(images, batches, config, device, bad):
        yield batch.indices[batch.valid], batch.images[torch.from_numpy(batch.valid).to(device)]
