"""Make a site of pages that are written to be read on GitHub. ``mkdocs.yml`` names this file, whose hooks MkDocs calls.

- README.md is the site's first page; CONTRIBUTING.md and CHANGELOG.md are pages too.
- Pages link to files outside of docs/, such as ``../benchmarks/results/data-cpu.json``. The site holds a copy of each
  of these files, under its path in the repository, so that the site needs no repository to link to.
- ``<!-- ::: sws_dist.train -->``, which GitHub does not show, stands for the docstring of ``sws_dist.train``.
- In the code spans of a table GitHub needs ``\\|`` for a bar; Python-Markdown would show the backslash.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES_ABOVE_DOCS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"(?<=\]\()([^)#\s]+)")
"""The target of a Markdown link, without its anchor."""
DOCSTRING = re.compile(r"^<!-- (::: [\w.]+) -->$", re.MULTILINE)
TABLE_ROW = re.compile(r"^\|.*\|$", re.MULTILINE)
CODE_SPAN = re.compile(r"`[^`]+`")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages above docs/, and every file outside of docs/ that a page links to."""
    pages = [ROOT / name for name in PAGES_ABOVE_DOCS]
    pages += [Path(file.abs_src_path) for file in files.documentation_pages()]
    wanted = [*pages[: len(PAGES_ABOVE_DOCS)], *(target for page in pages for target in linked_files(page))]
    for path in dict.fromkeys(wanted):
        if files.get_file_from_path(site_path(path)) is None:
            files.append(File.generated(config, site_path(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to where their targets are in the site, ask mkdocstrings for docstrings, and unescape tables."""
    source = Path(page.file.abs_src_path)

    def move(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(source.parent / link[1]))
        if not target.is_file():
            return link[1]  # MkDocs says what is wrong with it
        return os.path.relpath(site_path(target), os.path.dirname(page.file.src_uri))

    def unescape(row: re.Match[str]) -> str:
        return CODE_SPAN.sub(lambda code: code[0].replace("\\|", "|"), row[0])

    return TABLE_ROW.sub(unescape, DOCSTRING.sub(r"\1", LINK.sub(move, markdown)))


def linked_files(page: Path) -> Iterator[Path]:
    """Yield the files of the repository that a page links to."""
    for link in LINK.findall(page.read_text()):
        target = Path(os.path.normpath(page.parent / link))
        if target.is_file():
            yield target


def site_path(file: Path) -> str:
    """Return a file's path in the site: docs/ is the site's root, README.md its first page."""
    path = file.relative_to(ROOT).as_posix()
    return {"README.md": "index.md"}.get(path, path.removeprefix("docs/"))
