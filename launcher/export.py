#!/usr/bin/env python
"""Export a model to timm, ONNX and torch.export (from a checkout; installed, it is ``sws export``)."""

from sws_dist.cli import export
from sws_dist.cli.common import run_command

if __name__ == "__main__":
    run_command(export.main)
