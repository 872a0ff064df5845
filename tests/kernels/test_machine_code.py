"""Compile every kernel for A100 and H100 without either: no spills, and the resources that the launches assume."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sws_kernels import launch_config
from tests.kernels.machine_code import ARCHITECTURES, SHARED_MEMORY_LIMIT, Case, cases

CASES = list(cases())
REGISTERS_PER_SM = 65_536
Rows = dict[str, dict[str, Any]]  # by the case's text


@pytest.fixture(scope="session")
def compiled() -> Rows:
    """Compile all cases once, in another process: TRITON_INTERPRET, which this one needs, replaces the compiler."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.machine_code", "--json"],
        cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(map(str, CASES), json.loads(done.stdout), strict=True))


def select(*kernels: str, arch: int | None = None) -> list[Case]:
    return [case for case in CASES if case.kernel in kernels and arch in (None, case.arch)]


def test_every_kernel_is_compiled_for_every_gpu() -> None:
    for operator in ("add_layer_norm", "column_sum", "linear_gelu", "packed_attention"):
        module = importlib.import_module(f"sws_kernels.{operator}_kernels")
        for name in (name for name in vars(module) if name.endswith("_kernel")):
            found = {(case.dtype, case.arch) for case in CASES if f"{case.kernel}_kernel" == name}
            assert found == {(dtype, arch) for dtype in ("bf16", "fp16", "fp32") for arch in ARCHITECTURES}, name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_spills_and_shared_memory_fits(case: Case, compiled: Rows) -> None:
    row = compiled[str(case)]
    assert row["stack_bytes"] == 0, row
    assert row["shared_bytes"] <= SHARED_MEMORY_LIMIT[case.arch], row


PRODUCTS = [case for case in CASES if case.operator in ("linear_gelu", "packed_attention")]


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_products_use_the_tensor_cores(case: Case, compiled: Rows) -> None:
    """fp32 does not, because tensor cores lack its accuracy.

    Hopper's own instructions (wgmma) take all products, except dQ's of heads of 32, which have too few rows.
    """
    row = compiled[str(case)]
    half, hopper = case.dtype != "fp32", case.arch == 90
    few_rows = (
        case.kernel == "packed_attention_backward_keys" and case.launch["SINGLE_KV_BLOCK"] and case.launch["D"] == 32
    )
    assert (row["wgmma"] > 0) == (half and hopper), row
    assert (row["mma"] > 0) == (half and (not hopper or few_rows)), row


@pytest.mark.parametrize("case", select("add_layer_norm_backward"), ids=str)
def test_all_backward_programs_are_resident(case: Case, compiled: Rows) -> None:
    """add_layer_norm's backward launches as many programs as are meant to fit on the GPU at once."""
    row = compiled[str(case)]
    programs = launch_config.norm_programs(case.launch["D"])
    assert row["registers"] * row["threads"] * programs <= REGISTERS_PER_SM, row


@pytest.mark.parametrize("case", select("linear_gelu_forward", "linear_gelu_backward", arch=90), ids=str)
def test_two_programs_of_a_product_fit_on_hopper(case: Case, compiled: Rows) -> None:
    """The launches are chosen so that one program multiplies while the other is in its epilogue."""
    row = compiled[str(case)]
    assert 2 * row["registers"] * row["threads"] <= REGISTERS_PER_SM, row
    assert 2 * (row["shared_bytes"] + 1024) <= 233_472, row  # 228 KiB, of which CUDA takes 1 KiB a program


def test_a_long_head_stays_on_chip_on_hopper() -> None:
    """100 tokens at D = 64 are a single block of keys."""
    found = {case.shape for case in select("packed_attention_backward_keys", arch=90) if case.launch["SINGLE_KV_BLOCK"]}
    assert "100 tokens, heads of 64, bias" in found
