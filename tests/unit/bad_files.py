"""Damage image files in nine ways."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from PIL import Image


def _encoded(file: Path, kind: str) -> bytes:
    out = io.BytesIO()
    Image.open(file).convert("RGB").save(out, kind)
    return out.getvalue()


def _dangling(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.with_name("nowhere.jpg"))


def _rewrite(change: Callable[[Path], bytes]) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(change(file))


# Kind -> (how a good JPEG file is damaged, a word of the reason that has to be reported).
KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (_rewrite(lambda file: b""), "empty"),
    "zeros": (_rewrite(lambda file: bytes(len(file.read_bytes()))), "zeros"),
    "a web page": (_rewrite(lambda file: b"<html><body>404 Not Found</body></html>\n" * 9), "not an image"),
    "GIF": (_rewrite(lambda file: _encoded(file, "GIF")), "GIF"),
    "cut in its header": (_rewrite(lambda file: file.read_bytes()[:40]), "truncated"),
    "cut in half": (_rewrite(lambda file: file.read_bytes()[: len(file.read_bytes()) // 2]), "truncated"),
    "cut at its end": (_rewrite(lambda file: file.read_bytes()[:-90]), "truncated"),
    "half a PNG": (_rewrite(lambda file: (png := _encoded(file, "PNG"))[: len(png) // 2]), "truncated"),
    "gone": (_dangling, "missing"),
}


def spoil(files: list[Path]) -> dict[str, str]:
    """Damage each file in the next of nine ways. Returns file name -> a word of the reason."""
    reasons = {}
    for file, (damage, reason) in zip(files, list(KINDS.values()) * len(files), strict=False):
        damage(file)
        reasons[file.name] = reason
    return reasons
