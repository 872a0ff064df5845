"""Imports run one way: each module only uses what stands below it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From the top down; a module may import from the lines below its own, not from its own line or above.
LAYERS = (
    ("sws_dist.trainer",),
    ("sws_dist.progress",),
    ("sws_dist.assemble",),
    ("sws_dist.checkpoint", "sws_dist.evaluate"),
    ("sws_dist.shards",),
    ("sws_dist.ema", "sws_dist.filling", "sws_dist.ds_schema"),
    ("sws_dist.engine", "sws_dist.expansion"),
    ("sws_dist.learngene", "sws_dist.distillation", "sws_dist.nonfinite"),
    ("sws_dist.model_file", "sws_dist.rollcall"),
    ("sws_dist.watch",),
    ("sws_dist.models", "sws_dist.data", "sws_dist.metrics", "sws_dist.optim", "sws_dist.flops"),
    ("sws_dist.comm", "sws_dist.ds_config", "sws_dist.provenance", "sws_dist.traffic", "sws_kernels"),
    ("sws_dist.tensor_file",),
    ("sws_dist.config", "sws_dist.files", "sws_dist.signals"),
    ("sws_dist.cli",),
    ("sws_dist.launchers",),
    ("sws_dist.errors",),
)
LAUNCHER = "launcher"
HOMES = {  # heavy packages, and the only places that may import them
    "deepspeed": {
        "sws_dist.comm",
        "sws_dist.engine",
        "sws_dist.trainer",
        "sws_dist.checkpoint",
        "sws_dist.filling",
        "sws_dist.ds_schema",
    },
    "nvidia": {"sws_dist.data"},
    "sklearn": {"sws_dist.data"},
    "matplotlib": {LAUNCHER},
    "triton": {"sws_kernels"},
}


def unit(module: str) -> str:
    """The layered name of a module: packages inside sws_dist count as one."""
    return ".".join(module.split(".")[:2]) if module.startswith("sws_dist.") else module.split(".")[0]


def sources() -> Iterator[tuple[str, Path]]:
    for folder, name in (("sws_dist", "sws_dist"), ("kernels", "sws_kernels"), ("launcher", LAUNCHER)):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([name, *parts]).removesuffix(".__init__"), path


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            assert node.module
            # "from sws_dist import comm" imports sws_dist.comm
            yield from (f"sws_dist.{a.name}" for a in node.names) if node.module == "sws_dist" else (node.module,)


def level(name: str) -> int:
    return next(depth for depth, names in enumerate(LAYERS) if name in names)


def test_every_module_has_its_layer() -> None:
    units = {unit(module) for module, _ in sources()} - {LAUNCHER, "sws_dist"}
    assert units == {name for names in LAYERS for name in names}


@pytest.mark.parametrize(("module", "path"), list(sources()), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_run_downwards(module: str, path: Path) -> None:
    own = unit(module)
    for name in imported(path):
        other = unit(name)
        if other == LAUNCHER:
            pytest.fail(f"{module} imports {name}: nothing imports an entry point")
        if other.startswith(("sws_dist.", "sws_kernels")) and own not in (LAUNCHER, other):
            assert level(own) < level(other), f"{module} imports {name}, which does not stand below it"
        package = name.split(".")[0]
        if package in HOMES:
            assert own in HOMES[package], f"{module} imports {name}; {package} belongs to {sorted(HOMES[package])}"


def test_config_imports_no_torch() -> None:
    """A wrong key must be said at once, not after the seconds that importing torch takes."""
    import subprocess

    code = "import sys, sws_dist.cli, sws_dist.config, sws_dist.ds_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_kernels_need_nothing_of_the_trainer() -> None:
    for module, path in sources():
        if module.startswith("sws_kernels"):
            packages = {name.split(".")[0] for name in imported(path)} - sys.stdlib_module_names
            assert packages <= {"torch", "triton", "sws_kernels"}, module
