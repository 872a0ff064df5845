"""Define the cases of a stage, and of a block (one repeat), against timm's Block run as often on the same weights."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels.measure import Machine, Size
from benchmarks.kernels.operator_case import Function, OperatorCase, Provider, label, work
from sws_kernels import StageWeights, stage
from sws_kernels.common import Backend
from sws_kernels.providers import TABLES, TRITON


def cases(machine: Machine, size: Size) -> Iterator[OperatorCase]:
    for repeats in (1, 3):
        yield _case(machine, size, repeats)


def _with_rivals(ours: Function) -> dict[str, Provider]:
    """Return our stage with one operator computed by a rival, for each of them: what `auto_providers` chooses from."""
    return {
        f"{operator} by {name}": Provider(partial(ours, providers=TRITON._replace(**{operator: name})))
        for operator, table in TABLES.items()
        for name in table
        if name != "triton"
    }


def _case(machine: Machine, size: Size, repeats: int) -> OperatorCase:
    width, heads, hidden = size.width, size.heads, 4 * size.width

    def new_block() -> Block:
        norm = partial(torch.nn.LayerNorm, eps=1e-6)
        return Block(width, heads, qkv_bias=True, norm_layer=norm).to(machine.device, machine.dtype)

    timm_block = new_block()
    names = [name for name, _ in timm_block.named_parameters()]

    def inputs() -> tuple[list[Tensor], list[Tensor]]:
        x, dy = machine.normal(*size.stream), machine.normal(*size.stream)
        return [x, *(parameter.detach() for parameter in new_block().parameters())], [dy]

    def ours(x: Tensor, *weights: Tensor, backend: Backend = "triton", **options: Any) -> tuple[Tensor, ...]:
        return (stage(x, StageWeights(*weights), repeats, heads, backend=backend, **options),)

    def timms(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        parameters = dict(zip(names, weights, strict=True))
        for _ in range(repeats):
            x = torch.func.functional_call(timm_block, parameters, (x,))
        return (x,)

    compiled = machine.compile(timms)
    rows = size.batch * size.tokens
    forward = repeats * (2 * rows * width * (4 * width + 2 * hidden) + 4 * rows * size.tokens * width)
    return OperatorCase(
        operator="stage",
        label=f"{label(machine, *size.stream)}, {repeats} repeat{'s' if repeats > 1 else ''}",
        inputs=inputs,
        providers={
            "triton": Provider(ours),
            "triton, recomputed": Provider(partial(ours, recompute=True)),
            **(_with_rivals(ours) if repeats == 1 else {}),
            "eager timm": Provider(timms),
            "compile timm, flash": Provider(compiled, partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION)),
            "compile timm, cuDNN": Provider(compiled, partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION)),
        },
        reference=partial(ours, backend="reference"),
        num_flops=work(forward, 2 * forward),
        tolerance=0.05,  # a chain of bf16 products
    )
