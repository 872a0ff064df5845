#!/usr/bin/env python
"""Compare the method with its rivals (from a checkout; installed, it is ``sws study``)."""

from sws_dist.cli import study
from sws_dist.cli.common import run_command

if __name__ == "__main__":
    run_command(study.main)
