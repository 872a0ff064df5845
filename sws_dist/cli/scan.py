"""Read and decode every file of a data set once: which are images, how large, and which are bad, for what reason.

What is found is kept beside each split, in <root>/<split>.manifest.jsonl. Training takes the sizes from there instead
of reading every header, and leaves the bad files out.

examples:
  python launcher/scan.py --data /data/imagenet                    # the splits train and val
  python launcher/scan.py --data /data/imagenet/train --json train.json

--json F writes {"images": how many are good, "bad": [{"path", "reason"}, ...]}; paths are relative to --data.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from sws_dist.cli.common import make_parser


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of splits, or one split (class folders, tar shards, a list)"
    )
    parser.add_argument("--splits", nargs="+", default=["train", "val"], help="looked for in --data (train val)")
    parser.add_argument("--json", type=Path, help="write the result here too")
    parser.add_argument(
        "--num-threads", type=int, default=2 * (os.cpu_count() or 1), help="files at a time (default: 2 a core)"
    )
    scan(parser.parse_args())


def scan(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from sws_dist.atomic import atomic_write_json
    from sws_dist.data import manifest

    root: Path = args.data
    splits = [split for split in args.splits if holds_split(root / split)]
    within = [f"{split}/" for split in splits] if splits else [""]
    root, splits = (root, splits) if splits else (root.parent, [root.name])
    images, bad = 0, []
    for split, prefix in zip(splits, within, strict=True):
        with tqdm(unit="file", desc=split) as bar:
            found, kept = manifest.scan_and_decode(root, split, args.num_threads, bar)
        print(f"{split}: {len(found)} images in {len(found.classes)} classes, {len(found.bad)} bad files")
        for note in found.notes:
            print(note)
        for file in found.bad:
            print(f"bad image: {prefix}{file.path}: {file.reason}")
        if kept:
            print(f"wrote {kept}")
        images += len(found)
        bad += [{"path": prefix + file.path, "reason": file.reason} for file in found.bad]
    if args.json:
        atomic_write_json(args.json, {"images": images, "bad": bad})


def holds_split(place: Path) -> bool:
    """A list, or a folder of folders or of shards: a class that is named ``train`` holds images instead."""
    if not place.is_dir():
        return place.is_file()
    return any(entry.is_dir() or entry.name.endswith(".tar") for entry in os.scandir(place))
