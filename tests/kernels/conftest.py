"""Start every kernel test with memory full of NaN (tests/conftest.py chooses interpreter or GPU)."""

from collections.abc import Iterator

import pytest

from tests.kernels.checks.numerics import poisoned_memory


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    with poisoned_memory():
        yield
