"""Weight files of other programs: what they are wrapped in, what they hold beside the model, and what they are not."""

from __future__ import annotations

import argparse
import gzip
import logging
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sws_dist.build_models import build_models
from sws_dist.checkpoint.load_model import load_initial_weights, load_model, set_input_description
from sws_dist.checkpoint.model_file import ModelInfo, save_model_file
from sws_dist.checkpoint.weight_file import read_weight_file
from sws_dist.checkpoint.weight_names import select_weights
from sws_dist.config.schema import IMAGENET_MEAN, IMAGENET_STD, DataConfig, ModelConfig, RunConfig
from sws_dist.inference import input_config
from sws_dist.models import create_model

VIT = "test_vit"  # timm's smallest, for 160 pixels
Weights = dict[str, Tensor]


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """Return what was logged since the last call."""
    caplog.set_level(logging.INFO, "sws_dist")

    def text() -> str:
        found = "\n".join(caplog.messages)
        caplog.clear()
        return found

    return text


def weights_of(name: str = VIT, seed: int = 0, **kwargs: Any) -> Weights:
    torch.manual_seed(seed)
    model = create_model(name, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05)
    return model.state_dict()


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: tensor for name, tensor in weights.items()}


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def same(model: nn.Module, weights: Weights) -> bool:
    own = model.state_dict()
    return own.keys() == weights.keys() and all(torch.equal(own[name], weights[name]) for name in own)


# ---- wrappers and prefixes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: {"model": w, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "epoch": 3},
        lambda w: {"state_dict": prefixed("module.", w), "best_acc1": torch.tensor(70.0)},
        lambda w: {"state_dict": prefixed("model.", w) | {"criterion.weight": torch.ones(3)}, "hparams": {"lr": 1.0}},
        lambda w: {"model_state": prefixed("_orig_mod.module.", w)},
        lambda w: prefixed("module.encoder.backbone.", w),
        lambda w: {"anything": {"deeper": prefixed("net.", w)}},
        lambda w: {"model": {re.sub(r"^blocks\.(\d+)\.", r"blocks.\1._orig_mod.", name): t for name, t in w.items()}},
        lambda w: {"model": w, "args": argparse.Namespace(lr=0.1, output=Path("x")), "best": np.float64(0.7)},
        lambda w: {"model": {name: nn.Parameter(tensor) for name, tensor in w.items()}},
    ],
)
@pytest.mark.parametrize("ending", ["pth", "tar", "bin"])
def test_wrappers_and_prefixes_are_recognised(tmp_path: Path, wrap: Callable[[Weights], Any], ending: str) -> None:
    weights = weights_of()
    assert same(load_model(saved(tmp_path / f"a.{ending}", wrap(weights)), VIT), weights)


def test_the_content_and_not_the_name_says_what_a_file_is(tmp_path: Path) -> None:
    weights = weights_of()
    save_file(prefixed("model.", weights), tmp_path / "a.bin")
    assert same(load_model(tmp_path / "a.bin", VIT), weights)
    saved(tmp_path / "b.safetensors", {"model": weights})
    assert same(load_model(tmp_path / "b.safetensors", VIT), weights)
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(load_model(tmp_path / "old.pth", VIT), weights)


@pytest.mark.parametrize(
    ("plain", "averaged"),
    [
        ("model", "model_ema"),
        ("state_dict", "state_dict_ema"),
        ("model", "ema"),
        ("student", "teacher"),
        ("state_dict.model", "state_dict.ema_model"),
        ("state_dict.module.base_encoder", "state_dict.module.momentum_encoder"),
        ("encoder", "target_encoder"),
    ],
)
def test_the_average_is_taken_and_said(tmp_path: Path, said: Callable[[], str], plain: str, averaged: str) -> None:
    first, second = weights_of(seed=1), weights_of(seed=2)
    content: dict[str, Any] = {"epoch": 3}
    for place, weights in ((plain, first), (averaged, second)):
        group, _, prefix = place.partition(".")
        content.setdefault(group, {}).update(prefixed(f"{prefix}." if prefix else "", weights))
    file = saved(tmp_path / "a.pth", content)
    assert same(load_model(file, VIT), second)
    assert f"the averaged weights ({averaged}) are taken; --no-ema takes the others ({plain})" in said()
    assert same(load_model(file, VIT, use_ema=False), first)
    assert f"the weights of {plain} are taken, not the averaged ones ({averaged})" in said()


