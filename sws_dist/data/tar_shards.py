"""List the samples of WebDataset tar shards, and keep the list beside them.

    000001.jpg  000001.seg.png  000001.cls      one sample, with key 000001

As in WebDataset, a key ends at the first dot of the file's name, and what follows is the extension.
"""

from __future__ import annotations

import json
import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sws_dist.config.schema import DEFAULT_IMAGE_EXTENSIONS
from sws_dist.data.image_names import is_hidden
from sws_dist.data.json_lines import read_json_lines, write_json_lines
from sws_dist.data.kept_files import kept_file
from sws_dist.data.labels import join_names

_MIN_FOR_CAPTIONS = 100
"""Number of samples from which on ``.txt`` files are taken for captions, if more than half of the texts differ."""
_LONGEST_END = 1 << 24
"""Most zero bytes at the end of a tar file. Tar pads to records of 10 KiB, or with ``-b 2048`` of 1 MiB; more are the
rest of a file that was given its full length and never filled."""
_INDEX_VERSION = 2
"""Version 1 took shards whose end was missing."""
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")


@dataclass(frozen=True)
class SampleKeys:
    """The members of a sample that hold its image and its label."""

    image_extensions: tuple[str, ...] = DEFAULT_IMAGE_EXTENSIONS
    """Extensions of the image, without the leading dot; the first that a sample has is taken."""
    label_key: str = "label"
    """Key of the label in a sample's ``.json``."""

    @property
    def plain(self) -> list[Any]:
        """The same as JSON holds it."""
        return [list(self.image_extensions), self.label_key]


DEFAULT_KEYS = SampleKeys()


@dataclass(frozen=True)
class Samples:
    """The samples of all shards that have an image and a label, in their order."""

    paths: list[str]
    """``<shard>/<image>``."""
    labels: list[str]
    """As they are written."""
    spans: np.ndarray
    """[N, 3] int64: shard, offset and length in bytes."""
    notes: list[str]
    """Log messages about what is left out."""


def find_shards(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of a folder's tar files: those that can be read, and compressed ones."""
    names = sorted(name for name in os.listdir(folder) if not is_hidden(name))
    return [n for n in names if n.endswith(".tar")], [n for n in names if n.lower().endswith(_COMPRESSED)]


def list_samples(
    folder: Path, shards: Sequence[str], keys: SampleKeys, num_threads: int, lists: Path | None = None
) -> Samples:
    """List the samples of tar shards. ``<split>.index.jsonl`` keeps the list for the next time.

    Args:
        num_threads, keys, lists: see ``find_source``.

    Raises:
        ValueError: a shard that cannot be read by offset, or no sample with an image and a label.
    """
    file = kept_file(folder, "index.jsonl", lists)
    known = {entry["shard"]: entry for entry in read_json_lines(file)} if file.is_file() else {}
    stamps = {shard: _stamp(folder / shard, keys) for shard in shards}
    missing = [shard for shard in shards if known.get(shard, {}).get("stamp") != stamps[shard]]
    with ThreadPoolExecutor(num_threads) as pool:
        found = pool.map(lambda shard: _index_shard(folder / shard, keys), missing)
        for shard, about in zip(missing, found, strict=True):
            known[shard] = {"shard": shard, "stamp": stamps[shard], **about}
    notes = []
    if missing:
        try:
            write_json_lines(file, (known[shard] for shard in shards))
        except OSError as error:
            notes.append(
                f"{file}: cannot be written ({error.strerror}); the shards will be indexed again next time, unless "
                "data.lists names a folder for it"
            )
    samples = [(number, shard, *s) for number, shard in enumerate(shards) for s in known[shard]["samples"]]
    left_out = [(shard, *entry) for shard in shards for entry in known[shard]["left_out"]]
    notes += _describe_left_out(folder, left_out)
    if not samples:
        raise ValueError(_explain_no_samples(folder, shards, keys, left_out))
    labels = [label for *_, label, _ in samples]
    if len(samples) >= _MIN_FOR_CAPTIONS and all(kind == "txt" for *_, kind in samples):
        different = len(set(labels))
        if 2 * different > len(samples):
            raise ValueError(
                f"{folder}: the .txt files of {len(samples)} samples hold {different} different texts, which are "
                f"captions and no labels; expected labels in .cls, or in .json under data.label_key {keys.label_key!r}"
            )
    spans = np.array([(number, offset, length) for number, _, _, offset, length, *_ in samples], dtype=np.int64)
    return Samples([f"{shard}/{name}" for _, shard, name, *_ in samples], labels, spans, notes)


def _stamp(path: Path, keys: SampleKeys) -> list[Any]:
    """Return what the list of a shard depends on: a shard with the same is not indexed again."""
    status = path.stat()
    return [_INDEX_VERSION, status.st_size, status.st_mtime_ns, *keys.plain]


def _index_shard(path: Path, keys: SampleKeys) -> dict[str, Any]:
    """List a shard's samples: (name of the image, offset, length, label, kind of the label's file).

    Returns:
        ``samples``, and ``left_out``: (key, reason, extensions) of each sample that has no image or no label.
    """
    members: dict[str, dict[str, tarfile.TarInfo]] = {}  # key -> extension -> member
    samples, left_out = [], []
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            by_name: dict[str, tarfile.TarInfo] = {}
            for member in tar:
                key, extension = _split_key(member.name)
                if key is not None and not member.isdir():
                    other = members.setdefault(key, {}).setdefault(extension, member)
                    if other is not member:
                        raise ValueError(_explain_repeated(path, key, other, member))
                by_name[posixpath.normpath(member.name)] = member
            _require_end(file, tar.offset)
            for key, parts in members.items():
                files = {ext: _follow(member, by_name) for ext, member in parts.items()}
                present = {ext: member for ext, member in files.items() if member is not None}
                image = next((ext for ext in keys.image_extensions if ext in present), None)
                label, kind = _read_label(path, tar, key, present, keys)
                if image is None or label is None:
                    reason = "image" if image is None else "label"
                    left_out.append((key, reason, sorted(parts)))
                    continue
                target = present[image]
                if target.issparse():
                    raise ValueError(f"{path}: {target.name} is sparse; write the shard without --sparse")
                samples.append((parts[image].name, target.offset_data, target.size, label, kind))
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a whole tar file ({error}); write it again or remove it") from None
    return {"samples": samples, "left_out": left_out}


def _require_end(file: BinaryIO, offset: int) -> None:
    """Check that a tar file ends where its last member does: ``tarfile`` stops without a word where it is damaged.

    Raises:
        tarfile.ReadError: ``offset``, behind the last member, is not followed by zeros alone, one block or more.
    """
    file.seek(offset)
    end = file.read(_LONGEST_END + 1)
    if len(end) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"it breaks off at byte {offset}, without the zeros that end a tar file")
    if end[: tarfile.BLOCKSIZE].strip(b"\0"):
        raise tarfile.ReadError(f"damaged at byte {offset}, where the header of a file or the end should be")
    if end.strip(b"\0"):
        raise tarfile.ReadError(f"more files, or others' data, behind the zeros at byte {offset} that end a tar file")
    if len(end) > _LONGEST_END:
        raise tarfile.ReadError(f"nothing but zeros from byte {offset} on, more than a tar file ends with")


