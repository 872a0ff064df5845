"""Write a model as a program that runs without timm: ``torch.export``, and ONNX in fp32, fp16 and int8.

All are made of one trace, take batches of any size, and carry the content of timm's ``config.json``, which says how
images are prepared and what the labels are called. ONNX files take and return float32, whatever they compute in.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from sws_dist.checkpoint.onnx_file import CONFIG, INPUT, OUTPUT
from sws_dist.export.source import ExportSource

CONFIG_FILE = "config.json"
OPSET = 20
"""Version of ONNX's operators: the first with Gelu. ONNX Runtime has it since 1.17."""
_MAX_BYTES = 2**31
"""No ONNX file can be larger."""
_LEAST_INT8 = 0.5
"""Smallest share of the weights that has to become int8; of a convolutional network only the head would."""


def trace(source: ExportSource) -> ExportedProgram:
    """Trace a model with ``torch.export``, for any batch size.

    Raises:
        ValueError: torch cannot trace it.
    """
    example = torch.zeros(2, *source.image_shape)
    try:
        program = torch.export.export(source.model, (example,), dynamic_shapes=({0: Dim("batch")},))
    except Exception as error:  # torch raises a dozen types at what it cannot trace
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{source.file}: torch.export cannot trace this model ({first})") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it holds paths of this machine
    return program


def save_program(program: ExportedProgram, config: dict[str, Any], path: Path) -> None:
    """Write a ``.pt2`` file, with the config as an extra file ``config.json``."""
    with _quiet():
        torch.export.save(program, path, extra_files={CONFIG_FILE: json.dumps(config)})


def load_program(path: Path) -> tuple[Any, dict[str, Any]]:
    """Load a ``.pt2`` file: the function that it holds, and the config."""
    extra = {CONFIG_FILE: ""}
    with _quiet():
        program = torch.export.load(path, extra_files=extra)
    return program.module(), json.loads(extra[CONFIG_FILE])


def save_onnx(program: ExportedProgram, config: dict[str, Any], path: Path) -> None:
    """Write an ONNX file in fp32."""
    with _quiet():
        converted = torch.onnx.export(
            program,
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: "batch"},),
            opset_version=OPSET,
            verbose=False,
        )
    assert converted is not None
    model = converted.model_proto
    for node in model.graph.node:
        del node.metadata_props[:]  # where torch found the operator
    _save(model, config, path)


def save_fp16(fp32: Path, config: dict[str, Any], path: Path) -> None:
    """Write an ONNX file that computes in fp16, made of the one in fp32."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with _quiet():
        model = convert_float_to_float16(onnx.load(fp32), keep_io_types=True)
    _save(model, config, path)


def require_linear_weights(source: ExportSource) -> None:
    """Raise ``ValueError`` for a model that int8 would hardly change: one with few weights in linear layers."""
    linear = sum(module.weight.numel() for module in source.model.modules() if isinstance(module, torch.nn.Linear))
    share = linear / sum(parameter.numel() for parameter in source.model.parameters())
    if share < _LEAST_INT8:
        raise ValueError(
            f"onnx-int8: {100 * share:.0f} % of this model's weights are in linear layers, which alone would be int8; "
            "take onnx-fp16"
        )


def save_int8(fp32: Path, config: dict[str, Any], path: Path) -> None:
    """Write an ONNX file whose linear layers compute in int8, made of the one in fp32.

    Weights are rounded for each output channel, activations for each batch as it comes, so no calibration is needed.
    Weights take seven of the eight bits: processors without VNNI add up pairs of products in 16 bits, which would
    overflow.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = path.with_suffix(".prepared.onnx")
    try:
        with _quiet():
            quant_pre_process(fp32, prepared, skip_symbolic_shape=True)
            quantize_dynamic(
                prepared,
                path,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                reduce_range=True,
                weight_type=QuantType.QInt8,
            )
    finally:
        prepared.unlink(missing_ok=True)
    _save(onnx.load(path), config, path)


def _save(model: Any, config: dict[str, Any], path: Path) -> None:
    """Write an ONNX model with its description."""
    import onnx

    about = config["pretrained_cfg"]
    channels, height, width = about["input_size"]
    resized = int(height / about["crop_pct"])
    side = "both sides" if about["crop_mode"] == "squash" else "the shorter side"
    model.doc_string = (
        f"{INPUT}: float32 [batch, {channels}, {height}, {width}], RGB. Resize {side} to {resized} "
        f"({about['interpolation']}), crop {height} x {width} from the centre, divide by 255, subtract "
        f"{about['mean']}, divide by {about['std']}. {OUTPUT}: float32 [batch, {config['num_classes']}]; softmax gives "
        f"probabilities. The metadata entry {CONFIG} holds this and the names of the labels as JSON."
    )
    onnx.helper.set_model_props(model, {CONFIG: json.dumps(config)})
    if (size := model.ByteSize()) >= _MAX_BYTES:
        raise ValueError(f"{path.name}: {size / 1e9:.1f} GB are more than the 2 GB that an ONNX file can hold")
    onnx.save(model, path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the progress and the advice of torch's and ONNX Runtime's exporters out of the log."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
