"""Run the whole method on real images, GPU or none: teacher, auxiliary model, descendants, report.

Each step is an ordinary command, printed before it runs; what is already there is not done again, and a run that
was interrupted goes on where it stopped. Data and runs are written to the current folder.

examples:
  sws quickstart                                    # seed 0, into runs/quickstart; make quickstart in a checkout
  sws quickstart --seed 1 --output runs/quickstart-1
"""

from __future__ import annotations

import logging
import shlex
import shutil
import sys
import time
from pathlib import Path

from sws_dist.cli.commands import Command, perform, prepare_devices, sws
from sws_dist.cli.common import SEED, make_parser, parse_args, print_result
from sws_dist.cli.family import Family, perform_side_by_side
from sws_dist.config.paths import escape_path
from sws_dist.errors import require_packages

DATA = Path("data/quickstart")
DEPTH = 8  # of the descendant that is trained further; the auxiliary model has 5 stages and 10 layers

log = logging.getLogger(__name__)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder for all runs")
    parser.add_argument("--seed", type=SEED, default=0, help="of every run (default 0)")
    args = parse_args(parser, one_process=True)
    require_packages("dali,quickstart", "sklearn", "matplotlib", "nvidia")
    out, begun = args.output, time.monotonic()
    quiet = ("--quiet",) if args.quiet else ()
    ranks = prepare_devices()
    at_depths = ("tuned", "scratch", "scratch_full")
    family = Family(out, "quickstart", args.seed, ("auxiliary",), at_depths, (DEPTH,), options=quiet, ranks=ranks)
    perform(Command("the data", (Path(sys.executable).name, "-m", "sws_dist.data.digits", str(DATA)), DATA / "train"))
    perform(family.teacher_command())
    for command in family.auxiliary_commands():
        perform(command)
    log.info(f"\n# 3. the learngene, expanded to {DEPTH} layers; any other number would do")
    for command in family.expand_commands():
        perform(command)
    log.info("\n# 4. that descendant, fine-tuned, beside the same model from random weights; two runs at a time")
    perform_side_by_side(family.depth_commands(), jobs=2)
    perform(Command("5. the report", (*sws("report"), "--runs", escape_path(out), *quiet), done=None))
    log.info(f"\nfinished in {time.monotonic() - begun:.0f} s")
    tensorboard = "tensorboard" if shutil.which("tensorboard") else f"{Path(sys.executable).parent}/tensorboard"
    folder = shlex.quote(str(out))
    print_result(f"the report   {out}/report.md, {out}/report.png\nevery curve  {tensorboard} --logdir {folder}")


if __name__ == "__main__":
    main()
