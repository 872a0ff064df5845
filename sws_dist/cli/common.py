"""What the entry points under ``launcher/`` share: help that keeps its layout, and errors without tracebacks."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from sws_dist.distributed.launch_env import local_rank, rank
from sws_dist.errors import EXIT_REQUEUE, ConfigError, RunError, Stopped


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """An argument parser whose help is the script's docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def run_command(main: Callable[[], None]) -> None:
    """Call ``main``; an error that a user can mend becomes one message and exit code 1 on every rank.

    A run that was told to stop leaves with ``EXIT_AGAIN``. Anything else is a bug and keeps its traceback.
    """
    try:
        main()
    except Stopped as stopped:
        say(f"{stopped}; start again with --resume auto")
        _leave(EXIT_REQUEUE)
    except KeyboardInterrupt:
        _leave(130)
    except (ValueError, OSError, RunError) as error:
        # What all ranks know of is for rank 0 to say; a config, which each node reads for itself, for the first rank
        # there; and what a rank met on its own it says itself.
        silent = rank() if isinstance(error, RunError) else local_rank() if isinstance(error, ConfigError) else 0
        if not silent:
            print(f"error: {error}", file=sys.stderr)
        _leave(1)


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a tidy exit would wait for ranks that may be gone


def say(text: str) -> None:
    """Print on rank 0."""
    if rank() == 0:
        print(text, flush=True)
