"""Plant a race, a store out of bounds and a rounding to bf16 in a kernel: each is found.

Otherwise the tests of the kernels as they are would show nothing.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("ttsem", reason="needs ttsem and Python 3.12: make test-kernels-ir")

from ttsem.sanitize import KernelFault

from sws_kernels import column_sum, column_sum_kernels

Plant = Callable[[str, str], None]
STORE = r"planted.py:\d+: tl.store\(partials_ptr.*"


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Return what lets column_sum launch its kernel with one piece of its source replaced."""

    def replace(right: str, wrong: str) -> None:
        source = Path(column_sum_kernels.__file__).read_text()
        assert source.count(right) == 1, right
        path = tmp_path / "planted.py"  # Triton reads a kernel's source from its file
        path.write_text(source.replace(right, wrong))
        spec = importlib.util.spec_from_file_location("planted", path)
        planted = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(planted)
        monkeypatch.setattr(column_sum, "column_sum_kernel", planted.column_sum_kernel)

    return replace


def check() -> None:
    """Sum bf16 numbers by four programs, whose block of columns is not full."""
    x = torch.randn(400, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.testing.assert_close(column_sum.column_sum(x), x.double().sum(0).float(), rtol=1e-5, atol=1e-4)


def test_nothing_is_found_in_the_kernel_as_it_is(plant: Plant) -> None:
    plant("total += x", "total += x")
    check()


def test_a_race(plant: Plant) -> None:
    """All programs of a block of columns store their share in one row."""
    plant("(matrix * tl.num_programs(0) + program) * F", "matrix * tl.num_programs(0) * F")
    with pytest.raises(KernelFault, match=STORE + "Program instances run in any order"):
        check()


def test_a_store_out_of_bounds(plant: Plant) -> None:
    plant("tl.sum(total, axis=0), mask=cols < F)", "tl.sum(total, axis=0))")
    with pytest.raises(KernelFault, match=STORE + r"writes 32 element\(s\) past the end"):
        check()


def test_a_rounding_to_bf16(plant: Plant) -> None:
    """The sum over tiles is kept in the dtype of the input."""
    plant("total += x", "total = (total + x).to(x_ptr.dtype.element_ty).to(tl.float32)")
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check()
