"""Errors that a user can mend. Their messages say which value is wrong, where it came from, what would be right."""

from __future__ import annotations

EXIT_REQUEUE = 75
"""The exit code of a run that was told to stop: saved, start again with ``--resume auto``. sysexits' EX_TEMPFAIL."""
EXIT_PEER_LOST = 69
"""The exit code of a rank whose peers are gone or stand still: no fault of its own. sysexits' EX_UNAVAILABLE."""


class ConfigError(ValueError):
    """A value in a config file or on the command line."""


class RunError(RuntimeError):
    """A failure that all ranks know of: rank 0 reports it, the others leave silently."""


class Stopped(Exception):
    """The run was told to stop, and has saved: every rank leaves with ``EXIT_AGAIN``."""
