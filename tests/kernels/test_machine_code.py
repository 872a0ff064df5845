"""Compile every kernel for A100 and H100 without either: no spills, and the resources that the launches assume."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sws_kernels import launch_config
from tests.kernels.machine_code import ARCHITECTURES, CUXRAY, RESERVED_SHARED_BYTES, SHARED_BYTES, Case, Row, cases

CASES = list(cases())
Rows = dict[str, Row]  # by the case's text


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
    assert row["shared_bytes"] <= SHARED_BYTES[case.arch] - RESERVED_SHARED_BYTES, row


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


# Programs that fit on a multiprocessor at least, on (A100, Hopper). They hide each other's waits.
LEAST_PROGRAMS = {
    "add_layer_norm_forward": (9, 8),
    "column_sum": (4, 4),
    "linear_gelu_forward": (1, 2),  # on Hopper one multiplies while the other is in its epilogue
    "linear_gelu_backward": (1, 2),
    "packed_attention_forward": (1, 1),
    "packed_attention_backward_keys": (1, 1),
    "packed_attention_backward_queries": (1, 1),
}
LEAST_PROGRAMS_OF_A_VIT = {  # on Hopper, at heads of 64, block by block
    "packed_attention_forward": 2,
    "packed_attention_backward_keys": 3,
    "packed_attention_backward_queries": 4,
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_programs_on_a_multiprocessor(case: Case, compiled: Rows) -> None:
    row = compiled[str(case)]
    hopper = case.arch == 90
    if case.kernel == "add_layer_norm_backward":  # it launches as many programs as are meant to fit at once
        least = launch_config.norm_programs(case.launch["D"])
    elif hopper and case.dtype != "fp32" and case.shape.startswith("577 tokens, heads of 64"):
        least = LEAST_PROGRAMS_OF_A_VIT[case.kernel]
    else:
        least = LEAST_PROGRAMS[case.kernel][hopper]
    assert row["programs"] >= least, row


# The stores of the products' tiles: at the worst alignment, one touches two sectors of 32 bytes more than it fills.
UNCOALESCED = {"linear_gelu_forward": 4, "linear_gelu_backward": 6}


@pytest.mark.skipif(not CUXRAY, reason="needs cuxray (PyPI)")
def test_accesses_to_memory(compiled: Rows) -> None:
    rows = [row for row in compiled.values() if "followed" in row]
    assert {row["kernel"] for row in rows} == {case.kernel for case in CASES}
    for row in rows:
        assert row["followed"] >= 45 or row["shape"] == "width 384, add only", row
        assert row["bank_conflicts"] == 0, row
        assert row["uncoalesced"] <= UNCOALESCED.get(row["kernel"], 0), row


def test_a_long_head_stays_on_chip_on_hopper() -> None:
    """100 tokens at D = 64 are a single block of keys."""
    found = {case.shape for case in select("packed_attention_backward_keys", arch=90) if case.launch["SINGLE_KV_BLOCK"]}
    assert "100 tokens, heads of 64, bias" in found
