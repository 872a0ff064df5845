#!/usr/bin/env python
"""Draw a training batch as the model sees it (from a checkout; installed, it is ``sws show-batch``)."""

from sws_dist.cli import show_batch
from sws_dist.cli.common import run_command

if __name__ == "__main__":
    run_command(show_batch.main)
