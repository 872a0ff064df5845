#!/usr/bin/env python
"""Submit a SLURM job (from a checkout; installed, it is ``sws submit``)."""

from sws_dist.cli import submit
from sws_dist.cli.common import run_command

if __name__ == "__main__":
    run_command(submit.main)
