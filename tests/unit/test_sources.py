"""What people bring: class folders, lists and tar shards as they are found in the wild."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sws_dist.data import manifest
from sws_dist.data.sources import Source, find_source
from sws_dist.data.tar_shards import SampleKeys


def jpeg(value: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(file, "JPEG")
    return file.getvalue()


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg())


def labelled(source: Source) -> dict[str, str]:
    """Return path -> class."""
    return {path: source.classes[label] for path, label in zip(source.paths, source.labels, strict=True)}


# ---- class folders ---------------------------------------------------------------------------------------------------


def test_folders_without_images_are_no_classes(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/1.jpg", "train/dog/1.JPG", "train/__MACOSX/cat/._1.jpg", "train/.cache/1.jpg")
    (tmp_path / "train" / "lost+found").mkdir()
    (tmp_path / "train" / "notes").mkdir()
    (tmp_path / "train" / "notes" / "readme.txt").write_text("text")
    source, (note,) = find_source(tmp_path, "train")
    assert source.classes == ("cat", "dog")
    assert "2 folder(s) without images are no classes: lost+found, notes" in note


def test_a_training_class_without_validation_images_stays(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "train/eel/1.jpg", "val/cat/1.jpg", "val/eel/1.jpg")
    (tmp_path / "val" / "dog").mkdir()
    (tmp_path / "val" / "junk").mkdir()
    train, _ = find_source(tmp_path, "train")
    val, notes = find_source(tmp_path, "val", train.classes)
    assert val.classes == train.classes == ("cat", "dog", "eel")
    assert val.labels.tolist() == [0, 2]
    assert any("1 of 3 classes have no image here: dog" in note for note in notes)
    write(tmp_path, "val/junk/1.jpg")
    with pytest.raises(ValueError, match=r"1 class\(es\) that the training split .* does not have: \['junk'\]"):
        find_source(tmp_path, "val", train.classes)


def test_images_in_folders_inside_a_class(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/b.jpg", "train/cat/a/deep/1.jpg", "train/dog/images/1.jpg", "train/dog/images/.h/2.jpg")
    source, notes = find_source(tmp_path, "train")
    assert labelled(source) == {"cat/a/deep/1.jpg": "cat", "cat/b.jpg": "cat", "dog/images/1.jpg": "dog"}
    assert not notes


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/1.jpg", "store/dog/1.jpg")
    (tmp_path / "train" / "dog").symlink_to(tmp_path / "store" / "dog")
    (tmp_path / "train" / "cat" / "again").symlink_to(tmp_path / "train" / "cat")
    source, _ = find_source(tmp_path, "train")
    assert labelled(source) == {"cat/1.jpg": "cat", "dog/1.jpg": "dog"}


def test_what_is_no_image_in_a_class_folder(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/1.jpg", "train/cat/@eaDir/1.jpg/thumb.jpg", "train/dog/1.jpg")
    (tmp_path / "train" / "cat" / "self.jpg").symlink_to("self.jpg")
    os.mkfifo(tmp_path / "train" / "cat" / "pipe.jpg")
    found = manifest.scan(tmp_path, "train", max_bad_share=0.5)
    assert found.paths == ("cat/1.jpg", "dog/1.jpg")
    assert [file.path for file in found.bad] == ["cat/self.jpg"]


def test_one_folder_too_many_is_said(tmp_path: Path) -> None:
    write(tmp_path, "train/images/cat/1.jpg", "train/images/dog/1.jpg")
    source, (note,) = find_source(tmp_path, "train")
    assert source.classes == ("images",)
    assert "images is the only class; if the folders in it are classes, name it as the split" in note


def test_images_outside_of_class_folders(tmp_path: Path) -> None:
    write(tmp_path, "train/1.jpg", "train/2.jpg")
    with pytest.raises(ValueError, match=r"its 2 image\(s\) lie in no class folder; expected train/<class>/<image>"):
        find_source(tmp_path, "train")
    write(tmp_path, "train/cat/1.jpg")
    source, (note,) = find_source(tmp_path, "train")
    assert source.paths == ("cat/1.jpg",)
    assert "2 image(s) in no class folder are left out: 1.jpg, 2.jpg" in note


def test_numbers_that_sort_as_text_are_said(tmp_path: Path) -> None:
    write(tmp_path, *(f"train/{number}/1.jpg" for number in range(12)))
    source, (note,) = find_source(tmp_path, "train")
    assert source.classes[2] == "10"
    assert "sort as text: 0, 1, 10, 11, 2, ..." in note
    assert "label 2 is folder 10" in note
    ordered, notes = find_source(tmp_path, "train", [str(number) for number in range(12)])
    assert [ordered.classes[label] for label in ordered.labels] == [str(number) for number in range(12)]
    assert not notes
    write(tmp_path, *(f"padded/{number:02}/1.jpg" for number in range(12)))
    assert not find_source(tmp_path, "padded")[1]


def test_classes_that_differ_in_case_alone_are_said(tmp_path: Path) -> None:
    write(tmp_path, "train/Dog/1.jpg", "train/dog/1.jpg")
    assert "differ in upper and lower case alone: Dog and dog" in find_source(tmp_path, "train")[1][0]


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path: Path) -> None:
    write(tmp_path, "train/cat/1.jpg", "train/dog/in/1.jpg")
    (tmp_path / "train" / "dog" / "in").chmod(0)
    if os.access(tmp_path / "train" / "dog" / "in", os.R_OK):
        pytest.skip("root may read every folder")
    with pytest.raises(OSError, match="dog/in"):
        find_source(tmp_path, "train")


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/train/caf\xe9"
    os.makedirs(folder)
    Path(os.fsdecode(folder + b"/\xff.jpg")).write_bytes(jpeg())
    found, _ = manifest.scan(tmp_path, "train"), None
    assert found.classes == (os.fsdecode(b"caf\xe9"),)
    assert found.read(0) == jpeg()


def test_class_tars_beside_the_extracted_folders(tmp_path: Path) -> None:
    write(tmp_path, "train/n01/1.jpg", "train/n02/1.jpg")
    for name in ("n01", "n02"):
        write_tar(tmp_path / "train" / f"{name}.tar", {f"{name}_1.JPEG": jpeg()})
    source, (note,) = find_source(tmp_path, "train")
    assert labelled(source) == {"n01/1.jpg": "n01", "n02/1.jpg": "n02"}
    assert (
        "the images of its 2 class folders are taken; 2 tar file(s) beside them are not read: n01.tar, n02.tar" in note
    )
    write_tar(tmp_path / "other" / "n01.tar", {"n01_1.JPEG": jpeg()})
    with pytest.raises(ValueError, match="Class tars as ILSVRC has them are no shards: extract each into a folder"):
        find_source(tmp_path, "other")


# ---- tar shards ------------------------------------------------------------------------------------------------------


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            add(tar, name, data)


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def test_one_image_a_sample(tmp_path: Path) -> None:
    members = {"1.seg.png": b"mask", "1.jpg": jpeg(1), "1.cls": b"3", "2.png": jpeg(2), "2.jpg": jpeg(3), "2.cls": b"0"}
    write_tar(tmp_path / "train" / "a.tar", members)
    source, _ = find_source(tmp_path, "train")
    assert source.paths == ("a.tar/1.jpg", "a.tar/2.jpg")
    assert source.labels.tolist() == [3, 0]
    assert [source.read(i) for i in range(2)] == [jpeg(1), jpeg(3)]
    png_first, _ = find_source(tmp_path, "train", keys=SampleKeys(("png", "jpg")))
    assert png_first.paths == ("a.tar/1.jpg", "a.tar/2.png"), "the kept index is of other extensions"
    masks, _ = find_source(tmp_path, "train", keys=SampleKeys(("seg.png",)))
    assert masks.paths == ("a.tar/1.seg.png",)


def test_labels_of_json_and_text(tmp_path: Path) -> None:
    members = {"1.jpg": jpeg(), "1.json": json.dumps({"label": 2, "caption": "a cat"}).encode(), "1.txt": b"a cat"}
    members |= {"2.jpg": jpeg(), "2.txt": b"1\n", "2.json": b"{}", "3.jpg": jpeg(), "3.cls": b"0", "3.txt": b"words"}
    write_tar(tmp_path / "train" / "a.tar", members)
    assert find_source(tmp_path, "train")[0].labels.tolist() == [2, 1, 0]
    members = {"1.jpg": jpeg(), "1.json": json.dumps({"species": "ant"}).encode()}
    write_tar(tmp_path / "named" / "a.tar", members)
    source, _ = find_source(tmp_path, "named", keys=SampleKeys(label_key="species"))
    assert labelled(source) == {"a.tar/1.jpg": "ant"}
    with pytest.raises(ValueError, match=r"labels in .cls, in .json under 'label' \(data.label_key\)"):
        find_source(tmp_path, "named")
    write_tar(tmp_path / "wrong" / "a.tar", {"1.jpg": jpeg(), "1.json": b'{"label": [1, 2]}'})
    with pytest.raises(ValueError, match=r"a.tar: 1.json: label is \[1, 2\]; expected a whole number or a name"):
        find_source(tmp_path, "wrong")


def test_captions_are_no_labels(tmp_path: Path) -> None:
    members = {}
    for number in range(120):
        members |= {f"{number}.jpg": jpeg(), f"{number}.txt": f"a photograph of {number} cats".encode()}
    write_tar(tmp_path / "train" / "a.tar", members)
    with pytest.raises(ValueError, match="hold 120 different texts, which are captions and no labels"):
        find_source(tmp_path, "train")


def test_incomplete_samples_are_counted(tmp_path: Path) -> None:
    members = {"1.jpg": jpeg(), "1.cls": b"0", "2.cls": b"1", "3.jpg": jpeg(), "4.v2.jpg": jpeg(), "4.cls": b"1"}
    write_tar(tmp_path / "train" / "a.tar", members)
    source, notes = find_source(tmp_path, "train")
    assert source.paths == ("a.tar/1.jpg",)
    assert "2 sample(s) without an image are left out, for example 2 of a.tar, which has cls" in notes[0]
    assert "1 sample(s) without a label are left out, for example 3 of a.tar, which has jpg" in notes[1]
    dotted, _ = find_source(tmp_path, "train", keys=SampleKeys(("jpg", "v2.jpg")))
    assert dotted.paths == ("a.tar/1.jpg", "a.tar/4.v2.jpg")


def test_samples_of_one_key_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for first, second in (("x/1.jpg", "x/1.jpg"), ("x/1.jpg", "./x/1.JPG")):
        with tarfile.open(tmp_path / "train" / "a.tar", "w") as tar:
            for number, name in enumerate((first, second)):
                add(tar, name, jpeg(number))
                add(tar, f"x/{number}0.cls", b"0")
        names = rf"two samples: {first} \(at byte 0\) and {second} \(at byte \d+\)"
        with pytest.raises(ValueError, match=rf"a.tar: the key x/1 is that of {names}; one of them would be lost"):
            find_source(tmp_path, "train")
    write_tar(tmp_path / "train" / "a.tar", {"x/1.jpg": jpeg(), "x/1.cls": b"0", "y/1.jpg": jpeg(), "y/1.cls": b"0"})
    assert len(find_source(tmp_path, "train")[0]) == 2, "a key includes the folder"


def test_hidden_files_are_ignored(tmp_path: Path) -> None:
    write_tar(tmp_path / "train" / "a.tar", {"./._1.jpg": b"junk", "./1.jpg": jpeg(), "./1.cls": b"0"})
    (tmp_path / "train" / "._a.tar").write_bytes(b"Mac OS X")
    source, notes = find_source(tmp_path, "train")
    assert source.paths == ("a.tar/./1.jpg",)
    assert source.read(0) == jpeg()
    assert not notes


@pytest.mark.parametrize("here", ["", "./"])  # "./": as ``tar cf a.tar .`` names its members
def test_links_in_shards(tmp_path: Path, here: str) -> None:
    (tmp_path / "train").mkdir()
    with tarfile.open(tmp_path / "train" / "a.tar", "w") as tar:
        add(tar, f"{here}x/1.jpg", jpeg(7))
        add(tar, f"{here}x/1.cls", b"0")
        for name, kind, target in (
            ("x/2.jpg", tarfile.LNKTYPE, f"{here}x/1.jpg"),
            ("y/3.jpg", tarfile.SYMTYPE, "../x/1.jpg"),
            ("y/4.jpg", tarfile.SYMTYPE, "../x/gone.jpg"),
        ):
            link = tarfile.TarInfo(here + name)
            link.type, link.linkname = kind, target
            tar.addfile(link)
            add(tar, here + name.replace("jpg", "cls"), b"1")
    source, notes = find_source(tmp_path, "train")
    assert source.paths == tuple(f"a.tar/{here}{name}" for name in ("x/1.jpg", "x/2.jpg", "y/3.jpg"))
    assert [source.read(i) for i in range(3)] == [jpeg(7)] * 3
    assert "1 sample(s) without an image are left out, for example y/4" in notes[0]


OPEN_SHARDS = """
import os, sys
from sws_dist.data.sources import find_source