def test_an_average_that_is_missing_or_incomplete_is_not_taken(tmp_path: Path, said: Callable[[], str]) -> None:
    weights = weights_of("test_resnet")
    file = saved(tmp_path / "a.pth", {"state_dict": weights, "state_dict_ema": None})
    assert same(load_model(file, "test_resnet"), weights)
    part = {name: tensor for name, tensor in weights.items() if "running" not in name}
    file = saved(tmp_path / "b.pth", {"model": weights, "ema": part})
    assert same(load_model(file, "test_resnet"), weights)
    assert f"ema holds only {len(part)} of {len(weights)} tensors and is not taken" in said()
    file = saved(tmp_path / "c.pth", {"model_ema": weights})
    assert same(load_model(file, "test_resnet"), weights)
    with pytest.raises(ValueError, match="holds averaged weights alone"):
        load_model(file, "test_resnet", use_ema=False)


def test_two_models_in_one_file_are_not_guessed_at(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.pth", {"first": weights_of(seed=1), "second": weights_of(seed=2)})
    with pytest.raises(ValueError, match="several sets of weights, and which one is meant cannot be told: first, sec"):
        load_model(file, VIT)


def test_what_only_pre_training_uses_is_left_out_and_said(tmp_path: Path, said: Callable[[], str]) -> None:
    """DINO's projection head and MAE's decoder; without a classifier the backbone can be fine-tuned only."""
    backbone = {name: tensor for name, tensor in weights_of().items() if not name.startswith("head.")}
    dino = prefixed("backbone.", backbone) | {
        "head.mlp.0.weight": torch.ones(2, 2),
        "head.last_layer.weight_g": torch.ones(2),
    }
    mae = backbone | {"mask_token": torch.ones(1), "decoder_blocks.0.norm1.weight": torch.ones(2)}
    for content, parts in (
        ({"teacher": dino, "student": prefixed("module.", dino)}, "head (2 tensors)"),
        ({"model": mae, "args": argparse.Namespace()}, "mask_token, decoder_blocks"),
    ):
        file = saved(tmp_path / "a.pth", content)
        with pytest.raises(ValueError, match=r"has no classifier .*it is a backbone, to be fine-tuned first"):
            load_model(file, VIT)
        assert f"left out, since the model has no such part: {parts}" in said()
        model = create_model(VIT, num_classes=3)
        own = model.head.weight.clone()
        load_initial_weights(model, file, ["a", "b", "c"], 160)
        assert torch.equal(model.head.weight, own)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in backbone.items())
        assert f"the head is new: {file} has none, the data has 3 classes" in said()


def test_nothing_is_loaded_in_part(tmp_path: Path) -> None:
    weights = weights_of()
    deeper = weights | {name.replace("blocks.0.", "blocks.99."): tensor for name, tensor in weights.items()}
    with pytest.raises(ValueError, match=r"blocks\.99\.norm1\.weight: not in the model"):
        load_model(saved(tmp_path / "deeper.pth", {"model": deeper}), VIT)
    del weights["blocks.1.attn.qkv.weight"]
    for load in (
        lambda file: load_model(file, VIT),
        lambda file: load_initial_weights(create_model(VIT, num_classes=3), file, ["a", "b", "c"], 160),
    ):
        with pytest.raises(ValueError, match=r"blocks\.1\.attn\.qkv\.weight: missing in the file"):
            load(saved(tmp_path / "holes.pth", {"model": weights}))


# ---- heads and sizes -------------------------------------------------------------------------------------------------


def test_a_head_of_other_labels(tmp_path: Path, said: Callable[[], str]) -> None:
    file = saved(tmp_path / "a.pth", weights_of(num_classes=7))
    assert load_model(file, VIT).num_classes == 7
    model = create_model(VIT, num_classes=3)
    load_initial_weights(model, file, ["a", "b", "c"], 160)
    assert f"the head is new: {file} knows 7 labels, the data has 3 classes" in said()
    model = create_model(VIT, num_classes=7)
    load_initial_weights(model, file, list("abcdefg"), 160)
    assert "the head is kept" in said()
    assert same(model, weights_of(num_classes=7))