def _explain_repeated(path: Path, key: str, first: tarfile.TarInfo, second: tarfile.TarInfo) -> str:
    """Return why two files of one key and extension are no samples, for a message."""
    return (
        f"{path}: the key {key} is that of two samples: {first.name} (at byte {first.offset}) and {second.name} "
        f"(at byte {second.offset}); one of them would be lost. Write the shard again with a key for each sample"
    )


def _follow(member: tarfile.TarInfo, by_name: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo | None:
    """Return the file that a member is, or that it is a hard or symbolic link to; None if there is none.

    Args:
        by_name: the members by their normalised names.
    """
    seen = set()
    while member.islnk() or member.issym():
        if member.name in seen:
            return None
        seen.add(member.name)
        # ``tar cf x.tar .`` writes ./ before names, but not into symbolic links.
        target = posixpath.join(posixpath.dirname(member.name), member.linkname) if member.issym() else member.linkname
        target = posixpath.normpath(target)
        if target not in by_name:
            return None
        member = by_name[target]
    return member if member.isfile() else None


def _read_label(
    path: Path, tar: tarfile.TarFile, key: str, parts: dict[str, tarfile.TarInfo], keys: SampleKeys
) -> tuple[str | None, str]:
    """Return a sample's label as it is written, and the extension of the file that holds it: cls, json or txt."""

    def read(extension: str) -> str:
        content = tar.extractfile(parts[extension])
        assert content is not None
        try:
            return content.read().decode("utf-8-sig").strip()
        except UnicodeDecodeError:
            raise ValueError(f"{path}: {key}.{extension} is not UTF-8 text") from None

    if "cls" in parts:
        return read("cls") or None, "cls"
    if "json" in parts:
        try:
            fields = json.loads(read("json"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: {key}.json is not valid JSON ({error})") from None
        value = fields.get(keys.label_key) if isinstance(fields, dict) else None
        if isinstance(value, bool) or not isinstance(value, (int, str, type(None))):
            raise ValueError(f"{path}: {key}.json: {keys.label_key} is {value!r}; expected a whole number or a name")
        if value is not None:
            return str(value).strip() or None, "json"
    return (read("txt") or None, "txt") if "txt" in parts else (None, "")


def _split_key(name: str) -> tuple[str | None, str]:
    """Split a member's name into key and extension, in lower case. The key of a hidden file is None."""
    folder, _, base = name.removeprefix("./").rpartition("/")
    if is_hidden(base) or "__MACOSX" in folder.split("/"):
        return None, ""
    key, _, extension = base.partition(".")
    return f"{folder}/{key}" if folder else key, extension.lower()


def _describe_left_out(folder: Path, left_out: Sequence[tuple[str, str, str, list[str]]]) -> list[str]:
    notes = []
    for article, kind in (("an", "image"), ("a", "label")):
        found = [(shard, key, extensions) for shard, key, reason, extensions in left_out if reason == kind]
        if found:
            shard, key, extensions = found[0]
            notes.append(
                f"{folder}: {len(found)} sample(s) without {article} {kind} are left out, for "
                f"example {key} of {shard}, which has {join_names(extensions)}"
            )
    return notes


def _explain_no_samples(
    folder: Path, shards: Sequence[str], keys: SampleKeys, left_out: Sequence[tuple[str, str, str, list[str]]]
) -> str:
    """Return why no shard has a sample, for a message."""
    seen = Counter(extension for *_, extensions in left_out for extension in extensions)
    missing = {reason for _, _, reason, _ in left_out}
    text = f"{folder}: none of the samples in its {len(shards)} tar file(s) has both an image and a label"
    if not seen:
        return f"{text}; they hold no files"
    text += f"; their files end in {join_names([extension for extension, _ in seen.most_common()])}"
    if missing == {"label"} and set(seen) <= set(keys.image_extensions):
        return (
            f"{text}. Class tars as ILSVRC has them are no shards: extract each into a folder of its name, "
            f"{folder.name}/<class>/<image>"
        )
    return (
        f"{text}. Images are looked for as {', '.join(keys.image_extensions[:4])}, ... (data.image_extensions), labels "
        f"in .cls, in .json under {keys.label_key!r} (data.label_key), and in .txt"
    )
