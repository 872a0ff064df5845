"""Run ONNX files that ``sws export`` wrote as if they were timm models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sws_dist.errors import require_packages

CONFIG = "timm_config"
"""The key of an ONNX file's metadata under which the content of timm's ``config.json`` stands."""
INPUT, OUTPUT = "images", "logits"


class OnnxClassifier(nn.Module):
    """Map images [batch, channels, height, width] to logits [batch, classes] with ONNX Runtime, on the CPU.

    Like a timm model it has ``num_classes``, ``in_chans`` and ``pretrained_cfg``.

    Args:
        path: the file.

    Raises:
        ValueError: ONNX Runtime is missing, it cannot open the file, or ``sws export`` did not write it.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        require_packages("export", "onnxruntime")
        import onnxruntime

        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors alone
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common base
            raise ValueError(f"{path}: ONNX Runtime cannot open it ({str(error).splitlines()[0]})") from None
        metadata = session.get_modelmeta().custom_metadata_map
        if CONFIG not in metadata:
            raise ValueError(
                f"{path}: does not say how its images are normalised and what its labels are; sws export writes ONNX "
                "files that do"
            )
        config = json.loads(metadata[CONFIG])
        self.num_classes: int = config["num_classes"]
        self.pretrained_cfg: dict[str, Any] = config["pretrained_cfg"] | {"label_names": config.get("label_names")}
        self.in_chans: int = self.pretrained_cfg["input_size"][0]
        self.placed = nn.Parameter(torch.empty(0), requires_grad=False)
        """No weight: it says dtype and device, as the parameters of any model do."""
        self._session = session

    def forward(self, images: Tensor) -> Tensor:
        """Run the file. The logits are float32, on the images' device."""
        (logits,) = self._session.run([OUTPUT], {INPUT: images.detach().float().cpu().numpy()})
        return torch.from_numpy(logits).to(images.device)
