"""Test that node lists are read as ``scontrol show hostnames`` reads them: a table, and SLURM itself."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sws_dist.distributed.launch_env import first_host, tasks_per_node
from sws_dist.errors import ConfigError

KNOWN = {  # answers of SLURM 22.05
    "node1": "node1",
    "a,b,c": "a",
    "gpu[03-05,9],login": "gpu03",
    "gpu[7]": "gpu7",
    "a-b-[001-128]": "a-b-001",
    "rack[1-2]node[01-03]": "rack1node01",
    "a[1-2][3-4]": "a13",
    "n[1-2]m[3-4]o[5-6]": "n1m3o5",
    "n[01-03,10,5]": "n01",
    "a[08-11]": "a08",
    "a[1-003]": "a1",
    "a[3,1,2],b": "a3",
    "[1-3]": "1",
    ",a,,b,": "a",
    "b,a[1-2]b[1-2],a[1-2]": "b",
}
NEWER = {  # forms that SLURM 22.05 refuses
    "n[1-2]-ib0": "n1-ib0",
    "gpu-[001-002].cluster.local,x": "gpu-001.cluster.local",
    "rack[1-2]n[01-02]-ib,rack3": "rack1n01-ib",
    "n[0-10/2]": "n0",
    "n[4-10:2,3]m[1-2]": "n4m1",
}


@pytest.mark.parametrize(("nodelist", "host"), (KNOWN | NEWER).items())
def test_the_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


@pytest.mark.parametrize("nodelist", ["", " , ", "a[1-2", "a1]", "a[]", "a[x-y]", "a[[1-2]]", "[[", "a[1]]"])
def test_what_is_no_list_is_named(nodelist: str) -> None:
    with pytest.raises(ConfigError, match="not a SLURM node list") as caught:
        first_host(nodelist)
    assert repr(nodelist) in str(caught.value)


def test_tasks_per_node() -> None:
    assert tasks_per_node("8") == [8]
    assert tasks_per_node("8(x2),4") == [8, 8, 4]


numbers = st.integers(0, 120).map(str) | st.integers(0, 120).map("{:03}".format)
ranges = st.builds(lambda low, more: f"{low}-{int(low) + more}", numbers, st.integers(0, 3))
groups = st.lists(numbers | ranges, min_size=1, max_size=3).map(lambda parts: f"[{','.join(parts)}]")
names = st.text("abn-", min_size=1, max_size=3).filter(lambda name: name[0] != "-")
numbered = st.lists(st.tuples(names, groups), min_size=1, max_size=3).map(lambda parts: "".join(map("".join, parts)))
nodelists = st.lists(names | numbered, min_size=1, max_size=4).map(",".join)


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="needs scontrol")
@settings(max_examples=5, deadline=None)
@given(st.lists(nodelists, min_size=20, max_size=20))
def test_any_list_is_read_as_slurm_reads_it(tmp_path_factory: pytest.TempPathFactory, some: list[str]) -> None:
    """Twenty lists in one shell; scontrol wants a config, and no controller."""
    config = tmp_path_factory.getbasetemp() / "slurm.conf"
    config.write_text("ClusterName=x\nSlurmctldHost=localhost\nNodeName=a CPUs=1\nPartitionName=p Nodes=a\n")
    done = subprocess.run(
        ["bash", "-c", 'for list; do scontrol show hostnames "$list" | head -n1; done', "bash", *some],
        env=os.environ | {"SLURM_CONF": str(config)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.stderr == ""
    assert [first_host(nodelist) for nodelist in some] == done.stdout.splitlines()
