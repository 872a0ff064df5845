"""Let the ranks that these tests start train on the GPU, and start kernel tests with memory full of NaN."""

from collections.abc import Iterator

import pytest

from tests.kernels.checks.numerics import poisoned_memory


@pytest.fixture(autouse=True)
def _on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)


@pytest.fixture
def nan_memory() -> Iterator[None]:
    with poisoned_memory():
        yield
