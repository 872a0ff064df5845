"""Write the quickstart's data: scikit-learn's 1,797 handwritten digits as JPEG files in ImageNet's layout.

The images (UCI "Optical Recognition of Handwritten Digits", 8 x 8 pixels, 17 grey levels) ship inside
scikit-learn, so nothing is downloaded. Every fifth image of a class is for validation.

    python -m sws_dist.data.digits data/quickstart
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

IMAGE_SIZE = 32
"""Height and width of the written images, in pixels."""


def write_digits(root: str | Path) -> None:
    """Write ``<root>/train/<digit>/*.jpg`` and ``<root>/val/<digit>/*.jpg``, 32 x 32 pixels each.

    The folder appears whole or not at all. An existing folder is left as it is.
    """
    from sklearn.datasets import load_digits

    final = Path(root)
    if final.exists():
        return
    digits = load_digits()
    root = final.with_name(f".{final.name}.partial")
    shutil.rmtree(root, ignore_errors=True)
    num_seen = [0] * 10
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "val" if num_seen[label] % 5 == 4 else "train"
        num_seen[label] += 1
        folder = root / split / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8))
        large = small.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        large.save(folder / f"{index:04d}.jpg", quality=95)
    root.rename(final)


def main() -> None:
    """Write the digits to the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder to write, for example data/quickstart")
    root = parser.parse_args().root
    write_digits(root)
    print(f"wrote {len(list(root.glob('*/*/*.jpg')))} images to {root}")


if __name__ == "__main__":
    main()
