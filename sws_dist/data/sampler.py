"""In which order images are seen, and by which rank: pure functions of the seed and the position.

A training run is one long *stream* of positions 0, 1, 2, ...: epoch e holds positions e * size to
(e + 1) * size - 1, each image once (or ``num_repeats`` times in a row, with correspondingly fewer images).
Optimizer step s takes the global batch of positions s * G to (s + 1) * G - 1, so every batch is full, also where
it reaches from one epoch into the next, and nothing but the step is needed to go on, at any world size.
"""

from __future__ import annotations

import numpy as np
import torch

_ROUND = 256  # timm's RepeatAugSampler keeps a multiple of this many images an epoch
_SUBSTITUTE_STREAM = 2 << 64  # apart from the images' own draws and the mixing's (see recipe.py, mixing.py)


class TrainOrder:
    """Which image stands at each position of the stream.

    The shuffle is torch's ``randperm`` seeded with ``seed + epoch``, as in DistributedSampler. With
    ``num_repeats`` above 1 each image stands that often in a row and an epoch keeps the length of the data set,
    rounded down to a multiple of 256 (timm's RepeatAugSampler, from DeiT).

    Args:
        shards: [num_images] the tar shard of each image, and ``window``: shuffle the shards, then the images of so
            many shards at a time, so that only these are read meanwhile. None: shuffle all images.
    """

    def __init__(
        self,
        num_images: int,
        seed: int,
        num_repeats: int = 1,
        shards: np.ndarray | None = None,
        window: int | None = None,
    ) -> None:
        self.num_images, self.seed, self.num_repeats = num_images, seed, num_repeats
        self.epoch_size = num_images
        if num_repeats > 1 and num_images >= _ROUND:
            self.epoch_size = num_images // _ROUND * _ROUND
        self._shards, self._window = shards, window
        self._cached: tuple[int, np.ndarray] | None = None

    def epoch(self, epoch: int) -> np.ndarray:
        """The images of one epoch in order, [epoch_size] int64."""
        if self._cached is None or self._cached[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = self._shuffled(generator).repeat_interleave(self.num_repeats)
            self._cached = epoch, order[: self.epoch_size].numpy()
        return self._cached[1]

    def _shuffled(self, generator: torch.Generator) -> torch.Tensor:
        order = torch.randperm(self.num_images, generator=generator)
        if self._shards is None or self._window is None:
            return order
        turn = torch.randperm(int(self._shards.max()) + 1, generator=generator)  # of each shard
        windows = turn[torch.from_numpy(self._shards)][order] // self._window
        return order[windows.argsort(stable=True)]

    def images(self, positions: np.ndarray) -> np.ndarray:
        """Positions of the stream [n] -> images [n]."""
        epochs, places = np.divmod(positions, self.epoch_size)
        images = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            images[here] = self.epoch(int(epoch))[places[here]]
        return images

    def substitute(self, position: int, attempt: int) -> int:
        """The image to take at a position whose own (attempt 0) or latest substitute (1, 2, ...) cannot be read."""
        key, counter = _SUBSTITUTE_STREAM + self.seed, [attempt, position, 0, 0]
        return int(np.random.Generator(np.random.Philox(key=key, counter=counter)).integers(self.num_images))


def micro_batch_positions(step: int, global_batch: int, micro: int, num_micros: int) -> np.ndarray:
    """Positions of micro-batch ``micro`` of the ``num_micros`` (ranks x accumulation) of an optimizer step.

    Every ``num_micros``-th position: the same micro-batches whether they are spread over ranks or accumulated on
    one, and, without accumulation, the same image on the same rank as torch's and timm's distributed samplers.
    """
    return np.arange(step * global_batch + micro, (step + 1) * global_batch, num_micros)


def eval_batches(num_images: int, rank: int, world_size: int, batch: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """This rank's evaluation batches: images [b] and whether each counts [b].

    Every image counts exactly once over all ranks. All ranks get the same number of equally large batches, since
    ZeRO-3's forward is a collective; what is missing at the end is filled with images that do not count.
    """
    per_rank = -(-num_images // world_size)
    batches = []
    for start in range(0, per_rank, batch):
        images = np.arange(start, min(start + batch, per_rank)) * world_size + rank
        batches.append((np.minimum(images, num_images - 1), images < num_images))
    return batches
