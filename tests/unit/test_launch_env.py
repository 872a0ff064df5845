"""Test that a rank finds its place and the expected world in each launcher's environment and command line."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sws_dist.distributed import launch_env
from sws_dist.distributed.init import describe_unusable_gpus, has_gpu, init_distributed
from sws_dist.distributed.launch_env import (
    ExpectedWorld,
    choose_gloo_interface,
    complete_environment,
    describe_unused_tasks,
    require_free_port,
)
from sws_dist.errors import ConfigError

STEP = {
    "SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "12", "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "12", "SLURM_STEP_TASKS_PER_NODE": "8,4",
    "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
}  # fmt: skip
BATCH = {key: value for key, value in STEP.items() if "STEP" not in key} | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


def test_srun() -> None:
    env = dict(STEP)
    complete_environment(env)
    assert (env["RANK"], env["WORLD_SIZE"]) == ("9", "12")
    assert (env["LOCAL_RANK"], env["LOCAL_SIZE"]) == ("1", "4")
    assert env["MASTER_ADDR"] == "gpu03"
    assert 10_000 <= int(env["MASTER_PORT"]) < 30_000


def test_ranks_of_two_steps_do_not_meet() -> None:
    ports = set()
    for step in range(5):
        env = STEP | {"SLURM_STEP_ID": str(step)}
        complete_environment(env)
        ports.add(env["MASTER_PORT"])
    assert len(ports) == 5


def test_an_address_that_is_set_stays() -> None:
    env = STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"}  # deepspeed --launcher slurm --master_addr ...
    complete_environment(env)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"], env["RANK"]) == ("10.0.0.1", "4000", "9")


@pytest.mark.parametrize(("given", "missing"), [({"WORLD_SIZE": "4"}, "RANK"), ({"RANK": "1"}, "WORLD_SIZE")])
def test_a_rank_of_a_world_without_the_other_is_refused(given: dict[str, str], missing: str) -> None:
    with pytest.raises(ConfigError, match=f"has {next(iter(given))}=., but no {missing}: unset"):
        complete_environment(given)


@pytest.mark.parametrize("given", [{"WORLD_SIZE": "1"}, {"RANK": "0"}])
def test_a_world_of_one_needs_only_one_of_them(given: dict[str, str]) -> None:
    complete_environment(given)
    assert (given["RANK"], given["WORLD_SIZE"]) == ("0", "1")


def test_a_launcher_below_srun_decides() -> None:
    """One task a node starts torchrun or DeepSpeed, which starts the ranks."""
    torchrun = {"RANK": "17", "WORLD_SIZE": "24", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "12"}
    env = STEP | torchrun | {"MASTER_ADDR": "gpu03", "MASTER_PORT": "29400"}
    complete_environment(env)
    assert torchrun.items() <= env.items()
    assert env["LOCAL_SIZE"] == "12"


@pytest.mark.parametrize("env", [{}, BATCH], ids=["alone", "batch script"])
def test_python_is_a_world_of_one(env: dict[str, str]) -> None:
    env = dict(env)
    complete_environment(env)
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_SIZE"], env["MASTER_ADDR"]) == ("0", "1", "1", "127.0.0.1")


def expected(env: dict[str, str]) -> list[ExpectedWorld]:
    env = dict(env)
    complete_environment(env)
    return list(launch_env._slurm(env))


def test_the_world_that_slurm_was_asked_for() -> None:
    (step,) = expected(STEP)
    assert not step.mismatches(nodes=2, ranks=12)
    assert not step.mismatches(nodes=2, ranks=96)  # a launcher in every task
    assert step.mismatches(nodes=1, ranks=12)
    assert step.mismatches(nodes=2, ranks=1)  # RANK and WORLD_SIZE left over in the environment
    (job,) = expected(BATCH)
    assert job.mismatches(nodes=1, ranks=1)  # srun forgotten
    one_node = BATCH | {"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "8"}
    (job,) = expected(one_node | {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"})  # torchrun in the batch script
    assert not job.mismatches(nodes=1, ranks=4)
    assert expected({}) == []


def below(command: list[str], folder: Path) -> str:
    """Return what a process prints of its expected worlds, whose grandparent runs ``command``."""
    script = folder / command[0]
    script.write_text(
        "import subprocess, sys; sys.exit(subprocess.run(sys.argv[sys.argv.index('--') + 1:]).returncode)"
    )
    module = "sws_dist.distributed.launch_env"
    code = f"import os, {module} as m; m.complete_environment(os.environ); print(*m.expected_worlds())"
    full = [sys.executable, str(script), *command[1:], "--", sys.executable, "-c", code]
    env = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    done = subprocess.run(full, capture_output=True, text=True, timeout=600, env=env)
    return done.stdout + done.stderr


def test_a_hostfile_that_is_not_there(tmp_path: Path) -> None:
    there = tmp_path / "hosts"
    there.write_text("node1 slots=8\n")
    assert "Error" not in below(["deepspeed", "--hostfile", str(there)], tmp_path)
    for option in (["--hostfile", f"{there}x"], [f"--hostfile={there}x"], ["-H", f"{there}x"]):
        said = below(["deepspeed", "--num_nodes", "2", *option], tmp_path)
        assert f"{ConfigError.__name__}: --hostfile {there}x: there is no such file" in said


def test_the_world_that_deepspeed_was_asked_for(tmp_path: Path) -> None:
    world = base64.urlsafe_b64encode(json.dumps({"a": [0, 1], "b": [0]}).encode()).decode()
    said = below(["launch.py", f"--world_info={world}", "--node_rank=0"], tmp_path)
    assert "ExpectedWorld(nodes=2, ranks=3" in said
    assert "a with 2, b with 1" in said


SALLOC = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "gpu[03-04]"}
"""The shell of ``salloc``, where it was called."""
INTERACTIVE = SALLOC | {
    "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_STEP_NODELIST": "gpu03", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
}  # fmt: skip
"""The shell of ``salloc`` on the allocation's first node (``LaunchParameters=use_interactive_step``)."""


