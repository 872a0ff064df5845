"""Use a GPU that is lent for minutes: check and measure everything that only it can show, the most important first.

    python benchmarks/gpu_day.py --out gpu-day [--minutes 9] [--only steps operators]

Parts run one after another. Each has a limit, writes its own files, and a part that fails does not stop the others.
Before them, all at once: what only compiles. torch.compile takes one and a half minutes for a model with 16 cores, and
the kernels' tests compile a hundred kernels, so that nothing is timed meanwhile.

What was learned on an H200 (November 2026): a machine without a network needs DeepSpeed, DALI and their dependencies as
wheels; `PYTHONPATH` can stand for an installation (a link sws_kernels -> kernels/ and the checkout itself). Run nothing
else on the GPU while steps are timed: a small job beside them cost up to a third.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PYTHON = sys.executable
PYTEST = [PYTHON, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
STEPS = [PYTHON, "-m", "benchmarks.kernels", "--compile-mode", "reduce-overhead"]


@dataclass(frozen=True)
class Part:
    """One command with a limit in seconds. OUT in its words stands for the folder of results."""

    name: str
    command: list[str]
    seconds: int


WARM_UP = [
    Part("kernel-tests", [*PYTEST, "-n", "4", "tests/gpu", "--ignore", "tests/gpu/test_training.py"], 120),
    *[
        Part(f"compile-{size}", [*STEPS, "--only", "training_step", "--size", size, "--warm-up"], 150)
        for size in ("S", "Ti", "B")
    ],
]
PARTS = [
    Part("steps-S", [*STEPS, "--only", "training_step", "--size", "S", "--out", "OUT/steps-S.json"], 90),
    *[
        Part(operator, [*STEPS, "--only", operator, "--size", "S", "--out", f"OUT/{operator}.json"], 45)
        for operator in ("packed_attention", "add_layer_norm", "mlp", "stage", "linear_gelu")
    ],
    Part("training", [*PYTEST, "-n", "4", "tests/gpu/test_training.py"], 150),
    Part("steps-Ti", [*STEPS, "--only", "training_step", "--size", "Ti", "--out", "OUT/steps-Ti.json"], 60),
    Part("steps-B", [*STEPS, "--only", "training_step", "--size", "B", "--out", "OUT/steps-B.json"], 90),
    Part("data", [PYTHON, "benchmarks/data.py", "--images", "2048", "--repeats", "1", "--out", "OUT/data.json"], 90),
    Part("tune", [PYTHON, "-m", "benchmarks.kernels.tune", "--out", "OUT/tune.json"], 90),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-day"))
    parser.add_argument("--minutes", type=float, default=9.0, help="no part begins after them")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], help="these parts alone")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    chosen = [part for part in PARTS if args.only is None or part.name in args.only]
    summary: dict[str, object] = {"facts": facts()}
    steps = {part.name.replace("steps", "compile") for part in chosen}
    needed = [part for part in WARM_UP if part.name == "kernel-tests" or part.name in steps]
    running = [(part, start(part, args.out)) for part in needed]
    for part, process in running:
        summary[part.name] = finish(part, process, min(part.seconds, end - time.monotonic()))
    for part in chosen:
        left = end - time.monotonic()
        summary[part.name] = (
            finish(part, start(part, args.out), min(part.seconds, left)) if left > 0 else "no time left"
        )
        (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def facts() -> list[str]:
    """Return the GPU's name, driver, memory and clocks, and torch's and triton's versions."""
    query = "name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit"
    lines = ["no nvidia-smi"]
    if shutil.which("nvidia-smi"):
        shown = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv"], capture_output=True, text=True)
        lines = shown.stdout.splitlines()
    versions = "import torch, triton; print('torch', torch.__version__, 'triton', triton.__version__)"
    shown = subprocess.run([PYTHON, "-c", versions], capture_output=True, text=True)
    return [*lines, shown.stdout.strip()]


def start(part: Part, out: Path) -> subprocess.Popen[bytes]:
    """Start a part with its output in a file of its name."""
    words = [word.replace("OUT", str(out)) for word in part.command]
    with (out / f"{part.name}.log").open("wb") as log:
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def finish(part: Part, process: subprocess.Popen[bytes], seconds: float) -> str:
    """Wait for a part, end it where its time is over, and say how it went."""
    begun = time.monotonic()
    try:
        code = process.wait(max(1.0, seconds))
        state = "done" if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its own processes too
        process.wait()
        state = "stopped at its limit"
    line = f"{state}, {time.monotonic() - begun:.0f} s; see {part.name}.log"
    print(f"{part.name:<20} {line}", flush=True)
    return line


if __name__ == "__main__":
    main()
