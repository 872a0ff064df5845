"""List the formats that a model is exported to. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """A format beside timm's folder."""

    file: str
    about: str
    tolerance: float
    """The largest difference of a logit, as a share of the range of the model's logits."""
    packages: tuple[str, ...] = ()


_ONNX = ("onnx", "onnxscript", "onnxruntime")
TIMM = Format("model.safetensors", "the weights, for timm", 1e-5)
FORMATS = {
    "onnx": Format("model.onnx", "ONNX in fp32, any batch size", 1e-4, _ONNX),
    "onnx-fp16": Format("model_fp16.onnx", "ONNX that computes in fp16, any batch size", 0.02, _ONNX),
    "onnx-int8": Format("model_int8.onnx", "ONNX whose linear layers compute in int8, any batch size", 0.2, _ONNX),
    "torch": Format("model.pt2", "a program of `torch.export`, any batch size", 1e-4),
}
"""Name of a format -> its file. The files are called as transformers.js calls them."""
