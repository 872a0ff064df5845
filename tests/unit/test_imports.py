"""Test that imports run one way: each package only uses what stands below it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From the top down. A module may import from its own package and from the lines below its own.
LAYERS = (
    ("launcher", "sws_dist.__main__"),
    ("sws_dist.study",),
    ("sws_dist.cli",),
    ("sws_dist.export",),
    ("sws_dist",),
    ("sws_dist.api",),
    ("sws_dist.trainer",),
    ("sws_dist.watch", "sws_dist.results"),
    ("sws_dist.validation",),
    ("sws_dist.build",),
    ("sws_dist.prepare",),
    ("sws_dist.plan",),
    ("sws_dist.build_models",),
    ("sws_dist.learngene", "sws_dist.distill", "sws_dist.run_dir"),
    ("sws_dist.scoring", "sws_dist.class_names", "sws_dist.inference"),
    ("sws_dist.review",),
    ("sws_dist.checkpoint",),
    ("sws_dist.logging", "sws_dist.zero"),
    ("sws_dist.models", "sws_dist.data", "sws_dist.optim", "sws_dist.provenance"),
    ("sws_dist.progress",),
    ("sws_dist.distributed", "sws_dist.config"),
    ("sws_dist.text",),
    ("sws_dist.atomic", "sws_dist.seed", "sws_dist.units", "sws_dist.source_tree", "sws_kernels"),
    ("sws_dist.errors",),
)
HOMES = {  # heavy packages, and the only places that may import them
    "deepspeed": {"sws_dist.zero"},
    "nvidia": {"sws_dist.data"},
    "onnx": {"sws_dist.export"},
    "onnxruntime": {"sws_dist.export", "sws_dist.checkpoint"},
    "huggingface_hub": {"sws_dist.cli"},
    "sklearn": {"sws_dist.data"},
    "matplotlib": {"sws_dist.cli"},
    "triton": {"sws_kernels"},
}


def unit(module: str) -> str:
    """Return the layered name of a module: packages inside sws_dist count as one."""
    return ".".join(module.split(".")[:2]) if module.startswith("sws_dist.") else module.split(".")[0]


def sources() -> Iterator[tuple[str, Path]]:
    """Yield the dotted name and the path of every module."""
    for folder, name in (("sws_dist", "sws_dist"), ("kernels", "sws_kernels"), ("launcher", "launcher")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([name, *parts]).removesuffix(".__init__"), path


MODULES = dict(sources())


def imported(path: Path) -> Iterator[str]:
    """Yield what a file imports anywhere in it, also inside functions and for type checkers alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a name comes from"
            assert node.module
            # "from sws_dist.data import manifest" imports sws_dist.data.manifest
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in names)


def level(name: str) -> int:
    return next(depth for depth, names in enumerate(LAYERS) if name in names)


def test_every_module_has_its_layer() -> None:
    units = {unit(module) for module in MODULES}
    assert units == {name for names in LAYERS for name in names}


@pytest.mark.parametrize(("module", "path"), MODULES.items(), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_run_downwards(module: str, path: Path) -> None:
    own = unit(module)
    for name in imported(path):
        other = unit(name)
        if other.split(".")[0] in ("sws_dist", "sws_kernels", "launcher") and other != own:
            assert level(own) < level(other), f"{module} imports {name}, which does not stand below it"
        package = name.split(".")[0]
        if package in HOMES:
            assert own in HOMES[package], f"{module} imports {name}; {package} belongs to {sorted(HOMES[package])}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Inside a package too there is no circle."""
    graph = {
        module: {name for name in imported(path) if name in MODULES} - {module} for module, path in MODULES.items()
    }
    for package in [module for module, path in MODULES.items() if path.name == "__init__.py"]:
        graph[package] = set()  # a package's public names come from its modules
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module not in done:
            for name in graph[module]:
                visit(name, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_no_module_takes_another_layers_object_as_any() -> None:
    """An argument named like an object of a higher layer hides an import that the tests above cannot see."""
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                for argument in (*node.args.args, *node.args.kwonlyargs):
                    is_any = isinstance(argument.annotation, ast.Name) and argument.annotation.id == "Any"
                    assert not (is_any and argument.arg in {"trainer", "engine", "recorder", "parts"}), (
                        f"{module}.{node.name}: {argument.arg} is Any"
                    )


def test_config_imports_no_torch() -> None:
    """A wrong key is reported at once, not after the seconds that importing torch takes."""
    code = (
        "import sys, sws_dist.cli.train, sws_dist.config.loader, sws_dist.zero.config; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_kernels_need_nothing_of_the_trainer() -> None:
    for module, path in MODULES.items():
        if module.startswith("sws_kernels"):
            packages = {name.split(".")[0] for name in imported(path)} - sys.stdlib_module_names
            assert packages <= {"torch", "triton", "sws_kernels"}, module
