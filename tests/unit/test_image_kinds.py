"""Test that each kind of image file is read by its rule in docs/data.md, or refused with its reason.

Extreme sizes are here too: large images, and long and thin ones.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from sws_dist.config.schema import AugmentConfig, DataConfig
from sws_dist.data import manifest, sampler
from sws_dist.data.draws import Recipe
from sws_dist.data.loader import Loader
from sws_dist.data.manifest import Manifest
from sws_dist.data.mixup import denormalise
from sws_dist.data.pipeline import eval_loader, train_loader
from sws_dist.data.validate import BadImageError, check_image, check_image_header
from tests.unit import images
from tests.unit.image_kinds import READ, REFUSED, SIDE, png_file, turned

CPU = torch.device("cpu")
WHOLE = AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0.0)


def list_folder(folder: Path) -> Manifest:
    """List the images of one class folder, ``<split>/<class>``."""
    return manifest.scan(folder.parent.parent, folder.parent.name)


def trained(listed: Manifest, size: int, augment: AugmentConfig = WHOLE) -> dict[str, np.ndarray]:
    """Load every image once for training. Returns file name -> pixels [S, S, 3] uint8."""
    data, order = DataConfig(root="unused", image_size=size, num_threads=1), sampler.TrainOrder(len(listed), 0)
    loader = train_loader(listed, order, [np.arange(len(listed))], Recipe(augment, size), 0, data, CPU)
    return _pixels(listed, loader, data)


def evaluated(listed: Manifest, size: int, crop_pct: float, **keys: Any) -> dict[str, np.ndarray]:
    """Load every image once for evaluation. Returns file name -> pixels [S, S, 3] uint8."""
    data = DataConfig(root="unused", image_size=size, crop_pct=crop_pct, num_threads=1, **keys)
    return _pixels(listed, eval_loader(listed, sampler.eval_batches(len(listed), 0, 1, 8), data, CPU), data)


def _pixels(listed: Manifest, loader: Loader, data: DataConfig) -> dict[str, np.ndarray]:
    found = {}
    for batch in loader:
        assert batch.valid.all()
        pixels = denormalise(batch.images, data.mean, data.std).permute(0, 2, 3, 1).numpy()
        found |= {Path(listed.paths[index]).name: image for index, image in zip(batch.indices, pixels, strict=True)}
    assert len(found) == len(listed), "no image was replaced by another one"
    return found


def difference(ours: np.ndarray, theirs: np.ndarray) -> int:
    assert ours.shape == theirs.shape
    return int(np.abs(ours.astype(int) - theirs).max())


def verdict(file: Path) -> tuple[object, object]:
    """Return what a scan and a look at the header say of a file: its size, or the reason why it is bad."""
    found: list[object] = []
    with file.open("rb") as opened:
        for check in (lambda: check_image(file.read_bytes()), lambda: check_image_header(opened, file.stat().st_size)):
            try:
                found.append(check())
            except BadImageError as error:
                found.append(str(error))
    return found[0], found[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("kinds") / "train" / "0"
    made.mkdir(parents=True)
    return made


def test_every_kind_that_is_read_has_the_pixels_of_its_rule(folder: Path) -> None:
    expected = {f"{kind}.png": write(folder / f"{kind}.png") for kind, write in READ.items()}
    for name in expected:
        assert verdict(folder / name) == ((SIDE, SIDE), (SIDE, SIDE)), name
    listed = list_folder(folder)
    assert len(listed) == len(READ)
    for pixels in (trained(listed, SIDE), evaluated(listed, SIDE, crop_pct=1.0)):
        errors = {name: difference(pixels[name], expected[name]) for name in expected}
        assert max(errors.values()) <= 1, {name: error for name, error in errors.items() if error > 1}
        exact = [name for name in errors if not name.startswith(("tiff palette", "tiff YCbCr"))]
        assert all(errors[name] == 0 for name in exact), {name: errors[name] for name in exact if errors[name]}


@pytest.mark.parametrize("kind", REFUSED)
def test_every_kind_that_is_refused_has_its_reason(kind: str, tmp_path: Path) -> None:
    write, reason = REFUSED[kind]
    write(tmp_path / "file.png")
    scanned, looked_at = verdict(tmp_path / "file.png")
    assert scanned == looked_at
    assert str(scanned).startswith(reason)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_not_applied(kind: str, tmp_path: Path) -> None:
    """Check it with an image that is not square: its size and its windows would be others if it were turned."""
    folder = tmp_path / "train" / "0"
    folder.mkdir(parents=True)
    image = images.photograph("flower", 0, 0, 60, 100)
    image.save(folder / "plain.png", kind)
    image.save(folder / "turned.png", kind, **turned(kind))
    listed = list_folder(folder)
    assert listed.sizes.tolist() == [[60, 100], [60, 100]]
    narrow = AugmentConfig(scale=(1.0, 1.0), ratio=(0.5, 0.5), hflip=0.0)  # the largest such window: 60 x 30
    for pixels in (trained(listed, 32, narrow), evaluated(listed, 32, crop_pct=0.8)):
        assert difference(pixels["plain.png"], pixels["turned.png"]) == 0


def test_a_very_large_image_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "0"
    folder.mkdir(parents=True)
    large = np.zeros((14_000, 14_000), dtype=np.uint8)
    large[7000:] = 200
    Image.fromarray(large).save(folder / "large.jpg")
    assert verdict(folder / "large.jpg") == ((14_000, 14_000), (14_000, 14_000))
    pixels = evaluated(list_folder(folder), 32, crop_pct=1.0)["large.jpg"]
    assert np.unique(pixels[:14]).tolist() == [0]
    assert np.unique(pixels[18:]).tolist() == [200]


def test_an_image_above_the_limit_is_refused_by_its_header(tmp_path: Path) -> None:
    file = tmp_path / "huge.png"
    file.write_bytes(png_file(30_000, 30_000, b""))
    scanned, looked_at = verdict(file)
    assert scanned == looked_at == "too large: 30000 x 30000 pixels, at most 536870912 are decoded"


def test_a_scan_and_training_agree_about_damaged_files(folder: Path) -> None:
    """Damage files of five formats at random places, and compare what a scan calls good with what can be evaluated."""
    rng, files = np.random.default_rng(0), []
    for kind in ("jpeg", "jpeg progressive", "png", "webp", "webp lossless", "bmp", "tiff lzw") * 12:
        files.append(folder / f"damaged-{len(files):03d}.png")
        READ[kind](files[-1])
    listed = list_folder(folder)
    for file in files:
        data = bytearray(file.read_bytes())
        at = int(rng.integers(len(data)))
        data[at : at + 8] = rng.bytes(8) if rng.random() < 0.5 else b""
        file.write_bytes(data if rng.random() < 0.7 else data[:at])
    scanned = [isinstance(verdict(listed.file(index))[0], tuple) for index in range(len(listed))]
    data_config = DataConfig(root="unused", image_size=SIDE, crop_pct=1.0, num_threads=1)
    batches = eval_loader(listed, sampler.eval_batches(len(listed), 0, 1, 16), data_config, CPU)
    decoded = np.concatenate([batch.valid for batch in batches])[: len(listed)].tolist()
    assert scanned == decoded
    assert 10 < scanned.count(False) < len(files)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("height", "width"), [(2, 9000), (1000, 7), (33, 200), (211, 33), (97, 635), (97, 300), (1, 1)]
)
def test_evaluation_of_any_shape_gives_pillows_pixels(
    height: int, width: int, interpolation: Literal["bicubic", "bilinear"], tmp_path: Path
) -> None:
    folder = tmp_path / "val" / "0"
    folder.mkdir(parents=True)
    images.noise(height, width).save(folder / "image.png")
    ours = evaluated(list_folder(folder), 48, crop_pct=0.875, interpolation=interpolation)["image.png"]
    theirs = Compose([Resize(int(48 / 0.875), InterpolationMode(interpolation)), CenterCrop(48)])
    assert difference(ours, np.asarray(theirs(Image.open(folder / "image.png")))) <= 2


@pytest.fixture
def two_gigabytes() -> Iterator[None]:
    """Leave this process two gigabytes more than it has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.usefixtures("two_gigabytes")
