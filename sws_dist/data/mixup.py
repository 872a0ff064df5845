"""Apply random erasing, mixup, cutmix and label smoothing on the device, after normalisation, as timm defines them.

numpy draws them as functions of the micro-batch's first position, so the draws are the same on every device. Erased
pixels are filled from torch's generator, which the trainer seeds for each micro-batch.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sws_dist.config.schema import AugmentConfig
from sws_dist.data.loader import Batch
from sws_dist.seed import seed_everything

_MIXING_STREAM = 1 << 64
"""The key of Philox for mixing. The keys of the images' own draws are below it."""


def erase(images: Tensor, boxes: np.ndarray, mode: str = "pixel") -> Tensor:
    """Fill one box of each image, in place.

    Args:
        images: [B, 3, H, W] float, normalised.
        boxes: [B, 4] int: top, left, height and width in pixels; a height of 0 means no box.
        mode: what fills the box. ``pixel``: unit normal noise, drawn for each pixel. ``rand``: one unit normal colour.
            ``const``: zero, which is the data set's mean colour.

    Returns:
        ``images``.
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
    """Mix a whole micro-batch with its own reverse, and smooth its labels, as timm's ``Mixup`` does.

    Args:
        config: strengths and chances of mixup, cutmix and smoothing.
        num_classes: number of labels.
        seed: of the draws.
    """

    def __init__(self, config: AugmentConfig, num_classes: int, seed: int) -> None:
        self.config, self.num_classes, self.seed = config, num_classes, seed

    @property
    def changes_images(self) -> bool:
        """True if mixup or cutmix is on."""
        return self.config.mixup > 0 or self.config.cutmix > 0

    def __call__(self, images: Tensor, labels: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Mix one micro-batch.

        Args:
            images: [B, 3, H, W] float.
            labels: [B] int64.
            position: the micro-batch's first position in the stream. Seed and position alone decide the draws.

        Returns:
            Images [B, 3, H, W] and soft targets [B, classes] float32; or the labels [B] where nothing is mixed or
            smoothed.
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
        """Draw how a micro-batch is mixed.

        Returns:
            True for cutmix or False for mixup, the share of the batch that is not reversed, and the generator for the
            position of cutmix's box.
        """
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
    """Paste a box of the reversed batch. Returns the images, and the share corrected to the box's area in the image."""
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
    """Turn normalised images [B, 3, H, W] float back into pixels [B, 3, H, W] uint8, to look at them.

    Args:
        mean, std: what the red, green and blue channel (of 0 to 1) were normalised with.
    """
    shape = (1, -1, 1, 1)
    pixels = images.float() * torch.tensor(std, device=images.device).view(shape)
    pixels = pixels + torch.tensor(mean, device=images.device).view(shape)
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8)


def augment_batch(batch: Batch, mixing: Mixing, config: AugmentConfig, seed: int) -> tuple[Tensor, Tensor]:
    """Erase boxes of a micro-batch's images, and mix images and labels.

    All generators are seeded with the batch's place in the run first: what is drawn here, and by drop-path afterwards,
    does not depend on what ran before.

    Returns:
        Images [B, 3, H, W], and targets as ``Mixing`` returns them.
    """
    seed_everything(seed, batch.position)
    images = batch.images if batch.erase is None else erase(batch.images, batch.erase, config.re_mode)
    return mixing(images, batch.labels, batch.position)
