"""Record what one rank of a training run would see from a step on, a line for each position."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path

import torch

from sws_dist.config.schema import AugmentConfig, DataConfig
from sws_dist.data import manifest, pipeline, sampler
from sws_dist.data.draws import Recipe
from sws_dist.data.mixup import erase
from sws_dist.seed import seed_everything

GLOBAL_BATCH, SIZE, SEED = 12, 32, 3
AUGMENT = AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.5, num_repeats=3)


def record(root: Path, out_path: str, world: int, from_step: int, num_steps: int, stop_at: int | None) -> None:
    """Write a line of step, position, image, and a digest of its pixels, erased box included, for each position.

    Args:
        out_path: with ``{rank}`` for the rank.
        stop_at: the step before which rank 0 waits to be killed, amid what it has read ahead; rank 1 is one step
            further, and so on. None: read to the end.
    """
    rank = int(os.environ.get("RANK", 0))
    listed = manifest.scan(root, "train")
    order, recipe = sampler.TrainOrder(len(listed), SEED, AUGMENT.num_repeats), Recipe(AUGMENT, SIZE)
    data = DataConfig(root=str(root), image_size=SIZE, num_threads=1)
    places = [sampler.micro_batch_positions(step, GLOBAL_BATCH, rank, world) for step in range(from_step, num_steps)]
    loader = pipeline.train_loader(listed, order, places, recipe, SEED, data, torch.device("cpu"))
    with Path(out_path.format(rank=rank)).open("w") as out:
        for step, (positions, batch) in enumerate(zip(places, loader, strict=True), start=from_step):
            while stop_at is not None and step == stop_at + rank:
                signal.pause()
            assert batch.erase is not None
            for row, position in enumerate(positions):
                seed_everything(SEED, int(position))
                image = erase(batch.images[row : row + 1], batch.erase[row : row + 1])
                digest = hashlib.sha256(image.numpy().tobytes()).hexdigest()
                out.write(f"{step} {position} {batch.indices[row]} {digest}\n")
            out.flush()
