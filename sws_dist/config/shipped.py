"""Find config files: by path, or by the name of one that ships with this package. Imports no torch.

``auxiliary_small`` is ``configs/runs/auxiliary_small.yaml``, ``quickstart/teacher`` is
``configs/runs/quickstart/teacher.yaml``, and ``zero2_bf16`` is ``configs/deepspeed/zero2_bf16.json``. A file of that
path wins over a name.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from sws_dist.errors import ConfigError
from sws_dist.source_tree import configs_folder


def find_run_config(path: str | Path) -> Path:
    """Return the file of a run config.

    Raises:
        ConfigError: neither a file nor the name of a shipped config; names those that are near.
    """
    return _find(path, "runs", ".yaml", "the config file")


def find_shipped_run_config(name: str) -> Path:
    """Return the file of a run config that ships with this package. Raises ``ConfigError`` as ``find_run_config``."""
    return _find_shipped(name, "runs", ".yaml")


def find_deepspeed_config(path: str | Path) -> Path:
    """Return the file of a DeepSpeed config. Raises ``ConfigError`` as ``find_run_config`` does."""
    return _find(path, "deepspeed", ".json", "the DeepSpeed config")


def shipped_configs(kind: str, suffix: str) -> dict[str, Path]:
    """Return the shipped configs by name; ``kind`` is a folder of ``configs/``."""
    folder = configs_folder() / kind
    return {str(file.relative_to(folder).with_suffix("")): file for file in sorted(folder.rglob(f"*{suffix}"))}


def _find(path: str | Path, kind: str, suffix: str, what: str) -> Path:
    if Path(path).exists() and not Path(path).is_dir():  # a pipe is fine too
        return Path(path)
    reason = "it is a folder" if Path(path).is_dir() else "No such file"
    try:
        return _find_shipped(str(path), kind, suffix)
    except ConfigError as error:
        raise ConfigError(f"cannot read {what} {path}: {reason}, and {error}") from None


def _find_shipped(name: str, kind: str, suffix: str) -> Path:
    shipped = shipped_configs(kind, suffix)
    if name not in shipped:
        near = difflib.get_close_matches(name.removesuffix(suffix), shipped, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"those that ship are {', '.join(shipped)}"
        raise ConfigError(f"no config of that name ships with sws_dist; {hint}")
    return shipped[name]
