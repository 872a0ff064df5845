#!/usr/bin/env python
"""Compare training runs of two checkouts, or of two settings: losses, gradient norms and final weights, step by step.

Each side trains through its own launcher/train.py, so an old checkout can be compared with a new one. Without a
tolerance everything must be the same bit for bit. Several configs and rank counts give all their combinations.

examples:
  # has a change of the code changed what it computes, or can it not go on from an old checkpoint (--resume-across)?
  python benchmarks/loss_compare.py --before ../before --after . --config configs/runs/quickstart/auxiliary.yaml \\
      --deepspeed_config configs/deepspeed/zero2.json configs/deepspeed/zero3.json --ranks 1 2 [--resume-across]

  # do ZeRO-1 and ZeRO-3 compute the same, up to rounding?
  python benchmarks/loss_compare.py --config configs/runs/quickstart/tuned.yaml --rtol 1e-4 --atol 1e-6 \\
      --deepspeed_config_before configs/deepspeed/zero1.json --deepspeed_config_after configs/deepspeed/zero3.json

A relative path, on this command line and inside a config, is looked up in each checkout.
Exit codes: 0 within the tolerance, 1 not, 2 wrong usage or a run that failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from torch import Tensor

BIN = Path(sys.executable).parent
COMPARED = ("train/", "val/", "val_ema/")  # the rest of the log is speed and memory, which never repeat


class RunFailed(Exception):
    """Says which run could not be had, and why."""


@dataclass(frozen=True)
class Setup:
    """Describes the run of one side of a case."""

    side: str
    checkout: Path
    config: Path
    deepspeed_config: Path
    ranks: int
    sets: list[str]


def train(setup: Setup, run: Path, steps: int, resumed_from: Path | None = None) -> None:
    """Train up to ``steps`` into the folder ``run``, or go on there in a copy of another run; export the weights.

    Nothing is done if just this run is there already.
    """
    describe = ["git", "-C", str(setup.checkout), "describe", "--always", "--abbrev=40", "--dirty=+"]
    commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    marker, versions = run.with_suffix(".request"), [version(package) for package in ("torch", "deepspeed")]
    texts = [(setup.checkout / path).read_text() for path in (setup.config, setup.deepspeed_config)]
    texts += [resumed_from.with_suffix(".request").read_text()] if resumed_from else []
    request = "\n".join([f"{setup} {steps=} {commit=} {versions=}", *texts])
    unchanged = commit and not commit.endswith("+")  # or nobody could tell whether the code is still the same
    if unchanged and marker.is_file() and marker.read_text() == request:
        return
    marker.unlink(missing_ok=True)
    shutil.rmtree(run, ignore_errors=True)
    run.parent.mkdir(parents=True, exist_ok=True)
    if resumed_from:
        shutil.copytree(resumed_from, run, ignore=shutil.ignore_patterns("exported*"))
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    command = [str(BIN / "deepspeed"), "--num_accelerators", str(setup.ranks), "--master_port", str(port)]
    command += ["launcher/train.py", f"--config={setup.config}", f"--deepspeed_config={setup.deepspeed_config}"]
    own = [f"output={run}", "train.log_every=1", f"train.max_steps={steps}"]
    command += [f"--set={override}" for override in (*setup.sets, *own)]
    call(setup, run, [*command, "--resume=auto"] if resumed_from else command)
    if not (run / "metrics.json").is_file():  # max_steps has stopped it; a run that ends writes its weights itself
        export(setup, run)
    marker.write_text(request)


def export(setup: Setup, run: Path) -> None:
    """Write the weights of a run's last checkpoint, and their moving average if it keeps one, beside its log."""
    checkpoints = sorted((run / "checkpoints").glob("step-*"))
    if not checkpoints:
        raise RunFailed(f"the {setup.side} run has written no checkpoint")
    command = [sys.executable, "launcher/convert.py", "--checkpoint", str(checkpoints[-1]), "--out"]
    call(setup, run, [*command, f"{run}/exported.safetensors"])
    if yaml.safe_load((run / "config.yaml").read_text())["optim"]["ema_decay"] is not None:
        call(setup, run, [*command, f"{run}/exported_ema.safetensors", "--ema"])


