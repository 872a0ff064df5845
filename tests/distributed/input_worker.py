"""One rank's input, recorded: what a training run would see from a step on, a line for each position.

    python -m tests.distributed.input_worker DATA OUT --rank 1 --world 3 --from-step 7 --steps 30 [--pause 0.05]

Lines of OUT: step, position, image, digest of its pixels, erased box included.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path

import torch

from sws_dist.config.schema import AugmentConfig, DataConfig
from sws_dist.data import manifest, pipeline, sampler
from sws_dist.data.draws import Recipe
from sws_dist.data.mixup import erase
from sws_dist.seed import seed_everything

GLOBAL_BATCH, SIZE, SEED = 12, 32, 3
AUGMENT = AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.5, num_repeats=3)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world", type=int, required=True)
    parser.add_argument("--from-step", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--pause", type=float, default=0.0)
    args = parser.parse_args()
    listed = manifest.scan(args.data, "train")
    order, recipe = sampler.TrainOrder(len(listed), SEED, AUGMENT.num_repeats), Recipe(AUGMENT, SIZE)
    data = DataConfig(root=str(args.data), image_size=SIZE, num_threads=1)
    places = [
        sampler.micro_batch_positions(step, GLOBAL_BATCH, args.rank, args.world)
        for step in range(args.from_step, args.steps)
    ]
    loader = pipeline.train_loader(listed, order, places, recipe, SEED, data, torch.device("cpu"))
    with args.out.open("a") as out:
        for step, (positions, batch) in enumerate(zip(places, loader, strict=True), start=args.from_step):
            assert batch.erase is not None
            for row, position in enumerate(positions):
                seed_everything(SEED, int(position))
                image = erase(batch.images[row : row + 1], batch.erase[row : row + 1])
                digest = hashlib.sha256(image.numpy().tobytes()).hexdigest()
                out.write(f"{step} {position} {batch.indices[row]} {digest}\n")
            out.flush()
            time.sleep(args.pause)


if __name__ == "__main__":
    main()
