"""Look up how many floating-point operations a second a GPU can do at most, for the model FLOPs utilisation.

The figures are NVIDIA's own, in TFLOP/s without sparsity: tensor cores for bf16 and fp16 (sums in fp32), and the
ordinary cores for fp32, since this trainer leaves TF32 off as torch does.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch


class Peak(NamedTuple):
    """Peaks of one kind of GPU, in TFLOP/s."""

    half: float
    """bf16 and fp16."""
    single: float
    """fp32."""
    source: str


# What torch.cuda.get_device_name says, as a regular expression for all of it. A part of a GPU (MIG) has a name of its
# own, and no peak here.
PEAKS = {
    r"NVIDIA B200": Peak(2250, 75, "NVIDIA HGX B200 datasheet: 8 GPUs, 36 PFLOP/s bf16 with sparsity"),
    r"NVIDIA (H200|H100 80GB HBM3|GH200 \w+( HBM3e)?)": Peak(989.4, 66.9, "NVIDIA H100 white paper, SXM5"),
    r"NVIDIA H(100|200) NVL": Peak(835.5, 60, "NVIDIA H100 and H200 datasheets, NVL: 1,671 with sparsity"),
    r"NVIDIA H100 PCIe": Peak(756.4, 51.2, "NVIDIA H100 white paper, PCIe"),
    r"NVIDIA A100-(SXM4|PCIE)-\d+GB|NVIDIA A100 80GB PCIe": Peak(312, 19.5, "NVIDIA A100 datasheet"),
    r"NVIDIA A40": Peak(149.7, 37.4, "NVIDIA A40 datasheet"),
    r"NVIDIA A10": Peak(125, 31.2, "NVIDIA A10 datasheet"),
    r"NVIDIA L40S": Peak(362, 91.6, "NVIDIA L40S datasheet: 733 with sparsity"),
    r"NVIDIA L4": Peak(121, 30.3, "NVIDIA L4 datasheet: 242 with sparsity"),
    r"NVIDIA GeForce RTX 4090": Peak(165.2, 82.6, "NVIDIA Ada white paper"),
    r"NVIDIA GeForce RTX 3090": Peak(71, 35.6, "NVIDIA GA102 white paper"),
    r"Tesla V100-SXM2-\d+GB": Peak(125, 15.7, "NVIDIA V100 datasheet; it has no bf16"),
    r"Tesla T4": Peak(65, 8.1, "NVIDIA T4 datasheet; it has no bf16"),
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the FLOP/s that ``device`` can do at most in ``dtype``; None if the table does not say it, as for CPUs."""
    peak = None if device.type == "cpu" else find_peak(torch.cuda.get_device_name(device))
    return None if peak is None else 1e12 * (peak.single if dtype == torch.float32 else peak.half)


def describe_peak(device: torch.device, dtype: torch.dtype) -> str:
    """Return a log message about the peak that ``perf/mfu`` is a share of."""
    if device.type == "cpu":
        return "no figure for CPUs, so there is no curve perf/mfu"
    name, flops = torch.cuda.get_device_name(device), peak_flops(device, dtype)
    if flops is None:
        return f"{name} is not in sws_dist/logging/peaks.py, so there is no curve perf/mfu"
    return f"{flops / 1e12:g} TFLOP/s for {name}, of which perf/mfu is the share that the model computes"


def find_peak(name: str) -> Peak | None:
    """Return the peaks of the GPU that torch calls ``name``."""
    return next((peak for pattern, peak in PEAKS.items() if re.fullmatch(pattern, name)), None)