def test_images_that_were_normalised_otherwise_are_said(tmp_path: Path, said: Callable[[], str]) -> None:
    data = DataConfig(root="unused", image_size=160)
    for mean, warned in ((IMAGENET_MEAN, False), ((0.5, 0.5, 0.5), True)):
        preprocessing = {"mean": list(mean), "std": list(IMAGENET_STD), "image_size": 224, "crop_pct": 1.0}
        info = ModelInfo("model", VIT, {}, 3, preprocessing=preprocessing, classes=["a", "b", "c"])
        file = save_model_file(tmp_path / "a.safetensors", info, weights_of(num_classes=3))
        config = RunConfig("unused", ModelConfig(VIT, initial_checkpoint=str(file)), data)
        build_models(config, ("a", "b", "c"), torch.device("cpu"), torch.float32, {}, 100)
        assert ("normalised by mean [0.5, 0.5, 0.5] and std [0.229, 0.224, 0.225], those of" in said()) is warned


def test_the_head_of_our_files_follows_the_names_of_the_classes(tmp_path: Path, said: Callable[[], str]) -> None:
    weights = weights_of(num_classes=3)
    info = ModelInfo("model", VIT, {}, 3, classes=["cat", "dog", "eel"])
    file = save_model_file(tmp_path / "a.safetensors", info, weights)
    model = create_model(VIT, num_classes=3)
    load_initial_weights(model, file, ["eel", "cat", "dog"], 160)
    assert torch.equal(model.head.weight, weights["head.weight"][[2, 0, 1]])
    assert torch.equal(model.head.bias, weights["head.bias"][[2, 0, 1]])
    assert "put into the order of the data's classes" in said()
    model = create_model(VIT, num_classes=3)
    own = model.head.weight.clone()
    load_initial_weights(model, file, ["ant", "bee", "cow"], 160)
    assert torch.equal(model.head.weight, own)
    assert "knows 3 labels of other names" in said()


def test_position_embeddings_are_resampled_and_class_tokens_kept(tmp_path: Path, said: Callable[[], str]) -> None:
    weights = weights_of()
    file = saved(tmp_path / "a.pth", {"model": weights})
    model = load_model(file, VIT, image_size=96)
    expected = timm.layers.resample_abs_pos_embed(weights["pos_embed"], [6, 6], num_prefix_tokens=1)
    torch.testing.assert_close(model.pos_embed, expected, rtol=0, atol=0)
    assert torch.equal(model.pos_embed[:, 0], weights["pos_embed"][:, 0])
    assert "pos_embed resampled from (1, 101, 64) to (1, 37, 64)" in said()
    assert model(torch.zeros(1, 3, 96, 96)).shape == (1, 1000)


def test_the_files_own_word_for_its_model(tmp_path: Path) -> None:
    weights = weights_of()
    for content in ({"arch": VIT, "state_dict": weights}, {"args": argparse.Namespace(model=VIT), "model": weights}):
        assert same(load_model(saved(tmp_path / "a.pth", content)), weights)
    with pytest.raises(ValueError, match="does not say which model it is of; name it"):
        load_model(saved(tmp_path / "b.pth", {"arch": "nonsense", "model": weights}))
    (tmp_path / "hub").mkdir()
    save_file(weights, tmp_path / "hub" / "model.safetensors")
    (tmp_path / "hub" / "config.json").write_text(f'{{"architecture": "{VIT}", "num_classes": 1000}}')
    assert same(load_model(tmp_path / "hub" / "model.safetensors"), weights)


# ---- official files --------------------------------------------------------------------------------------------------


