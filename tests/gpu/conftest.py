"""Lets the GPU tests use the helpers of tests/kernels, whatever the working directory."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
