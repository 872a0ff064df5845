"""Write a SLURM job for a run config, submit it, and say where to watch it.

examples:
  # the auxiliary model on two nodes of eight GPUs; the batch is checked against their number before it is queued
  sws submit auxiliary --config auxiliary_small --deepspeed_config zero2_bf16 --nodes 2 --gpus-per-node 8 \\
      --time 1-00:00 --set data.root=/data/imagenet

  # three descendants that start when job 4711 has ended well: an array, one element a depth
  sws submit descendants --config descendant_small --deepspeed_config zero2_bf16 \\
      --learngene runs/auxiliary_small/learngene.safetensors --depths 6,9,12 --after 4711 --gpus-per-node 8 \\
      --time 12:00:00 --set output=runs/descendants

  # a score
  sws submit evaluate --checkpoint runs/descendants/depth9/model.safetensors --data /data/imagenet/val \\
      --gpus-per-node 8 --time 1:00:00

Beside the run, in OUTPUT/jobs/<time>-<job>/, stay the script, the resolved configs, and the code as it is now: the job
runs from there, so editing the checkout or upgrading the package changes nothing that is queued. `sbatch <that script>`
submits it once more.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sws_dist import source_tree
from sws_dist.atomic import atomic_write_text
from sws_dist.cli.common import (
    add_config_options,
    add_deepspeed_option,
    make_parser,
    parse_args,
    parse_depths,
    print_result,
    whole_number,
)
from sws_dist.config.loader import config_to_yaml, load_config
from sws_dist.config.paths import escape_path
from sws_dist.config.schema import DEFAULT_NUM_THREADS
from sws_dist.config.shipped import find_deepspeed_config
from sws_dist.errors import ConfigError, RunError
from sws_dist.text import read_text
from sws_dist.zero.config import resolve_deepspeed_config

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A SLURM job, before it is written and submitted."""

    kind: str
    """``auxiliary``, ``descendants`` or ``evaluate``: the name of its batch script."""
    output: Path
    """The folder of what the job makes."""
    folder: Path
    """The folder that keeps its script, configs and code."""
    arguments: list[str]
    """The arguments of its batch script."""
    threads: int
    """Threads that a rank's input takes."""
    texts: dict[str, str]
    """Files beside the script, by name."""


def main() -> None:
    args = parse()
    job = plan_evaluation(args) if args.job == "evaluate" else plan_training(args)
    if set(str(job.folder)) & set("\\\n"):
        raise ConfigError(
            f"output {job.output}: SLURM cannot write a log below a path with a backslash or a line break"
        )
    text = fill_template(job, args)
    if args.dry_run:
        print_result(text.rstrip("\n"))
        return
    keep_code(job)
    script = atomic_write_text(job.folder / "job.sbatch", text)
    number = sbatch(script)
    if args.parsable or args.quiet:
        print_result(number)
        return
    output = f"{number}_*.out" if args.depths else f"{number}.out"
    print_result(
        f"job {number}: {job.kind}, {args.nodes} node(s) x {ranks_per_node(args)} rank(s)\n"
        f"  script  {shlex.quote(str(script))}\n"
        f"  state   squeue --jobs={number}\n"
        f"  log     tail -F {shlex.quote(str(job.folder))}/{output}\n"
        f"  curves  tensorboard --logdir {shlex.quote(str(job.output))}"
    )


def parse() -> argparse.Namespace:
    """Parse the command line, and refuse options that the job does not take."""
    parser = make_parser(__doc__)
    parser.add_argument("job", choices=("auxiliary", "descendants", "evaluate"), help="auxiliary: any single run")
    add_config_options(parser, required=False)
    add_deepspeed_option(parser, required=False)
    parser.add_argument("--learngene", type=Path, help="descendants: what they are expanded from")
    parser.add_argument("--depths", type=parse_depths, help="descendants: their layers, 6,9,12 or 6-15")
    parser.add_argument("--checkpoint", type=Path, help="evaluate: the weights")
    parser.add_argument("--data", type=Path, help="evaluate: a folder of class folders")
    parser.add_argument("--nodes", type=whole_number(1, 100_000), default=1, help="of one run (default 1)")
    parser.add_argument(
        "--gpus-per-node", type=whole_number(0, 1024), required=True, help="each gets a rank; 0 trains on CPUs"
    )
    parser.add_argument("--ranks-per-node", type=whole_number(1, 1024), help="only with --gpus-per-node 0 (default 1)")
    parser.add_argument(
        "--cpus-per-task",
        type=whole_number(1, 4096),
        help="cores of a rank (default: one more than its input's threads)",
    )
    parser.add_argument(
        "--time", required=True, help="limit, as SLURM writes it: 90, 12:00:00, 2-00:00; the run goes on after it"
    )
    for option in ("partition", "account", "qos"):
        parser.add_argument(f"--{option}", help="SLURM's")
    parser.add_argument("--after", metavar="JOB", help="start when this job has ended well")
    parser.add_argument("--sbatch", metavar="OPTION", action="append", default=[], help="any other: --sbatch=--mem=64G")
    parser.add_argument(
        "--python", default=sys.executable, help="what runs Python on the nodes, as in a shell (default: this one)"
    )
    parser.add_argument("--parsable", action="store_true", help="print the job's number and nothing else, as --quiet")
    parser.add_argument("--dry-run", action="store_true", help="print the script; write and submit nothing")
    args = parse_args(parser, one_process=True)
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
    if args.overrides and args.job == "evaluate":
        parser.error("--set means nothing to evaluate, which reads no run config")
    if args.gpus_per_node and args.ranks_per_node:
        parser.error("--ranks-per-node is for CPUs: a GPU has one rank")
    return args