def official_levit(weights: Weights, depths: tuple[int, ...]) -> Weights:
    """Write timm's LeViT under facebookresearch/LeViT's names: one row of blocks, ``c``, ``l``, residuals ``m``."""
    rows = []
    for stage, depth in enumerate(depths):
        if stage:
            rows += [(f"stages.{stage}.downsample.attn_downsample.", ""), (f"stages.{stage}.downsample.mlp.", "m.")]
        for block in range(depth):
            rows += [(f"stages.{stage}.blocks.{block}.attn.", "m."), (f"stages.{stage}.blocks.{block}.mlp.", "m.")]
    starts = {f"stem.conv{i + 1}.": f"patch_embed.{2 * i}." for i in range(4)}
    starts |= {theirs: f"blocks.{row}.{residual}" for row, (theirs, residual) in enumerate(rows)}
    official = {}
    for name, tensor in weights.items():
        start = next((start for start in starts if name.startswith(start)), None)
        rest = name.removeprefix(start or "")
        linear = "l" if name.startswith("head") else "c"
        for ours, theirs in ((".ln.", ".1."), ("ln1.", "0."), ("ln2.", "2.")):
            rest = rest.replace(ours, theirs)
        rest = re.sub(r"(^|\.)linear\.", rf"\1{linear}.", rest)
        official[starts.get(start or "", "") + rest] = tensor
        if name.endswith("attention_biases"):
            official[starts[start or ""] + "attention_bias_idxs"] = torch.zeros(4, 4, dtype=torch.long)
    return official


def test_an_official_levit_file_is_timms_model(tmp_path: Path) -> None:
    weights = weights_of("levit_128s")
    official = official_levit(weights, (2, 3, 4))
    # as the official class names them (https://github.com/facebookresearch/LeViT, levit.py)
    for name in (
        *("patch_embed.6.bn.running_mean", "blocks.0.m.qkv.c.weight", "blocks.0.m.proj.1.bn.bias"),
        *("blocks.1.m.2.c.weight", "blocks.4.kv.c.weight", "blocks.4.q.1.c.weight", "blocks.5.m.0.bn.weight"),
        *("blocks.12.attention_biases", "blocks.21.m.2.bn.weight", "head.l.weight", "head_dist.bn.bias"),
    ):
        assert name in official, name
    assert len({name.split(".")[1] for name in official if name.startswith("blocks.")}) == 22
    file = saved(tmp_path / "LeViT-128S-96703c44.pth", {"model": official})
    assert same(load_model(file, "levit_128s"), weights)
    student = create_model("levit_128s", num_classes=5)
    load_initial_weights(student, file, list("abcde"), 224)
    assert torch.equal(
        student.stages[2].blocks[3].attn.qkv.linear.weight, weights["stages.2.blocks.3.attn.qkv.linear.weight"]
    )


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_an_official_deit_file_and_its_training_checkpoint(tmp_path: Path, name: str) -> None:
    weights = weights_of(name)
    assert ("head_dist.weight" in weights) == ("distilled" in name)
    content = {
        "model": weights,
        "model_ema": weights_of(name, seed=1),
        "args": argparse.Namespace(model=name),
        "epoch": 9,
    }
    assert same(load_model(saved(tmp_path / "a.pth", content), use_ema=False), weights)
    student = create_model(name, num_classes=5, img_size=64)
    load_initial_weights(student, saved(tmp_path / "b.pth", {"model": weights}), list("abcde"), 64)
    prefix = 2 if "distilled" in name else 1
    assert student.pos_embed.shape[1] == 16 + prefix
    assert torch.equal(student.pos_embed[:, :prefix], weights["pos_embed"][:, :prefix])


def test_an_official_deit3_file(tmp_path: Path) -> None:
    weights = weights_of("deit3_small_patch16_224")
    official = {re.sub(r"ls(\d)\.gamma", r"gamma_\1", name): tensor for name, tensor in weights.items()}
    assert "blocks.0.gamma_1" in official
    assert same(load_model(saved(tmp_path / "a.pth", {"model": official}), "deit3_small_patch16_224"), weights)


# ---- what is no file of weights --------------------------------------------------------------------------------------

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "an empty file (0 bytes)"),
        (LFS.encode(), "a Git LFS pointer to them; run git lfs pull"),
        (b"\n<!DOCTYPE html><html><body>Not found", "a web page (HTML or XML), as failed downloads leave it"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied", "a web page (HTML or XML)"),
        (b'{"metadata": {}, "weight_map": {"a": "b"}}', "JSON text; weights in several files have to be joined first"),
        (b"Not Found", "text: 'Not Found'"),
        (gzip.compress(b"x" * 1000, mtime=0), "a gzip archive; unpack it first"),
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 100, "an HDF5 file (Keras)"),
    ],
)
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_what_is_no_weight_file_is_called_what_it_is(tmp_path: Path, content: bytes, reason: str, ending: str) -> None:
    file = tmp_path / f"a.{ending}"
    file.write_bytes(content)
    for read in (read_weight_file, lambda path: load_model(path, VIT)):
        with pytest.raises(ValueError, match=re.escape(f"{file}: not weights but {reason}")):
            read(file)


