"""Compare the method with its rivals, and write the report.

A study is made of families of runs. Each has a teacher, auxiliary models that are trained at many depths, rivals that
are not (as published, TLEG, a model without sharing), and at some depths fine-tuned descendants beside models of random
weights. A study that was interrupted goes on where it stopped; the same seeds give the same table.

{SIZES}

Fashion-MNIST, whose scores are public, is in Debian's package dataset-fashion-mnist (apt install
dataset-fashion-mnist). Characters in fonts that were never trained on are drawn from a folder of fonts; python -m
sws_dist.study.font_files --help says how to get it.

examples:
  sws study                                          # size small, into runs/study; make study in a checkout
  sws study --seeds 0 1 2                            # three families, and their spread
  sws study --size tiny --output runs/study-tiny
  sws study --data-set characters --fonts fonts --output runs/study-characters
  sws study --compare fixed scratch_full             # these runs only, beside the auxiliary model
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from sws_dist.cli.commands import Command, perform, prepare_devices, sws
from sws_dist.cli.common import SEED, make_parser, parse_args, print_result, whole_number
from sws_dist.cli.family import AT_DEPTHS, AUXILIARIES, Family, perform_side_by_side
from sws_dist.config.paths import escape_path
from sws_dist.errors import require_packages

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Size:
    """Say how large a study is. Its validation set has always 10,000 images, which is all of Fashion-MNIST's."""

    images: int
    epochs: int
    """Number of epochs of everything but fine-tuning, which takes 5."""
    teacher_epochs: int
    depths: tuple[int, ...]
    seeds: tuple[int, ...]
    time: str
    scored: tuple[int, ...] = (5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16)
    """Depths at which the auxiliary models are scored, beside their own, 10."""


@dataclass(frozen=True)
class DataSet:
    """Name the module that writes a data set, its sizes, and what its runs have that others do not."""

    title: str
    module: str
    sizes: dict[str, Size]
    sets: tuple[str, ...] = ()


TEN_DEPTHS, THREE_SEEDS = (5, 6, 7, 8, 9, 10, 11, 12, 13, 14), (0, 1, 2)
DATA_SETS = {
    "fashion-mnist": DataSet(
        "Fashion-MNIST",
        "sws_dist.study.fashion",
        {
            "tiny": Size(1_000, 2, 3, (6,), (0,), "3 minutes", scored=(5, 6, 15)),
            "small": Size(6_000, 10, 12, (5, 12), (0,), "35 minutes"),
            "full": Size(60_000, 20, 12, TEN_DEPTHS, THREE_SEEDS, "not tried; take a GPU"),
        },
    ),
    # 78 classes need more images: from 6,000 no vision transformer learned more than 11 % in ten epochs, and from
    # 30,000 most of what is learned in ten is learned after the sixth
    "characters": DataSet(
        "Characters in unseen fonts",
        "sws_dist.study.fonts",
        {
            "tiny": Size(1_000, 2, 3, (6,), (0,), "not timed", scored=(5, 6, 15)),
            "small": Size(30_000, 10, 6, (5, 12), (0,), "4 hours, estimated"),
            "full": Size(60_000, 20, 12, TEN_DEPTHS, THREE_SEEDS, "not tried; take a GPU"),
        },
        ("augment.hflip=0",),
    ),
}