source, _ = find_source(sys.argv[1], "train")
before = len(os.listdir("/proc/self/fd"))
for index in range(len(source)):
    source.read(index)
print(len(os.listdir("/proc/self/fd")) - before)
"""


@pytest.mark.parametrize(("limit", "kept"), [(1024, 100), (160, 80), (110, 64)])
def test_shards_stay_open_as_far_as_the_limit_allows(tmp_path: Path, limit: int, kept: int) -> None:
    for number in range(100):
        write_tar(tmp_path / "train" / f"{number:03d}.tar", {"1.jpg": jpeg(), "1.cls": b"0"})
    script = f'ulimit -n {limit} && exec "$@"'
    command = ["sh", "-c", script, "sh", sys.executable, "-c", OPEN_SHARDS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout.strip()) == (0, str(kept)), done.stderr


def test_compressed_shards(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with tarfile.open(tmp_path / "train" / "a.tar.gz", "w:gz") as tar:
        add(tar, "1.jpg", jpeg())
    with pytest.raises(ValueError, match=r"its 1 shard\(s\) are compressed \(a.tar.gz\).*by their offset"):
        find_source(tmp_path, "train")
    write_tar(tmp_path / "train" / "b.tar", {"1.jpg": jpeg(), "1.cls": b"0"})
    source, (note,) = find_source(tmp_path, "train")
    assert source.paths == ("b.tar/1.jpg",)
    assert "1 compressed shard(s) are not read: a.tar.gz" in note


# ---- lists -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("some.txt", "\ufeffa.jpg golden retriever\r\nmy dog.JPG 7up\r\n"),
        ("some.txt", "a.jpg\tgolden retriever\nmy dog.JPG\t7up\n"),
        ("some.tsv", "a.jpg\tgolden retriever\nmy dog.JPG\t7up\n"),
        ("some.txt", "path label\na.jpg golden retriever\nmy dog.JPG 7up\n"),
        ("some.txt", "a.jpg,golden retriever\nmy dog.JPG, 7up\n"),
        ("some.csv", "a.jpg;golden retriever\nmy dog.JPG;7up\n"),
        ("some.CSV", "photo,breed\na.jpg,golden retriever\nmy dog.JPG,7up\n"),
        ("some.csv", 'a.jpg,golden retriever\n\n"my dog.JPG",7up\n'),
        ("some.csv", "\ufeffid,Label,Path\n1,golden retriever,a.jpg\n2,7up,my dog.JPG\n"),
    ],
)
def test_labels_with_spaces(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode())
    source, _ = find_source(tmp_path, name)
    assert labelled(source) == {"a.jpg": "golden retriever", "my dog.JPG": "7up"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("some.txt", "a.jpg 0\nb.jpg copy.jpg 1\n", "line 2: 'b.jpg copy.jpg 1' can be split in two ways"),
        ("some.txt", "a.jpg 0\n\nb.jpg\n", "line 3: expected '<path> <label>', found 'b.jpg'"),
        ("some.txt", "a.jpg 0\nmy photo.jpg\n", "line 2: the label is the name of an image, 'photo.jpg'"),
        ("some.csv", "0,a.jpg\n1,b.jpg\n", "line 1: the label is the name of an image, 'a.jpg'"),
        ("some.txt", "a.jpg 99999999999999999999\n", "has label 99999999999999999999; labels go up to 10000000"),
        ("some.txt", "a.jpg\0 1\n", "not a text file in UTF-8"),
        ("some.txt", "a b c\n", "line 1: expected '<path> <label>', found 'a b c'; a tab parts the two"),
        ("some.csv", "a.jpg,0\nb.jpg,\n", "line 2: the label is empty"),
        ("some.csv", "a.jpg,0,9\n", "line 1: 3 columns; expected a path and a label, or a header"),
        ("some.csv", "path,label\na.jpg\n", r"line 2: expected a path and a label, found \['a.jpg'\]"),
        ("some.txt", "a.jpg 0\nb.jpg -1\n", "labels are whole numbers from 0, or names; found -1"),
        ("some.txt", "a.jpg 0.0\nb.jpg 1.0\n", "labels are whole numbers from 0, or names; found 0.0, 1.0"),
        ("some.txt", "\n", "lists no images"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        find_source(tmp_path, name)


def test_labels_that_count_from_one_are_said(tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("a.jpg 1\nb.jpg 2\n")
    source, (note,) = find_source(tmp_path, "some.txt")
    assert source.classes == ("0", "1", "2")
    assert "1 of 3 classes have no image here: 0; do the labels count from 1?" in note


def test_repeated_lines_are_oversampling(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "some.txt").write_text("a.jpg 0\nb.jpg 1\na.jpg 0\na.jpg 0\n")
    source, (note,) = find_source(tmp_path, "some.txt")
    assert source.paths == ("a.jpg", "b.jpg", "a.jpg", "a.jpg")
    assert "its 4 lines name 2 images; those that repeat are trained on as often" in note
    manifest.scan_and_decode(tmp_path, "some.txt", 2)
    again = manifest.scan(tmp_path, "some.txt")
    assert len(again) == 4
    assert not [line for line in again.notes if "has changed" in line]


def test_paths_outside_of_the_lists_folder(tmp_path: Path) -> None:
    write(tmp_path, "lists/x.jpg", "images/a.jpg")
    (tmp_path / "lists" / "some.txt").write_text(f"../images/a.jpg 0\n{tmp_path}/images/a.jpg 1\n")
    found = manifest.scan(tmp_path / "lists", "some.txt")
    assert found.read(0) == found.read(1) == jpeg()
    assert np.array_equal(found.labels, [0, 1])


def test_names_in_lists_that_are_not_utf_8(tmp_path: Path) -> None:
    write(tmp_path, os.fsdecode(b"caf\xe9.jpg"))
    (tmp_path / "some.txt").write_bytes(b"caf\xe9.jpg 0\n")
    assert manifest.scan(tmp_path, "some.txt").read(0) == jpeg()
