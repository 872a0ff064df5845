"""launcher/submit.py: what it writes into a script, and what it refuses before anything is queued."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from sws_dist.config.paths import expand_path

ROOT = Path(__file__).parents[2]
TRAIN = ["--config", "configs/runs/auxiliary_small.yaml", "--deepspeed_config", "configs/deepspeed/zero2_bf16.json"]


def submit(*arguments: str, code: int = 0) -> str:
    gpus = [] if "--gpus-per-node" in arguments else ["--gpus-per-node", "8"]
    command = [sys.executable, "launcher/submit.py", *arguments, *gpus, "--time", "60"]
    env = os.environ | {"PATH": "/nowhere"}  # no SLURM here
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_script_says_all_that_was_asked_for(tmp_path: Path) -> None:
    options = ["--nodes", "2", "--gpus-per-node", "8", "--partition", "gpu", "--account", "us", "--qos", "long"]
    text = submit("auxiliary", *TRAIN, *options, "--sbatch=--mem=0", "--set", f"output={tmp_path}/run", "--dry-run")
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    wanted = ["nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "time=60", "partition=gpu", "account=us", "qos=long"]
    for option in (*wanted, "mem=0", "signal=B:USR1@120", "requeue"):
        assert f"#SBATCH --{option}" in lines
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:])  # sbatch reads no further
    assert 'on_every_rank train.py "$@" --resume auto' in text
    assert not (tmp_path / "run").exists()
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_paths_survive_into_the_script(tmp_path: Path) -> None:
    """Characters that the shell, sbatch and a config read otherwise survive; tests/cluster asks a real SLURM."""
    folder = tmp_path / "a b #1 50% $HOME 'q' \"d\""
    output = f"output={str(folder).replace('$', '$$')}"
    python = tmp_path / "my venv" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    text = submit("auxiliary", *TRAIN, "--gpus-per-node", "8", "--set", output, "--python", str(python), "--dry-run")
    (logs,) = re.findall(r'#SBATCH --output="(.*)/%j.out"\n', text)
    assert re.match(r".*/a b #1 50%% \$HOME 'q' \\\"d\\\"/jobs/", logs)
    header, _, _ = text.partition("set -euo pipefail")
    probe = f'{header}\neval "PYTHON=($PYTHON)"; printf "%s\\n" "${{PYTHON[@]}}" "$CODE" "$@"'
    words = subprocess.run(["bash", "-c", probe], capture_output=True, text=True, check=True).stdout.splitlines()
    job = words[1].removesuffix("/code")
    assert words[:2] == [str(python), f"{job}/code"]
    assert Path(job).parent == folder / "jobs"
    assert expand_path(words[3]) == f"{job}/config.yaml"
    container = submit(
        "auxiliary", *TRAIN, "--gpus-per-node", "8", "--python", "apptainer exec x.sif python", "--dry-run"
    )
    assert "PYTHON='apptainer exec x.sif python'\n" in container


def test_shipped_configs_may_be_named(tmp_path: Path) -> None:
    options = ["--gpus-per-node", "8", "--set", f"output={tmp_path}/run", "--dry-run"]
    named = ["--config", "auxiliary_small", "--deepspeed_config", "zero2_bf16"]
    stamp = re.compile(r"\d{8}-\d{6}")
    assert stamp.sub("", submit("auxiliary", *named, *options)) == stamp.sub("", submit("auxiliary", *TRAIN, *options))


def test_descendants_are_an_array_that_waits(tmp_path: Path) -> None:
    config = ["--config", "configs/runs/descendant_small.yaml", *TRAIN[2:], "--gpus-per-node", "8"]
    array = ["--learngene", str(tmp_path / "learngene.safetensors"), "--depths", "6,9,12"]
    text = submit("descendants", *config, *array, "--after", "4711", "--set", "output=runs/d", "--dry-run")
    assert "#SBATCH --array=6,9,12\n" in text
    assert "#SBATCH --dependency=afterok:4711\n" in text
    assert "set -- runs/d --config" in text
    said = submit("descendants", *config, *array, code=1)
    assert "there is no such file; --after JOB waits" in said
    text = submit("descendants", *config, *array[:3], "6-8", "--after", "1", "--dry-run")
    assert "#SBATCH --array=6,7,8\n" in text
    for depths, wrong in (
        ("6,x", "expected depths such as 6,9,12 or 6-15"),
        ("5000", "expected depths from 1 to 1000"),
    ):
        assert wrong in submit("descendants", *config, *array[:3], depths, "--after", "1", code=2)


def test_what_could_not_run_is_not_queued(tmp_path: Path) -> None:
    output = ["--set", f"output={tmp_path}/run"]
    said = submit("auxiliary", *TRAIN, *output, "--gpus-per-node", "3", code=1)
    assert "train.global_batch = 512 cannot be shared evenly by 3 ranks" in said
    assert "did you mean train.epochs?" in submit("auxiliary", *TRAIN, *output, "--set", "train.epoch=3", code=1)
    assert "auxiliary needs --deepspeed_config" in submit("auxiliary", *TRAIN[:2], code=2)
    assert "--depths means nothing to auxiliary" in submit("auxiliary", *TRAIN, "--depths", "6", code=2)
    score = ["evaluate", "--checkpoint", "model.safetensors", "--data", "val", "--after", "1"]
    assert "--set means nothing to evaluate" in submit(*score, "--set", "data.crop_pct=1", code=2)
    assert not (tmp_path / "run").exists()


def test_a_job_for_cpus_says_so(tmp_path: Path) -> None:
    options = ["--ranks-per-node", "2", "--set", f"output={tmp_path}/run", "--dry-run"]
    text = submit("auxiliary", *TRAIN, *options, "--gpus-per-node", "0")
    assert "#SBATCH --ntasks-per-node=2\n" in text
    assert text.index("\nexport DS_ACCELERATOR=cpu\n") < text.index("\nsource ")
    assert "DS_ACCELERATOR" not in submit("auxiliary", *TRAIN, *options[2:])
    assert "--ranks-per-node is for CPUs" in submit("auxiliary", *TRAIN, *options, code=2)


def test_a_machine_without_slurm(tmp_path: Path) -> None:
    said = submit("auxiliary", *TRAIN, "--set", f"output={tmp_path}/run", "--gpus-per-node", "8", code=1)
    assert "error: there is no sbatch on this machine" in said
    (job,) = (tmp_path / "run" / "jobs").iterdir()
    assert {path.name for path in job.iterdir()} == {"code", "config.yaml", "deepspeed.json", "job.sbatch"}
    kept = (job / "code" / "launcher" / "slurm" / "common.sh").read_text()
    assert kept == (ROOT / "launcher" / "slurm" / "common.sh").read_text()
    assert (job / "code" / "sws_kernels" / "__init__.py").is_file()
