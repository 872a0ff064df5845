"""DeepSpeed's launcher over a hostfile of three ssh hosts, and what happens when one of them goes."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, require, tail, wait_until
from tests.launching import BIN, Job, log


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    require("pdsh")
    hosts = Hosts(tmp_path_factory.mktemp("hosts"), 3)
    (hosts.folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in hosts.names))
    # DeepSpeed hands on no variable but PYTHON*; it finds the others in this file, in the home folder.
    forwarded = ("OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR")
    (hosts.folder / ".deepspeed_env").write_text("".join(f"{name}={hosts.environment[name]}\n" for name in forwarded))
    try:
        yield hosts
    finally:
        hosts.close()


def start(hosts: Hosts, job: Job, hostfile: str = "hostfile") -> tuple[subprocess.Popen[str], Path]:
    """``deepspeed --hostfile ... launcher/train.py ...`` on h1, and the file that it prints to."""
    command = [BIN / "deepspeed", "--hostfile", hosts.folder / hostfile, "launcher/train.py"]
    command += ["--config", job.config, "--deepspeed_config", job.ds_file(), "--resume", "auto"]
    command += [part for override in job.overrides() for part in ("--set", override)]
    said = job.output.with_suffix(f".{time.monotonic_ns()}.out")
    with said.open("w") as file:
        return hosts.start("h1", *command, stdout=file, stderr=subprocess.STDOUT), said


def wait_for_step(job: Job, step: int, said: Path) -> None:
    wait_until(lambda: any(entry["step"] >= step for entry in log(job.output)), 300, lambda: tail(said))


def ended(process: subprocess.Popen[str], said: Path, within_s: float) -> float:
    """Wait for the launcher; the seconds it took."""
    return wait_until(lambda: process.poll() is not None, within_s, lambda: tail(said))


def ranks(hosts: Hosts) -> list[str]:
    return [f"{name}: {p.pid}" for name in hosts.names for p in hosts.processes(name, "launcher/train.py")]


def refused(hosts: Hosts, job: Job, hostfile: str = "hostfile") -> str:
    """The one message of a run that has to end at once, everywhere."""
    process, said = start(hosts, job, hostfile)
    ended(process, said, 300)
    assert process.returncode != 0, tail(said)
    wait_until(lambda: not ranks(hosts), 300, lambda: str(ranks(hosts)))
    messages = [line for line in said.read_text().splitlines() if "error: " in line]
    assert len(messages) == 1, tail(said)
    assert not (job.output / "log.jsonl").exists()
    return messages[0]


def test_a_hostfile_that_is_not_there(hosts: Hosts, job: Job) -> None:
    """DeepSpeed itself warns, trains on one machine and leaves with 0."""
    message = refused(hosts, job, "hostfle")
    assert f"--hostfile {hosts.folder}/hostfle: there is no such file on h1" in message


def test_a_hostfile_that_names_a_host_twice(hosts: Hosts, job: Job) -> None:
    (hosts.folder / "twice").write_text("h2 slots=1\n10.77.0.2 slots=1\n")
    message = refused(hosts, job, "twice")
    assert "this run has 1 node(s) and 2 rank(s), but 2 and 2 were promised by DeepSpeed's launcher" in message


def test_an_output_that_the_hosts_do_not_share(hosts: Hosts, job: Job) -> None:
    (hosts.folder / "two").write_text("h2 slots=1\nh3 slots=1\n")
    message = refused(hosts, Job(job.config, job.output, job.ds, {"output": "/dev/shm/run"}), "two")
    assert "output /dev/shm/run: on h" in message
    assert "all nodes have to share its file system" in message


def test_a_host_crashes(hosts: Hosts, job: Job, report: Callable[[str, float], None]) -> None:
    """All ranks end in seconds; the same command goes on from the last checkpoint once the host is back."""
    process, said = start(hosts, job)
    wait_for_step(job, 30, said)
    hosts.crash("h2")
    report("host crashes: launcher ends", ended(process, said, 30))
    assert process.returncode != 0
    wait_until(lambda: not ranks(hosts), 300, lambda: str(ranks(hosts)))
    last = log(job.output)[-1]["step"]

    hosts.boot("h2")
    begun = time.monotonic()
    process, said = start(hosts, job)
    wait_for_step(job, last + 1, said)
    report("host crashes: back at the same step after the restart", time.monotonic() - begun)
    ended(process, said, 300)
    text = said.read_text()
    assert process.returncode == 0, tail(said)
    assert "3 nodes x 1 rank" in text
    assert "gloo uses eth0 (10.77.0.2)" in text  # h2 knows itself as 127.0.1.1, as Debian has it
    assert json.loads((job.output / "metrics.json").read_text())["world_size"] == 3
    saved = int(text.partition("from step ")[2].partition(",")[0])
    assert 0 < last - saved < 15


def test_a_host_falls_silent(hosts: Hosts, job: Job, report: Callable[[str, float], None]) -> None:
    """Nobody closes a connection: what ends the ranks is the time limit of their collectives, train.timeout_s."""
    process, said = start(hosts, job)
    wait_for_step(job, 20, said)
    hosts.unplug("h2")
    report("host falls silent, train.timeout_s 20: launcher ends", ended(process, said, 20 + 30))
    assert process.returncode != 0
    wait_until(lambda: not ranks(hosts), 40, lambda: str(ranks(hosts)))
    hosts.plug("h2")


def test_ctrl_c(hosts: Hosts, job: Job, report: Callable[[str, float], None]) -> None:
    """The launcher tells every host's ranks, which save the step under way."""
    (hosts.folder / "two").write_text("h2 slots=1\nh3 slots=1\n")
    process, said = start(hosts, job, "two")
    wait_for_step(job, 20, said)
    begun = time.monotonic()
    launcher = min(hosts.processes("h1", "launcher/train.py"), key=lambda p: p.create_time())
    launcher.send_signal(signal.SIGINT)
    ended(process, said, 60)
    wait_until(lambda: not ranks(hosts), 60, lambda: str(ranks(hosts)))
    report("Ctrl-C to the launcher over two hosts: all ranks ended", time.monotonic() - begun)
    saved = sorted(path.name for path in (job.output / "checkpoints").glob("step-*"))
    assert saved[-1] == f"step-{int(log(job.output)[-1]['step']):08d}", f"{saved} {tail(said)}"