@pytest.mark.parametrize(("height", "width"), [(1, 60_000), (60_000, 1)])
def test_extremely_thin_images_are_evaluated(height: int, width: int, tmp_path: Path) -> None:
    """Resized whole they would take 256 x 15 million pixels. Only one pixel of the file, and its neighbours, count."""
    folder = tmp_path / "val" / "0"
    folder.mkdir(parents=True)
    image = images.noise(height, width)
    image.save(folder / "thin.png")
    ours = evaluated(list_folder(folder), 224, crop_pct=0.875)["thin.png"]
    start, share = (60_000 * 256 - 224) / 2 / 256, 224 / 256  # in pixels of the file
    top_left = (16 / 256, start) if width > height else (start, 16 / 256)
    box = (*top_left[::-1], *(edge + share for edge in top_left[::-1]))
    assert difference(ours, np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC, box))) <= 1


def test_thin_images_are_trained_on(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "0"
    folder.mkdir(parents=True)
    for height, width in ((1, 60_000), (60_000, 1)):
        Image.new("RGB", (width, height), (10, 200, 30)).save(folder / f"{height}.png")
    wide = AugmentConfig(ratio=(3.0, 4.0))  # of a height of one pixel: no window may have less
    for augment in (AugmentConfig(), wide):
        for pixels in trained(list_folder(folder), 32, augment).values():
            assert np.unique(pixels.reshape(-1, 3), axis=0).tolist() == [[10, 200, 30]]
