"""The distillation losses against their formulas, and the teachers that are taken and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sws_dist.checkpoint.model_file import ModelInfo, save_model_file
from sws_dist.config.schema import DataConfig, DistillConfig
from sws_dist.distill.teacher import OnlineTeacher, load_teacher
from sws_dist.models import create_model
from sws_dist.models.losses import DistillationLoss

HALF = (0.5, 0.5, 0.5)
DIGITS = list("0123456789")


def logits() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 10, dtype=torch.float64) * 3, torch.randn(6, 10, dtype=torch.float64) * 3, torch.arange(6)


def by_hand(student: Tensor, teacher: Tensor, tau: float) -> float:
    """tau^2 sum_c p_c (log p_c - log q_c), averaged over the batch."""
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = (torch.tensor(x, dtype=torch.float64).div(tau).softmax(0) for x in (t, s))
        total += sum(float(pc * (pc / qc).log()) for pc, qc in zip(p, q, strict=True))
    return tau**2 * total / len(student)


@pytest.mark.parametrize("tau", [1.0, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("reduction", ["batchmean", "elements"])
def test_soft_loss(alpha: float, tau: float, reduction: Any) -> None:
    student, teacher, labels = logits()
    parts = DistillationLoss(DistillConfig(alpha=alpha, tau=tau, reduction=reduction))(student, labels, teacher)
    kl = by_hand(student, teacher, tau) / (10 if reduction == "elements" else 1)
    cross_entropy = -student.log_softmax(1)[range(6), labels].mean()
    assert parts.distill.item() == pytest.approx(kl, rel=1e-5)
    assert parts.labels.item() == pytest.approx(cross_entropy.item(), rel=1e-5)
    assert parts.total.item() == pytest.approx((1 - alpha) * cross_entropy.item() + alpha * kl, rel=1e-5)


def test_hard_loss_takes_the_teachers_label() -> None:
    student, teacher, labels = logits()
    parts = DistillationLoss(DistillConfig(kind="hard", alpha=0.5))(student, labels, teacher)
    hard = -student.log_softmax(1)[range(6), teacher.argmax(1)].mean()
    assert parts.distill.item() == pytest.approx(hard.item(), rel=1e-5)


def test_an_infinite_label_loss_does_not_reach_pure_distillation() -> None:
    student, teacher, _ = logits()
    parts = DistillationLoss(DistillConfig())(student, torch.full((6, 10), float("inf")), teacher)
    assert torch.isfinite(parts.total)


def test_soft_labels_and_no_teacher() -> None:
    student, _, labels = logits()
    soft = torch.nn.functional.one_hot(labels, 10).float()
    parts = DistillationLoss(DistillConfig())(student, soft, None)
    assert parts.total.item() == pytest.approx(torch.nn.functional.cross_entropy(student, labels).item(), rel=1e-5)
    assert parts.distill.item() == 0


def test_a_teacher_sees_its_own_normalisation() -> None:
    own = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    pixels = torch.rand(2, 3, 8, 8)
    mean, std = ((torch.tensor(own[k]).view(1, 3, 1, 1)) for k in ("mean", "std"))
    seen = OnlineTeacher(torch.nn.Identity(), (HALF, HALF), (own["mean"], own["std"]))((pixels - 0.5) / 0.5)
    torch.testing.assert_close(seen, (pixels - mean) / std)


def test_a_teacher_stays_as_it_is() -> None:
    teacher = OnlineTeacher(create_model("resnet10t", num_classes=10), (HALF, HALF), (HALF, HALF))
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    out = teacher(torch.randn(4, 3, 32, 32, requires_grad=True))
    assert not out.requires_grad
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items()), "running statistics moved"


def test_a_timm_teacher_from_local_weights_of_either_kind(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("resnet10t", num_classes=10).eval()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "t.pth")
    from safetensors.torch import save_file

    save_file(model.state_dict(), tmp_path / "t.safetensors")
    cfg = model.pretrained_cfg
    images = torch.randn(2, 3, 32, 32)
    for name in ("t.pth", "t.safetensors"):
        config = DistillConfig(teacher="resnet10t", teacher_weights=str(tmp_path / name))
        teacher = load_teacher(
            config, DIGITS, DataConfig(root="unused", image_size=32, mean=cfg["mean"], std=cfg["std"])
        )
        assert teacher is not None
        torch.testing.assert_close(teacher(images), model(images))


def test_what_timm_drops_from_old_files_is_dropped(tmp_path: Path) -> None:
    """LeViT's first checkpoints hold tables that were never weights."""
    model = create_model("levit_128s", num_classes=10)
    stale = {name.replace("attention_biases", "attention_bias_idxs"): t for name, t in model.state_dict().items()}
    torch.save({"model": stale | model.state_dict()}, tmp_path / "levit.pth")
    config = DistillConfig(teacher="levit_128s", teacher_weights=str(tmp_path / "levit.pth"))
    assert load_teacher(config, DIGITS, DataConfig(root="unused", image_size=224, mean=HALF, std=HALF)) is not None


def described(path: Path, num_classes: int = 10, classes: list[str] | None = None) -> str:
    info = ModelInfo("model", "resnet10t", {}, num_classes, {"mean": HALF, "std": HALF}, classes or [])
    model = create_model("resnet10t", num_classes=num_classes)
    return str(save_model_file(path, info, model.state_dict()))


def test_refusals(tmp_path: Path) -> None:
    def refused(said: str, **config: Any) -> None:
        with pytest.raises(ValueError, match=said):
            load_teacher(DistillConfig(**config), DIGITS, DataConfig(root="unused", image_size=32, mean=HALF, std=HALF))

    refused("knows 7 labels, the data has 10", teacher=described(tmp_path / "a.safetensors", 7))
    refused("named otherwise", teacher=described(tmp_path / "b.safetensors", 10, list("abcdefghij")))
    turned = described(tmp_path / "e.safetensors", 10, list(DIGITS[::-1]))
    refused("or in another order", teacher=turned)
    refused("or in another order", teacher="resnet10t", teacher_weights=turned)
    refused("set distill.teacher_weights", teacher="levit_384")
    refused("no model 'resnot50'", teacher="resnot50", teacher_weights=described(tmp_path / "c.safetensors"))
    refused("does not fit the model", teacher="resnet18", teacher_weights=described(tmp_path / "d.safetensors"))
    levit = create_model("levit_128s", num_classes=10)
    torch.save(levit.state_dict(), tmp_path / "levit.pth")
    with pytest.raises(ValueError, match=r"need data\.image_size \(--image-size\) 224"):
        load_teacher(
            DistillConfig(teacher="levit_128s", teacher_weights=str(tmp_path / "levit.pth")),
            DIGITS,
            DataConfig(root="unused", image_size=96, mean=HALF, std=HALF),
        )


def test_a_teacher_is_built_for_the_students_images(tmp_path: Path) -> None:
    vit = create_model("test_vit", num_classes=10)  # for 160 pixels
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    config = DistillConfig(teacher="test_vit", teacher_weights=str(tmp_path / "vit.pth"))
    teacher = load_teacher(config, DIGITS, DataConfig(root="unused", image_size=32, mean=HALF, std=HALF))
    assert teacher is not None
    assert teacher(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
