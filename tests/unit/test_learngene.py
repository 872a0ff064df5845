"""Model files: they say what they are, refuse what they are not, and the released code's checkpoints convert."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from sws_dist.checkpoint import model_file
from sws_dist.checkpoint.model_file import ModelInfo, load_weights_strict, save_model_file
from sws_dist.learngene.expand import expand_learngene
from sws_dist.learngene.file import describe_model, load_learngene, read_learngene_info
from sws_dist.learngene.plan import expansion_plan
from sws_dist.learngene.released import convert_released
from sws_dist.models import create_model

ARGUMENTS: dict[str, Any] = {"schedule": [2, 2], "img_size": 32, "patch_size": 8, "embed_dim": 64, "num_heads": 2}


def small(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    return create_model("sws_vit", **(ARGUMENTS | {"num_classes": 10} | changes))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    model = small()
    info = describe_model(model, "learngene", preprocessing={"mean": [0.5] * 3}, provenance={"epochs": 3})
    return save_model_file(tmp_path / "learngene.safetensors", info, model.state_dict())


# ---- files ----


def test_a_file_rebuilds_its_model(file: Path) -> None:
    info, weights = load_learngene(file)
    model = info.build().eval()
    load_weights_strict(model, weights, file)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images), small().eval()(images))
    assert (info.kwargs["schedule"], info.num_classes, info.provenance) == ([2, 2], 10, {"epochs": 3})


def test_damaged_files_are_refused(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    for name, content, reason in (
        ("cut", whole[:-10], "not a whole safetensors file"),
        ("header", whole[:50], "not a whole safetensors file"),
        ("empty", b"", "not weights but an empty file"),
        ("foreign", b"\x80\x02}q\x00.", "a PyTorch file, where a safetensors file is needed"),
    ):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.safetensors: {reason}"):
            load_learngene(path)
    with pytest.raises(ValueError, match="no such file"):
        load_learngene(tmp_path / "nowhere.safetensors")


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="no description of a model"):
        load_learngene(tmp_path / "bare.safetensors")
    model = create_model("vit_tiny_patch16_224", depth=1, num_classes=10)
    info = ModelInfo("model", "vit_tiny_patch16_224", {"depth": 1}, 10)
    save_model_file(tmp_path / "model.safetensors", info, model.state_dict())
    with pytest.raises(ValueError, match="holds a model, not a learngene"):
        load_learngene(tmp_path / "model.safetensors")
    weights = small().state_dict()
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("blocks.1.")}
    save_model_file(tmp_path / "half.safetensors", describe_model(small(), "learngene"), weights)
    with pytest.raises(ValueError, match=r"layers for stages \[0\], but its schedule \[2, 2\] needs 2"):
        load_learngene(tmp_path / "half.safetensors")


def test_a_newer_format_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info, weights = load_learngene(file)
    monkeypatch.setattr(model_file, "VERSION", model_file.VERSION + 1)
    save_model_file(file, info, weights)
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match=f"in version {model_file.VERSION + 1} of the format, this program reads up to"
    ):
        read_learngene_info(file)


def test_a_file_of_version_1_is_read(file: Path) -> None:
    """It has the key ``pixels`` for today's ``preprocessing``."""
    info, weights = load_learngene(file)
    fields = asdict(info)
    fields["pixels"] = fields.pop("preprocessing")
    save_file(weights, file, {"format": "pt", "sws_dist": json.dumps({"version": 1, **fields})})
    assert read_learngene_info(file) == info


def test_a_misfit_names_each_tensor_with_both_shapes(file: Path) -> None:
    _, weights = load_learngene(file)
    weights["extra"] = weights.pop("norm.bias")
    shapes = r"pos_embed: \(1, 16, 64\) in the file, \(1, 16, 32\) in the model"
    with pytest.raises(ValueError, match=shapes):
        load_weights_strict(small(embed_dim=32), weights, file)
    with pytest.raises(ValueError, match=r"norm.bias: missing in the file\n +extra: not in the model"):
        load_weights_strict(small(), weights, file)


