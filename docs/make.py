#!/usr/bin/env python
"""Write the parts of the documentation that are made from the code: ``docs/config.md`` and the diagrams.

``docs/config.md`` lists every key of a run config with its type, default and meaning, as ``sws_dist/config/schema.py``
defines them. ``docs/pictures.py`` draws the diagrams, ``docs/scaling.py`` the curves of docs/scaling.md.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCHEMA = ROOT / "sws_dist" / "config" / "schema.py"
CONFIG_PAGE = ROOT / "docs" / "config.md"
HEAD = """# Run configs

`make docs` writes this page from `sws_dist/config/schema.py`.

A run config is a YAML file with the keys below. `base: FILE` reads another file's keys first. Each key can also be set
on the command line: `--set optim.lr=1e-3`. An unknown key, a key that appears twice and a value of the wrong type are
errors. The DeepSpeed JSON decides how a run is sharded (see [sharding](sharding.md)).

- **Paths.** In a value of the type `path`, a leading `~` or `~user` is that user's home folder, `$NAME` and `${NAME}`
  are environment variables, and `$$` is a dollar sign. The options of all commands that take a path are read so too.
- **Resuming.** A resumed run takes its keys from the command line again. A key marked † may differ from the run's own
  value, and the log says so; any other is refused. `data.root` and its splits may name another place with the same
  images ([sharding](sharding.md#checkpoints)).
- **YAML.** Values are read by YAML 1.2: `true` and `false` are the only booleans, `010` is ten, `1e-3` is a number.
"""
MAY_CHANGE = "MayChange"
TYPE_NAMES = {"PathStr": "path"}


def page() -> str:
    """Return the text of ``docs/config.md``."""
    tree = ast.parse(SCHEMA.read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    constants = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    return HEAD + "".join(_section(classes, constants, "RunConfig", ""))


def _section(classes: dict[str, ast.ClassDef], constants: dict[str, ast.expr], name: str, prefix: str) -> list[str]:
    """Return the table of one group of keys, followed by those of the groups inside it."""
    rows, inner = [], []
    body = classes[name].body
    for node, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign):
            continue
        key, kind = f"{prefix}{ast.unparse(node.target)}", ast.unparse(node.annotation)
        group = next((part for part in kind.split(" | ") if part in classes), None)
        if group:
            inner += _section(classes, constants, group, f"{key}.")
            if kind == group:  # a group that is always there needs no row
                continue
        default = _escape(_default(node.value, constants))
        dagger = " †" if kind.startswith(MAY_CHANGE) else ""
        rows.append(f"| `{key}`{dagger} | {_escape(_type(kind))} | {default} | {_meaning(following)} |\n")
    about = ast.get_docstring(classes[name])
    title = f"\n## {prefix.rstrip('.') or 'The run'}\n\n" + (f"{about}\n\n" if about else "")
    return [title, "| key | type | default | meaning |\n|---|---|---|---|\n", *rows, *inner]


def _type(annotation: str) -> str:
    """Return an annotation as a user knows it."""
    if annotation.startswith(MAY_CHANGE):
        annotation = annotation[len(MAY_CHANGE) + 1 : -1]
    for name, known in TYPE_NAMES.items():
        annotation = annotation.replace(name, known)
    return annotation


def _default(value: ast.expr | None, constants: dict[str, ast.expr]) -> str:
    """Return a field's default as source; a constant's value instead of its name."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "Field":
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        if "default_factory" in given:
            return "{}"  # dict is the only one
        value = given.get("default")
    if value is None:
        return "required"
    source = ast.unparse(value)
    return ast.unparse(constants[source]) if source in constants else source


def _meaning(node: ast.stmt | None) -> str:
    """Return the string that follows a field, on one line."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return " ".join(str(node.value.value).replace("``", "`").split())
    return ""


def _escape(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text != "required" else text


if __name__ == "__main__":
    import pictures
    import scaling

    CONFIG_PAGE.write_text(page())
    print(f"wrote {CONFIG_PAGE.relative_to(ROOT)}")
    pictures.main()
    scaling.main()
