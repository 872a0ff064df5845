"""What the operators share: the choice of backend and the checks that keep it from falling back in silence."""

from typing import Literal

import torch
import triton
from torch import Tensor

Backend = Literal["reference", "triton"]


@triton.jit
def _probe():
    """Never launched: the decorator's result says who would run a kernel."""


# Decided when the decorator ran, from TRITON_INTERPRET; setting the variable later changes nothing.
INTERPRETED = not isinstance(_probe, triton.runtime.JITFunction)


def is_triton(operator: str, backend: str) -> bool:
    """Whether ``backend`` is "triton"; anything but the two known names is an error."""
    if backend not in ("reference", "triton"):
        raise ValueError(f"{operator}: backend={backend!r} is unknown; choose 'reference' or 'triton'")
    return backend == "triton"


def check_triton(operator: str, tensors: dict[str, Tensor | None], *, one_dtype: bool = True) -> None:
    """One device and dtypes that Triton can run on here; ``one_dtype``: the same for all, as a matrix product needs."""
    present = {name: x for name, x in tensors.items() if x is not None}
    devices = {x.device for x in present.values()}
    if len(devices) > 1:
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"{operator}: all tensors must be on one device, found {found}")
    device = devices.pop()
    if not (device.type == "cuda" or (INTERPRETED and device.type == "cpu")):
        raise ValueError(
            f"{operator}: backend='triton' was asked for, but the tensors are on {device}. "
            "Move them to a CUDA device, choose backend='reference', or, to test without a GPU, "
            "set TRITON_INTERPRET=1 before triton is imported."
        )
    dtypes = {x.dtype for x in present.values()}
    if one_dtype and len(dtypes) > 1:
        found = ", ".join(f"{name} {_short(x.dtype)}" for name, x in present.items())
        raise ValueError(f"{operator}: backend='triton' takes tensors of one dtype, got {found}")
    # The interpreter cuts fp32 to bf16 where the hardware rounds: what it says of bf16 does not hold there.
    allowed = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
    for dtype in dtypes - set(allowed):
        where = " under TRITON_INTERPRET=1" if INTERPRETED else ""
        raise ValueError(
            f"{operator}: backend='triton'{where} takes {', '.join(map(_short, allowed))}, got {_short(dtype)}"
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def contiguous(x: Tensor | None) -> Tensor | None:
    """The kernels know one layout; a sliced input or an expanded gradient is copied here."""
    return None if x is None else x.contiguous()


def weight_gradient(d_out: Tensor, x: Tensor) -> Tensor:
    """d_out^T x of a linear layer, fp32 [out, in], from [..., out] and [..., in] of one dtype.

    cuBLAS accumulates in fp32 whatever comes out; letting it out in fp32 costs nothing and keeps the sum over
    a stage's repeats exact.
    """
    d_out, x = d_out.flatten(0, -2), x.flatten(0, -2)
    if x.dtype == torch.float32:
        return d_out.t() @ x
    if x.is_cuda:
        return torch.mm(d_out.t(), x, out_dtype=torch.float32)
    return d_out.float().t() @ x.float()  # PyTorch has out_dtype on CUDA only


def bias_gradient(d_out: Tensor) -> Tensor:
    """The sum of [..., out] over all but the last dimension, fp32 [out]."""
    return d_out.flatten(0, -2).sum(dim=0, dtype=torch.float32)
