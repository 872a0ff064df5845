#!/usr/bin/env python
"""Plan a run (from a checkout; installed, it is ``sws plan``)."""

from sws_dist.cli import plan
from sws_dist.cli.common import run_command

if __name__ == "__main__":
    run_command(plan.main)
