#!/usr/bin/env python
"""Read every file of a data set once (from a checkout; installed, it is ``sws scan``)."""

from sws_dist.cli import scan
from sws_dist.cli.common import run_command

if __name__ == "__main__":
    run_command(scan.main)
