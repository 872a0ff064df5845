"""Write a SLURM job for a run config, submit it, and say where to watch it.

examples:
  # the auxiliary model on two nodes of eight GPUs; the batch is checked against their number before it is queued
  python launcher/submit.py auxiliary --config configs/runs/auxiliary_small.yaml \\
      --deepspeed_config configs/deepspeed/zero2_bf16.json --nodes 2 --gpus-per-node 8 --time 1-00:00 \\
      --set data.root=/data/imagenet

  # three descendants that start when job 4711 has ended well: an array, one element a depth
  python launcher/submit.py descendants --config configs/runs/descendant_small.yaml \\
      --deepspeed_config configs/deepspeed/zero2_bf16.json --learngene runs/auxiliary_small/learngene.safetensors \\
      --depths 6,9,12 --after 4711 --gpus-per-node 8 --time 12:00:00 --set output=runs/descendants

  # a score
  python launcher/submit.py evaluate --checkpoint runs/descendants/depth9/model.safetensors \\
      --data /data/imagenet/val --gpus-per-node 8 --time 1:00:00

Beside the run, in OUTPUT/jobs/<time>-<job>/, stay the script, the resolved configs, and the code as it is now: the job
runs from there, so editing the checkout changes nothing that is queued. `sbatch <that script>` submits it once more.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sws_dist.atomic import atomic_write_text
from sws_dist.cli.common import make_parser, parse_args
from sws_dist.config.loader import config_to_yaml, load_config
from sws_dist.errors import ConfigError, RunError
from sws_dist.zero.config import resolve_deepspeed_config

ROOT = Path(__file__).resolve().parents[1]
EVALUATE_THREADS = 4  # evaluate.py's default
CODE = ("launcher", "sws_dist", "kernels", "configs")


@dataclass(frozen=True)
class Job:
    """``output``: the folder of what it makes; ``arguments``: of its batch script."""

    kind: str
    output: Path
    folder: Path
    arguments: list[str]
    threads: int
    """That a rank's input takes."""
    texts: dict[str, str]
    """Files beside the script."""


def main() -> None:
    args = parse()
    job = evaluation(args) if args.job == "evaluate" else training(args)
    text = script(job, args)
    if args.dry_run:
        print(text, end="")
        return
    keep(job)
    file = atomic_write_text(job.folder / "job.sbatch", text)
    number = submit(file)
    if args.parsable:
        print(number)
        return
    log = f"{number}_*.out" if args.depths else f"{number}.out"
    print(
        f"job {number}: {job.kind}, {args.nodes} node(s) x {ranks_per_node(args)} rank(s)\n"
        f"  script  {file}\n"
        f"  state   squeue --jobs={number}\n"
        f"  log     tail -F {job.folder}/{log}\n"
        f"  curves  tensorboard --logdir {job.output}"
    )


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("job", choices=("auxiliary", "descendants", "evaluate"), help="auxiliary: any single run")
    parser.add_argument("--config", type=Path, help="what to train (YAML)")
    parser.add_argument("--deepspeed_config", type=Path, help="how it is sharded (JSON)")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], dest="overrides", help="repeatable")
    parser.add_argument("--learngene", type=Path, help="descendants: what they are expanded from")
    parser.add_argument("--depths", help="descendants: their layers, 6,9,12")
    parser.add_argument("--checkpoint", type=Path, help="evaluate: the weights")
    parser.add_argument("--data", type=Path, help="evaluate: a folder of class folders")
    parser.add_argument("--nodes", type=int, default=1, help="of one run (default 1)")
    parser.add_argument("--gpus-per-node", type=int, default=0, help="each gets a rank; 0 (default): train on CPUs")
    parser.add_argument("--ranks-per-node", type=int, help="only without GPUs (default 1)")
    parser.add_argument(
        "--cpus-per-task", type=int, help="cores of a rank (default: one more than its input's threads)"
    )
    parser.add_argument(
        "--time", required=True, help="limit, as SLURM writes it: 90, 12:00:00, 2-00:00; the run goes on after it"
    )
    for option in ("partition", "account", "qos"):
        parser.add_argument(f"--{option}", help="SLURM's")
    parser.add_argument("--after", metavar="JOB", help="start when this job has ended well")
    parser.add_argument("--sbatch", metavar="OPTION", action="append", default=[], help="any other: --sbatch=--mem=64G")
    parser.add_argument("--python", default=sys.executable, help="command on the nodes (default: this one)")
    parser.add_argument("--parsable", action="store_true", help="print the job's number and nothing else")
    parser.add_argument("--dry-run", action="store_true", help="print the script; write and submit nothing")
    args = parse_args(parser)
    needed = {
        "auxiliary": ("config", "deepspeed_config"),
        "descendants": ("config", "deepspeed_config", "learngene", "depths"),
        "evaluate": ("checkpoint", "data"),
    }
    for job, options in needed.items():
        for option in options:
            given = getattr(args, option) is not None
            if job == args.job and not given:
                parser.error(f"{job} needs --{option}")
            if option not in needed[args.job] and given:
                parser.error(f"--{option} means nothing to {args.job}")
    if args.gpus_per_node and args.ranks_per_node:
        parser.error("--ranks-per-node is for CPUs: a GPU has one rank")
    return args


