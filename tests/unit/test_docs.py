"""Documented commands name scripts, options, config files and keys that exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from sws_dist.config.loader import valid_keys

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BATCH = {"auxiliary": "launcher/train.py", "descendants": "launcher/train.py", "evaluate": "launcher/evaluate.py"}
SCRIPTS = sorted((ROOT / "launcher").glob("*.py"))
SBATCHES = sorted((ROOT / "launcher" / "slurm").glob("*.sbatch"))
KEYS = set(valid_keys())


def commands(path: Path) -> Iterator[list[str]]:
    """Every command that runs one of our scripts, from its name on: ``[launcher/x.py, --option, value, ...]``.

    ``sbatch`` with one of our batch scripts is taken for the script that it runs.
    """
    text = path.read_text()
    if path.suffix == ".sbatch":
        text = re.sub(r"^# *", "", text, flags=re.MULTILINE)
    if path.suffix == ".md":
        text = "\n".join(re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL))
    text = re.sub(r"\\+\n\s*", " ", text)
    for line in text.splitlines():
        found = re.search(r"(?:python|deepspeed)\s.*?(launcher/\w+\.py .*)", line)
        if found:
            yield shlex.split(found[1].split("  #")[0].removesuffix("...").removesuffix(")"), comments=True)
        elif found := re.search(r"sbatch\s.*?launcher/slurm/(\w+)\.sbatch (.*)", line):
            yield [BATCH[found[1]], *shlex.split(found[2])]


@cache
def options(script: str) -> set[str]:
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    usage = done.stdout.split("\n\n")[0]
    return set(re.findall(r"--[\w-]+", usage))


@pytest.mark.parametrize("path", [*PAGES, *SCRIPTS, *SBATCHES], ids=lambda p: str(p.relative_to(ROOT)))
def test_documented_commands_exist(path: Path) -> None:
    for script, *arguments in commands(path):
        assert (ROOT / script).is_file(), script
        unknown = {a for a in arguments if a.startswith("--")} - options(script)
        assert not unknown, f"{script} has no {unknown}"
        for option, value in pairwise(arguments):
            if option in ("--config", "--deepspeed_config"):
                assert (ROOT / value).is_file(), value
            if option == "--set":
                assert value.split("=")[0] in KEYS, value


@pytest.mark.parametrize("path", SBATCHES, ids=lambda p: p.name)
def test_batch_scripts_say_how_they_are_submitted(path: Path) -> None:
    assert len(list(commands(path))) == 1


def test_the_readme_has_commands_to_check() -> None:
    assert len(list(commands(ROOT / "README.md"))) >= 5


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target
