"""Jobs of launcher/submit.py on a real SLURM: preempted, out of time, without a rank or a node, waiting for another."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sws_dist.config.paths import escape_path, expand_path
from tests.cluster.hosts import require, tail, wait_until
from tests.cluster.slurm import PROGRAMS, Slurm
from tests.launching import BIN, REPOSITORY, Job, log

Report = Callable[[str, float], None]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    require(*PROGRAMS)
    slurm = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        yield slurm
    finally:
        slurm.close()


@pytest.fixture
def slurm(cluster: Slurm) -> Iterator[Slurm]:
    yield cluster
    cluster.cancel_all()


def submit(slurm: Slurm, kind: str, job: Job, *options: str) -> str:
    """The job's number."""
    command = [sys.executable, "launcher/submit.py", kind, "--config", job.config, "--time", "20", "--parsable"]
    command += ["--deepspeed_config", job.ds_file(), "--cpus-per-task", "1", *options]
    command += [] if "--gpus-per-node" in options else ["--gpus-per-node", "0"]
    command += [part for override in job.overrides() for part in ("--set", override)]
    return slurm.run(*command).strip()


def printed(job: Job) -> str:
    """Return what the job has written so far."""
    return "".join(path.read_text() for path in sorted(job.output.glob("jobs/*/*.out")))


def wait_for(job: Job, pattern: str, timeout_s: float = 300) -> float:
    """Until the job has printed that."""
    return wait_until(
        lambda: re.search(pattern, printed(job)), timeout_s, lambda: f"no {pattern}: {printed(job)[-4000:]}"
    )


def wait_for_step(job: Job, step: int) -> None:
    wait_until(lambda: taken(job)[-1:] >= [step], 300, lambda: printed(job)[-4000:])


def taken(job: Job) -> list[int]:
    """The steps that were logged, in order."""
    return [int(entry["step"]) for entry in log(job.output) if "train/loss" in entry]


def wait_for_state(slurm: Slurm, number: str, state: str, job: Job, timeout_s: float = 300) -> None:
    wait_until(lambda: slurm.state(number) == state, timeout_s, lambda: f"{slurm.show(number)}\n{printed(job)[-4000:]}")


def test_preempted_by_a_higher_partition(slurm: Slurm, job: Job, few_digits: Path, report: Report) -> None:
    """It saves, makes room, comes back, and has taken every step once."""
    options = ["--gpus-per-node", "1", "--sbatch=--export=ALL,DS_ACCELERATOR=cpu"]  # the GPUs are SLURM's alone
    number = submit(slurm, "auxiliary", job, "--nodes", "2", "--partition", "low", *options)
    wait_for_step(job, 30)
    urgent = job.output.parent / "urgent.out"
    begun = time.monotonic()
    slurm.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", f"--output={urgent}", "--wrap=srun hostname")
    wait_for(job, "goes back into the queue")
    report("preempted: saved, and back in the queue", time.monotonic() - begun)
    wait_until(lambda: urgent.is_file() and len(urgent.read_text().split()) == 2, 300, lambda: slurm.run("squeue"))
    stopped = taken(job)[-1]
    wait_for_step(job, stopped + 1)
    report("preempted: training again", time.monotonic() - begun)
    wait_for_state(slurm, number, "COMPLETED", job)
    assert slurm.show(number)["Restarts"] == "1"
    assert slurm.show(number)["TresPerNode"] == "gres:gpu:1"
    assert f"from step {stopped}, " in printed(job)
    assert "2 nodes x 1 rank" in printed(job)
    assert taken(job) == list(range(1, 161))
    results = json.loads((job.output / "metrics.json").read_text())
    assert results["steps"] == 160
    (snapshot,) = job.output.glob("jobs/*-auxiliary/code")
    assert results["commit"] == (snapshot / "COMMIT").read_text().strip()

    options = ["--data", few_digits / "val", "--nodes", "2", "--time", "5"]
    options += ["--gpus-per-node", "0", "--cpus-per-task", "1"]
    learngene = job.output / "learngene.safetensors"
    command = [sys.executable, "launcher/submit.py", "evaluate", "--checkpoint", learngene, *options]
    submitted = re.match(r"job (\d+): evaluate, 2 node\(s\) x 1 rank\(s\)\n", slurm.run(*command))
    assert submitted
    wait_for_state(slurm, submitted[1], "COMPLETED", job)
    assert json.loads((job.output / "learngene.scores.json").read_text())["top1"] == results["top1"]


