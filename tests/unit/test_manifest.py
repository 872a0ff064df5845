"""Test the list of images: three kinds of sources, the scan and its file, the message about a changed folder."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sws_dist.cli import scan
from sws_dist.config.schema import AugmentConfig, DataConfig
from sws_dist.data import labels, manifest, sampler, sources, tar_shards
from sws_dist.data.build import list_images
from sws_dist.data.draws import Recipe
from sws_dist.data.manifest import Manifest
from sws_dist.data.pipeline import eval_loader, train_loader
from sws_dist.data.tar_shards import SampleKeys
from sws_dist.data.validate import BadImageError, check_image, check_image_header
from tests.launching import REPOSITORY
from tests.unit import bad_files, images

CPU = torch.device("cpu")


@pytest.fixture
def root(few_digits: Path, tmp_path: Path) -> Path:
    shutil.copytree(few_digits, tmp_path / "data")
    return tmp_path / "data"


def write_shards(root: Path, listed: Manifest, split: str, names: bool, num_shards: int = 3) -> None:
    """Write the images of ``listed`` in their order as WebDataset shards, with numbers or names as labels."""
    (root / split).mkdir(parents=True)
    for shard in range(num_shards):
        with tarfile.open(root / split / f"shard-{shard:03d}.tar", "w") as tar:
            for index in np.array_split(np.arange(len(listed)), num_shards)[shard]:
                label = int(listed.labels[index])
                text = listed.classes[label] if names else str(label)
                for extension, content in (("jpg", listed.read(index)), ("cls", text.encode())):
                    member = tarfile.TarInfo(f"{index:06d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


# ---- One file ----


def test_every_kind_of_image_is_accepted(tmp_path: Path) -> None:
    for file in images.write_sample_images(tmp_path):
        with Image.open(file) as image:
            expected = image.height, image.width
        assert check_image(file.read_bytes()) == expected
        with file.open("rb") as opened:
            assert check_image_header(opened, file.stat().st_size) == expected


@pytest.mark.parametrize("kind", [kind for kind in bad_files.KINDS if kind != "gone"])
@pytest.mark.parametrize("source", ["420.jpg", "progressive.jpg", "small.jpg"])
def test_every_kind_of_bad_file_has_its_reason(tmp_path: Path, kind: str, source: str) -> None:
    images.write_sample_images(tmp_path)
    file = tmp_path / source
    damage, reason = bad_files.KINDS[kind]
    damage(file)
    with pytest.raises(BadImageError, match=reason):
        check_image(file.read_bytes())
    with file.open("rb") as opened, pytest.raises(BadImageError, match=reason):
        check_image_header(opened, file.stat().st_size)


# ---- The scan and its file ----


def run_scan(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launcher/scan.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_scan_names_every_bad_file(root: Path, tmp_path: Path) -> None:
    files = sorted((root / "train").glob("*/*.jpg"))
    reasons = bad_files.spoil(files[::8][:9])
    done = run_scan("--data", root, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["images"] == 80 - 9 + 33
    assert len(found["bad"]) == 9
    for entry in found["bad"]:
        assert (root / entry["path"]).is_symlink() or (root / entry["path"]).is_file()
        assert reasons[Path(entry["path"]).name] in entry["reason"]
        assert entry["path"] in done.stdout
    assert "train: 71 images in 10 classes, 9 bad files" in done.stdout
    assert "\r" not in done.stdout + done.stderr, "a progress bar outside of a terminal"
    run_scan("--data", root / "train", "--json", tmp_path / "split.json")
    bad = json.loads((tmp_path / "split.json").read_text())["bad"]
    assert [f"train/{entry['path']}" for entry in bad] == [entry["path"] for entry in found["bad"]]


def test_a_split_that_is_not_there_is_no_reason_to_scan_another_folder(tmp_path: Path) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    assert scan.find_splits(tmp_path, None) == [(tmp_path, "train", "train/")]
    for names in (["trian"], ["train", "trian"]):
        with pytest.raises(ValueError, match=f"--splits trian: {tmp_path} holds no such split"):
            scan.find_splits(tmp_path, names)


def test_scan_writes_a_manifest_file(root: Path) -> None:
    (victim, *_) = sorted((root / "train").glob("*/*.jpg"))
    light = manifest.scan(root, "train")
    # The damage is in the middle: the header is intact, and the file ends as it should.
    Image.open(victim).save(victim, format="PNG")
    damaged = bytearray(victim.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    victim.write_bytes(damaged)
    assert len(manifest.scan(root, "train")) == 80
    run_scan("--data", root)
    lines = [json.loads(line) for line in (root / "train.manifest.jsonl").read_text().splitlines()]
    assert [line["path"] for line in lines] == list(light.paths)
    assert [(line["height"], line["width"], line["label"]) for line in lines[1:]] == [
        (*size, label) for size, label in zip(light.sizes.tolist()[1:], light.labels.tolist()[1:], strict=True)
    ]
    listed = manifest.scan(root, "train")
    assert not listed.notes
    assert [file.path for file in listed.bad] == ["0/" + victim.name], "the scan knows it to be bad"
    np.testing.assert_array_equal(listed.sizes, light.sizes[1:])


def test_lists_are_kept_in_another_folder(root: Path, tmp_path: Path) -> None:
    lists = tmp_path / "lists"
    listed = manifest.scan(root, "train")
    for folder in (root / "a", root / "b"):  # two splits of one name
        write_shards(folder, listed, "train", names=False)
    shutil.copytree(root / "train", root / "b" / "val")
    before = sorted(root.rglob("*"))
    for folder in (root / "a", root / "b"):
        run_scan("--data", folder, "--lists", lists)
    assert sorted(root.rglob("*")) == before, "nothing is written beside the data"
    kept = {str(file.relative_to(lists / root.relative_to("/"))) for file in lists.rglob("*") if file.is_file()}
    endings = ("index.jsonl", "manifest.jsonl", "images.safetensors")
    splits = [f"{folder}/train.{ending}" for folder in "ab" for ending in endings]
    assert kept == {*splits, "b/val.manifest.jsonl", "b/val.images.safetensors"}
    for trust in (True, False):
        config = DataConfig(root=str(root / "b"), lists=str(lists), trust_manifest=trust)
        assert [len(images) for images in list_images(config)] == [80, 80]
    assert sorted(root.rglob("*")) == before
    with pytest.raises(ValueError, match=rf"there is no .*none.*; sws scan --data {root}/b --lists {lists} writes"):
        manifest.load_scanned(root / "b", "none", lists=lists)


def test_a_scan_finds_out_at_once_that_its_lists_cannot_be_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "check_image", lambda *_: pytest.fail("an image was decoded"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"train.manifest.jsonl: cannot be written \(Not a directory\); --lists"):
        manifest.scan_and_decode(root, "train", 2, lists=tmp_path / "file")
    root.chmod(0o555)
    if os.access(root, os.W_OK):
        pytest.skip("root may write into every folder")
    with pytest.raises(ValueError, match=r"train.manifest.jsonl: cannot be written \(Permission denied\)"):
        manifest.scan_and_decode(root, "train", 2)


def test_what_could_not_be_read_is_tried_again(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = manifest.scan(root, "train").paths
    (root / "some.txt").write_text("".join(f"train/{path} {path[0]}\n" for path in paths))
    file = root / "train" / paths[3]
    content = file.read_bytes()
    file.unlink()
    file.mkdir()  # has a size, and cannot be read
    assert scan.scan_split(root, "some.txt", "", 2, SampleKeys())[0] == 79
    assert "some.txt: 79 images in 10 classes, 0 bad files, 1 that could not be read" in capsys.readouterr().out
    (note,) = manifest.load_scanned(root, "some.txt").notes
    assert "1 file(s) that could not be read then are left out until sws scan is run again" in note
    file.rmdir()
    file.write_bytes(content)
    kept = root / "some.txt.manifest.jsonl"
    entries = [json.loads(line) for line in kept.read_text().splitlines()]
    assert entries[3]["reason"] == "unreadable: Is a directory"
    entries[3]["bytes"] = len(content)  # as if the image itself could not be read when it was scanned
    kept.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    assert len(manifest.scan(root, "some.txt")) == 80


@pytest.mark.parametrize("split", ["train/", "./train", "train/../train"])
def test_a_split_finds_its_files_however_it_is_written(root: Path, split: str) -> None:
    manifest.scan_and_decode(root, "train", 2)
    kept = root / "train.manifest.jsonl"
    kept.write_text(kept.read_text().replace('"height": 32', '"height": 33'))
    for listed in (manifest.scan(root, split), manifest.scan(root / "train", ".")):
        assert (listed.sizes[:, 0] == 33).all(), "the sizes are the kept ones"
    assert len(manifest.load_scanned(root, split)) == len(manifest.load_scanned(root / "train", ".")) == 80
    write_shards(root, manifest.scan(root, "train"), "shards", names=False)
    manifest.scan(root / "shards", ".")
    assert (root / "shards.index.jsonl").is_file()
    assert scan.find_splits(root, [split]) == [(root, "train", "train/")]


def test_with_a_manifest_file_no_header_is_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_scan("--data", root)
    monkeypatch.setattr(manifest, "check_image_header", lambda *_: pytest.fail("a header was read"))
    assert len(manifest.scan(root, "train")) == 80


def test_a_changed_folder_is_reported(root: Path) -> None:
    run_scan("--data", root)
    new, changed, gone, emptied = sorted((root / "train").glob("*/*.jpg"))[:40:10]
    shutil.copy(new, new.with_name("new.jpg"))
    changed.write_bytes(gone.read_bytes() + b"\0")
    gone.unlink()
    emptied.write_bytes(b"")
    listed = manifest.scan(root, "train")
    (note,) = listed.notes
    assert "1 file(s) new, 2 changed, 1 gone" in note
    assert "sws scan" in note
    assert f"0/{'new.jpg'}" in listed.paths
    assert [file.reason for file in listed.bad] == ["empty"]
    assert len(listed) == 79


def test_more_bad_files_than_allowed(root: Path) -> None:
    bad_files.spoil(sorted((root / "train").glob("*/*.jpg"))[::8][:9])
    with pytest.raises(ValueError, match=r"9 of 80 images are bad, more than data.max_bad_share 0.1 allows.*empty"):
        manifest.scan(root, "train")
    listed = manifest.scan(root, "train", max_bad_share=9 / 80)
    assert (len(listed), len(listed.bad)) == (71, 9)
    assert len(listed.sizes) == len(listed.labels) == 71


def test_a_damaged_manifest_is_refused(root: Path) -> None:
    (root / "train.manifest.jsonl").write_text('{"path": "0/')
    with pytest.raises(ValueError, match="remove it"):
        manifest.scan(root, "train")


# ---- Other sources ----


def same_images(a: Manifest, b: Manifest) -> None:
    """Check that bytes, sizes and labels are the same, and the pixels in training and in evaluation."""
    assert [a.read(i) for i in range(len(a))] == [b.read(i) for i in range(len(b))]
    np.testing.assert_array_equal(a.sizes, b.sizes)
    np.testing.assert_array_equal(a.labels, b.labels)
    data = DataConfig(root="unused", image_size=32, num_threads=1)
    recipe = Recipe(AugmentConfig(auto_augment="rand-m9-mstd0.5-inc1"), 32)
    pixels = []
    for listed in (a, b):
        order = sampler.TrainOrder(len(listed), seed=0)
        training = train_loader(listed, order, [np.arange(40), np.arange(40, 80)], recipe, 0, data, CPU)
        evaluation = eval_loader(listed, sampler.eval_batches(len(listed), 0, 1, 50), data, CPU)
        pixels.append(torch.cat([batch.images for batch in (*training, *evaluation)]))
    assert torch.equal(*pixels)


@pytest.mark.parametrize("names", [True, False])
def test_shards_are_the_same_images(root: Path, names: bool) -> None:
    folders = manifest.scan(root, "train")
    write_shards(root, folders, "shards", names)
    shards = manifest.scan(root, "shards", folders.classes)
    same_images(folders, shards)
    assert shards.paths[0] == "shard-000.tar/000000.jpg"


def test_the_shards_index_is_built_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = manifest.scan(root, "train")
    write_shards(root, folders, "shards", names=False)
    first = manifest.scan(root, "shards")
    opened: list[Path] = []
    index_shard = tar_shards._index_shard
    monkeypatch.setattr(tar_shards, "_index_shard", lambda path, keys: opened.append(path) or index_shard(path, keys))
    again = manifest.scan(root, "shards")
    assert not opened
    assert again.paths == first.paths
    shutil.copy(root / "shards" / "shard-000.tar", root / "shards" / "shard-001.tar")
    changed = manifest.scan(root, "shards")
    assert [path.name for path in opened] == ["shard-001.tar"]
    assert changed.read(27) == first.read(0)


def test_bad_images_in_shards(root: Path) -> None:
    reasons = bad_files.spoil(sorted((root / "train").glob("*/*.jpg"))[::10][:8])
    listed, _ = sources.find_source(root, "train")
    write_shards(root, listed, "shards", names=False)
    shards = manifest.scan(root, "shards")
    assert len(shards.bad) == len(reasons) == 8
    assert all(reason in file.reason for file, reason in zip(shards.bad, reasons.values(), strict=True))


CUTS: dict[str, tuple[Callable[[bytes, int], bytes], str]] = {
    "in an image": (lambda tar, _: tar[:5000], r"unexpected end of data"),
    "at a header": (lambda tar, at: tar[:at], r"it breaks off at byte \d+, without the zeros that end a tar file"),
    "in a header": (lambda tar, at: tar[: at + 100], r"it breaks off at byte \d+, without the zeros"),
    "without its last blocks": (lambda tar, _: tar.rstrip(b"\0") + bytes(-len(tar.rstrip(b"\0")) % 512), "breaks off"),
    "header of garbage": (lambda tar, at: tar[:at] + b"7" * 512 + tar[at + 512 :], r"damaged at byte \d+, where the"),
    "header of zeros": (lambda tar, at: tar[:at] + bytes(512) + tar[at + 512 :], r"behind the zeros at byte \d+"),
    "two in one file": (lambda tar, _: tar + tar, r"more files, or others' data, behind the zeros at byte \d+"),
    "given its full length, not filled": (lambda tar, at: tar[:at] + bytes(1 << 25), "nothing but zeros from byte"),
}


@pytest.mark.parametrize("kind", CUTS)
def test_a_damaged_shard_is_refused(root: Path, kind: str) -> None:
    write_shards(root, manifest.scan(root, "train"), "shards", names=False)
    shard = root / "shards" / "shard-001.tar"
    with tarfile.open(shard) as tar:
        header = tar.getmembers()[10].offset
    damage, message = CUTS[kind]
    shard.write_bytes(damage(shard.read_bytes(), header))
    with pytest.raises(ValueError, match=rf"shard-001.tar: not a whole tar file \(.*{message}"):
        manifest.scan(root, "shards")


def test_the_end_of_a_shard_may_be_short_or_long(root: Path) -> None:
    write_shards(root, manifest.scan(root, "train"), "shards", names=False)
    for number, end in enumerate((512, 1024, 1 << 20)):
        shard = root / "shards" / f"shard-{number:03d}.tar"
        with tarfile.open(shard) as tar:
            tar.getmembers()
            whole = tar.offset
        shard.write_bytes(shard.read_bytes()[:whole] + bytes(end))
    assert len(manifest.scan(root, "shards")) == 80


@pytest.mark.parametrize("names", [True, False])
def test_a_list_is_the_same_images(root: Path, names: bool) -> None:
    folders = manifest.scan(root, "train")
    pairs = zip(folders.paths, folders.labels.tolist(), strict=True)
    lines = [f"train/{path} {folders.classes[label] if names else label}" for path, label in pairs]
    (root / "some.txt").write_text("\n".join(lines) + "\n\n")
    same_images(folders, manifest.scan(root, "some.txt"))


def test_lists_that_cannot_be_used(root: Path) -> None:
    file = root / "some.txt"
    file.write_text("train/0/a.jpg 0\nlonely.jpg\n")
    with pytest.raises(ValueError, match=r"some.txt, line 2: expected '<path> <label>'"):
        sources.find_source(root, "some.txt")
    file.write_text("train/0/a.jpg 11\n")
    with pytest.raises(ValueError, match=r"label 11, but there are 10 classes"):
        sources.find_source(root, "some.txt", [f"class {i}" for i in range(10)])
    file.write_text("train/0/a.jpg cat\n")
    with pytest.raises(ValueError, match=r"1 class\(es\) that the training split .* does not have: \['cat'\]"):
        sources.find_source(root, "some.txt", ["dog", "horse"])
    file.write_text("")
    with pytest.raises(ValueError, match="lists no images"):
        sources.find_source(root, "some.txt")


def test_a_classes_file_gives_the_order(root: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("".join(f"{digit}\n" for digit in reversed(range(10))))
    listed = manifest.scan(root, "train", labels.read_classes(tmp_path / "classes.txt"))
    for path, label in zip(listed.paths, listed.labels, strict=True):
        assert int(path[0]) == 9 - label
    (tmp_path / "classes.txt").write_text("1\n2\n1\n")
    with pytest.raises(ValueError, match="named twice: 1"):
        labels.read_classes(tmp_path / "classes.txt")


def test_zero_padded_numbers_are_numbers_in_both_splits(root: Path) -> None:
    """From 100 labels on, some look like the names that the training split's have."""
    path = manifest.scan(root, "train").paths[0]
    (root / "some.txt").write_text("".join(f"train/{path} {label:03d}\n" for label in range(121)))
    train = manifest.scan(root, "some.txt")
    assert manifest.scan(root, "some.txt", train.classes).labels.tolist() == train.labels.tolist() == list(range(121))
