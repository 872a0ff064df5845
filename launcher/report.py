#!/usr/bin/env python
"""Write a report of the quickstart's runs (from a checkout; installed, it is ``sws report``)."""

from sws_dist.cli import report
from sws_dist.cli.common import run_command

if __name__ == "__main__":
    run_command(report.main)