def test_time_limit(slurm: Slurm, job: Job, report: Report) -> None:
    """A run that is longer than its time limit is told two minutes before it, and goes on in a next turn."""
    job = Job(job.config, job.output, job.ds, {"train.epochs": 4000})
    number = submit(slurm, "auxiliary", job)
    wait_for_step(job, 1)  # however long that took, the limit comes after it
    hours, minutes, _ = map(int, slurm.show(number)["RunTime"].split(":"))
    slurm.run("scontrol", "update", f"JobId={number}", f"TimeLimit={60 * hours + minutes + 2}")
    wait_for(job, "goes back into the queue")
    slurm.run("scontrol", "update", f"JobId={number}", "TimeLimit=20")
    begun, stopped = time.monotonic(), taken(job)[-1]
    wait_for(job, f"from step {stopped}, ")
    wait_for_step(job, stopped + 1)
    report("time limit: from saved to training again", time.monotonic() - begun)
    assert taken(job)[: stopped + 1] == list(range(1, stopped + 2))
    slurm.run("scancel", number)
    wait_for_state(slurm, number, "CANCELLED", job)
    time.sleep(5)
    assert slurm.state(number) == "CANCELLED"  # told to stop, the ranks have saved; and nobody wants them again
    saved = sorted(path.name for path in job.output.glob("checkpoints/step-*"))
    assert saved[-1] == f"step-{taken(job)[-1]:08d}"


def test_a_rank_is_killed(slurm: Slurm, job: Job, report: Report) -> None:
    """The job was submitted by hand."""
    (job.output / "jobs" / "0").mkdir(parents=True)
    options = ["--nodes=2", "--ntasks-per-node=1", "--time=20", f"--output={job.output}/jobs/0/%j.out", "--parsable"]
    command = ["--config", str(job.config), "--deepspeed_config", str(job.ds_file()), "--set", job.overrides()[0]]
    number = slurm.run("sbatch", *options, "launcher/slurm/auxiliary.sbatch", *command).strip()
    wait_for_step(job, 30)
    ranks = slurm.hosts.processes("h3", "launcher/train.py")
    begun = time.monotonic()
    os.kill(min(ranks, key=lambda p: p.create_time()).pid, signal.SIGKILL)
    wait_for(job, "a rank was lost .*goes back into the queue")
    report("a rank killed: job back in the queue", time.monotonic() - begun)
    lost = taken(job)[-1]
    wait_for(job, r"from step \d+, ")
    report("a rank killed: resumed", time.monotonic() - begun)
    wait_for_state(slurm, number, "COMPLETED", job)
    check_resumed(job, lost)


def test_a_node_is_killed(slurm: Slurm, job: Job, report: Report) -> None:
    """SLURM finds out, and runs the job again when it has two nodes."""
    number = submit(slurm, "auxiliary", job, "--nodes", "2")
    wait_for_step(job, 30)
    begun = time.monotonic()
    slurm.hosts.crash("h3")
    wait_until(lambda: slurm.state(number) == "PENDING", 300, lambda: f"{slurm.show(number)}\n{printed(job)[-4000:]}")
    report("a node killed: job back in the queue", time.monotonic() - begun)
    lost = taken(job)[-1]
    slurm.hosts.boot("h3")
    slurm.start_daemons("h3")
    begun = time.monotonic()
    wait_for(job, r"from step \d+, ")
    report("a node killed: resumed, counted from the node's return", time.monotonic() - begun)
    wait_for_state(slurm, number, "COMPLETED", job)
    check_resumed(job, lost)


