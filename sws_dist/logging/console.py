"""Show the log on the terminal: a handler of Python's ``logging`` on rank 0, beside a progress bar.

Modules write to ``logging.getLogger(__name__)``. Records below WARNING go to standard output, the others to standard
error with their level in front. Rank 0 shows all records; other ranks show those that are written with
``extra=ANY_RANK`` (see ``distributed/launch_env.py``).
"""

from __future__ import annotations

import io
import logging
import re
import sys
import warnings

from tqdm import tqdm

from sws_dist.distributed.launch_env import rank

# Libraries say these at every start, and no user can act on them: how DeepSpeed calls torch, ...
_IGNORED_WARNINGS = (
    (FutureWarning, r".*all_gather_into_tensor.*"),
    (FutureWarning, r".*_all_gather_base.*"),
    (FutureWarning, r".*reduce_scatter_tensor.*"),
    (FutureWarning, r".*_reduce_scatter_base.*"),
)
# ... and, in DeepSpeed's log, the device, which the run's own first lines name.
_IGNORED_RECORDS = re.compile(r"Setting accelerator to CPU")


class ConsoleHandler(logging.Handler):
    """Print records above the progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            important = record.levelno >= logging.WARNING
            text = f"{record.levelname.lower()}: {self.format(record)}" if important else self.format(record)
            stream = sys.stderr if important else sys.stdout
            tqdm.write(text, file=stream)
            stream.flush()
        except OSError:  # nobody reads any more (distributed/signals.py stops the run), or the disk behind it is full
            return
        except Exception:
            self.handleError(record)


def setup_console(level: int = logging.INFO) -> None:
    """Show this package's log from ``level`` on; a second call replaces the level. Library chatter is filtered."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that the locale cannot write is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    logger = logging.getLogger("sws_dist")
    logger.setLevel(level)
    logger.propagate = False
    if not any(isinstance(handler, ConsoleHandler) for handler in logger.handlers):
        handler = ConsoleHandler()
        handler.addFilter(lambda record: rank() == 0 or getattr(record, "any_rank", False))
        logger.addHandler(handler)
    for category, message in _IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    # DeepSpeed will find its logger with this filter when it is imported. Adding a filter once more changes nothing.
    logging.getLogger("DeepSpeed").addFilter(_is_worth_showing)


def _is_worth_showing(record: logging.LogRecord) -> bool:
    return not _IGNORED_RECORDS.search(record.getMessage())
