#!/usr/bin/env python
"""Classify images with a model of one's own (from a checkout; installed, it is ``sws classify``)."""

from sws_dist.cli import classify
from sws_dist.cli.common import run_command

if __name__ == "__main__":
    run_command(classify.main)