def test_only_lost_ranks_count_as_such(slurm: Slurm, tmp_path: Path) -> None:
    """A job that is told to stop at first, and then loses a rank each time, is started again once for RESTARTS=1."""
    (tmp_path / "launcher").mkdir()
    (tmp_path / "launcher" / "lose.py").write_text(
        "import os, sys\nsys.exit(69 if int(os.environ.get('SLURM_RESTART_COUNT', '0')) else 75)\n"
    )
    script = tmp_path / "job.sbatch"
    lines = [
        "#!/bin/bash",
        "set -euo pipefail",
        f"source {REPOSITORY}/launcher/slurm/common.sh",
        "on_every_rank lose.py",
    ]
    script.write_text("\n".join(lines) + "\n")
    options = ["--requeue", "--open-mode=append", f"--output={tmp_path}/job.out", f"--chdir={tmp_path}", "--time=5"]
    given = f"--export=ALL,CODE={tmp_path},PYTHON={sys.executable},RESTARTS=1"
    number = slurm.run("sbatch", "--parsable", given, *options, script).strip()
    wait_until(
        lambda: slurm.state(number) == "FAILED", 300, lambda: f"{slurm.show(number)}\n{tail(tmp_path / 'job.out')}"
    )
    said = (tmp_path / "job.out").read_text()
    assert slurm.show(number)["Restarts"] == "2", said
    assert said.count("told to stop (exit code 75); it goes back into the queue") == 1
    assert said.count("a rank was lost (exit code 69); it goes back into the queue") == 1
    assert "a rank was lost (exit code 69), and RESTARTS=1 times before: the job ends" in said
    assert not list(tmp_path.glob(".lost-ranks-*"))


def check_resumed(job: Job, lost: int) -> None:
    """At most the steps since the last save were taken again.

    On a busy machine SLURM may find a node too slow and take it for dead, so that there are more resumes than this one.
    """
    saved = int(re.findall(r"from step (\d+), ", printed(job))[0])
    assert 0 <= lost - saved < 15
    assert taken(job)[-1] == 160
    assert (job.output / "metrics.json").is_file()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the job would find this machine's GPUs")
def test_an_error_of_one_rank_ends_the_job(slurm: Slurm, job: Job) -> None:
    """It has srun stop the other rank, whose exit code asks for another start, and is the higher one."""
    number = submit(slurm, "auxiliary", job, "--nodes", "2", "--gpus-per-node", "1")
    wait_for_state(slurm, number, "FAILED", job)
    assert slurm.show(number)["Restarts"] == "0"
    assert "has 1 NVIDIA GPU(s), but PyTorch" in printed(job)


def test_three_descendants_wait_for_their_auxiliary(slurm: Slurm, job: Job, report: Report) -> None:
    """And one of them, told to stop, starts again alone."""
    first = Job(job.config, job.output / "auxiliary", job.ds, {"train.epochs": 6})
    config = job.config.with_name("tuned.yaml")
    config.write_text(f"base: {job.config.name}\nmodel: {{schedule: null, depth: 2}}\n")
    others = Job(config, job.output / "descendants", job.ds)
    auxiliary = submit(slurm, "auxiliary", first)
    learngene = first.output / "learngene.safetensors"
    options = ["--learngene", str(learngene), "--depths", "2,3,4", "--after", auxiliary]
    array = submit(slurm, "descendants", others, *options)
    wait_for_step(first, 1)
    assert slurm.show(array)["Reason"] == "Dependency"
    begun = time.monotonic()
    elements = {depth: f"{array}_{depth}" for depth in (2, 3, 4)}
    runs = {depth: Job(config, others.output / f"depth{depth}", job.ds) for depth in elements}
    for run in runs.values():
        wait_for_step(run, 1)
    assert learngene.is_file()
    wait_for_step(runs[3], 5)
    slurm.run("scancel", "--batch", "--signal=USR1", elements[3])
    for element in elements.values():
        wait_for_state(slurm, element, "COMPLETED", others)
    report("three descendants, one of them stopped once: all done", time.monotonic() - begun)
    assert [slurm.show(element)["Restarts"] for element in elements.values()] == ["0", "1", "0"]
    for depth, run in runs.items():
        assert json.loads((run.output / "metrics.json").read_text())["depth"] == depth
        assert taken(run) == list(range(1, 161))


