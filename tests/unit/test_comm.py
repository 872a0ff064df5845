"""Who a rank is, from each launcher's environment."""

from __future__ import annotations

import os

import pytest
import torch

from sws_dist import comm


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[03-05,9],login", "gpu03"),
        ("gpu[7]", "gpu7"),
        ("rack[1-2]-ib,x", "rack1-ib"),
        ("a-b-[001-128]", "a-b-001"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert comm.first_host(nodelist) == host


def test_srun_is_translated(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = {"PROCID": "9", "NTASKS": "16", "LOCALID": "1", "STEP_TASKS_PER_NODE": "8(x2)", "JOB_ID": "77"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SLURM_STEP_NODELIST", "gpu[03-04]")
    comm._environment_from_slurm()
    assert {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR")} == {
        "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_SIZE": "8", "MASTER_ADDR": "gpu03",
    }  # fmt: skip


def test_seeds_are_a_function_of_the_numbers() -> None:
    def draw(*numbers: int) -> float:
        comm.seed_everything(*numbers)
        return torch.rand(1).item()

    assert draw(3, 14) == draw(3, 14)
    assert len({draw(a, b) for a in range(20) for b in range(20)}) == 400
