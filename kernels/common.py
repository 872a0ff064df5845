"""Share between operators the choice of backend, the argument checks and the gradients of a linear layer."""

from typing import Literal

import torch
import triton
from torch import Tensor

Backend = Literal["reference", "triton"]


@triton.jit
def _probe() -> None:
    """Show by its type who would run a kernel. It is never launched."""


# This is decided when the decorator runs, from TRITON_INTERPRET; setting the variable later changes nothing.
INTERPRETED = not isinstance(_probe, triton.runtime.JITFunction)


def is_triton(operator: str, backend: str) -> bool:
    """Return whether ``backend`` is "triton".

    Raises:
        ValueError: ``backend`` is neither "reference" nor "triton".
    """
    if backend not in ("reference", "triton"):
        raise ValueError(f"{operator}: backend={backend!r} is unknown; choose 'reference' or 'triton'")
    return backend == "triton"


def check_triton(operator: str, tensors: dict[str, Tensor | None], *, one_dtype: bool = True) -> None:
    """Check that all tensors are on one device, in dtypes that Triton can run there; None is skipped.

    On the meta device the operators give shapes and no values, which is how memory is planned.

    one_dtype: whether all must have the same dtype, as a matrix product needs.

    Raises:
        ValueError: anything else. The message names ``operator`` and what was found.
    """
    present = {name: x for name, x in tensors.items() if x is not None}
    devices = {x.device for x in present.values()}
    if len(devices) > 1:
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"{operator}: all tensors must be on one device, found {found}")
    device = devices.pop()
    if not (device.type in ("cuda", "meta") or (INTERPRETED and device.type == "cpu")):
        raise ValueError(
            f"{operator}: backend='triton' was asked for, but the tensors are on {device}. "
            "Move them to a CUDA device, choose backend='reference', or, to test without a GPU, "
            "set TRITON_INTERPRET=1 before triton is imported."
        )
    dtypes = {x.dtype for x in present.values()}
    if one_dtype and len(dtypes) > 1:
        found = ", ".join(f"{name} {_short(x.dtype)}" for name, x in present.items())
        raise ValueError(f"{operator}: backend='triton' takes tensors of one dtype, got {found}")
    # The interpreter truncates fp32 to bf16 where the hardware rounds, so its bf16 results would not hold on a GPU.
    takes_bf16 = not INTERPRETED or device.type == "meta"
    allowed = [torch.float32, torch.float16] + ([torch.bfloat16] if takes_bf16 else [])
    for dtype in dtypes - set(allowed):
        where = " under TRITON_INTERPRET=1" if INTERPRETED else ""
        raise ValueError(
            f"{operator}: backend='triton'{where} takes {', '.join(map(_short, allowed))}, got {_short(dtype)}"
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def contiguous(x: Tensor | None) -> Tensor | None:
    """Return ``x`` in the one layout that the kernels take. A sliced input or an expanded gradient is copied."""
    return None if x is None else x.contiguous()


def weight_gradient(d_out: Tensor, x: Tensor) -> Tensor:
    """Compute d_out^T x of a linear layer, fp32 [out, in], from [..., out] and [..., in] of one dtype.

    cuBLAS accumulates in fp32 in any case. An fp32 result costs nothing more and keeps the sum over a stage's repeats
    exact.
    """
    d_out, x = d_out.flatten(0, -2), x.flatten(0, -2)
    if x.dtype == torch.float32:
        return d_out.t() @ x
    if x.device.type == "cpu":  # where PyTorch has no out_dtype
        return d_out.float().t() @ x.float()
    return torch.mm(d_out.t(), x, out_dtype=torch.float32)