@pytest.mark.parametrize("env", [SALLOC, INTERACTIVE, INTERACTIVE | {"SLURM_STEP_ID": "interactive"}])
def test_a_shell_of_salloc_is_no_task(env: dict[str, str]) -> None:
    """A single process runs there, and is told of what it leaves idle; a launcher's ranks may be all there are."""
    env = dict(env)
    complete_environment(env)
    assert (env["RANK"], env["WORLD_SIZE"], env["LOCAL_SIZE"], env["MASTER_ADDR"]) == ("0", "1", "1", "127.0.0.1")
    assert list(launch_env._slurm(env)) == []
    note = describe_unused_tasks(env, nodes=1, ranks=1)
    assert note is not None
    assert note.startswith("job 77 has 2 node(s) and 4 task(s), this run uses 1 and 1; srun before the command")
    assert describe_unused_tasks(env, nodes=2, ranks=4) is None


@pytest.mark.parametrize("env", [{}, STEP, BATCH])
def test_only_a_shell_of_salloc_leaves_tasks_idle(env: dict[str, str]) -> None:
    assert describe_unused_tasks(env, nodes=1, ranks=1) is None


def test_a_port_that_is_in_use() -> None:
    for address, family in (("127.0.0.1", socket.AF_INET), ("0.0.0.0", socket.AF_INET), ("::1", socket.AF_INET6)):
        with socket.create_server((address, 0), family=family) as listener:
            port = listener.getsockname()[1]
            env = {"RANK": "0", "MASTER_PORT": str(port)}
            with pytest.raises(OSError, match=rf"^port {port} of .*: Address already in use; choose another with deep"):
                require_free_port(env)
            require_free_port(env | {"RANK": "1"})
            require_free_port(env | {"TORCHELASTIC_USE_AGENT_STORE": "True"})
        require_free_port(env)
    for wrong in ("0", "65536", "-1", "http", ""):
        with pytest.raises(ConfigError, match=f"MASTER_PORT={wrong}: expected a port number"):
            require_free_port({"RANK": "0", "MASTER_PORT": wrong})


def test_gloo_needs_no_help_on_one_node_nor_where_it_is_told() -> None:
    env = {"LOCAL_SIZE": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    assert choose_gloo_interface(env) is None
    assert choose_gloo_interface(env | {"WORLD_SIZE": "4", "GLOO_SOCKET_IFNAME": "x"}) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine's GPUs can be used")
def test_gpus_that_pytorch_cannot_use_are_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A run would otherwise train on CPUs until its time is over."""
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    with pytest.raises(ValueError, match=r"has 8 NVIDIA GPU\(s\), but PyTorch .* cannot use them: .*NVIDIA driver"):
        init_distributed(timeout_s=60)
    assert not has_gpu()
    assert "DS_ACCELERATOR=cpu computes on the CPU" in caplog.text
    for name, value in (("DS_ACCELERATOR", "cpu"), ("CUDA_VISIBLE_DEVICES", ""), ("SLURM_GPUS_ON_NODE", "0")):
        with monkeypatch.context() as other:
            other.setenv(name, value)
            assert describe_unusable_gpus() is None
