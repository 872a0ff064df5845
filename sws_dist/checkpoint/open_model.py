"""Open whatever classifies images: a weight file, a finished run, a timm folder, an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm

from sws_dist.checkpoint.load_model import load_model
from sws_dist.checkpoint.onnx_file import OnnxClassifier
from sws_dist.models.image_size import image_size_arguments
from sws_dist.text import read_json


def open_model(
    path: str | Path, name: str | None = None, *, image_size: int | None = None, use_ema: bool = True
) -> Any:
    """Build a classifier with its weights, on the CPU.

    How it wants its images and what its labels are called stand in ``pretrained_cfg``, as in any timm model.

    Args:
        path: a file of weights, the folder of a finished run, a folder that timm reads (``config.json`` and weights),
            or an ONNX file of ``sws export``.
        name: the timm model that a weight file is of; None: what the file says.
        image_size: height and width in pixels, for which the model is built.
        use_ema: take averaged weights where a weight file has them beside others.

    Raises:
        ValueError: nothing of these, or an argument that does not go with what was found.
    """
    path = Path(path)
    if path.suffix.lower() == ".onnx":
        model = OnnxClassifier(path)
        size = model.pretrained_cfg["input_size"][-1]
        if name is not None or image_size not in (None, size):
            raise ValueError(f"{path}: an ONNX file is of one model and one image size, here {size} pixels")
        return model
    if path.suffix == ".pt2":
        raise ValueError(f"{path}: a program of torch.export, for one's own code; give the folder that it lies in")
    if is_timm_folder(path):
        if name is not None:
            raise ValueError(f"{path}: its config.json says which model it is; leave the name {name} out")
        return load_timm_folder(path, image_size)
    return load_model(find_run_weights(path) or path, name, image_size=image_size, use_ema=use_ema)


def is_timm_folder(path: str | Path) -> bool:
    """Return True for a folder with a ``config.json``, as ``sws export`` and timm write it for the Hub."""
    return (Path(path) / "config.json").is_file()


def load_timm_folder(path: str | Path, image_size: int | None = None) -> Any:
    """Load what ``timm.create_model("local-dir:PATH", pretrained=True)`` loads. Raises ``ValueError`` if it cannot."""
    config = read_timm_config(path)
    arguments = {} if image_size is None else image_size_arguments(config["architecture"], image_size)
    try:
        return timm.create_model(f"local-dir:{path}", pretrained=True, **arguments)
    except Exception as error:  # timm raises a dozen types at what it cannot use
        raise ValueError(f"{path}: timm cannot open this folder ({str(error) or type(error).__name__})") from None


def read_timm_config(path: str | Path) -> dict[str, Any]:
    """Read a timm folder's ``config.json``. Raises ``ValueError`` if it names no model."""
    config = read_json(Path(path) / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise ValueError(f"{path}: its config.json names no timm model (architecture)")
    return config


def find_weights(path: str | Path) -> Path:
    """Return the weight file of a finished run's folder or of a timm folder, and any other path as it is.

    Raises:
        ValueError: the run is not finished, or the folder has no such file.
    """
    path = Path(path)
    if not is_timm_folder(path):
        return find_run_weights(path) or path
    names = ("model.safetensors", "pytorch_model.bin")  # of the Hub, in timm's order
    found = next((path / name for name in names if (path / name).is_file()), None)
    if found is None:
        raise ValueError(f"{path}: has a config.json, but no {' or '.join(names)}")
    return found


def find_run_weights(folder: str | Path, ema: bool = False) -> Path | None:
    """Return the weight file of a finished run's folder, or None if it is no run's folder.

    Args:
        ema: the moving average of the weights.

    Raises:
        ValueError: the run is not finished, or has no such file.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        return None
    if not (folder / "metrics.json").is_file():
        raise ValueError(
            f"{folder}: this run is not finished; go on with it (--resume auto), or take a checkpoint of it: "
            "sws convert --checkpoint"
        )
    names = [f"{name}{'_ema' * ema}.safetensors" for name in ("learngene", "model")]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise ValueError(f"{folder}: the run has no {' or '.join(names)}")
    return found
