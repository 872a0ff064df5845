"""Read run configs: YAML files with bases and command-line overrides, and errors that name key, file and remedy.

    config = load_config("configs/runs/quickstart/auxiliary.yaml", ["train.epochs=3"])

This module imports no torch, so that a wrong key is reported at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from sws_dist.config.schema import KeyConflictError, RunConfig
from sws_dist.config.shipped import find_run_config, find_shipped_run_config
from sws_dist.errors import ConfigError
from sws_dist.text import read_text


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a run config.

    A file may name another one under ``base:`` (relative to itself, or a shipped one's name); its own keys win.

    Args:
        path: a YAML file, or the name of a config that ships with this package: ``auxiliary_small``.
        overrides: ``key=value`` strings with dotted keys and YAML values.

    Raises:
        ConfigError: with every unknown, missing, duplicate or ill-typed key, the file it stands in and the
            nearest valid key.

    >>> import sws_dist
    >>> config = sws_dist.load_config("auxiliary_small", ["data.root=/data/imagenet", "train.epochs=3"])
    >>> config.model.name, config.train.epochs
    ('sws_aux_small_patch16_224', 3)
    """
    path = find_run_config(path)
    values, sources = _read_with_bases(path, seen=())
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {override!r}: expected key=value, for example --set train.epochs=3")
        source = f"--set {override}"
        value = _parse(text, source)
        for part in reversed(key.split(".")):
            value = {part: value}
        _merge(values, value, sources, source)
    try:
        # By way of JSON: pydantic's strict mode takes mappings for dataclasses and lists for tuples only from there.
        return TypeAdapter(RunConfig).validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(e, sources, str(path)) for e in error.errors())) from None


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """Return the config as plain dictionaries and lists, as ``config_to_yaml`` writes it and TensorBoard shows it."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    return plain(dataclasses.asdict(config))


def config_to_yaml(config: RunConfig) -> str:
    """Return the config as a YAML file that ``load_config`` reads."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML with unique keys, and with 5e-4 as a number (YAML 1.1 takes it for a string)."""


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    pairs = [(loader.construct_object(k, deep=True), v, k) for k, v in node.value]
    seen: set[str] = set()
    for key, _, key_node in pairs:
        if not isinstance(key, str):
            raise ConfigError(f"line {key_node.start_mark.line + 1}: the key {key!r} is no text; write it in quotes")
        if key in seen:
            raise ConfigError(f"line {key_node.start_mark.line + 1}: the key {key!r} appears twice; remove one")
        seen.add(key)
    return {key: loader.construct_object(value, deep=True) for key, value, _ in pairs}


_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or a number that cannot be one
        raise ConfigError(f"{source}: not valid YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{source}: not valid YAML: nested too deeply") from None


def _read_with_bases(path: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: names itself as its base, by way of {', '.join(map(str, seen))}")
    try:
        text = read_text(path)
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from None
    own = _parse(text, str(path))
    if not isinstance(own, dict):
        raise ConfigError(f"{path}: expected a mapping of keys (output, model, data, ...), found {type(own).__name__}")
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    base = own.pop("base", None)
    if base is not None:
        beside = path.parent / str(base)
        try:
            file = beside if beside.is_file() else find_shipped_run_config(str(base))
        except ConfigError as error:
            raise ConfigError(f"{path}: base {base}: there is no {beside}; {error}") from None
        values, sources = _read_with_bases(file, (*seen, path.resolve()))
    _merge(values, own, sources, str(path))
    return values, sources


def _merge(into: dict[str, Any], new: dict[str, Any], sources: dict[str, str], source: str, prefix: str = "") -> None:
    """Merge ``new`` into ``into``, mappings key by key, and remember where each key came from."""
    for key, value in new.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict):
            if not isinstance(into.get(key), dict):
                into[key] = {}
            _merge(into[key], value, sources, source, dotted + ".")
            sources.setdefault(dotted, source)
        else:
            into[key] = value
            sources[dotted] = source


def _explain(error: Any, sources: dict[str, str], path: str) -> str:
    """Turn one pydantic error into a line: the source, the key, what is wrong, what would be right."""
    # pydantic also names the alternative that it tried: function-..., literal[...], tuple[...]
    keys = [str(part) for part in error["loc"] if not str(part).startswith("function-") and "[" not in str(part)]
    dotted = ".".join(keys)
    source = next((sources[p] for n in range(len(keys), 0, -1) if (p := ".".join(keys[:n])) in sources), path)
    kind, message = error["type"], error["msg"]
    conflict = error.get("ctx", {}).get("error")
    if isinstance(conflict, KeyConflictError):
        return f"{sources.get('.'.join([*keys, conflict.key]), source)}: {conflict}"
    if kind == "unexpected_keyword_argument":
        return f"{source}: unknown key {dotted}{_suggest(keys)}"
    if kind in ("missing", "missing_argument"):
        return f"{source}: the key {dotted} is missing"
    return f"{source}: {dotted} = {error['input']!r}: {message[0].lower()}{message[1:]}"


def _suggest(keys: list[str]) -> str:
    """Suggest the same name in another group, else the nearest key of the same group, else all keys of the group."""
    *parents, name = keys
    groups: dict[str, list[str]] = {}
    for key in valid_keys():
        parent, _, last = key.rpartition(".")
        groups.setdefault(parent, []).append(last)
    for parent, names in groups.items():
        if name in names:
            return f"; did you mean {parent}.{name}?"
    here = groups.get(".".join(parents), [])
    for near in difflib.get_close_matches(name, here, n=1):
        return f"; did you mean {'.'.join([*parents, near])}?"
    return f"; valid here: {', '.join(here)}" if here else ""


def valid_keys(cls: type = RunConfig, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key that a run config may hold."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield prefix + field.name
        for inner in (hints[field.name], *get_args(hints[field.name])):
            if dataclasses.is_dataclass(inner):
                yield from valid_keys(cast(type, inner), f"{prefix}{field.name}.")
