"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before triton is imported."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # for `tests.kernels...`, whatever the working directory

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError(
            "tests/kernels: triton was imported before TRITON_INTERPRET=1 could be set. "
            "Run `pytest tests/kernels` by itself, or set TRITON_INTERPRET=1 for the whole run."
        )
    os.environ["TRITON_INTERPRET"] = "1"

from tests.kernels.numerics import poisoned_memory


@pytest.fixture(autouse=True)
def _poisoned_memory():
    with poisoned_memory():
        yield
