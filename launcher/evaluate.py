#!/usr/bin/env python
"""Score a model on a folder of images (from a checkout; installed, it is ``sws evaluate``)."""

from sws_dist.cli import evaluate
from sws_dist.cli.common import run_command

if __name__ == "__main__":
    run_command(evaluate.main)
