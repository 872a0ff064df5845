#!/usr/bin/env python
"""Store a teacher's logits for the students of a run (from a checkout; installed, it is ``sws teach``)."""

from sws_dist.cli import teach
from sws_dist.cli.common import run_command

if __name__ == "__main__":
    run_command(teach.main)
