"""Let every test start with memory full of NaN, and give ttsem's GPU what the kernels ask of a real one."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sws_kernels import launch_config
from tests.kernels.checks.numerics import poisoned_memory


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    with poisoned_memory():
        yield


@pytest.fixture(autouse=True)
def _one_small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count one multiprocessor, so that programs go over many tiles, and let torch.mm give fp32 results on the CPU.

    ttsem says that tensors are on a GPU, but PyTorch computes them on the CPU, where torch.mm has no out_dtype.
    """
    monkeypatch.setattr(launch_config, "num_multiprocessors", lambda device: 1)
    mm = torch.mm

    def mm_with_out_dtype(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        return mm(a, b) if out_dtype is None else mm(a.to(out_dtype), b.to(out_dtype))

    monkeypatch.setattr(torch, "mm", mm_with_out_dtype)


@pytest.fixture
def capability(request: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """Choose the launches for a GPU of this compute capability, times ten."""
    monkeypatch.setattr(launch_config, "is_hopper", lambda device: request.param == 90)
    return request.param
