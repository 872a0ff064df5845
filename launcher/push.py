#!/usr/bin/env python
"""Put an exported model on the Hugging Face Hub (from a checkout; installed, it is ``sws push``)."""

from sws_dist.cli import push
from sws_dist.cli.common import run_command

if __name__ == "__main__":
    run_command(push.main)
