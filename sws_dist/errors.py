"""Errors that a user can mend, and exit codes. Messages say which value is wrong, where it came from, what is right."""

from __future__ import annotations

EXIT_REQUEUE = 75
"""Exit code of a run that was told to stop and has saved: start it again with ``--resume auto`` (EX_TEMPFAIL)."""
EXIT_PEER_LOST = 69
"""Exit code of a rank whose peers are gone or stand still; the fault is not its own (EX_UNAVAILABLE)."""


class ConfigError(ValueError):
    """A value in a config file or on the command line is wrong."""


class RunError(RuntimeError):
    """A failure that all ranks know of: rank 0 reports it, the others leave silently."""


class Stopped(Exception):
    """The run was told to stop and has saved: every rank leaves with ``EXIT_REQUEUE``."""
