"""Read text files that people write: UTF-8 whatever the locale says, with or without a byte-order mark."""

from __future__ import annotations

from pathlib import Path

from sws_dist.errors import ConfigError


def read_text(path: str | Path) -> str:
    """Return a file's text, without the byte-order mark that some editors put at its start.

    Raises:
        OSError: it cannot be read.
        ConfigError: it is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start} is 0x{byte:02x}); save it as UTF-8") from None