def test_every_launcher_leads_to_the_same_world(slurm: Slurm, tmp_path: Path) -> None:
    """On two nodes, for srun of two ranks each; and plain python, where SLURM promised more, is refused."""
    (tmp_path / "hostfile").write_text("h2 slots=1\nh3 slots=1\n")
    say = "tests/cluster/print_world.py"
    deepspeed = f"{BIN}/deepspeed --hostfile {tmp_path}/hostfile"
    torchrun = f"{BIN}/torchrun --nnodes=2 --nproc-per-node=1 --master-addr=h2 --master-port=29510"
    by_node = "srun --ntasks-per-node=1 --ntasks=2 bash -c"
    commands = {
        "srun": f"srun {sys.executable} {say}",
        "deepspeed slurm": f"{deepspeed} --launcher slurm --no_ssh_check --master_addr h2 --num_nodes 2 {say}",
        "deepspeed": f"{by_node} '{deepspeed} --no_ssh --node_rank $SLURM_NODEID --master_addr h2 {say}'",
        "torchrun": f"{by_node} '{torchrun} --node-rank=$SLURM_NODEID {say}'",
        "python": f"{sys.executable} {say}",
    }
    script = tmp_path / "job.sbatch"
    lines = [f"({command}) >{tmp_path}/{name.replace(' ', '-')}.out 2>&1" for name, command in commands.items()]
    script.write_text("\n".join(["#!/bin/bash", *lines]))
    options = ("--nodes=2", "--ntasks-per-node=2", "--time=5", f"--output={tmp_path}/job.out")
    slurm.run("sbatch", "--wait", *options, script, timeout_s=200, check=False)
    said = {name: tail(tmp_path / f"{name.replace(' ', '-')}.out") for name in commands}
    assert "2 nodes x 2 rank(s): [(0, 0), (1, 1), (2, 0), (3, 1)]" in said["srun"], said["srun"]
    for name in ("deepspeed slurm", "deepspeed", "torchrun"):
        assert "2 nodes x 1 rank(s): [(0, 0), (1, 0)]" in said[name], f"{name}: {said[name]}"
    assert "error: this run has 1 node(s) and 1 rank(s), but 2 and 4 were promised by SLURM" in said["python"]


def test_strange_paths_survive(slurm: Slurm, tmp_path: Path) -> None:
    """In the script, in the log's name, and in what the ranks are given; the program's path has a space too."""
    folder = tmp_path / ("a b  #1 50% %j $HOME 'q' \"d\" Bär;&()")
    program = folder / "my venv" / "python"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\nprintf "[%s]\\n" "$@"\n')
    program.chmod(0o755)
    checkpoint = folder / "model.safetensors"
    checkpoint.touch()
    options = ["--data", escape_path(folder / "val"), "--python", program, "--cpus-per-task", "1", "--time", "5"]
    command = [
        sys.executable,
        "launcher/submit.py",
        "evaluate",
        "--checkpoint",
        escape_path(checkpoint),
        "--parsable",
        "--gpus-per-node",
        "0",
        *options,
    ]
    number = slurm.run(*command).strip()
    wait_until(lambda: slurm.state(number) == "COMPLETED", 300, lambda: str(slurm.show(number)))
    (kept,) = folder.glob("jobs/*-evaluate")
    words = (kept / f"{number}.out").read_text().splitlines()
    assert words[:2] == ["[-u]", f"[{kept}/code/launcher/evaluate.py]"]
    assert [expand_path(word[1:-1]) for word in words[2::2]] == ["--checkpoint", "--data", "--json"]
    scores = folder / "model.scores.json"
    assert [expand_path(word[1:-1]) for word in words[3::2]] == [str(checkpoint), str(folder / "val"), str(scores)]


def test_a_shell_of_salloc_runs_single_processes(slurm: Slurm) -> None:
    """A single process works in the shell, and both tasks in a step that srun opens there."""
    say = f"{sys.executable} tests/cluster/print_world.py"
    said = slurm.run("salloc", "--nodes=2", "--ntasks=2", "bash", "-c", f"{say} 2>&1; srun {say} 2>&1", timeout_s=200)
    assert "1 rank: [(0, 0)]" in said
    assert "has 2 node(s) and 2 task(s), this run uses 1 and 1; srun before the command" in said
    assert "2 nodes x 1 rank(s): [(0, 0), (1, 0)]" in said
