"""Run one of the study's modules as a command: its log on the terminal, errors as one message."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from sws_dist.config.paths import expand_path
from sws_dist.errors import EXIT_INTERRUPTED
from sws_dist.logging.console import setup_console

log = logging.getLogger(__name__)


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return an argument parser whose help is the module's docstring, and which expands paths as configs do."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.register("type", Path, lambda text: Path(expand_path(text)))
    return parser


def run_command(main: Callable[[], None]) -> None:
    """Call ``main``; an error that a user can mend becomes one message and exit code 1."""
    setup_console()
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except (ValueError, OSError) as error:
        log.error("%s", error)
        sys.exit(1)
