"""Write numbers of bytes, operations and seconds for people."""

from __future__ import annotations


def format_bytes(num_bytes: int) -> str:
    """Return ``num_bytes`` with a decimal unit: ``147.80 MB``."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes} B"


def format_flop(operations: float) -> str:
    """Return a number of floating-point operations with a decimal unit: ``1.25 PFLOP``."""
    for unit, size in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if operations >= size:
            return f"{operations / size:.2f} {unit}"
    return f"{operations / 1e9:.2f} GFLOP"


def format_duration(seconds: float) -> str:
    """Return ``seconds`` as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
