"""Expand ``~`` and ``$VARIABLE`` in the paths that users write: in configs, in ``--set`` and in other options.

A shell does so for words of their own, and for none inside a YAML file, in quotes, or after ``=``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from sws_dist.errors import ConfigError

_VARIABLE = re.compile(r"\$(?:(\$)|([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})")


def expand_path(text: str) -> str:
    """Return the path that is meant.

    A leading ``~`` or ``~user`` becomes that user's home folder, ``$NAME`` and ``${NAME}`` become the environment
    variable, and ``$$`` a dollar sign. Anything else stays as it is.

    Raises:
        ConfigError: a variable that is not set or empty, a user without a home folder, or a null byte.

    >>> import os
    >>> os.environ["DATA"] = "/data"
    >>> expand_path("${DATA}/image$$net")
    '/data/image$net'
    """
    if "\0" in text:
        raise ConfigError(f"{text!r}: a path cannot hold a null byte")
    first, slash, rest = text.partition("/")
    home = os.path.expanduser(first)
    if first.startswith("~") and home == first:
        raise ConfigError(f"{text}: there is no home folder of {first}; ./{first} is a file or folder of that name")
    return f"{home if first.startswith('~') else _expand(first, text)}{slash}{_expand(rest, text)}"


def escape_path(path: str | Path) -> str:
    """Return the text that ``expand_path``, and ``--set KEY=`` before it, turns into this path."""
    text = str(path).replace("$", "$$")
    return f"./{text}" if text.startswith(("~", "'", '"')) or text == "null" else text


def _expand(part: str, text: str) -> str:
    def value(match: re.Match[str]) -> str:
        dollar, *names = match.groups()
        if dollar:
            return dollar
        name = names[0] or names[1]
        if not os.environ.get(name):
            raise ConfigError(f"{text}: the environment variable {name} is not set; $$ is a dollar sign itself")
        return os.environ[name]

    return _VARIABLE.sub(value, part)