def call(setup: Setup, run: Path, command: list[str]) -> None:
    """Run a command in the checkout; a failure is told by its own message or, if it has none, its last lines."""
    environment = code_of(setup, run.parent / "imports" / setup.side)
    with (printed := run.with_suffix(".txt")).open("w") as file:
        done = subprocess.run(command, cwd=setup.checkout, env=environment, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        lines = [line for line in printed.read_text().splitlines() if line.strip() and "[launch.py:" not in line]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        told = errors[-1] if errors else "\n  ".join(["its last lines:", *lines[-8:]])
        raise RunFailed(f"the {setup.side} run ended with exit code {done.returncode}: {told}")


def code_of(setup: Setup, links: Path) -> dict[str, str]:
    """Return the environment in which the checkout's code comes before the installed one; refuse if it does not."""
    links.mkdir(parents=True, exist_ok=True)
    (links / "sws_kernels").unlink(missing_ok=True)
    (links / "sws_kernels").symlink_to(setup.checkout / "kernels")  # the name under which kernels/ is imported
    paths = [str(setup.checkout), str(links), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONDONTWRITEBYTECODE": "1",  # a checkout stays as it is
        "OMP_NUM_THREADS": "1",  # the order of sums must not depend on the machine's cores
        "TORCH_EXTENSIONS_DIR": str(BIN.parent / "torch_extensions"),
    }
    probe = "from importlib.util import find_spec as f; print(f('sws_dist').origin, f('sws_kernels').origin, sep=':')"
    # From another folder: Python looks into the current one first, which would hide a wrong PYTHONPATH.
    done = subprocess.run([sys.executable, "-c", probe], cwd=links, env=environment, capture_output=True, text=True)
    found = [Path(path).resolve() for path in done.stdout.strip().split(":")]
    if found != [setup.checkout.resolve() / name / "__init__.py" for name in ("sws_dist", "kernels")]:
        told = done.stdout.strip() or done.stderr.strip().rpartition("\n")[2]
        raise RunFailed(f"the {setup.side} run would not import the code of {setup.checkout} but {told}")
    return environment


@dataclass(frozen=True)
class Difference:
    """Sums up one quantity of the log over its steps, or one file of weights over its tensors."""

    name: str
    compared: int
    differing: int
    first: str
    """The first step or tensor that differs; empty if none does."""
    worst: str
    max_abs: float
    max_rel: float
    within: bool


@dataclass(frozen=True)
class Comparison:
    title: str
    steps: list[int]
    quantities: list[Difference]
    weights: list[Difference]
    problems: list[str]
    """Names that cannot be compared, because only one side has them."""

    @property
    def verdict(self) -> str:
        found = [*self.quantities, *self.weights]
        if self.problems or not all(d.within for d in found):
            return "DIFFERENT"
        return "within the tolerance" if any(d.differing for d in found) else "identical bit for bit"

    def lines(self) -> Iterator[str]:
        """Yield the report for people: one line, and a table where there is a difference."""
        files = ", ".join(f"{d.compared} tensors of {d.name}" for d in self.weights)
        yield f"{self.title}: {self.verdict} ({len(self.steps)} steps of {len(self.quantities)} quantities; {files})"
        yield from (f"  {problem}" for problem in self.problems)
        if any(d.differing for d in (*self.quantities, *self.weights)):
            yield f"  {'':24} compared  differ   max abs   max rel  first, worst"
            for d in (*self.quantities, *self.weights):
                where = f"{d.first}, {d.worst}" if d.differing else ""
                yield f"  {d.name:24}{d.compared:>9}{d.differing:>8}{d.max_abs:>10.1e}{d.max_rel:>10.1e}  {where}"


def compare(title: str, before: Path, after: Path, rtol: float = 0.0, atol: float = 0.0, begin: int = 0) -> Comparison:
    """Compare two runs' folders, leaving out the steps up to ``begin``."""
    logs, all_steps, quantities, weights = [read_log(run, begin) for run in (before, after)], set(), [], []
    files, problems = shared(
        "the file", *({path.name for path in run.glob("*.safetensors")} for run in (before, after))
    )
    for name in sorted(logs[0].keys() | logs[1].keys()):
        old, new = (log.get(name, {}) for log in logs)
        steps, missing = shared(f"{name} at step", old, new)
        quantities.append(difference(name, ((f"step {s}", old[s], new[s]) for s in steps), rtol, atol))
        problems += missing
        all_steps |= set(steps)
    for name in files:
        with safe_open(before / name, "pt") as b, safe_open(after / name, "pt") as a:
            names, missing = shared(f"{name}'s tensor", b.keys(), a.keys())
            pairs = ((n, b.get_tensor(n), a.get_tensor(n)) for n in names)  # one at a time in memory
            weights.append(difference(name, pairs, rtol, atol))
            problems += missing
    if not all_steps or not files:
        problems.append("there are no steps, or no weights, that both runs have")
    return Comparison(title, sorted(all_steps), quantities, weights, problems)


def read_log(run: Path, begin: int) -> dict[str, dict[int, Tensor]]:
    """Read the compared quantities of ``log.jsonl`` at every step after ``begin``; null was a NaN or infinity."""
    found: dict[str, dict[int, Tensor]] = {}
    for line in (run / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        for name, value in entry.items():
            if name.startswith(COMPARED) and entry["step"] > begin:
                number = torch.tensor(math.nan if value is None else value, dtype=torch.float64)
                found.setdefault(name, {})[entry["step"]] = number
    return found


def difference(name: str, pairs: Iterable[tuple[str, Tensor, Tensor]], rtol: float, atol: float) -> Difference:
    """Compare tensors of before and after; what is finite on one side only differs by the largest number."""
    compared, within, found = 0, True, []
    for where, old, new in pairs:
        compared += 1
        if (old.dtype, old.shape) != (new.dtype, new.shape):
            kinds = " to ".join(f"{t.dtype} {list(t.shape)}" for t in (old, new))
            found.append((f"{where} ({kinds})", sys.float_info.max, sys.float_info.max))
            within = False
        elif not torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (old, new))):
            old, new = old.double(), new.double()
            same = (old == new) | (old.isnan() & new.isnan())
            absolute = torch.where(same, 0.0, (new - old).abs())
            relative = torch.where(same, 0.0, absolute / old.abs())
            largest = [float(d.nan_to_num(nan=sys.float_info.max).max()) for d in (absolute, relative)]
            found.append((where, largest[0], largest[1]))
            within &= bool(rtol or atol) and torch.allclose(new, old, rtol=rtol, atol=atol, equal_nan=True)
    worst, max_abs, _ = max(found, key=lambda f: f[1], default=("", 0.0, 0.0))
    max_rel = max((f[2] for f in found), default=0.0)
    return Difference(name, compared, len(found), found[0][0] if found else "", worst, max_abs, max_rel, within)


