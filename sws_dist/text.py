"""Read text files that people write: UTF-8 whatever the locale says, with or without a byte-order mark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sws_dist.errors import ConfigError


def read_text(path: str | Path) -> str:
    """Return a file's text, without the byte-order mark that some editors put at its start.

    Raises:
        OSError: it cannot be read.
        ConfigError: it is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:  # one in the middle of a file does not name it
        raise OSError(error.errno, error.strerror, str(path)) from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start} is 0x{byte:02x}); save it as UTF-8") from None


def read_json(path: str | Path) -> Any:
    """Return the value in a JSON file. Raises as ``read_text`` does, and ``ConfigError`` for what is not JSON."""
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from None
