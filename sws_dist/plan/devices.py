"""Keep what is known of devices and networks: published figures, and what this trainer reached where it was measured.

Every figure has its source beside it. What is assumed is in the text that a plan prints (``SpeedAssumption``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sws_dist.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """Published figures of one GPU, in the server that its maker sells."""

    name: str
    cuda_name: str
    """What ``torch.cuda.get_device_name`` says of it."""
    memory_bytes: int
    link_bytes: float
    """Bytes a second of NVLink, in each direction."""
    network_bytes: float
    """Bytes a second of the network between nodes, for each GPU and in each direction."""
    source: str

    def flops(self, precision: str) -> float:
        """Return the operations a second in ``fp32`` (without TF32, as torch runs it), ``bf16`` or ``fp16``, dense."""
        from sws_dist.logging.peaks import find_peak  # with torch, which takes seconds to import

        peak = find_peak(self.cuda_name)
        assert peak is not None
        return 1e12 * (peak.single if precision == "fp32" else peak.half)


GBIT = 1e9 / 8
"""Bytes a second of one Gbit/s."""
DEVICES = {
    device.name: device
    for device in (
        Device(
            *("a100", "NVIDIA A100-SXM4-80GB", 80_000_000_000, 300e9, 200 * GBIT),
            "NVIDIA A100 80GB SXM data sheet (June 2021); DGX A100: one 200 Gbit/s adapter a GPU",
        ),
        Device(
            *("h100", "NVIDIA H100 80GB HBM3", 80_000_000_000, 450e9, 400 * GBIT),
            "NVIDIA H100 SXM data sheet (2023); DGX H100: one 400 Gbit/s adapter a GPU",
        ),
        Device(
            *("h200", "NVIDIA H200", 141_000_000_000, 450e9, 400 * GBIT),
            "NVIDIA H200 SXM data sheet (2024); DGX H200: one 400 Gbit/s adapter a GPU",
        ),
    )
}
DEFAULT_DEVICE = "h100"
MEASURED_ON = "h200"
"""The device of ``MEASURED``."""
Backend = Literal["triton", "triton, stages graphed", "compile timm, cuDNN", "eager timm"]
"""What runs the stages, as ``benchmarks/results/kernels.json`` calls it."""
MEASURED: dict[Backend, dict[int, float]] = {
    "triton": {192: 74.4e12, 384: 277.2e12},
    "triton, stages graphed": {192: 178.0e12, 384: 298.2e12},
    "compile timm, cuDNN": {192: 139.3e12, 384: 239.3e12},
    "eager timm": {192: 63.6e12, 384: 142.1e12},
}
"""Backend -> width -> operations a second of a whole training step in bf16, 256 images, 16 layers, on one
H200: ``benchmarks/results/kernels.json``."""
MEASURED_BATCH = 256
HEADROOM = 0.1
"""Share of a device's memory that is left free unless told otherwise: for CUDA's context, NCCL's buffers, what DALI
decodes on the device, and gaps between tensors. None of these is counted."""

DECODING_CPU_S = 3.43e-3
"""CPU seconds of reading, decoding and augmenting one image with the full recipe: ``benchmarks/results/data-cpu.json``,
on one x86-64 machine."""


def find_device(name: str) -> Device:
    """Return the device of a name such as ``h100``, or of what CUDA calls it (``NVIDIA H100 80GB HBM3``).

    Raises:
        ConfigError: a device without figures.
    """
    for device in DEVICES.values():
        if name in (device.name, device.cuda_name):
            return device
    raise ConfigError(f"device {name!r}: no figures are known; known are {', '.join(DEVICES)}")


@dataclass(frozen=True)
class SpeedAssumption:
    """The share of a device's published operations a second that a step is assumed to reach."""

    utilisation: float
    reason: str


def assume_utilisation(device: Device, backend: Backend, width: int | None, precision: str) -> SpeedAssumption:
    """Return what was measured for the nearest width that is not larger, or else the smallest.

    Args:
        backend: what runs the stages.
        width: of the model; None for one that is not a ViT of ours, of which nothing was measured.
    """
    measured = MEASURED[backend]
    nearest = max((known for known in measured if width is None or known <= width), default=min(measured))
    share = measured[nearest] / DEVICES[MEASURED_ON].flops("bf16")
    reason = f"measured on an H200: {backend}, width {nearest}, bf16, {MEASURED_BATCH} images"
    is_measured = (device.name, width, precision) == (MEASURED_ON, nearest, "bf16")
    return SpeedAssumption(share, reason if is_measured else f"assumed to be as {reason}")
