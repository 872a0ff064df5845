"""Order the images of a run, and share them among the ranks: pure functions of the seed and the position.

A training run is one long *stream* of positions 0, 1, 2, ... Epoch e holds the positions e * size to (e + 1) * size - 1
and shows each image once (or fewer images ``num_repeats`` times in a row). Optimizer step s takes the global batch of
the positions s * G to (s + 1) * G - 1. So every batch is full, even where it reaches from one epoch into the next, and
a run needs only the number of its step to go on, at any world size.

With ``num_crops`` above 1 the positions p to p + num_crops - 1, for each multiple p of it, are crops of one image that
is decoded once. An epoch keeps its number of positions, and so its length and cost: one *pass* over all images takes
``num_crops`` epochs, as in FKD (Shen & Xing 2022). With one crop, passes are epochs.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch

_MANY = 1 << 20
"""Number of images above which the processes of a node shuffle them one after another."""
_EPOCH_MULTIPLE = 256
"""With repeats, the length of an epoch is a multiple of this, as in timm's RepeatAugSampler."""
_SUBSTITUTE_STREAM = 2 << 64
"""The key of Philox for substitutes; the images' own draws (``draws.py``) and mixing (``mixup.py``) have other keys."""


class TrainOrder:
    """Find the image at each position of the stream.

    The shuffle is torch's ``randperm`` seeded with ``seed`` + the number of the pass, as in DistributedSampler. With
    ``num_repeats`` above 1 each image stands that often in a row and an epoch keeps the length of the data set,
    rounded down to a multiple of 256 (timm's RepeatAugSampler, from DeiT).

    Args:
        num_images: number of images of the data set.
        seed: of the shuffle.
        num_repeats: how often an image stands in a row.
        num_crops: crops of an image that is decoded once.
        shards: [num_images] int: the tar shard of each image.
        window: number of shards. The shards are shuffled, then the images of ``window`` shards at a time, so that only
            these are read meanwhile. None: all images are shuffled.
        share: (rank, world size): only positions of this rank will be asked for, those whose decode number leaves
            ``rank`` when divided by the world size. Of millions of images a rank then keeps its own part of a pass.
    """

    def __init__(
        self,
        num_images: int,
        seed: int,
        num_repeats: int = 1,
        num_crops: int = 1,
        shards: np.ndarray | None = None,
        window: int | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.num_images, self.seed, self.num_repeats, self.num_crops = num_images, seed, num_repeats, num_crops
        self.epoch_size = num_images
        if num_repeats > 1 and num_images >= _EPOCH_MULTIPLE:
            self.epoch_size = num_images // _EPOCH_MULTIPLE * _EPOCH_MULTIPLE
        self._shards, self._window = shards, window
        self._rank, self._world_size = share
        self._passes: dict[int, Future[np.ndarray]] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="order")

    def pass_images(self, number: int) -> np.ndarray:
        """Return the images of one pass in the order in which they are decoded, [epoch_size] int32 or int64."""
        generator = torch.Generator().manual_seed(self.seed + number)
        order = self._shuffle(generator).numpy()
        # Each image ``num_repeats`` times, without a list of all repeats of all images.
        return order if self.num_repeats == 1 else order[np.arange(self.epoch_size) // self.num_repeats]

    def _own_images(self, number: int) -> np.ndarray:
        """Return this rank's images of a pass, in order."""
        with _one_at_a_time() if self.num_images > _MANY else nullcontext():
            return self.pass_images(number)[self._first_place(number) :: self._world_size].copy()

    def _first_place(self, number: int) -> int:
        return (self._rank - number * self.epoch_size) % self._world_size

    def _own_part(self, number: int) -> np.ndarray:
        """Return what ``_own_images`` returns; a thread shuffles the next pass meanwhile."""
        for ahead in (number, number + 1):
            if ahead not in self._passes:
                self._passes[ahead] = self._pool.submit(self._own_images, ahead)
        for old in [known for known in self._passes if not number <= known <= number + 1]:
            del self._passes[old]
        return self._passes[number].result()

    def _shuffle(self, generator: torch.Generator) -> torch.Tensor:
        # The draws are the same for either type.
        dtype = torch.int32 if self.num_images < 1 << 31 else torch.int64
        order = torch.randperm(self.num_images, generator=generator, dtype=dtype)
        if self._shards is None or self._window is None:
            return order
        shard_order = torch.randperm(int(self._shards.max()) + 1, generator=generator)
        windows = shard_order[torch.from_numpy(self._shards)][order.long()] // self._window
        return order[windows.argsort(stable=True)]

    def images(self, positions: np.ndarray) -> np.ndarray:
        """Return the images [n] at positions [n] of the stream, which have to be of this rank's share."""
        decodes = positions // self.num_crops
        assert (decodes % self._world_size == self._rank).all(), "positions of another rank"
        passes, places = np.divmod(decodes, self.epoch_size)
        images = np.empty_like(positions)
        for number in np.unique(passes).tolist():
            here = passes == number
            images[here] = self._own_part(number)[(places[here] - self._first_place(number)) // self._world_size]
        return images

    def substitute(self, position: int, attempt: int) -> int:
        """Return the image that replaces an unreadable one.

        Args:
            position: of its first crop.
            attempt: 0 if the image that belongs there cannot be read, n if its n-th substitute cannot be read either.
        """
        key, counter = _SUBSTITUTE_STREAM + self.seed, [attempt, position, 0, 0]
        return int(np.random.Generator(np.random.Philox(key=key, counter=counter)).integers(self.num_images))


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Let one process of a node at a time run the block: each holds the order of all images for a moment."""
    with (Path(tempfile.gettempdir()) / f"sws-dist-{os.getuid()}.shuffle").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed, also where the process dies
        yield


def micro_batch_positions(step: int, global_batch: int, micro: int, num_micros: int, num_crops: int = 1) -> np.ndarray:
    """Return the positions of one micro-batch of an optimizer step: every ``num_micros``-th image, with all its crops.

    The micro-batches are the same whether they are spread over ranks or accumulated on one. Without accumulation each
    rank sees the images that torch's and timm's distributed samplers give it.

    Args:
        step: number of the optimizer step, from 0.
        global_batch: number of images of a step, each crop counted.
        micro: number of the micro-batch within the step, from 0.
        num_micros: micro-batches of a step: ranks x accumulation.
        num_crops: crops of an image that is decoded once; a micro-batch holds a multiple of it.

    Returns:
        [global_batch / num_micros] int64, rising.
    """
    assert global_batch % (num_micros * num_crops) == 0
    num_decodes = global_batch // num_crops
    decodes = np.arange(step * num_decodes + micro, (step + 1) * num_decodes, num_micros)
    return (decodes[:, None] * num_crops + np.arange(num_crops)).ravel()


def eval_batches(num_images: int, rank: int, world_size: int, batch: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return this rank's evaluation batches.

    Every image counts exactly once over all ranks. All ranks get the same number of equally large batches, since
    ZeRO-3's forward is a collective. Images that do not count fill the last batch where it would be too small.

    Returns:
        For each batch its images [b] int64, and whether each of them counts [b] bool.
    """
    per_rank = -(-num_images // world_size)
    batches = []
    for start in range(0, per_rank, batch):
        images = np.arange(start, min(start + batch, per_rank)) * world_size + rank
        batches.append((np.minimum(images, num_images - 1), images < num_images))
    return batches
