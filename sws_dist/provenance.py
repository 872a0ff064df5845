"""Collect where a result comes from: commit, versions and hardware."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from sws_dist.source_tree import commit

_PACKAGES = ("sws-dist", "torch", "deepspeed", "triton", "timm", "nvidia-dali-cuda130", "nvidia-dali-cuda120")


def collect_provenance() -> dict[str, Any]:
    """Collect where a result comes from, JSON-ready: ``commit``, ``versions``, ``hardware``."""
    return {"commit": commit(), "versions": _versions(), "hardware": hardware()}


def hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{torch.get_num_threads()} thread(s) of a {platform.machine()} CPU"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
