#!/usr/bin/env python
"""Write docs/config.md from sws_dist/config.py: every key of a run config, its type, default and meaning."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "config.md"
HEAD = """# Run configs

Made from `sws_dist/config.py` by `make docs`. A run config is a YAML file of these keys; `base: FILE` takes another
file's keys first. Any key can be overridden on the command line: `--set optim.lr=1e-3`. Unknown, duplicate and
ill-typed keys are errors. How a run is sharded is the DeepSpeed JSON's business: see [sharding](sharding.md).
"""


def page() -> str:
    """The page's text."""
    tree = ast.parse((ROOT / "sws_dist" / "config.py").read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    return HEAD + "".join(_section(classes, "RunConfig", ""))


def _section(classes: dict[str, ast.ClassDef], name: str, prefix: str) -> list[str]:
    rows, inner = [], []
    body = classes[name].body
    for node, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign):
            continue
        key, kind = f"{prefix}{ast.unparse(node.target)}", ast.unparse(node.annotation)
        group = next((part for part in kind.split(" | ") if part in classes), None)
        if group:
            inner += _section(classes, group, f"{key}.")
            if kind == group:  # a group that is always there needs no row of its own
                continue
        rows.append(f"| `{key}` | {_escape(kind)} | {_escape(_default(node.value))} | {_meaning(following)} |\n")
    about = ast.get_docstring(classes[name])
    title = f"\n## {prefix.rstrip('.') or 'The run'}\n\n" + (f"{about}\n\n" if about else "")
    return [title, "| key | type | default | meaning |\n|---|---|---|---|\n", *rows, *inner]


def _default(value: ast.expr | None) -> str:
    """A field's default as its source says it; ``Field(default=x, ...)`` has it inside."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "Field":
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in value.keywords}
        return given.get("default", "{}")
    return "required" if value is None else ast.unparse(value)


def _meaning(node: ast.stmt | None) -> str:
    """The string that follows a field, on one line."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return " ".join(str(node.value.value).replace("``", "`").split())
    return ""


def _escape(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text != "required" else text


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE.relative_to(ROOT)}")
