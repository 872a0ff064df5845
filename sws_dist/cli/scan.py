"""Read and decode every file of a data set once, and list the bad ones with their reasons.

What is found is kept beside each split, in <root>/<split>.manifest.jsonl, or in the folder --lists, which runs find by
data.lists. Training takes the sizes from there instead of reading every header, and leaves the bad files out.

examples:
  sws scan --data /data/imagenet                    # the splits train and val
  sws scan --data /data/imagenet/train --json train.json
  sws scan --data /readonly/imagenet --lists ~/lists   # then train with --set data.lists=~/lists

--json F writes {"images": how many are good, "bad": [{"path", "reason"}, ...]}; paths are relative to --data.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from sws_dist.atomic import atomic_write_json
from sws_dist.cli.common import (
    NUM_THREADS,
    add_shard_options,
    make_parser,
    parse_args,
    print_result,
    shard_keys_of,
)

if TYPE_CHECKING:
    from sws_dist.data.tar_shards import SampleKeys

DEFAULT_SPLITS = ("train", "val")

log = logging.getLogger(__name__)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of splits, or one split (class folders, tar shards, a list)"
    )
    parser.add_argument("--splits", nargs="+", help="splits of --data (default: train and val, where they are there)")
    parser.add_argument("--lists", type=Path, help="keep what is found in this folder, as data.lists (default: --data)")
    parser.add_argument("--json", type=Path, help="write the result here too")
    parser.add_argument(
        "--num-threads",
        type=NUM_THREADS,
        default=2 * (os.cpu_count() or 1),
        help="files at a time (default: 2 a core)",
    )
    add_shard_options(parser)
    args = parse_args(parser, one_process=True)
    keys = shard_keys_of(args)
    num_images, bad = 0, []
    for root, split, prefix in find_splits(args.data, args.splits):
        good, found = scan_split(root, split, prefix, args.num_threads, keys, args.lists)
        num_images += good
        bad += found
    if args.json:
        atomic_write_json(args.json, {"images": num_images, "bad": bad})


def find_splits(data: Path, names: list[str] | None) -> list[tuple[Path, str, str]]:
    """Return the root of each split, its name, and what its paths begin with in ``--json``.

    Raises:
        ValueError: one of ``names`` is not there.
    """
    data = Path(os.path.abspath(data))  # a split needs a name: --data . is the folder one stands in
    names = names and [os.path.normpath(name) for name in names]  # train/
    found = [name for name in names or DEFAULT_SPLITS if holds_split(data / name)]
    if missing := [name for name in names or () if name not in found]:
        raise ValueError(f"--splits {' '.join(missing)}: {data} holds no such split")
    if found:
        return [(data, name, f"{name}/") for name in found]
    return [(data.parent, data.name, "")]


def holds_split(place: Path) -> bool:
    """Return True for a list, or a folder of folders or shards: a class named ``train`` holds images instead."""
    if not place.is_dir():
        return place.is_file()
    return any(entry.is_dir() or entry.name.endswith(".tar") for entry in os.scandir(place))


def scan_split(
    root: Path, split: str, prefix: str, num_threads: int, keys: SampleKeys, lists: Path | None = None
) -> tuple[int, list[dict[str, str]]]:
    """Scan one split. Returns the number of good images, and path and reason of each bad file."""
    from sws_dist.data import manifest  # needs DALI

    found, kept = manifest.scan_and_decode(root, split, num_threads, keys, lists)
    unread = sum(file.is_unread for file in found.bad)
    counts = f"{len(found)} images in {len(found.classes)} classes, {len(found.bad) - unread} bad files"
    print_result(f"{split}: {counts}" + (f", {unread} that could not be read" if unread else ""))
    if unread:
        log.warning("what could not be read is tried again by each run without data.trust_manifest, and by each scan")
    for note in found.notes:
        log.warning(note)
    for file in found.bad:
        print_result(f"bad image: {prefix}{file.path}: {file.reason}")
    if kept:
        log.info(f"wrote {kept}")
    return len(found), [{"path": prefix + file.path, "reason": file.reason} for file in found.bad]
