"""Write Fashion-MNIST as class folders of PNG files, from the idx files of Debian's package dataset-fashion-mnist.

    apt-get install dataset-fashion-mnist             # as root; --source takes a folder that was unpacked without
    python -m sws_dist.study.fashion data/fashion
    python -m sws_dist.study.fashion data/fashion-10k --train 10000     # a subset: 1,000 images of each class

Each image is <split>/<label>_<class>/<index in its idx file>.png, 28 x 28 pixels, grey. Fashion-MNIST's 10,000 test
images are the validation split; a subset keeps all of them.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sws_dist.cli.common import make_parser, parse_args, run_command
from sws_dist.progress import track
from sws_dist.study.dataset_folder import write_dataset

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package has the idx files."""
CLASSES = (
    *("0_t-shirt", "1_trouser", "2_pullover", "3_dress", "4_coat"),
    *("5_sandal", "6_shirt", "7_sneaker", "8_bag", "9_ankle-boot"),
)
"""Class folders; sorted, they have the order of the data set's labels."""
HOW_TO_GET = (
    "as root: apt-get install dataset-fashion-mnist; without root: apt-get download dataset-fashion-mnist && "
    "dpkg -x dataset-fashion-mnist_*.deb unpacked, then --source unpacked/usr/share/datasets/fashion-mnist"
)
_UNSIGNED_BYTES = 8  # the type of the elements, in the third byte of an idx file


@dataclass(frozen=True)
class SplitFiles:
    """The idx files of one split, and what they have to hold. MNIST's own files bear the same names."""

    split: str
    images: str
    labels: str
    images_sha256: str
    """Of the unpacked file, as that of the labels: packers differ in the bytes they write."""
    labels_sha256: str


FASHION_MNIST = (
    SplitFiles(
        "train",
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ),
    SplitFiles(
        "val",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("out", type=Path, help="folder to write, for example data/fashion")
    parser.add_argument(
        "--source", type=Path, default=DEBIAN_FOLDER, help=f"folder of the idx files (default {DEBIAN_FOLDER})"
    )
    parser.add_argument("--train", type=int, metavar="N", help="keep the first N/10 training images of each class")
    args = parse_args(parser, one_process=True)
    convert_fashion(args.source, args.out, args.train)


def convert_fashion(
    source: Path, out: Path, num_train: int | None = None, files: tuple[SplitFiles, ...] = FASHION_MNIST
) -> None:
    """Write ``<out>/train`` and ``<out>/val``, whole or not at all.

    Args:
        source: folder of the four idx files, packed (``.gz``) or not.
        out: the folder to write; one that holds the same already stays as it is.
        num_train: number of training images, evenly from all classes; None for all.
        files: the idx files of each split, and what they have to hold.

    Raises:
        ValueError: a file that is missing or not Fashion-MNIST's, an impossible ``num_train``, or another ``out``.
    """
    splits = {split.split: read_split(source, split) for split in files}
    chosen = {split: np.arange(len(labels)) for split, (_, labels) in splits.items()}
    if num_train is not None:
        chosen["train"] = first_of_each_class(splits["train"][1], num_train)

    def write(folder: Path) -> None:
        for split, (images, labels) in splits.items():
            for label in CLASSES:
                (folder / split / label).mkdir(parents=True)
            for index in track(chosen[split], f"writing {split}", len(chosen[split]), "images"):
                Image.fromarray(images[index]).save(folder / split / CLASSES[labels[index]] / f"{index:05d}.png")

    facts = {split: len(indices) for split, indices in chosen.items()}
    write_dataset(out, {"dataset": "Fashion-MNIST", "images": facts, "format": "PNG"}, write)


def read_split(source: Path, files: SplitFiles) -> tuple[np.ndarray, np.ndarray]:
    """Read the images [N, height, width] uint8 and labels [N] uint8 of a split, and check that they are the right ones.

    Raises:
        ValueError: a file that is missing, damaged, or not Fashion-MNIST's.
    """
    images = read_idx(source / files.images, num_dimensions=3, sha256=files.images_sha256)
    labels = read_idx(source / files.labels, num_dimensions=1, sha256=files.labels_sha256)
    if len(images) != len(labels):
        raise ValueError(f"{source / files.images}: {len(images)} images, but {len(labels)} labels in {files.labels}")
    return images, labels


def read_idx(path: Path, num_dimensions: int, sha256: str) -> np.ndarray:
    """Read an idx file of unsigned bytes: magic number, size of each dimension, elements.

    Args:
        path: the file's name without ``.gz``; the packed file is taken where the other is not there.
        num_dimensions: 3 for images, 1 for labels.
        sha256: of the unpacked file.

    Raises:
        ValueError: the file is missing, damaged, or another data set's.
    """
    path, data = _read_unpacked(path)
    magic = bytes((0, 0, _UNSIGNED_BYTES, num_dimensions))
    if data[:4] != magic:
        raise ValueError(
            f"{path}: begins with {data[:4].hex(' ') or 'nothing'}; an idx file of unsigned bytes in {num_dimensions} "
            f"dimension(s) begins with {magic.hex(' ')}"
        )
    start = 4 + 4 * num_dimensions
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4))
    if len(data) - start != math.prod(shape):
        raise ValueError(
            f"{path}: {len(data) - start} bytes follow its header; {math.prod(shape)} would be right for "
            f"{' x '.join(map(str, shape))}: the copy broke off, or the file is damaged"
        )
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path}: a whole idx file, but not Fashion-MNIST's (unpacked, its SHA-256 is {found}; {sha256} would be "
            f"right). MNIST's files have the same names. {HOW_TO_GET}"
        )
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)


def first_of_each_class(labels: np.ndarray, num_images: int) -> np.ndarray:
    """Return the indices of the first ``num_images / 10`` images of each class, rising.

    Raises:
        ValueError: the classes cannot give equally many, or do not have as many.
    """
    each, rest = divmod(num_images, len(CLASSES))
    most = min(np.bincount(labels, minlength=len(CLASSES)).tolist())
    if rest or not 1 <= each <= most:
        raise ValueError(
            f"--train {num_images}: expected a multiple of {len(CLASSES)} from {len(CLASSES)} to {most * len(CLASSES)}"
        )
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:each] for label in range(len(CLASSES))]))


def _read_unpacked(path: Path) -> tuple[Path, bytes]:
    """Read a file or, where it is not there, its ``.gz``. Returns the path that was read, and the unpacked bytes."""
    if path.is_file():
        return path, path.read_bytes()
    packed = path.with_name(f"{path.name}.gz")
    if not packed.is_file():
        raise ValueError(f"{path}: not there, and neither is {packed.name}. {HOW_TO_GET}")
    try:
        return packed, gzip.decompress(packed.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{packed}: not a whole gzip file ({error}); copy it again") from None


if __name__ == "__main__":
    run_command(main)
