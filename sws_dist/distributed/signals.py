"""Stop on request: SIGUSR1 and SIGTERM (SLURM, launchers), Ctrl-C, or a closed terminal.

A run that is told to stop finishes its step and saves. A thread acts on the signals, not their handlers: Python runs
a handler only when the main thread comes back from what it does, and that may be a collective with a rank that is
gone.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sws_dist.errors import EXIT_INTERRUPTED, EXIT_REQUEUE, exit_now

_TWICE_S = 1.0  # one Ctrl-C may arrive twice, from the terminal and from the launcher

_OUTPUTS = (1, 2)  # standard output and standard error

_requested = 0
_deferred = False

log = logging.getLogger(__name__)


def install_handlers() -> None:
    """Install handlers that end this process with ``EXIT_REQUEUE``; inside ``deferred_signals`` they do not.

    Called once, from the main thread. What is ignored (Ctrl-C by a shell's background job, SIGHUP by nohup) stays so.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: None)  # Python has written the number to the pipe
            signal.siginterrupt(number, False)
    threading.Thread(target=_act, args=(reader,), name="signals", daemon=True).start()


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Defer signals: inside the block they only set ``requested_signal``. One that came stays deferred after it."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = bool(_requested)


def requested_signal() -> int:
    """Return the first signal that told this process to stop, or 0."""
    return _requested


def signal_name(number: float) -> str:
    return signal.Signals(int(number)).name


def _act(reader: int) -> None:
    """Wait for signals, and act on each."""
    global _requested
    first = -_TWICE_S
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    for stream in _OUTPUTS:
        poll.register(stream, 0)  # a hang-up is reported unasked
    while True:
        number = _next_signal(reader, poll)
        name = signal_name(number)
        if not _deferred:
            _exit(f"{name}: stopped at once, no step was under way; start again with --resume auto", EXIT_REQUEUE)
        if number == signal.SIGINT and _requested and time.monotonic() - first > _TWICE_S:
            _exit(f"{name} again: stopped at once, without saving", EXIT_INTERRUPTED)
        if not _requested:
            _requested, first = number, time.monotonic()
            hint = "; once more: stop at once" if number == signal.SIGINT else ""
            log.warning("%s: the step under way is finished, then the run is saved%s", name, hint)


def _next_signal(reader: int, poll: select.poll) -> int:
    """Wait for the next signal. Returns SIGHUP where nobody is left to read what this process prints.

    That is the case when ssh hung up, or when a pipe ended.
    """
    while True:
        for descriptor, event in poll.poll():
            if descriptor == reader:
                return os.read(reader, 1)[0]
            for stream in _OUTPUTS:
                poll.unregister(stream)
            if event & (select.POLLHUP | select.POLLERR):
                nothing = os.open(os.devnull, os.O_WRONLY)
                for stream in _OUTPUTS:  # from now on printing goes nowhere, which is no error
                    os.dup2(nothing, stream)
                return signal.SIGHUP
            break


def _exit(message: str, code: int) -> None:
    log.warning(message)
    exit_now(code)
