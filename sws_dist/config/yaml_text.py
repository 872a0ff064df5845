"""Read and write YAML without its traps: unique keys, no tags, and values that mean what they look like.

Plain values are read by YAML 1.2's core schema. The older YAML 1.1, PyYAML's own, takes ``1e-3`` for a string, ``no``
for false, ``010`` for 8, ``1:30`` for 90 and ``2026-01-01`` for a date.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml

from sws_dist.errors import ConfigError

_TAG = "tag:yaml.org,2002:"


class Mapping(dict[str, Any]):
    """A mapping that knows where each of its keys stands: ``run.yaml:3``."""

    sources: dict[str, str]


def parse_yaml(text: str, source: str, *, is_file: bool) -> Any:
    """Return the value of a YAML text; its mappings are ``Mapping``.

    Args:
        source: where the text stands, for messages.
        is_file: whether messages name the line too.

    Raises:
        ConfigError: with one line that says where, and what is wrong.
    """

    def where(mark: yaml.Mark | None) -> str:
        return f"{source}:{mark.line + 1}" if is_file and mark else source

    try:
        loader = _Loader(text)
        loader.where = where
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{where(error.problem_mark or error.context_mark)}: {_explain(error)}") from None
    except RecursionError:
        raise ConfigError(f"{source}: not valid YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError, KeyError) as error:  # a tag and a value that cannot be of its type
        reason = " ".join(str(error).split())
        raise ConfigError(f"{source}: not valid YAML: {reason}") from None


def dump_yaml(values: dict[str, Any]) -> str:
    """Return a YAML text that ``parse_yaml`` reads, and other readers of YAML 1.1 and 1.2 too."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


class _BadKeyError(yaml.MarkedYAMLError):
    """A key that is no name, or that appears twice in one mapping: the last would win without a word."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 (those of YAML 1.1 are left out)
    yaml_constructors = {  # noqa: RUF012 (so are sets, dates and binary values)
        f"{_TAG}null": yaml.SafeLoader.construct_yaml_null,
        f"{_TAG}bool": yaml.SafeLoader.construct_yaml_bool,
        f"{_TAG}float": yaml.SafeLoader.construct_yaml_float,
        f"{_TAG}str": yaml.SafeLoader.construct_yaml_str,
        f"{_TAG}seq": yaml.SafeLoader.construct_yaml_seq,
        None: yaml.SafeLoader.construct_undefined,
    }
    where: Callable[[yaml.Mark | None], str]


class _Dumper(yaml.SafeDumper):
    """It puts a text in quotes that one of both versions would take for something else."""


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> Mapping:
    mapping = Mapping()
    mapping.sources = {}
    for key_node, value_node in node.value:
        key, mark = loader.construct_object(key_node, deep=True), key_node.start_mark
        if not isinstance(key, str):
            raise _BadKeyError(problem=f"the key {key!r} is not a name; put it in quotes", problem_mark=mark)
        if key in mapping:
            raise _BadKeyError(problem=f"the key {key!r} appears twice; remove one", problem_mark=mark)
        mapping[key] = loader.construct_object(value_node, deep=True)
        mapping.sources[key] = loader.where(mark)
    return mapping


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node).replace("_", ""))


_Loader.add_constructor(f"{_TAG}map", _construct_mapping)
_Loader.add_constructor(f"{_TAG}int", _construct_int)
for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(f"^(?:{_pattern})$"), _first)


def _explain(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or error.context or ""
    if isinstance(error, _BadKeyError):
        return problem
    if "\\t" in problem:
        return "not valid YAML: there is a tab; indent with spaces"
    return f"not valid YAML: {problem}" + (f" ({error.context})" if error.problem and error.context else "")
