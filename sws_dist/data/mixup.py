"""Random erasing, mixup, cutmix and label smoothing, on the device, after normalisation (timm's definitions).

The draws come from numpy as functions of the micro-batch's first position, so they are the same on every device;
erased pixels are filled from torch's generator, which the trainer seeds for each micro-batch.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sws_dist.config.schema import AugmentConfig

_MIXING_STREAM = 1 << 64  # apart from the images' own draws, which take keys below


def erase(images: Tensor, boxes: np.ndarray, mode: str = "pixel") -> Tensor:
    """Fill each image's box (top, left, height, width; height 0: none), in place.

    images [B, 3, H, W], normalised; boxes [B, 4] int. ``mode``: unit normal noise for each ``pixel``, one unit
    normal colour a box (``rand``), or zero, which is the data set's mean colour (``const``).
    """
    for image, (top, left, height, width) in zip(images, boxes.tolist(), strict=True):
        if not height:
            continue
        box = image[:, top : top + height, left : left + width]
        if mode == "pixel":
            box.normal_()
        elif mode == "rand":
            box.copy_(torch.randn(len(image), 1, 1, dtype=image.dtype, device=image.device))
        else:
            box.zero_()
    return images


class Mixing:
    """mixup and cutmix of a whole micro-batch with its own reverse, and smoothed labels (timm's ``Mixup``)."""

    def __init__(self, config: AugmentConfig, num_classes: int, seed: int) -> None:
        self.config, self.num_classes, self.seed = config, num_classes, seed

    @property
    def changes_images(self) -> bool:
        return self.config.mixup > 0 or self.config.cutmix > 0

    def __call__(self, images: Tensor, labels: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """images [B, 3, H, W], labels [B] -> images, soft targets [B, classes]; labels as they are if nothing mixes.

        ``position``: the micro-batch's first position in the stream; it alone decides the draws.
        """
        if not self.changes_images and not self.config.smoothing:
            return images, labels
        targets = self._smooth(labels)
        if not self.changes_images:
            return images, targets
        use_cutmix, share, rng = self.draw(position)
        if use_cutmix:
            images, share = _cutmix(images, share, rng)
        else:
            images = images.lerp(images.flip(0), 1 - share)
        return images, targets.lerp(targets.flip(0), 1 - share)

    def draw(self, position: int) -> tuple[bool, float, np.random.Generator]:
        """Cutmix (or else mixup), the share of the unreversed batch, and the generator to go on with."""
        config = self.config
        rng = np.random.Generator(np.random.Philox(key=_MIXING_STREAM + self.seed, counter=[0, position, 0, 0]))
        use_cutmix = rng.random() < config.mixup_switch_prob if config.mixup > 0 else True
        use_cutmix = use_cutmix and config.cutmix > 0
        alpha = config.cutmix if use_cutmix else config.mixup
        return use_cutmix, float(rng.beta(alpha, alpha)), rng

    def _smooth(self, labels: Tensor) -> Tensor:
        off = self.config.smoothing / self.num_classes
        one_hot = F.one_hot(labels, self.num_classes).float()
        return one_hot * (1 - self.config.smoothing) + off


def _cutmix(images: Tensor, share: float, rng: np.random.Generator) -> tuple[Tensor, float]:
    """Paste a box of the reversed batch; the share is corrected to the box's area inside the image."""
    height, width = images.shape[-2:]
    cut = np.sqrt(1 - share)
    cut_h, cut_w = int(height * cut), int(width * cut)
    centre_y, centre_x = rng.integers(height), rng.integers(width)
    top, bottom = np.clip([centre_y - cut_h // 2, centre_y + (cut_h + 1) // 2], 0, height)
    left, right = np.clip([centre_x - cut_w // 2, centre_x + (cut_w + 1) // 2], 0, width)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    return mixed, 1.0 - float((bottom - top) * (right - left)) / (height * width)


def denormalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Normalised [B, 3, H, W] -> uint8 for looking at."""
    shape = (1, -1, 1, 1)
    pixels = images.float() * torch.tensor(std, device=images.device).view(shape)
    pixels = pixels + torch.tensor(mean, device=images.device).view(shape)
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8)