def ranks_per_node(args: argparse.Namespace) -> int:
    """Return how many ranks a node runs: one for each GPU."""
    return args.gpus_per_node or args.ranks_per_node or 1


def plan_training(args: argparse.Namespace) -> Job:
    """Plan a training job. What would stop it once it runs stops it here, before it is queued.

    Raises:
        ConfigError: a wrong key; a batch that these ranks cannot have; a learngene that is not there.
    """
    learngene = [f"model.initial_learngene={escape_path(args.learngene)}"] if args.learngene else []
    config = load_config(args.config, [*args.overrides, *learngene])
    resolve_deepspeed_config(args.deepspeed_config, config, args.nodes * ranks_per_node(args))
    output = Path(config.output)
    folder = job_folder(args.job, output)
    configs = escape_path(folder)
    arguments = ["--config", f"{configs}/config.yaml", "--deepspeed_config", f"{configs}/deepspeed.json"]
    if args.job == "descendants":
        require_file("--learngene", args.learngene, args.after)
        arguments = [escape_path(output), *arguments]
    deepspeed_json = read_text(find_deepspeed_config(args.deepspeed_config))
    texts = {"config.yaml": config_to_yaml(config), "deepspeed.json": deepspeed_json}
    return Job(args.job, output, folder, arguments, config.data.num_threads, texts)


def plan_evaluation(args: argparse.Namespace) -> Job:
    """Plan a job that scores a model."""
    require_file("--checkpoint", args.checkpoint, args.after)
    output = args.checkpoint.parent
    scores = f"{args.checkpoint.with_suffix('')}.scores.json"
    options = {"--checkpoint": args.checkpoint, "--data": args.data, "--json": scores}
    arguments = [word for option, path in options.items() for word in (option, escape_path(path))]
    return Job(args.job, output, job_folder(args.job, output), arguments, DEFAULT_NUM_THREADS, {})


def require_file(option: str, path: Path, after: str | None) -> None:
    """Raise ConfigError if a file is not there, unless an earlier job is to write it."""
    if not after and not path.is_file():
        raise ConfigError(f"{option} {path}: there is no such file; --after JOB waits for the job that writes it")


def job_folder(kind: str, output: Path) -> Path:
    """Return the folder that is to keep a job's script, configs and code."""
    return output / "jobs" / f"{time.strftime('%Y%m%d-%H%M%S')}-{kind}"


def fill_template(job: Job, args: argparse.Namespace) -> str:
    """Return the batch script of the job's kind with resources, code and arguments filled in."""
    lines = read_text(source_tree.launcher_folder() / "slurm" / f"{job.kind}.sbatch").splitlines()
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    filled = [
        *(f"#SBATCH {option}" for option in sbatch_options(job, args)),
        f"cd {shlex.quote(str(Path.cwd()))}",
        f"CODE={shlex.quote(str((job.folder / 'code').absolute()))}",
        f"PYTHON={shlex.quote(quote_program(args.python))}",
        *([] if args.gpus_per_node else ["export DS_ACCELERATOR=cpu"]),
        f"set -- {shlex.join(job.arguments)}",
    ]
    # The comment of the template is for those who submit it by hand.
    header = [line for line in lines[:first] if line.startswith(("#!", "#SBATCH"))]
    return "\n".join([*header, *filled, *lines[first:]]) + "\n"


def quote_program(python: str) -> str:
    """Return a command line of the shell. A path that leads to a file, spaces and all, is one word of it."""
    return shlex.quote(python) if Path(python).is_file() else python


def sbatch_options(job: Job, args: argparse.Namespace) -> Iterator[str]:
    """Yield sbatch's options."""
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
        yield "--kill-on-invalid-dep=yes"  # without it, a job whose dependency can no longer be met waits for ever
    if args.depths:
        yield f"--array={','.join(map(str, args.depths))}"
    # sbatch knows quotes in #SBATCH lines, and %% for a percent sign.
    folder = str(job.folder.absolute()).replace("%", "%%").replace('"', '\\"')
    yield f'--output="{folder}/{"%A_%a" if args.depths else "%j"}.out"'
    yield from args.sbatch


def keep_code(job: Job) -> None:
    """Copy the code and the configs into the job's folder, laid out as in a checkout."""
    code = job.folder / "code"
    folders = {
        "sws_dist": source_tree.PACKAGE,
        "kernels": source_tree.kernels_folder(),
        "configs": source_tree.configs_folder(),
        "launcher": source_tree.launcher_folder(),
    }
    for name, source in folders.items():
        # An installed sws_dist holds the launch scripts and configs, which stand beside it in a checkout.
        elsewhere = {path.name for path in folders.values() if path.parent == source}
        shutil.copytree(source, code / name, ignore=shutil.ignore_patterns("__pycache__", *elsewhere))
    (code / "sws_kernels").symlink_to("kernels")  # the name under which it is imported
    atomic_write_text(code / "COMMIT", source_tree.commit() + "\n")
    for name, text in job.texts.items():
        atomic_write_text(job.folder / name, text)
    log.debug("%s: the code, as it is now", code)


def sbatch(script: Path) -> str:
    """Submit a script. Returns the job's number."""
    try:
        done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True)
    except FileNotFoundError:
        raise RunError("there is no sbatch on this machine; --dry-run prints the script") from None
    if done.returncode:
        raise RunError(f"sbatch {script}: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]
