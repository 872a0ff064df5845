"""Being told to stop: SIGUSR1 and SIGTERM (SLURM, launchers), Ctrl-C and a connection that ended let a run finish its
step and save.

A thread acts on the signals, not their handlers: Python runs a handler only when the main thread comes back from
what it does, and that may be a collective with a rank that is gone.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sws_dist.cli.common import say
from sws_dist.errors import EXIT_REQUEUE

_EXIT_INTERRUPTED = 130  # what shells report of a program that Ctrl-C ended
_TWICE_S = 1.0  # one Ctrl-C may arrive twice, from the terminal and from the launcher

_PRINTED = (1, 2)  # standard output and standard error

_asked = 0
_deferred = False


def install_handlers() -> None:
    """From now on a signal ends this process with ``EXIT_AGAIN``, and inside ``deferred()`` it only sets ``asked()``.

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
    """Inside the block, and after it if one came, a signal waits to be asked for."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = bool(_asked)


def requested_signal() -> int:
    """The first signal that told this process to stop, or 0."""
    return _asked


def signal_name(number: float) -> str:
    return signal.Signals(int(number)).name


def _act(reader: int) -> None:
    global _asked
    first = -_TWICE_S
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    for stream in _PRINTED:
        poll.register(stream, 0)  # a hang-up is reported unasked
    while True:
        number = _next(reader, poll)
        if not _deferred:
            _leave(
                f"{signal_name(number)}: stopped at once, no step was under way; start again with --resume auto",
                EXIT_REQUEUE,
            )
        if number == signal.SIGINT and _asked and time.monotonic() - first > _TWICE_S:
            _leave(f"{signal_name(number)} again: stopped at once, without saving", _EXIT_INTERRUPTED)
        if not _asked:
            _asked, first = number, time.monotonic()
            hint = "; once more: stop at once" if number == signal.SIGINT else ""
            say(f"{signal_name(number)}: the step under way is finished, then the run is saved{hint}")


def _next(reader: int, poll: select.poll) -> int:
    """The next signal; SIGHUP where nobody is left to read what this process prints: ssh hung up, or a pipe ended."""
    while True:
        for descriptor, event in poll.poll():
            if descriptor == reader:
                return os.read(reader, 1)[0]
            for stream in _PRINTED:
                poll.unregister(stream)
            if event & (select.POLLHUP | select.POLLERR):
                nothing = os.open(os.devnull, os.O_WRONLY)
                for stream in _PRINTED:  # from now on printing goes nowhere, which is no error
                    os.dup2(nothing, stream)
                return signal.SIGHUP
            break


def _leave(message: str, code: int) -> None:
    say(message)
    sys.stderr.flush()
    os._exit(code)
