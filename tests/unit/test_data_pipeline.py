"""Compare DALI's pixels with Pillow's and torchvision's on real files of many kinds, with equal draws on both sides."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize
from torchvision.transforms import functional as F

from sws_dist.config.schema import AffineConfig, AugmentConfig, DataConfig
from sws_dist.data import manifest, sampler
from sws_dist.data.draws import Draws, Recipe
from sws_dist.data.loader import Batch
from sws_dist.data.manifest import Manifest
from sws_dist.data.mixup import denormalise
from sws_dist.data.pipeline import eval_loader, train_loader
from tests.unit import images

CPU = torch.device("cpu")
SIZE = 224


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """List twelve files of twelve kinds, in two classes."""
    root = tmp_path_factory.mktemp("kinds")
    files = images.write_sample_images(root / "all")
    for index, file in enumerate(files):
        folder = root / "val" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        file.rename(folder / file.name)
    return manifest.scan(root, "val")


def config(listed: Manifest, **keys) -> DataConfig:
    return DataConfig(root=str(listed.folder.parent), num_threads=2, **keys)


def pixels(batch: Batch, data: DataConfig) -> np.ndarray:
    """Return the model's input as pixels, [B, S, S, 3] uint8."""
    return denormalise(batch.images, data.mean, data.std).permute(0, 2, 3, 1).numpy()


def pillow(listed: Manifest, index: int) -> Image.Image:
    return Image.open(listed.file(index)).convert("RGB")


def difference(ours: np.ndarray, theirs: Image.Image) -> np.ndarray:
    """Return the absolute difference in 8-bit units, [H, W, 3]."""
    assert ours.shape[:2] == (theirs.height, theirs.width)
    return np.abs(ours.astype(np.int16) - np.asarray(theirs))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("size", "crop_pct", "mode"),
    [(224, 0.875, "center"), (160, 0.95, "center"), (32, 1.0, "center"), (160, 0.9, "squash")],
)
def test_evaluation_gives_torchvisions_pixels(
    listed: Manifest, size: int, crop_pct: float, mode: Literal["center", "squash"], interpolation: str
) -> None:
    data = config(listed, image_size=size, crop_pct=crop_pct, crop_mode=mode, interpolation=interpolation)
    short = int(size / crop_pct)
    sides = (short, short) if mode == "squash" else short
    theirs = Compose([Resize(sides, InterpolationMode(interpolation)), CenterCrop(size)])
    errors = {}
    for batch in eval_loader(listed, sampler.eval_batches(len(listed), 0, 1, 5), data, CPU):
        for index, ours in zip(batch.indices, pixels(batch, data), strict=True):
            errors[listed.paths[index][2:-4]] = difference(ours, theirs(pillow(listed, index)))
    assert len(errors) == len(listed)
    means = {name: float(error.mean()) for name, error in errors.items()}
    print(size, interpolation, {name: f"{mean:.4f}" for name, mean in means.items()})  # shown by pytest -s
    # Pillow 13 squashes tall images along the other side first, which files of noise show.
    mean, most = (0.3, 20) if mode == "squash" else (0.02, 8)
    assert max(means.values()) <= mean, means
    assert max(error.max() for error in errors.values()) <= most


def test_normalisation_is_torchvisions(listed: Manifest) -> None:
    data = config(listed, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1))
    (batch,) = eval_loader(listed, [(np.arange(2), np.ones(2, dtype=bool))], data, CPU)
    for ours, uint8 in zip(batch.images, pixels(batch, data), strict=True):
        expected = F.normalize(F.to_tensor(uint8), list(data.mean), list(data.std))
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)
    assert batch.images.dtype == torch.float32
    assert batch.images.shape == (2, 3, SIZE, SIZE)


def training(listed: Manifest, augment: AugmentConfig, data: DataConfig, epochs: int) -> list[tuple[Batch, Draws]]:
    """Load ``epochs`` epochs, each as one batch. Returns them with the draws that the loader must have used."""
    count = len(listed)
    recipe, order = Recipe(augment, data.image_size), sampler.TrainOrder(count, seed=1)
    positions = [np.arange(epoch * count, (epoch + 1) * count) for epoch in range(epochs)]
    loader = train_loader(listed, order, positions, recipe, 5, data, CPU)
    return [
        (batch, recipe.draw(5, places, listed.sizes[batch.indices]))
        for places, batch in zip(positions, loader, strict=True)
    ]