@pytest.mark.parametrize("mark", [b"PK", b"\x1f\x8b", b"\x80\x02", b"{ "])
def test_a_header_whose_length_looks_like_the_mark_of_another_format(tmp_path: Path, mark: bytes) -> None:
    """The first bytes of a safetensors file are the length of its header: any bytes at all."""
    length = int.from_bytes(mark, "little")
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(length)
    (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + header + b"\0\0\x80\x3f")
    groups = read_weight_file(tmp_path / "a.safetensors").groups
    assert torch.equal(groups[""]["a"], torch.ones(1))


def test_folders_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.pth: no such file"):
        read_weight_file(tmp_path / "nowhere.pth")
    saved(tmp_path / "model.pth", weights_of())
    with pytest.raises(ValueError, match=r"a folder, not a file; inside is model\.pth"):
        read_weight_file(tmp_path)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="a training checkpoint; sws convert --checkpoint writes"):
        read_weight_file(tmp_path)


def test_files_that_are_cut_short(tmp_path: Path) -> None:
    for ending, save in (("pth", torch.save), ("safetensors", save_file)):
        file = tmp_path / f"a.{ending}"
        save(weights_of(), file)
        file.write_bytes(file.read_bytes()[:-1000])
        with pytest.raises(ValueError, match=r"cut short|not a whole safetensors file"):
            read_weight_file(file)
    old = tmp_path / "old.pth"
    torch.save(weights_of(), old, _use_new_zipfile_serialization=False)
    old.write_bytes(old.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cut short"):
        read_weight_file(old)


class Evil:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    file = saved(tmp_path / "evil.pth", {"model": weights_of(), "args": Evil(tmp_path / "executed")})
    with pytest.raises(
        ValueError, match=r"not plain tensors: it holds .*pathlib\.Path.*and making such objects can run code"
    ):
        read_weight_file(file)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(ValueError, match=r"it holds .*Linear"):
        read_weight_file(saved(tmp_path / "module.pth", nn.Linear(2, 2)))
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    with pytest.raises(ValueError, match="a TorchScript program"):
        read_weight_file(tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("model.pth", b"weights")
    with pytest.raises(ValueError, match="not weights but a zip archive; unpack it first"):
        read_weight_file(tmp_path / "a.zip")
    np.savez(tmp_path / "a.npz", weights=np.ones(3))
    with pytest.raises(ValueError, match="not weights but a NumPy archive"):
        read_weight_file(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"expected a dictionary of tensors, .* found keys \['model'\]"):
        read_weight_file(saved(tmp_path / "numbers.pth", {"model": {"w": 3}}))
    with pytest.raises(ValueError, match="found a list"):
        read_weight_file(saved(tmp_path / "list.pth", [torch.ones(2)]))


def test_without_a_model_the_largest_dictionary_is_taken(tmp_path: Path) -> None:
    content = {
        "model": {"module.a": torch.ones(2), "module.b": torch.ones(3)},
        "optimizer": {str(i): torch.ones(1) for i in range(9)},
    }
    assert select_weights(read_weight_file(saved(tmp_path / "a.pth", content))).keys() == {"a", "b"}


def test_a_model_says_how_its_images_are_cropped(tmp_path: Path) -> None:
    """timm's own models squash some; a file of ours from before it said so was scored on the centre."""
    model = create_model(VIT, num_classes=3)
    model.pretrained_cfg["crop_mode"] = "squash"
    assert input_config(model, "it", tmp_path).crop_mode == "squash"
    preprocessing = {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD), "image_size": 160, "crop_pct": 1.0}
    for said, expected in (({}, "center"), ({"crop_mode": "squash"}, "squash")):
        set_input_description(model, ModelInfo("model", VIT, {}, 3, preprocessing=preprocessing | said))
        assert input_config(model, "it", tmp_path).crop_mode == expected
    model.pretrained_cfg["crop_mode"] = "border"
    with pytest.raises(ValueError, match=r"crop_mode 'border': input should be 'center' or 'squash'"):
        input_config(model, "it", tmp_path)
