"""Test the Fashion-MNIST converter with small idx files, and with Debian's package where it is installed."""

from __future__ import annotations

import gzip
import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sws_dist.data.sources import find_source
from sws_dist.study import fashion
from sws_dist.study.fashion import CLASSES, FASHION_MNIST, SplitFiles, convert_fashion, read_idx

DIGEST_OF_ANOTHER = "0" * 64


def write_idx(path: Path, array: np.ndarray) -> str:
    """Write an idx file of unsigned bytes, packed if its name says so. Returns the SHA-256 of what is in it."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    data = bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def source(tmp_path: Path) -> tuple[Path, tuple[SplitFiles, ...]]:
    """Write 40 training images, packed, and 20 test images of 4 x 5 pixels, classes in turn."""
    folder = tmp_path / "idx"
    folder.mkdir()
    files = []
    for split, count, suffix in zip(FASHION_MNIST, (40, 20), (".gz", ""), strict=True):
        images = np.random.default_rng(count).integers(0, 256, (count, 4, 5), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) * 3 % 10
        digests = [
            write_idx(folder / f"{name}{suffix}", array)
            for name, array in ((split.images, images), (split.labels, labels))
        ]
        files.append(replace(split, images_sha256=digests[0], labels_sha256=digests[1]))
    return folder, tuple(files)


def test_every_image_lies_unchanged_in_the_folder_of_its_label(
    source: tuple[Path, tuple[SplitFiles, ...]], tmp_path: Path
) -> None:
    folder, files = source
    out = tmp_path / "data" / "fashion"
    convert_fashion(folder, out, files=files)
    for split, count in zip(files, (40, 20), strict=True):
        found, notes = find_source(out, split.split)
        assert (found.classes, len(found), notes) == (CLASSES, count, [])
        images, labels = fashion.read_split(folder, split)
        for i in range(len(found)):
            index = int(found.file(i).stem)
            assert found.labels[i] == labels[index]
            np.testing.assert_array_equal(np.array(Image.open(found.file(i))), images[index])
    assert [path.name for path in out.parent.iterdir()] == ["fashion"]


def test_a_subset_has_the_first_images_of_each_class_and_all_test_images(
    source: tuple[Path, tuple[SplitFiles, ...]], tmp_path: Path
) -> None:
    folder, files = source
    convert_fashion(folder, tmp_path / "out", num_train=20, files=files)
    assert sorted(int(path.stem) for path in tmp_path.glob("out/train/*/*.png")) == list(range(20))
    assert len(list(tmp_path.glob("out/val/*/*.png"))) == 20


@pytest.mark.parametrize("num_train", [0, -10, 25, 50])
def test_a_subset_that_cannot_be_is_refused(
    source: tuple[Path, tuple[SplitFiles, ...]], tmp_path: Path, num_train: int
) -> None:
    folder, files = source
    with pytest.raises(ValueError, match=f"--train {num_train}: expected a multiple of 10 from 10 to 40"):
        convert_fashion(folder, tmp_path / "out", num_train, files)
    assert not (tmp_path / "out").exists()


def test_what_is_there_stays_or_is_refused(source: tuple[Path, tuple[SplitFiles, ...]], tmp_path: Path) -> None:
    folder, files = source
    out = tmp_path / "out"
    convert_fashion(folder, out, files=files)
    image = next(out.glob("train/*/*.png"))
    image.unlink()
    convert_fashion(folder, out, files=files)
    assert not image.exists()  # made from the same: not written again
    with pytest.raises(ValueError, match=r"made from something else \(images is .*40.* not .*10"):
        convert_fashion(folder, out, 10, files)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match=r"mine: already there, and not written by this command"):
        convert_fashion(folder, tmp_path / "mine", files=files)


def test_an_interrupted_conversion_leaves_nothing(
    source: tuple[Path, tuple[SplitFiles, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, files = source
    save, saved = Image.Image.save, []

    def stop_at_the_fiftieth(image: Image.Image, path: Path) -> None:
        if len(saved) == 50:
            raise KeyboardInterrupt
        saved.append(path)
        save(image, path)

    monkeypatch.setattr(Image.Image, "save", stop_at_the_fiftieth)
    with pytest.raises(KeyboardInterrupt):
        convert_fashion(folder, tmp_path / "data" / "out", files=files)
    assert not list((tmp_path / "data").iterdir())


def test_files_that_are_not_right_are_named(tmp_path: Path) -> None:
    path = tmp_path / "images"
    with pytest.raises(ValueError, match=r"images: not there, and neither is images.gz. as root: apt-get install"):
        read_idx(path, 3, DIGEST_OF_ANOTHER)
    right = write_idx(path, np.zeros((2, 4, 5), dtype=np.uint8))
    assert read_idx(path, 3, right).shape == (2, 4, 5)
    with pytest.raises(ValueError, match=r"begins with 00 00 08 03; .* 1 dimension\(s\) begins with 00 00 08 01"):
        read_idx(path, 1, right)
    with pytest.raises(ValueError, match=r"MNIST's files have the same names"):
        read_idx(path, 3, DIGEST_OF_ANOTHER)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"39 bytes follow its header; 40 would be right for 2 x 4 x 5"):
        read_idx(path, 3, right)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"images: begins with nothing"):
        read_idx(path, 3, right)
    path.unlink()
    packed = tmp_path / "images.gz"
    write_idx(packed, np.zeros((2, 4, 5), dtype=np.uint8))
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"images.gz: not a whole gzip file"):
        read_idx(path, 3, right)


def test_the_command_ends_with_one_message(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sws_dist.study.fashion", str(tmp_path / "out"), "--source", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}/train-images-idx3-ubyte: not there")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(not fashion.DEBIAN_FOLDER.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_debians_package_is_what_was_published(tmp_path: Path) -> None:
    convert_fashion(fashion.DEBIAN_FOLDER, tmp_path / "out", num_train=100)
    assert len(list(tmp_path.glob("out/train/*/*.png"))) == 100
    assert [len(list(tmp_path.glob(f"out/val/{name}/*.png"))) for name in CLASSES] == [1000] * 10
