"""Compare an exported file with the model that it was made of, on the same images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sws_dist.class_names import name_labels
from sws_dist.errors import RunError
from sws_dist.export.source import ExportSource
from sws_dist.inference import input_config, read_images

NUM_IMAGES = 32
"""Images that are compared."""


@dataclass(frozen=True)
class TestImages:
    """Images to compare on."""

    images: Tensor
    """[n, 3, height, width], float32, normalised."""
    kind: str
    """What they are, for messages."""


@dataclass(frozen=True)
class Parity:
    """How far the logits of an exported file are from the model's."""

    difference: float
    """The largest difference of a logit, as a share of the range of the model's logits."""
    tolerance: float
    """The largest difference that is accepted."""
    agreement: float
    """Share of the images with the same first label."""

    def __str__(self) -> str:
        if not self.difference:
            return "the same logits"
        return (
            f"logits differ by {self.difference:.1e} of their range (accepted: {self.tolerance:.0e}), "
            f"{100 * self.agreement:.0f} % of the first labels are the same"
        )


def sample_images(source: ExportSource, data: Path | None) -> TestImages:
    """Return images from all over a folder, as an evaluation reads them, or noise.

    Args:
        data: a folder of class folders, as ``sws evaluate`` takes it.

    Raises:
        ValueError: a folder without images of the model's classes.
    """
    if data is None:
        generator = torch.Generator().manual_seed(0)
        return TestImages(torch.randn(8, *source.image_shape, generator=generator), "8 images of noise")
    from sws_dist.data import manifest  # needs DALI
    from sws_dist.data.bad_images import BadImages

    config = input_config(source.model, str(source.file), data.parent)
    labels = name_labels(source.model, str(source.file), data)
    found = manifest.scan(data.parent, data.name, labels)
    rows = np.unique(np.linspace(0, len(found) - 1, NUM_IMAGES).astype(np.int64))
    parts = read_images(found, rows, config, torch.device("cpu"), NUM_IMAGES, BadImages())
    images = torch.cat([images for _, images in parts])
    if not len(images):
        raise ValueError(f"--data {data}: none of {len(rows)} images can be read")
    return TestImages(images, f"{len(images)} images of {data}")


def compare(
    name: str, exported: Callable[[Tensor], Any], model: Callable[[Tensor], Tensor], test: TestImages, tolerance: float
) -> Parity:
    """Compare logits, in a batch of one image and in one of all others.

    Raises:
        RunError: they differ by more than ``tolerance``, or are not finite.
    """
    with torch.inference_mode():
        batches = [batch for batch in (test.images[:1], test.images[1:]) if len(batch)]
        expected = torch.cat([model(batch) for batch in batches])
        found = torch.cat([exported(batch) for batch in batches])
    span = float(expected.max() - expected.min())
    difference = float((found - expected).abs().max()) / span
    agreement = float((found.argmax(1) == expected.argmax(1)).float().mean())
    parity = Parity(difference, tolerance, agreement)
    if not difference <= tolerance:  # NaN too
        raise RunError(
            f"{name}: {parity}, on {test.kind}; nothing is written. fp16 and int8 do not suit every model; any "
            "other file that differs is a fault to report"
        )
    return parity
