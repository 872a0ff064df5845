#!/usr/bin/env python
"""Expand a learngene into a descendant (from a checkout; installed, it is ``sws expand``)."""

from sws_dist.cli import expand
from sws_dist.cli.common import run_command

if __name__ == "__main__":
    run_command(expand.main)
