#!/usr/bin/env python
"""Run the whole road on digits (from a checkout; installed, it is ``sws quickstart``)."""

from sws_dist.cli import quickstart
from sws_dist.cli.common import run_command

if __name__ == "__main__":
    run_command(quickstart.main)