def main() -> None:
    parser = make_parser(__doc__.replace("{SIZES}", _table()))
    parser.add_argument("--size", choices=("tiny", "small", "full"), default="small")
    parser.add_argument("--data-set", choices=DATA_SETS, default="fashion-mnist")
    parser.add_argument("--fonts", type=Path, help="folder of the fonts that the characters are drawn from")
    others = (*(name for name in AUXILIARIES if name != "auxiliary"), *AT_DEPTHS)
    said = f"some of {', '.join(others)}, beside the auxiliary model (default: all)"
    parser.add_argument("--compare", choices=others, nargs="+", default=others, metavar="RUN", help=said)
    parser.add_argument("--output", type=Path, default=Path("runs/study"), help="folder for all runs")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder for the images")
    parser.add_argument("--seeds", type=SEED, nargs="+", help="instead of the size's")
    parser.add_argument("--jobs", type=whole_number(1, 64), help="runs at a time (default: one a core; 1 on a GPU)")
    args = parse_args(parser, one_process=True)
    require_packages("dali,quickstart", "matplotlib", "nvidia")
    data_set, begun = DATA_SETS[args.data_set], time.monotonic()
    size = data_set.sizes[args.size]
    prepare_devices()
    on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    jobs = args.jobs or (os.cpu_count() if on_cpu else None) or 1
    data = args.data / f"{args.data_set}-{size.images}"
    if (args.fonts is not None) != (args.data_set == "characters"):
        parser.error("--fonts goes with --data-set characters, which needs it")
    quiet = ("--quiet",) if args.quiet else ()
    sets = (f"data.root={escape_path(data)}", *data_set.sets)
    families = make_families(args.output, size, args.compare, args.seeds or size.seeds, sets, quiet)

    write = (Path(sys.executable).name, "-m", data_set.module, escape_path(data), "--train", str(size.images))
    fonts = ("--fonts", escape_path(args.fonts)) if args.fonts else ()
    perform(Command("the data", (*write, *fonts, *quiet), data / "train"))
    perform(families[0].teacher_command())
    log.info(f"\n# 2. auxiliary models; {jobs} runs at a time")
    perform_side_by_side((c for family in families for c in family.auxiliary_commands(beside_others=True)), jobs)
    log.info(
        f"\n# 3. their learngenes, expanded, and what scaled branches make of models of one depth; {jobs} at a time"
    )
    perform_side_by_side((c for family in families for c in family.scaled_commands(data / "val")), jobs)
    for command in (c for family in families for c in family.expand_commands()):
        perform(command)
    log.info(f"\n# 4. descendants and models of random weights; {jobs} runs at a time")
    perform_side_by_side((c for family in families for c in family.depth_commands()), jobs)
    report = args.output / "study.md"
    runs = (escape_path(family.folder) for family in families)
    title = f"{data_set.title}, {size.images:,} training images"
    words = (*sws("report"), "--runs", *runs, "--out", escape_path(report), "--title", title)
    perform(Command("5. the report", (*words, *quiet), done=None))
    print_result(f"the report   {report}   ({time.monotonic() - begun:.0f} s)")


def make_families(
    output: Path,
    size: Size,
    compared: Collection[str],
    seeds: tuple[int, ...],
    sets: tuple[str, ...],
    options: tuple[str, ...],
) -> list[Family]:
    """Return a family for each seed. All learn from the first one's teacher, as an ancestor is given, not drawn."""
    return [
        Family(
            output / f"seed{seed}",
            "study",
            seed,
            tuple(name for name in AUXILIARIES if name == "auxiliary" or name in compared),
            tuple(name for name in AT_DEPTHS if name in compared),
            size.depths,
            sets=sets,
            scored=size.scored,
            epochs={"teacher": size.teacher_epochs, "auxiliary": size.epochs},
            options=options,
            teacher=output / f"seed{seeds[0]}" / "teacher",
        )
        for seed in seeds
    ]


def _table() -> str:
    head = "  data set        size    training images   epochs   trained depths   seeds   time on 2 CPU cores"
    rows = []
    for name, data_set in DATA_SETS.items():
        for key, size in data_set.sizes.items():
            shown = size.depths if len(size.depths) < 4 else (f"{size.depths[0]} to {size.depths[-1]}",)
            rows.append(
                f"  {name:<13}   {key:<7} {size.images:>15,} {size.epochs:>8} {', '.join(map(str, shown)):>16}"
                f" {len(size.seeds):>7}   {size.time}"
            )
    return "\n".join([head, *rows])


if __name__ == "__main__":
    main()