def ranks_per_node(args: argparse.Namespace) -> int:
    return args.gpus_per_node or args.ranks_per_node or 1


def training(args: argparse.Namespace) -> Job:
    """What would stop the job once it runs stops it here, before it is queued.

    Raises:
        ConfigError: a wrong key; a batch that these ranks cannot have; a depth or learngene that cannot be.
    """
    learngene = [f"model.initial_learngene={args.learngene}"] if args.learngene else []
    run = load_config(args.config, [*args.overrides, *learngene])
    resolve_deepspeed_config(args.deepspeed_config, run, args.nodes * ranks_per_node(args))
    output, folder = Path(run.output), folder_of(args.job, Path(run.output))
    arguments = ["--config", f"{folder}/config.yaml", "--deepspeed_config", f"{folder}/deepspeed.json"]
    if args.job == "descendants":
        if not all(depth.isdigit() and int(depth) for depth in args.depths.split(",")):
            raise ConfigError(f"--depths {args.depths}: expected numbers of layers, for example 6,9,12")
        if not args.after and not args.learngene.is_file():
            raise ConfigError(
                f"--learngene {args.learngene}: there is no such file; --after JOB waits for the job that writes it"
            )
        arguments = [str(output), *arguments]
    texts = {"config.yaml": config_to_yaml(run), "deepspeed.json": args.deepspeed_config.read_text()}
    return Job(args.job, output, folder, arguments, run.data.num_threads, texts)


def evaluation(args: argparse.Namespace) -> Job:
    if not args.after and not args.checkpoint.is_file():
        raise ConfigError(
            f"--checkpoint {args.checkpoint}: there is no such file; --after JOB waits for the job that writes it"
        )
    output = args.checkpoint.parent
    scores = f"{args.checkpoint.with_suffix('')}.scores.json"
    arguments = ["--checkpoint", str(args.checkpoint), "--data", str(args.data), "--json", scores]
    return Job(args.job, output, folder_of(args.job, output), arguments, EVALUATE_THREADS, {})


def folder_of(kind: str, output: Path) -> Path:
    return output / "jobs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{kind}"


def script(job: Job, args: argparse.Namespace) -> str:
    """The batch script of that kind with resources, code and arguments filled in."""
    lines = (ROOT / "launcher" / "slurm" / f"{job.kind}.sbatch").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    filled = [
        *(f"#SBATCH {option}" for option in options(job, args)),
        f"cd {shlex.quote(str(Path.cwd()))}",
        f"CODE={shlex.quote(str((job.folder / 'code').absolute()))}",
        f"PYTHON={shlex.quote(args.python)}",
        f"set -- {shlex.join(job.arguments)}",
    ]
    # The comment of the template is for those who submit it by hand.
    header = [line for line in lines[:first] if line.startswith(("#!", "#SBATCH"))]
    return "\n".join([*header, *filled, *lines[first:]]) + "\n"


def options(job: Job, args: argparse.Namespace) -> Iterator[str]:
    """sbatch's."""
    yield f"--nodes={args.nodes}"
    yield f"--ntasks-per-node={ranks_per_node(args)}"
    yield f"--cpus-per-task={args.cpus_per_task or job.threads + 1}"
    if args.gpus_per_node:
        yield f"--gpus-per-node={args.gpus_per_node}"
    yield f"--time={args.time}"
    for name in ("partition", "account", "qos"):
        if value := getattr(args, name):
            yield f"--{name}={value}"
    if args.after:
        yield f"--dependency=afterok:{args.after}"
        yield "--kill-on-invalid-dep=yes"  # or it would wait for ever for what can no longer come
    if args.depths:
        yield f"--array={args.depths}"
    yield f"--output={job.folder.absolute()}/{'%A_%a' if args.depths else '%j'}.out"
    yield from args.sbatch


def keep(job: Job) -> None:
    """Code and configs, beside the run."""
    code = job.folder / "code"
    for name in CODE:
        shutil.copytree(ROOT / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
    (code / "sws_kernels").symlink_to("kernels")  # the name under which it is imported
    from sws_dist.run_dir import commit  # imports torch: not before everything else is known to be right

    atomic_write_text(code / "COMMIT", commit() + "\n")
    for name, text in job.texts.items():
        atomic_write_text(job.folder / name, text)


def submit(file: Path) -> str:
    """Returns the job's number."""
    try:
        done = subprocess.run(["sbatch", "--parsable", str(file)], capture_output=True, text=True)
    except FileNotFoundError:
        raise RunError("there is no sbatch on this machine; --dry-run prints the script") from None
    if done.returncode:
        raise RunError(f"sbatch {file}: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]
