#!/usr/bin/env python
"""Train a model (from a checkout; installed, it is ``sws train``)."""

from sws_dist.cli import train
from sws_dist.cli.common import run_command

if __name__ == "__main__":
    run_command(train.main)
