"""Errors that a user can mend, and exit codes. Messages say which value is wrong, where it came from, what is right."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import NoReturn

EXIT_REQUEUE = 75
"""Exit code of a run that was told to stop, and has saved what it had: start it again with ``--resume auto``
(EX_TEMPFAIL)."""
EXIT_PEER_LOST = 69
"""Exit code of a rank whose peers are gone or stand still; the fault is not its own (EX_UNAVAILABLE)."""
EXIT_INTERRUPTED = 130
"""Exit code of a program that Ctrl-C ended, as shells report it."""


class ConfigError(ValueError):
    """A value in a config file or on the command line is wrong."""


class RunError(RuntimeError):
    """A failure of the whole run, known to all its ranks: rank 0 reports it, the others leave silently."""


class Stopped(Exception):
    """The run was told to stop, and has saved what it had: every rank leaves with ``EXIT_REQUEUE``."""


def require_packages(extra: str, *modules: str) -> None:
    """Check that optional packages are there.

    Args:
        extra: the extras of setup.py that bring them.

    Raises:
        ValueError: naming those that are missing, and how to get them.
    """
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ValueError(f"missing: {', '.join(missing)}; pip install 'sws-dist[{extra}]' brings them")


def exit_now(code: int) -> NoReturn:
    """End this process at once, with everything printed: a tidy exit would wait for ranks that may be gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