def shared(what: str, before: Iterable[Any], after: Iterable[Any]) -> tuple[list[Any], list[str]]:
    """Return what both have, in order, and a sentence about what each has alone."""
    old, new = set(before), set(after)
    alone = [(side, sorted(items)) for side, items in (("before", old - new), ("after", new - old)) if items]
    return sorted(old & new), [f"only {side} has {what} {', '.join(map(str, items))}" for side, items in alone]


def parse() -> tuple[argparse.Namespace, list[tuple[str, Setup, Setup]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, nargs="+", required=True, help="what to train (YAML); one or more")
    parser.add_argument("--deepspeed_config", type=Path, nargs="+", help="how it is sharded (JSON); one or more")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1], help="ranks of a run (default 1); one or more")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="for both sides; repeatable")
    for side in ("before", "after"):
        parser.add_argument(f"--{side}", type=Path, default=Path(), help="a checkout (default: the current folder)")
        parser.add_argument(f"--deepspeed_config_{side}", type=Path, help=f"only for {side}")
        parser.add_argument(f"--ranks-{side}", type=int, help=f"only for {side}")
        parser.add_argument(f"--set-{side}", metavar="KEY=VALUE", action="append", default=[], help=f"only for {side}")
    parser.add_argument("--steps", type=int, default=10, help="at most so many (default 10)")
    parser.add_argument("--resume-across", action="store_true", help="before trains half; both sides resume that run")
    parser.add_argument("--rtol", type=float, default=0.0, help="tolerated, relative to before (default 0)")
    parser.add_argument("--atol", type=float, default=0.0, help="tolerated (default 0)")
    parser.add_argument("--out", type=Path, help="write the report here (JSON)")
    keep = (
        "keep the runs here, and use one that is here if commit, configs and options are the same (data: not checked)"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help=keep)
    args = parser.parse_args()
    if args.steps < 1 + args.resume_across or min(args.ranks) < 1 or min(args.rtol, args.atol) < 0:
        parser.error("--ranks and --steps are at least 1 (2 with --resume-across), --rtol and --atol at least 0")
    if not args.deepspeed_config and not (args.deepspeed_config_before and args.deepspeed_config_after):
        parser.error("--deepspeed_config is missing")
    cases = []
    for config, sharding, ranks in product(args.config, args.deepspeed_config or [None], args.ranks):
        pair = []
        for side in ("before", "after"):
            own = {key: getattr(args, f"{key}_{side}") for key in ("deepspeed_config", "ranks", "set")}
            spread = own["deepspeed_config"] or sharding, own["ranks"] or ranks
            pair.append(Setup(side, getattr(args, side).resolve(), config, *spread, [*args.set, *own["set"]]))
            for path in (Path("launcher/train.py"), config, spread[0]):
                if not (pair[-1].checkout / path).is_file():
                    parser.error(f"--{side} {getattr(args, side)}: there is no file {path}")
        names = [(s.deepspeed_config.stem, f"{s.ranks} rank{'s' * (s.ranks > 1)}") for s in pair]
        parts = [old if old == new else f"{old} to {new}" for old, new in zip(*names, strict=True)]
        cases.append((", ".join([f"{config.parent.name}/{config.stem}", *parts]), pair[0], pair[1]))
    return args, cases


