"""Compiles every kernel for A100 and H100 without either: no spills, shared memory within the machine's."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from sws_kernels.tiles import BACKWARD_PROGRAMS_PER_SM

REGISTERS_PER_SM = 65_536
SHARED_MEMORY_LIMIT = {80: 166_912, 90: 232_448}  # bytes a program may have; Triton's compiler does not check


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    """In a process of its own: TRITON_INTERPRET, which this one needs, replaces the compiler."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    table = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_table", "--json"],
        cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert table.returncode == 0, table.stderr
    return json.loads(table.stdout)


def test_every_case_compiles(compiled):
    rows = [row for row in compiled if not row["kernel"].startswith("packed_attention")]
    cases = {(row["kernel"], row["width"], row["dtype"], row["arch"]) for row in rows}
    assert len(cases) == len(rows) == 4 * 3 * 3 * 2 + 2 * 3 * 2  # the persistent ones for Hopper's tensor cores only


def test_every_packed_attention_tile_compiles(compiled):
    rows = [row for row in compiled if row["kernel"].startswith("packed_attention")]
    for dtype, arch, head_dim in product(("bf16", "fp16", "fp32"), (80, 90), (32, 64, 128)):
        found = {
            row["kernel"].removeprefix("packed_attention_")
            for row in rows
            if (row["dtype"], row["arch"], row["head_dim"], row["tokens"]) == (dtype, arch, head_dim, 577)
        }
        assert found == {"forward", "backward_keys", "backward_queries"}
    # A head of 196 tokens stays on chip on Hopper, with a bias and without.
    assert {row["bias"] for row in rows if row["tokens"] == 196 and row["head_dim"] == 64} == {0, 1}


def test_packed_attention_uses_tensor_cores(compiled):
    """sm_90: all products by its own instructions, except where D = 32 is too few rows for dQ's."""
    for row in compiled:
        if row["kernel"].startswith("packed_attention"):
            half = row["dtype"] != "fp32"
            few_rows = row["head_dim"] == 32 and row["kernel"].endswith("keys") and row["tokens"] < 577
            assert (row["hgmma"] > 0) == (half and row["arch"] == 90), row
            assert (row["hmma"] > 0) == (half and (row["arch"] == 80 or few_rows)), row


def test_no_spills(compiled):
    assert [row for row in compiled if row["spills"]] == []


def test_shared_memory_fits(compiled):
    assert [row for row in compiled if row["shared_bytes"] > SHARED_MEMORY_LIMIT[row["arch"]]] == []


def test_backward_programs_fit_on_a_multiprocessor(compiled):
    """All P programs of the backward are meant to be resident at once."""
    backward = [row for row in compiled if row["kernel"] == "add_layer_norm_backward"]
    needed = [row["registers"] * row["threads"] * BACKWARD_PROGRAMS_PER_SM for row in backward]
    assert max(needed) <= REGISTERS_PER_SM


def test_products_use_the_tensor_cores(compiled):
    """fp16 and bf16 only: fp32 keeps its own accuracy, which tensor cores do not have."""
    rows = [row for row in compiled if row["kernel"].startswith("linear_gelu")]
    assert all(row["hmma"] == row["hgmma"] == 0 for row in rows if row["dtype"] == "fp32")
    low_precision = [row for row in rows if row["dtype"] != "fp32"]
    assert all(row["hgmma" if row["arch"] == 90 else "hmma"] for row in low_precision)


def test_two_programs_of_a_product_fit_on_hopper(compiled):
    """What the launches are chosen for: one multiplies while the other is in its epilogue."""
    kernels = ("linear_gelu_forward", "linear_gelu_backward")
    rows = [row for row in compiled if row["kernel"] in kernels and row["arch"] == 90]
    for row in rows:
        assert 2 * row["registers"] * row["threads"] <= REGISTERS_PER_SM, row
        assert 2 * (row["shared_bytes"] + 1024) <= 233_472, row  # 228 KiB, of which CUDA takes 1 KiB a program
