"""Test that the documentation names commands, options, keys, files and code that exist."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
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
BATCH_SCRIPTS = {
    "auxiliary": "launcher/train.py",
    "descendants": "launcher/train.py",
    "evaluate": "launcher/evaluate.py",
}
"""Name of a batch script -> the script that it runs."""
SCRIPTS = sorted((ROOT / "launcher").glob("*.py"))
SBATCHES = sorted((ROOT / "launcher" / "slurm").glob("*.sbatch"))
KEYS = set(valid_keys())
FOLDERS = ("sws_dist", "kernels", "launcher", "configs", "tests", "benchmarks", "containers", "docs")
EXACT_FILES = (".safetensors", ".jsonl", ".npz", ".txt", ".csv", ".tsv", ".tar", ".onnx", ".pt2")
"""Endings of file names that look like config keys."""


def code_spans(path: Path) -> list[str]:
    """Return what a page sets as code inside its text, without the code blocks."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def commands(path: Path) -> Iterator[list[str]]:
    """Yield every command that runs one of our scripts, from its name on: ``[launcher/x.py, --option, value, ...]``.

    ``sws x`` stands for ``launcher/x.py``, and one of our batch scripts for the script that it runs.
    """
    text = path.read_text()
    if path.suffix == ".sbatch":
        text = re.sub(r"^# *", "", text, flags=re.MULTILINE)
    if path.suffix == ".md":
        text = "\n".join([*re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL), *code_spans(path)])
    text = re.sub(r"\\+\n\s*", " ", text)
    for line in text.splitlines():
        line = re.split(r"  #|\.\.\.", line)[0]
        if found := re.search(r"(?:python|deepspeed)\s.*?((?:launcher|benchmarks)/\w+\.py( .*)?)$", line):
            yield shlex.split(found[1].removesuffix(")"), comments=True)
        elif found := re.search(r"(?:^|\s)sws ([a-z][a-z-]*)( .*)?$", line):
            yield [f"launcher/{found[1].replace('-', '_')}.py", *shlex.split(found[2] or "", comments=True)]
        elif found := re.search(r"sbatch\s.*?launcher/slurm/(\w+)\.sbatch (.*)", line):
            yield [BATCH_SCRIPTS[found[1]], *shlex.split(found[2])]


@cache
def options(script: str) -> set[str]:
    """Return the options that a script's help lists."""
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    usage = done.stdout.split("\n\n")[0]
    return set(re.findall(r"--[\w-]+", usage))


def config_exists(option: str, value: str) -> bool:
    """Return True if ``value`` is a config file, or the name of one that ships."""
    folder, ending = {"--config": ("runs", "yaml"), "--deepspeed_config": ("deepspeed", "json")}[option]
    return (ROOT / value).is_file() or (ROOT / "configs" / folder / f"{value}.{ending}").is_file()


@pytest.mark.parametrize("path", [*PAGES, *SCRIPTS, *SBATCHES], ids=lambda p: str(p.relative_to(ROOT)))
def test_documented_commands_exist(path: Path) -> None:
    for script, *arguments in commands(path):
        assert (ROOT / script).is_file(), script
        unknown = {a.split("=")[0] for a in arguments if a.startswith("--")} - {"--help"}
        if unknown:
            unknown -= options(script)
        assert not unknown, f"{script} has no {unknown}"
        for option, value in pairwise(arguments):
            if option in ("--config", "--deepspeed_config"):
                assert config_exists(option, value), value
            if option == "--set":
                assert value.split("=")[0] in KEYS, value


@pytest.mark.parametrize("path", SBATCHES, ids=lambda p: p.name)
def test_batch_scripts_say_how_they_are_submitted(path: Path) -> None:
    assert len(list(commands(path))) == 1


def test_the_readme_has_commands_to_check() -> None:
    assert len(list(commands(ROOT / "README.md"))) >= 10


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_documented_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", path.read_text(), flags=re.MULTILINE))
    assert named <= targets, named - targets


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_documented_files_exist(path: Path) -> None:
    for span in code_spans(path):
        if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./*-]*", span):
            assert list(ROOT.glob(span.rstrip("/"))), span


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_documented_keys_exist(path: Path) -> None:
    groups = {key.split(".")[0] for key in KEYS if "." in key}
    for span in code_spans(path):
        found = re.match(rf"(({'|'.join(groups)})(\.[a-z_]+)+)(?=$|[:= ])", span)
        if found and not found[1].endswith(EXACT_FILES):
            assert found[1] in KEYS, span


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_documented_names_can_be_imported(path: Path) -> None:
    for name in set(re.findall(r"\bsws_dist(?:\.[A-Za-z_]\w*)+", path.read_text())):
        parts = name.split(".")
        found = importlib.import_module(parts[0])
        for end, part in enumerate(parts[1:], start=2):
            if not hasattr(found, part):
                importlib.import_module(".".join(parts[:end]))
            found = getattr(found, part)


def defined_names(file: Path) -> set[str]:
    """Return the functions, classes and constants of a module."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {ast.unparse(target) for target in targets}
    return names


def test_the_map_of_the_code_is_right() -> None:
    """Check the rows ``| what | file | names |``: each name is defined in its file."""
    rows = re.findall(
        r"^\| .+ \| `(\w+/[\w/]+\.py)` \| (.+) \|$", (ROOT / "docs" / "code.md").read_text(), re.MULTILINE
    )
    assert len(rows) >= 30
    for file, names in rows:
        missing = set(re.findall(r"`(\w+)`", names)) - defined_names(ROOT / file)
        assert not missing, f"{file} has no {missing}"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", path.read_text()):
        if "://" in target:
            continue
        page = path.parent / target if target else path
        assert page.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, f"{target}#{anchor}"


def test_the_pictures_are_up_to_date() -> None:
    pictures = runpy.run_path(str(ROOT / "docs" / "pictures.py"))["PICTURES"]
    for name, draw in pictures.items():
        assert (ROOT / "docs" / name).read_text() == draw(), f"{name}: run make docs"