def test_a_failed_write_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def full(*_: Any) -> None:
        Path(_[0]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_file, "write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        save_model_file(file, describe_model(small(), "learngene"), small().state_dict())
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


# ---- the released code's checkpoints ----


def released_logits(weights: dict[str, Tensor], images: Tensor, schedule: tuple[int, ...], heads: int) -> Tensor:
    """Compute what the released auxiliary model computes, from its description and not from our model.

    Patches, position embedding, pre-norm blocks whose stage i runs schedule[i] times, norm, mean over tokens, head;
    every LayerNorm with epsilon 1e-5 (PyTorch's own default, which that code leaves as it is).
    """
    w = weights
    stride = w["patch_embed.proj.weight"].shape[-1]
    x = F.conv2d(images, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=stride)
    x = x.flatten(2).transpose(1, 2) + w["pos_embed"]
    batch, tokens, width = x.shape

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-5)

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    for stage, repeats in enumerate(schedule):
        for _ in range(repeats):
            y = norm(f"blocks.block.norm1.instances.{stage}", x)
            qkv = linear(f"blocks.block.attn.qkv.instances.{stage}", y)
            q, k, v = qkv.reshape(batch, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
            share = (q @ k.transpose(-2, -1) * (width // heads) ** -0.5).softmax(dim=-1)
            y = (share @ v).transpose(1, 2).reshape(batch, tokens, width)
            x = x + linear(f"blocks.block.attn.proj.instances.{stage}", y)
            y = norm(f"blocks.block.norm2.instances.{stage}", x)
            y = F.gelu(linear(f"blocks.block.mlp.fc1.instances.{stage}", y))
            x = x + linear(f"blocks.block.mlp.fc2.instances.{stage}", y)
    return linear("head", norm("norm", x).mean(dim=1))


def released_weights(width: int, stages: int, classes: int) -> dict[str, Tensor]:
    """A checkpoint in the released layout with random values: 224 pixels, patches of 16, 196 positions."""
    torch.manual_seed(4)

    def linear(name: str, out: int, inside: int) -> dict[str, Tensor]:
        return {f"{name}.weight": torch.randn(out, inside) * inside**-0.5, f"{name}.bias": torch.randn(out) * 0.1}

    def norm(name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + 0.1 * torch.randn(width), f"{name}.bias": 0.1 * torch.randn(width)}

    # A stream of small values, where an epsilon of 1e-6 instead of 1e-5 shows.
    w = {"patch_embed.proj.weight": torch.randn(width, 3, 16, 16) * 1e-4, "patch_embed.proj.bias": torch.zeros(width)}
    w |= {"pos_embed": torch.randn(1, 196, width) * 2e-3} | norm("norm") | linear("head", classes, width)
    for i in range(stages):
        block = "blocks.block"
        w |= norm(f"{block}.norm1.instances.{i}") | norm(f"{block}.norm2.instances.{i}")
        w |= linear(f"{block}.attn.qkv.instances.{i}", 3 * width, width)
        w |= linear(f"{block}.attn.proj.instances.{i}", width, width)
        w |= linear(f"{block}.mlp.fc1.instances.{i}", 4 * width, width)
        w |= linear(f"{block}.mlp.fc2.instances.{i}", width, 4 * width)
    return w


@pytest.mark.parametrize("heads", [6, 12])
def test_a_released_checkpoint_keeps_its_logits(heads: int) -> None:
    schedule = (3, 3, 4, 3, 3)
    weights = released_weights(width=96, stages=5, classes=11)
    images = torch.randn(2, 3, 224, 224)
    expected = released_logits(weights, images, schedule, heads)
    info, converted = convert_released(weights, schedule, heads)
    assert info.preprocessing["mean"] == (0.485, 0.456, 0.406)
    auxiliary = info.build().eval()
    auxiliary.load_state_dict(converted, strict=True)
    torch.testing.assert_close(auxiliary(images), expected, rtol=1e-4, atol=1e-4)
    described, unrolled = expand_learngene(info, converted, expansion_plan(schedule, 16))
    descendant = described.build().eval()
    descendant.load_state_dict(unrolled, strict=True)
    torch.testing.assert_close(descendant(images), expected, rtol=1e-4, atol=1e-4)
    # Negative control: the wrong epsilon is seen by this comparison.
    for module in auxiliary.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    assert (auxiliary(images) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("schedule", "heads", "change", "said"),
    [
        ((3, 3, 4), 6, {}, "has 3 stages, the checkpoint has 5"),
        ((3, 3, 4, 3, 3), 7, {}, "7 heads do not divide the width 96"),
        ((3, 3, 4, 3, 3), 6, {"pos_embed": None}, "has no pos_embed"),
        ((3, 3, 4, 3, 3), 6, {"odd.weight": torch.zeros(1)}, "odd.weight: not in the model"),
    ],
)
def test_what_does_not_fit_the_released_layout(
    schedule: tuple[int, ...], heads: int, change: dict[str, Tensor | None], said: str
) -> None:
    weights = {k: v for k, v in (released_weights(96, 5, 11) | change).items() if v is not None}
    with pytest.raises(ValueError, match=said):
        convert_released(weights, schedule, heads)
