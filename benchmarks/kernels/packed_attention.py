"""Define the cases of packed_attention, counted as limited by memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)

from benchmarks.kernels.measure import Machine, Size
from benchmarks.kernels.operator_case import OperatorCase, Provider, label, tupled, work
from sws_kernels import packed_attention, packed_attention_reference


def sdpa(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, T, D] each
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@contextmanager
def flash_attention(version: str) -> Iterator[None]:
    """Let SDPA's flash backend run another FlashAttention, "FA3" or "FA4", from a package of its own."""
    activate_flash_attention_impl(version)
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            yield
    finally:
        restore_flash_attention_impl()


def cases(machine: Machine, size: Size) -> Iterator[OperatorCase]:
    """Yield one case without a bias, as a linear layer leaves qkv: SDPA can be compared with that."""

    def inputs() -> tuple[list[Tensor], list[Tensor]]:
        qkv = machine.normal(size.batch, size.tokens, 3, size.heads, size.head_dim)
        return [qkv], [machine.normal(*size.stream)]

    part = size.batch * size.tokens * size.width * machine.dtype.itemsize  # one of q, k, v, out
    yield OperatorCase(
        operator="packed_attention",
        label=label(machine, size.batch, size.tokens, size.heads, size.head_dim),
        inputs=inputs,
        providers={
            "triton": Provider(tupled(partial(packed_attention, backend="triton"))),
            "SDPA flash": Provider(tupled(sdpa), partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION)),
            "SDPA FlashAttention 3": Provider(tupled(sdpa), partial(flash_attention, "FA3")),
            "SDPA FlashAttention 4": Provider(tupled(sdpa), partial(flash_attention, "FA4")),
            "SDPA cuDNN": Provider(tupled(sdpa), partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION)),
            "SDPA math": Provider(tupled(sdpa), partial(sdpa_kernel, SDPBackend.MATH)),
            "compile": Provider(tupled(machine.compile(sdpa))),
        },
        reference=tupled(packed_attention_reference),
        num_bytes=work(4 * part, 7 * part),
    )
