#!/usr/bin/env python
"""Fine-tune weights on one's own labels (from a checkout; installed, it is ``sws finetune``)."""

from sws_dist.cli import finetune
from sws_dist.cli.common import run_command

if __name__ == "__main__":
    run_command(finetune.main)