def run(title: str, before: Setup, after: Setup, args: argparse.Namespace, work: Path) -> Comparison:
    """Train both sides and compare them."""
    half = args.steps // 2 if args.resume_across else 0
    title += f", resumed at step {half}" if half else ""
    folder = work / re.sub(r"\W+", "-", title)
    if half:
        train(before, folder / "half", half)
        if (folder / "half" / "metrics.json").is_file():
            raise RunFailed(f"the whole run has only {half} steps, so there is nothing to resume; lower --steps")
    for setup in (before, after):
        train(setup, folder / setup.side, args.steps, folder / "half" if half else None)
    return compare(title, folder / "before", folder / "after", args.rtol, args.atol, half)


def main() -> int:
    args, cases = parse()
    code, report = 0, []
    with nullcontext(args.keep) if args.keep else tempfile.TemporaryDirectory(prefix="loss_compare-") as work:
        for title, before, after in cases:
            try:
                found = run(title, before, after, args, Path(work).resolve())
            except RunFailed as failed:
                print(f"error: {title}: {failed}", file=sys.stderr, flush=True)
                report.append({"title": title, "error": str(failed)})
                code = 2
                continue
            print(*found.lines(), sep="\n", flush=True)
            report.append({"verdict": found.verdict, **dataclasses.asdict(found)})
            code = max(code, int(found.verdict == "DIFFERENT"))
    if args.out:
        args.out.write_text(json.dumps({"options": vars(args), "cases": report}, indent=2, default=str) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
