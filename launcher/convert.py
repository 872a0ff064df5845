#!/usr/bin/env python
"""Convert learngenes and checkpoints (from a checkout; installed, it is ``sws convert``)."""

from sws_dist.cli import convert
from sws_dist.cli.common import run_command

if __name__ == "__main__":
    run_command(convert.main)
