"""Where a result comes from: commit, versions, hardware."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("sws-dist", "torch", "deepspeed", "triton", "timm", "nvidia-dali-cuda130", "nvidia-dali-cuda120")


def collect() -> dict[str, Any]:
    """JSON-ready: ``commit``, ``versions``, ``hardware``."""
    return {"commit": commit(), "versions": _versions(), "hardware": hardware()}


def hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{torch.get_num_threads()} thread(s) of a {platform.machine()} CPU"


def commit() -> str:
    """The checkout's commit, with ``+`` where files differ from it; a snapshot's (``launcher/submit.py``); or empty."""
    root = Path(__file__).parents[1]
    if (kept := root / "COMMIT").is_file():
        return kept.read_text().strip()
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
