"""What is kept of a teacher's logits, the files that hold it, and the fingerprint of what they belong to."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sws_dist.config.loader import load_config
from sws_dist.config.schema import DistillConfig, RunConfig
from sws_dist.data import manifest
from sws_dist.distill.fingerprint import Fingerprint, compute_fingerprint, differences, require_same_fingerprint
from sws_dist.distill.logits_folder import EpochLogits, LogitsFolder
from sws_dist.distill.topk import build_logits, keep_top_k
from sws_dist.models.losses import DistillationLoss

CPU = torch.device("cpu")


def some_logits(num_classes: int, spread: float = 4.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_classes)
    teacher, student = torch.randn(2, 32, num_classes, generator=generator) * spread
    return teacher, student


def rebuilt(logits: Tensor, k: int, tau: float = 1.0) -> Tensor:
    return build_logits(keep_top_k(logits, k, tau), logits.shape[1], CPU)


# ---- what is kept ----


def test_all_classes_are_kept_to_the_rounding_of_fp16() -> None:
    teacher, _ = some_logits(100)
    logp = teacher.log_softmax(dim=1)
    kept = keep_top_k(teacher, 100, 1.0)
    assert kept.classes is None
    assert kept.values.dtype == np.float16
    assert ((build_logits(kept, 100, CPU) - logp).abs() <= logp.abs() * 2**-11).all()


@pytest.mark.parametrize("tau", [1.0, 4.0])
@pytest.mark.parametrize(("k", "num_classes"), [(1, 10), (3, 10), (9, 10), (10, 300)])
def test_the_k_largest_keep_their_probabilities_and_the_others_their_sum(k: int, num_classes: int, tau: float) -> None:
    teacher, _ = some_logits(num_classes)
    found, true = ((x / tau).softmax(dim=1) for x in (rebuilt(teacher, k, tau), teacher))
    top = true.topk(k, dim=1).indices
    torch.testing.assert_close(found.gather(1, top), true.gather(1, top), rtol=1e-2, atol=1e-6)
    left, true_left = (1 - x.gather(1, top).sum(dim=1) for x in (found, true))
    torch.testing.assert_close(left, true_left, rtol=0.02, atol=1e-5)
    others = found.scatter(1, top, torch.nan)
    assert (others.nan_to_num(-1).amax(1) == others.nan_to_num(2).amin(1)).all()


@pytest.mark.parametrize("tau", [1.0, 4.0])
@pytest.mark.parametrize(("k", "num_classes"), [(1, 10), (3, 10), (9, 10), (10, 300), (100, 300)])
def test_truncation_stays_within_its_stated_bound(k: int, num_classes: int, tau: float) -> None:
    teacher, student = some_logits(num_classes)
    loss = DistillationLoss(DistillConfig(tau=tau))
    rounding = 2e-2 * tau**2
    p, logq = (teacher / tau).softmax(dim=1), (student / tau).log_softmax(dim=1)
    bounds = []
    for image in range(len(teacher)):
        gradients, losses = [], []
        for target in (teacher, rebuilt(teacher, k, tau)):
            own = student[image : image + 1].clone().requires_grad_()
            found = loss(own, torch.zeros(1, dtype=torch.long), target[image : image + 1]).total
            found.backward()
            assert own.grad is not None
            gradients.append(own.grad)
            losses.append(found.item())
        others = torch.ones(num_classes, dtype=torch.bool)
        others[teacher[image].topk(k).indices] = False
        mass, spread = p[image, others].sum().item(), np.ptp(logq[image, others].numpy())
        bound = tau**2 * mass * (np.log(num_classes - k) + spread)
        assert abs(losses[0] - losses[1]) <= bound + rounding
        assert (gradients[0] - gradients[1]).abs().sum().item() <= 2 * tau * mass + rounding
        bounds.append(bound)
    assert max(bounds) > 5 * rounding or k > 5, "too small for this comparison to mean anything"


def test_classes_take_the_smallest_type() -> None:
    for num_classes, dtype in ((256, np.uint8), (257, np.uint16), (65_537, np.uint32)):
        logits = torch.zeros(1, num_classes)
        logits[0, -1] = 5
        kept = keep_top_k(logits, 1, 1.0)
        assert kept.classes is not None
        assert kept.classes.dtype == dtype
        assert kept.classes[0, 0] == num_classes - 1
        assert build_logits(kept, num_classes, CPU).argmax() == num_classes - 1


@pytest.mark.parametrize("k", [2, 4])
def test_a_teacher_that_is_certain_gives_a_finite_loss(k: int) -> None:
    teacher = torch.tensor([[1e6, 0.0, -1e6, 3.0]])
    loss = DistillationLoss(DistillConfig())
    for student in (teacher / 1e5, -teacher / 1e5):
        found = loss(student, torch.tensor([0]), rebuilt(teacher, k)).distill
        assert found.item() == pytest.approx(loss(student, torch.tensor([0]), teacher).distill.item(), rel=1e-3)


# ---- files ----


@pytest.fixture
def folder(tmp_path: Path) -> LogitsFolder:
    folder = LogitsFolder(tmp_path / "logits", {"train.seed": 0}, num_classes=7, top_k=2, epoch_size=3)
    folder.create({"teacher": "somebody"})
    folder.write(4, EpochLogits(keep_top_k(some_logits(7)[0][:3], 2, 1.0), np.array([5, 0, 9], np.uint8)))
    return folder


def test_an_epoch_is_read_as_it_was_written(folder: LogitsFolder) -> None:
    found = LogitsFolder.open(folder.path)
    assert found == folder
    logits, expected = found.read(4, verify=True), keep_top_k(some_logits(7)[0][:3], 2, 1.0)
    assert logits.images.tolist() == [5, 0, 9]
    assert logits.kept.classes is not None
    assert expected.classes is not None
    np.testing.assert_array_equal(logits.kept.values, expected.values)
    np.testing.assert_array_equal(logits.kept.classes, expected.classes)


def test_no_changed_byte_of_an_epoch_goes_unnoticed(folder: LogitsFolder) -> None:
    path = folder.file(4)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="cannot be used"):
            folder.read(4, verify=True)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_an_epoch_that_was_cut_is_refused(folder: LogitsFolder, length: int) -> None:
    folder.file(4).write_bytes(folder.file(4).read_bytes()[:length])
    with pytest.raises(ValueError, match="cannot be used"):
        folder.read(4)


def test_an_epoch_of_another_folder_or_epoch_is_refused(folder: LogitsFolder, tmp_path: Path) -> None:
    shutil.copy(folder.file(4), folder.file(5))
    other = replace(folder, path=tmp_path / "other", fingerprint={"train.seed": 1})
    other.path.mkdir()
    shutil.copy(folder.file(4), other.file(4))
    for where, epoch in ((folder, 5), (other, 4)):
        with pytest.raises(ValueError, match="another epoch's, or belongs to other logits"):
            where.read(epoch)


def test_a_folder_goes_on_only_with_the_same_logits(folder: LogitsFolder, tmp_path: Path) -> None:
    folder.create({"teacher": "written by another version of the program"})
    with pytest.raises(
        ValueError, match=r"--top-k is 3, in the folder 2; train\.seed is 1, in the folder 0\. Give anot"
    ):
        replace(folder, fingerprint={"train.seed": 1}, top_k=3).create({})
    with pytest.raises(ValueError, match="not a folder of logits that sws teach wrote"):
        LogitsFolder.open(tmp_path)


# ---- fingerprints ----


@pytest.fixture
def config(few_digits: Path, tmp_path: Path) -> RunConfig:
    (tmp_path / "teacher.safetensors").write_bytes(b"weights")
    sets = [f"data.root={few_digits}", f"distill.teacher={tmp_path / 'teacher.safetensors'}"]
    return load_config("quickstart/auxiliary", sets)


def print_of(
    config: RunConfig, micro_batch: int = 32, is_truncated: bool = False, device: torch.device = CPU
) -> Fingerprint:
    images = manifest.scan(config.data.root, config.data.train_split)
    return compute_fingerprint(config, images, micro_batch, device, is_truncated=is_truncated)


def with_keys(config: RunConfig, group: str, **keys: object) -> RunConfig:
    return replace(config, **{group: replace(getattr(config, group), **keys)})


@pytest.mark.parametrize(
    ("group", "key", "value"),
    [
        ("train", "seed", 1),
        ("data", "image_size", 48),
        ("data", "mean", (0.5, 0.5, 0.4)),
        ("data", "interpolation", "bilinear"),
        ("augment", "hflip", 0.5),
        ("augment", "scale", (0.5, 1.0)),
        ("augment", "auto_augment", "rand-m9-mstd0.5-inc1"),
        ("augment", "num_repeats", 3),
        ("augment", "num_crops", 4),
        ("augment", "mixup", 0.8),
        ("augment", "re_prob", 0.25),
    ],
)
def test_what_changes_an_image_changes_the_fingerprint(config: RunConfig, group: str, key: str, value: object) -> None:
    changed = print_of(with_keys(config, group, **{key: value}))
    assert any(text.startswith(f"{group}.{key} is ") for text in differences(changed, print_of(config)))


def test_what_changes_no_image_does_not_change_the_fingerprint(config: RunConfig) -> None:
    other = replace(config, output="elsewhere", model=replace(config.model, schedule=(1, 2)))
    other = with_keys(other, "train", epochs=3, global_batch=8, eval_batch=7)
    other = with_keys(other, "augment", smoothing=0.1)
    other = with_keys(other, "data", crop_pct=0.9, num_threads=3)
    other = with_keys(other, "distill", alpha=0.3, tau=2.0, kind="hard")
    assert print_of(other, micro_batch=4) == print_of(config)


@pytest.mark.parametrize(
    "keys", [{"mixup": 0.8}, {"cutmix": 1.0}, {"re_prob": 0.2}, {"re_prob": 0.2, "re_mode": "rand"}]
)
def test_what_depends_on_the_micro_batch_belongs_to_it(config: RunConfig, keys: dict[str, object]) -> None:
    config = with_keys(config, "augment", **keys)
    found = differences(print_of(config, micro_batch=16), print_of(with_keys(config, "train", global_batch=64)))
    assert found == ["images in a micro-batch is 16, in the folder 32", "train.global_batch is 32, in the folder 64"]
    on_gpu = differences(print_of(config, device=torch.device("cuda")), print_of(config))
    assert len(on_gpu) == ("re_prob" in keys)


def test_a_box_of_one_colour_does_not_depend_on_the_micro_batch(config: RunConfig) -> None:
    config = with_keys(config, "augment", re_prob=0.2, re_mode="const")
    assert print_of(config, micro_batch=16) == print_of(config)


def test_the_temperature_counts_where_classes_are_left_out(config: RunConfig) -> None:
    warm = with_keys(config, "distill", tau=2.0)
    found = differences(print_of(warm, is_truncated=True), print_of(config, is_truncated=True))
    assert found == ["distill.tau is 2.0, in the folder 1.0"]


def test_other_images_have_another_fingerprint(config: RunConfig, few_digits: Path, tmp_path: Path) -> None:
    stored = print_of(config)
    moved = tmp_path / "moved"
    shutil.copytree(few_digits, moved)
    config = with_keys(config, "data", root=str(moved))
    assert print_of(config) == stored
    first, *_, last = sorted((moved / "train").rglob("*.jpg"))
    shutil.copy(last, first)
    assert [text.split(" is ")[0] for text in differences(print_of(config), stored)] == ["contents of some images"]
    last.rename(last.with_name("other.jpg"))
    assert any(text.startswith("names of the images is ") for text in differences(print_of(config), stored))
    last.with_name("other.jpg").unlink()
    assert "number of images is 79, in the folder 80" in differences(print_of(config), stored)


def test_another_teacher_is_refused_and_none_is_not(config: RunConfig, tmp_path: Path) -> None:
    stored = print_of(config)
    require_same_fingerprint(print_of(with_keys(config, "distill", teacher=None)), stored, tmp_path)
    (tmp_path / "other.pth").write_bytes(b"other weights")
    keys = {"teacher": "resnet10t", "teacher_weights": str(tmp_path / "other.pth")}
    with pytest.raises(
        ValueError, match=r"not the logits of this run: .*timm model of the teacher.*; weights of the tea"
    ):
        require_same_fingerprint(print_of(with_keys(config, "distill", **keys)), stored, tmp_path)
    (tmp_path / "teacher.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no such file\. A run that reads stored logits needs no teacher"):
        print_of(config)
