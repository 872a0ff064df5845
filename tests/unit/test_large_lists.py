"""Lists of images as mapped arrays: the same values as lists of Python objects, and nothing that is not whole."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest

from sws_dist.config.schema import DataConfig
from sws_dist.data.build import list_images
from sws_dist.data.manifest import BadFile, Manifest
from sws_dist.data.packed_names import PackedNames
from tests.unit.test_manifest import run_scan
from tests.unit.test_sources import jpeg, write_tar

NAMES = ["a/1.jpg", "", "b/" + "x" * 300, os.fsdecode(b"caf\xe9/\xff.jpg"), "zwölf/图.jpg"]


def test_packed_names_are_a_sequence_of_names() -> None:
    packed = PackedNames.pack(NAMES)
    assert list(packed) == NAMES
    assert packed == NAMES
    assert packed == PackedNames.pack(iter(NAMES))
    assert packed != NAMES[:-1]
    assert packed != [*NAMES[:-1], "other"]
    assert (packed[-1], packed[1:3], packed[np.int64(3)]) == (NAMES[-1], NAMES[1:3], NAMES[3])
    with pytest.raises(IndexError):
        packed[5]
    for rows in ([], [4, 0, 0, 3], [1], range(5)):
        assert packed.select_rows(np.array(rows, dtype=np.int64)) == [NAMES[row] for row in rows]
    assert len(PackedNames.pack([])) == 0
    assert list(PackedNames.pack([])) == []


def make_list(count: int, spans: bool, large: bool = False) -> Manifest:
    return Manifest(
        folder=Path("/data/train"),
        classes=tuple(f"class {i}" for i in range(70_000 if large else 3)),
        paths=PackedNames.pack(f"{i}.jpg" for i in range(count)),
        labels=np.arange(count, dtype=np.int64) % 3 + (69_000 if large else 0),
        shards=("a.tar",) if spans else (),
        spans=np.arange(3 * count, dtype=np.int64).reshape(-1, 3) << 33 if spans else None,
        sizes=np.full((count, 2), (480, 70_000 if large else 640), dtype=np.int32),
        bad=(BadFile(NAMES[3], "empty"),),
    )


@pytest.mark.parametrize("count", [0, 1, 1000])
@pytest.mark.parametrize("spans", [True, False])
@pytest.mark.parametrize("large", [True, False])
def test_a_mapped_list_is_what_was_saved(tmp_path: Path, count: int, spans: bool, large: bool) -> None:
    saved = make_list(count, spans, large)
    mapped = Manifest.load(saved.save(tmp_path / "list.safetensors"))
    for field in ("folder", "classes", "paths", "shards", "bad"):
        assert getattr(mapped, field) == getattr(saved, field), field
    for field in ("labels", "sizes", "spans"):
        np.testing.assert_array_equal(getattr(mapped, field), getattr(saved, field))
    some = np.arange(count)[::7]
    assert mapped.sizes_of(some).dtype == np.int32
    np.testing.assert_array_equal(mapped.sizes_of(some), saved.sizes[some])


def test_a_mapped_list_holds_no_python_strings(tmp_path: Path) -> None:
    mapped = Manifest.load(make_list(1000, spans=False).save(tmp_path / "list.safetensors"))
    for array in (mapped.paths.data, mapped.paths.ends, mapped.labels, mapped.sizes):
        assert not array.flags.owndata
        assert not array.flags.writeable
    assert mapped.paths.ends.dtype == np.uint32
    assert mapped.labels.dtype == mapped.sizes.dtype == np.uint16


def test_what_is_no_list_is_refused(tmp_path: Path) -> None:
    file = make_list(1000, spans=False).save(tmp_path / "list.safetensors")
    whole = file.read_bytes()
    for broken in (b"", b"text", whole[:100], whole[:-1], b"\xff" * 100):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match="not a list of images that this trainer wrote"):
            Manifest.load(file)


def test_lists_of_earlier_versions_are_read(tmp_path: Path) -> None:
    saved = make_list(10, spans=True)
    texts = {"folder": str(saved.folder), "classes": saved.classes, "paths": list(saved.paths), "shards": saved.shards}
    texts["bad"] = [[file.path, file.reason] for file in saved.bad]
    encoded = np.frombuffer(json.dumps(texts).encode(), np.uint8)
    np.savez_compressed(
        tmp_path / "old.npz", texts=encoded, labels=saved.labels, sizes=saved.sizes, spans=np.asarray(saved.spans)
    )
    mapped = Manifest.load(tmp_path / "old.npz")
    assert (mapped.paths, mapped.classes, mapped.bad) == (saved.paths, saved.classes, saved.bad)
    np.testing.assert_array_equal(mapped.spans, saved.spans)


def test_a_scanned_list_is_taken_without_a_look_at_the_files(few_digits: Path, tmp_path: Path) -> None:
    root = tmp_path / "moved"
    config = DataConfig(root=str(root), trust_manifest=True)
    with pytest.raises(ValueError, match=r"there is no .*train.images.safetensors; sws scan --data .*/moved writes it"):
        list_images(config)
    (tmp_path / "root").mkdir()
    for split in ("train", "val"):
        os.symlink(few_digits / split, tmp_path / "root" / split)
    run_scan("--data", tmp_path / "root")
    expected = list_images(DataConfig(root=str(tmp_path / "root")))
    (tmp_path / "root").rename(root)
    for split in ("train", "val"):
        (root / split).unlink()  # nobody may look
        (root / split).mkdir()
    for found, listed in zip(list_images(config), expected, strict=True):
        assert found.paths == listed.paths
        assert found.folder == root / listed.folder.name
        np.testing.assert_array_equal(found.labels, listed.labels)
        np.testing.assert_array_equal(found.sizes, listed.sizes)
        assert "what has changed since is not noticed" in found.notes[0]
    trusted = Manifest.load(root / "train.images.safetensors")
    bad = tuple(BadFile(f"{i}.jpg", "empty") for i in range(20))
    dataclasses.replace(trusted, bad=bad).save(root / "train.images.safetensors")
    with pytest.raises(ValueError, match=r"20 of 100 images are bad, more than data.max_bad_share 0.1 allows"):
        list_images(config)
    trusted.save(root / "train.images.safetensors")
    names = [str(digit) for digit in reversed(range(10))]
    (tmp_path / "classes.txt").write_text("\n".join(names))
    train, _ = list_images(DataConfig(root=str(root), trust_manifest=True, classes=str(tmp_path / "classes.txt")))
    assert [train.classes[label] for label in train.labels] == [path[0] for path in train.paths]


def test_a_scanned_list_of_numbers_takes_the_classes_names(few_digits: Path, tmp_path: Path) -> None:
    files = sorted((few_digits / "train").glob("?/*.jpg"))
    for split in ("train.txt", "val.txt"):
        (tmp_path / split).write_text("".join(f"{file} {file.parent.name}\n" for file in files))
    (tmp_path / "names.txt").write_text("".join(f"digit {label}\n" for label in range(10)))
    run_scan("--data", tmp_path, "--splits", "train.txt", "val.txt")
    keys = {"root": str(tmp_path), "train_split": "train.txt", "val_split": "val.txt"}
    for trust in (False, True):
        train, val = list_images(DataConfig(**keys, classes=str(tmp_path / "names.txt"), trust_manifest=trust))
        assert train.classes == val.classes == tuple(f"digit {label}" for label in range(10))
        assert train.labels.tolist() == [int(file.parent.name) for file in files]


def test_shards_are_scanned_by_the_keys_that_a_run_uses(tmp_path: Path) -> None:
    for split in ("train", "val"):
        members = {"1.webp": b"no image", "1.jpg": jpeg(), "1.json": b'{"species": "ant"}'}
        write_tar(tmp_path / split / "a.tar", members)
    run_scan("--data", tmp_path, "--image-extensions", "jpg", "--label-key", "species")
    with pytest.raises(ValueError, match="written with --image-extensions jpg --label-key species; set"):
        list_images(DataConfig(root=str(tmp_path), trust_manifest=True))
    config = DataConfig(root=str(tmp_path), trust_manifest=True, image_extensions=("jpg",), label_key="species")
    train, val = list_images(config)
    assert train.paths == val.paths == ["a.tar/1.jpg"]
    assert train.classes == ("ant",)
    assert train.read(0) == jpeg()