def crop_and_flip(image: Image.Image, draws: Draws, row: int, size: int, resample: Image.Resampling) -> Image.Image:
    (top, left), (height, width) = draws.crop_start[row].tolist(), draws.crop_shape[row].tolist()
    image = image.crop((left, top, left + width, top + height)).resize((size, size), resample)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draws.flip[row] else image


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [224, 33])
def test_training_crops_give_pillows_pixels(listed: Manifest, size: int, interpolation: str) -> None:
    data = config(listed, image_size=size, interpolation=interpolation)
    resample = Image.Resampling[interpolation.upper()]
    errors = []
    for batch, draws in training(listed, AugmentConfig(), data, epochs=4):
        for row, (index, ours) in enumerate(zip(batch.indices, pixels(batch, data), strict=True)):
            expected = crop_and_flip(pillow(listed, index), draws, row, size, resample)
            error = difference(ours, expected)
            errors.append(error.mean())
    print(f"mean {np.mean(errors):.4f} worst {max(errors):.4f}")  # shown by pytest -s
    assert np.mean(errors) <= 0.05
    assert max(errors) <= 0.4
    assert len(errors) == 4 * len(listed)


def test_affine_gives_torchvisions_pixels(listed: Manifest) -> None:
    """Leave out noise and thin lines, where any two resampling filters differ by tens (see ``warp``)."""
    affine = AffineConfig(degrees=15, translate=0.12, scale=(0.85, 1.15), fill=(10, 200, 30))
    data = config(listed, image_size=128)
    errors = []
    for batch, draws in training(listed, AugmentConfig(affine=affine), data, epochs=3):
        assert draws.affine is not None
        for row, (index, ours) in enumerate(zip(batch.indices, pixels(batch, data), strict=True)):
            if "noise" in listed.paths[index] or "drawing" in listed.paths[index]:
                continue
            image = crop_and_flip(pillow(listed, index), draws, row, 128, Image.Resampling.BICUBIC)
            coefficients = draws.affine[row][:2].ravel().tolist()
            expected = image.transform(
                image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC, fillcolor=affine.fill
            )
            errors.append(difference(ours, expected).mean())
    print(f"mean {np.mean(errors):.4f} worst {max(errors):.4f}")  # shown by pytest -s
    assert np.mean(errors) <= 1.3
    assert max(errors) <= 2.0


def test_full_recipe_depends_on_positions_alone(listed: Manifest) -> None:
    """Check that one rank, three ranks and a start in mid-epoch give the same images, pixel for pixel."""
    augment = AugmentConfig(
        auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.5, affine=AffineConfig(degrees=10, scale=(0.9, 1.1))
    )
    data, count = config(listed, image_size=64), len(listed)
    recipe = Recipe(augment, 64)

    def run(positions: list[np.ndarray]) -> dict[int, tuple[int, bytes, bytes]]:
        order = sampler.TrainOrder(count, seed=1)
        loader = train_loader(listed, order, positions, recipe, 5, data, CPU)
        seen = {}
        for places, batch in zip(positions, loader, strict=True):
            assert batch.erase is not None
            assert torch.equal(batch.labels, torch.from_numpy(listed.labels[batch.indices]))
            for row, place in enumerate(places):
                key = int(batch.indices[row]), batch.images[row].numpy().tobytes(), batch.erase[row].tobytes()
                seen[int(place)] = key
        return seen

    whole = run([np.arange(s * 12, s * 12 + 12) for s in range(4)])
    assert len(set(whole.values())) == 4 * 12, "each position has its own draws"
    ranks = [sampler.micro_batch_positions(step, 12, rank, 3) for step in range(4) for rank in range(3)]
    assert run(ranks) == whole
    assert run([np.arange(17, 22), np.arange(22, 48)]) == {place: whole[place] for place in range(17, 48)}


def test_several_crops_a_decode_are_those_of_as_many_decodes(listed: Manifest) -> None:
    """Check that decoding an image once changes no pixel of its crops, on one rank and on two."""
    full = AugmentConfig(auto_augment="rand-m9-n1-mstd0.5-inc1", re_prob=0.5, affine=AffineConfig(degrees=10))
    data, order = config(listed, image_size=64), sampler.TrainOrder(len(listed), seed=1, num_crops=4)

    def run(num_crops: int, num_micros: int) -> dict[int, tuple[int, int, bytes, bytes]]:
        positions = [
            sampler.micro_batch_positions(step, 24, micro, num_micros, num_crops)
            for step in range(2)
            for micro in range(num_micros)
        ]
        recipe, seen = Recipe(replace(full, num_crops=num_crops), 64), {}
        for places, batch in zip(positions, train_loader(listed, order, positions, recipe, 5, data, CPU), strict=True):
            assert batch.erase is not None
            np.testing.assert_array_equal(batch.positions, places)
            rows = zip(batch.indices, batch.labels, batch.images, batch.erase, strict=True)
            for place, (index, label, image, box) in zip(places, rows, strict=True):
                seen[int(place)] = int(index), int(label), image.numpy().tobytes(), box.tobytes()
        return seen

    expected = run(num_crops=1, num_micros=1)
    assert len({image for _, _, image, _ in expected.values()}) == 48, "each crop has its own draws"
    assert len({index for index, *_ in expected.values()}) == 12, "of one image four times"
    assert run(num_crops=4, num_micros=1) == expected
    assert run(num_crops=4, num_micros=2) == expected
