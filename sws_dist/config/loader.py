"""Read run configs: YAML files with bases and command-line overrides, and errors that name key, file and remedy.

    config = load_config("configs/runs/quickstart/auxiliary.yaml", ["train.epochs=3"])

This module imports no torch, so that a wrong key is reported at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from sws_dist.config.paths import escape_path, expand_path
from sws_dist.config.schema import IS_PATH, KeyConflictError, RunConfig
from sws_dist.config.shipped import find_run_config, find_shipped_run_config
from sws_dist.config.yaml_text import Mapping, dump_yaml, parse_yaml
from sws_dist.errors import ConfigError
from sws_dist.text import read_text

_TYPE_HINTS = {"bool_type": ", true or false", "string_type": "; put a name that looks like a number in quotes"}


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a run config.

    A file may name another one under ``base:`` (relative to itself, or a shipped one's name); its own keys win.

    Args:
        path: a YAML file, or the name of a config that ships with this package: ``auxiliary_small``.
        overrides: ``key=value`` strings with dotted keys and YAML values. The value of a path is taken as it is
            written, unless it is in quotes or null.

    Raises:
        ConfigError: with every unknown, missing, duplicate or ill-typed key, the file and line where it stands and the
            nearest valid key.

    Examples:
        >>> import sws_dist
        >>> config = sws_dist.load_config("auxiliary_small", ["data.root=/data/imagenet", "train.epochs=3"])
        >>> config.model.name, config.train.epochs
        ('sws_aux_small_patch16_224', 3)
    """
    if isinstance(overrides, str) or not all(isinstance(each, str) for each in overrides):
        raise ConfigError(f'overrides {overrides!r}: expected a list of strings, such as ["train.epochs=3"]')
    path = find_run_config(path)
    values, sources = _read_with_bases(path, seen=())
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {override!r}: expected key=value, for example --set train.epochs=3")
        source = f"--set {override}"
        value = _parse_override(key, text, source)
        for part in reversed(key.split(".")):
            value = {part: value}
        _merge(values, value, sources, source)
    _expand_paths(values, sources)
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
    values = config_to_dict(config)
    for group, name, _ in _path_values(values):
        group[name] = escape_path(group[name])
    return dump_yaml(values)


def _parse_override(key: str, text: str, source: str) -> Any:
    """Return the value of one ``--set``. A path is not read as YAML, which would cut it at `` #``."""
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if key in marked_keys(IS_PATH) and text not in ("", "null") and not is_quoted:
        return text
    return parse_yaml(text, source, is_file=False)


def _expand_paths(values: dict[str, Any], sources: dict[str, str]) -> None:
    """Expand ``~`` and ``$VARIABLE`` in the values of paths."""
    for group, name, dotted in _path_values(values):
        try:
            group[name] = expand_path(group[name])
        except ConfigError as error:
            raise ConfigError(f"{sources[dotted]}: {dotted}: {error}") from None


def _path_values(values: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Yield the group, the name in it and the dotted key of each path that is given."""
    for dotted in marked_keys(IS_PATH):
        *parents, name = dotted.split(".")
        group: Any = values
        for parent in parents:
            group = group.get(parent) if isinstance(group, dict) else None
        if isinstance(group, dict) and isinstance(group.get(name), str):
            yield group, name, dotted


def _read_with_bases(path: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: names itself as its base, by way of {', '.join(map(str, seen))}")
    try:
        own = parse_yaml(read_text(path), str(path), is_file=True)
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from None
    if not isinstance(own, Mapping):
        found = "an empty file" if own is None else type(own).__name__
        raise ConfigError(f"{path}: expected a mapping of keys (output, model, data, ...), found {found}")
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
        here = new.sources[key] if isinstance(new, Mapping) else source
        if isinstance(value, dict) and value:  # an empty one replaces what was there
            if not isinstance(into.get(key), dict):
                into[key] = {}
            _merge(into[key], value, sources, source, dotted + ".")
            sources.setdefault(dotted, here)
        else:
            into[key] = value
            sources[dotted] = here


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
    hint = _TYPE_HINTS.get(kind, "")
    return f"{source}: {dotted} = {error['input']!r}: {message[0].lower()}{message[1:]}{hint}"


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


def valid_keys() -> list[str]:
    """Return every dotted key that a run config may hold."""
    return list(_annotations())


def marked_keys(mark: str) -> list[str]:
    """Return the dotted keys whose annotation bears a mark of ``schema.py``."""
    return [key for key, annotation in _annotations().items() if _has_mark(annotation, mark)]


def _has_mark(annotation: Any, mark: str) -> bool:
    marks = getattr(annotation, "__metadata__", ())
    return mark in marks or any(_has_mark(inner, mark) for inner in get_args(annotation))


@cache
def _annotations(cls: type = RunConfig, prefix: str = "") -> dict[str, Any]:
    """Return the annotation of every dotted key, those of groups before those of the keys in them."""
    found: dict[str, Any] = {}
    hints = get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        annotation = found[prefix + field.name] = hints[field.name]
        for inner in (annotation, *get_args(annotation)):
            if dataclasses.is_dataclass(inner):
                found |= _annotations(cast(type, inner), f"{prefix}{field.name}.")
    return found
