"""Find the files that ship beside the modules: configs, launch scripts, kernels, and the commit. Imports no torch.

In a checkout, and in the snapshot of the code that ``sws submit`` keeps with a job, ``configs/`` and ``launcher/`` are
beside ``sws_dist/``; in an installed package they are inside it (see setup.py). Both are real folders: configs name
each other by relative paths, and SLURM reads the batch scripts.
"""

from __future__ import annotations

import subprocess
from importlib.util import find_spec
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def is_installed() -> bool:
    """Return True if the code was installed from a wheel, False in a checkout or a snapshot of one."""
    return (PACKAGE / "configs").is_dir()


def configs_folder() -> Path:
    """Return the folder of ``runs/**.yaml`` and ``deepspeed/*.json``."""
    return _beside("configs")


def launcher_folder() -> Path:
    """Return the folder of the launch scripts and of ``slurm/``, the batch scripts."""
    return _beside("launcher")


def kernels_folder() -> Path:
    """Return the folder that is imported as ``sws_kernels``."""
    if not is_installed():  # another checkout may be the one that is installed
        return PACKAGE.parent / "kernels"
    spec = find_spec("sws_kernels")  # of a top-level package, this imports nothing
    assert spec is not None, "sws_kernels is not installed"
    assert spec.submodule_search_locations, spec
    return Path(next(iter(spec.submodule_search_locations)))


def commit() -> str:
    """Return the checkout's commit, with ``+`` where files differ from it; empty for an installed package.

    A snapshot that ``sws submit`` made carries its commit in a file.
    """
    root = PACKAGE.parent
    if (kept := root / "COMMIT").is_file():
        return kept.read_text().strip()
    if not (root / ".git").exists():  # git would look further up, and find the commit of another project
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _beside(name: str) -> Path:
    return (PACKAGE if is_installed() else PACKAGE.parent) / name
