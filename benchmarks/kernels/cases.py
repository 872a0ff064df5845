"""The operators, the block and the stage: their inputs, their providers and the work they must do."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
import torch._functorch.config
from timm.models.vision_transformer import Block
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels.measure import Ceilings, Machine, Row, Size
from sws_dist.config import DistillConfig
from sws_dist.distillation import DistillationLoss
from sws_kernels import (
    StageWeights,
    add_layer_norm,
    add_layer_norm_reference,
    mlp,
    mlp_reference,
    packed_attention,
    packed_attention_reference,
    stage,
    tiles,
)
from sws_kernels.linear_gelu import linear_gelu_backward, linear_gelu_forward

Function = Callable[..., tuple[Tensor, ...]]
Inputs = Callable[[], tuple[list[Tensor], list[Tensor]]]
FORWARD, BACKWARD, BOTH = "forward", "backward", "both"


@dataclass(frozen=True)
class Provider:
    """One way to compute an operator, and what must hold around all of it: checking, compiling, timing."""

    function: Function
    context: Callable[[], AbstractContextManager] = nullcontext


@dataclass(frozen=True)
class OperatorCase:
    """One operator at one shape. `inputs` makes (leaves, output gradients); the work is per pass.

    num_bytes: for what memory limits; num_flops: for what arithmetic limits. The other is left empty.
    """

    operator: str
    label: str
    inputs: Inputs
    providers: dict[str, Provider]
    reference: Function
    num_bytes: dict[str, int] = field(default_factory=dict)
    num_flops: dict[str, int] = field(default_factory=dict)
    tolerance: float = 0.02  # relative, of the whole tensor: against timing nonsense; the tests hold the real ones

    @property
    def has_backward(self) -> bool:
        return BACKWARD in self.num_bytes | self.num_flops

    def measure(self, provider: str, machine: Machine, ceilings: Ceilings) -> list[Row]:
        """A row a pass. ValueError if the provider is wrong."""
        leaves, gradients = self.inputs()
        exact = self._results(self.reference, [x.float() for x in leaves], [x.float() for x in gradients])
        function = self.providers[provider].function
        once_more = torch._functorch.config.patch(donated_buffer=False)  # or a compiled backward runs only once
        with self.providers[provider].context(), once_more:
            for got, want in zip(self._results(function, leaves, gradients), exact, strict=False):  # may give fewer
                distance = ((got.float() - want).norm() / want.norm()).item()
                if not distance <= self.tolerance:
                    raise ValueError(f"{distance:.1%} off the fp32 reference, {self.tolerance:.0%} allowed; not timed")
            del exact, got, want
            return [self._row(name, run, machine, ceilings) for name, run in self._passes(function, leaves, gradients)]

    def _results(self, function: Function, leaves: list[Tensor], gradients: list[Tensor]) -> tuple[Tensor, ...]:
        """Outputs, and the leaves' gradients where there is a backward."""
        if not self.has_backward:
            return function(*leaves)
        leaves = [x.detach().requires_grad_() for x in leaves]
        outputs = function(*leaves)
        return *outputs, *torch.autograd.grad(outputs, leaves, gradients)

    def _passes(
        self, function: Function, leaves: list[Tensor], gradients: list[Tensor]
    ) -> Iterator[tuple[str, Callable[[], object]]]:
        yield FORWARD, lambda: function(*leaves)
        if self.has_backward:
            leaves = [x.detach().requires_grad_() for x in leaves]
            outputs = function(*leaves)
            yield BACKWARD, lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)
            yield BOTH, lambda: torch.autograd.grad(function(*leaves), leaves, gradients)

    def _row(self, name: str, run: Callable[[], object], machine: Machine, ceilings: Ceilings) -> Row:
        peak, ms = machine.peak_allocated(run), machine.kernel_ms(run)
        work = {"num_bytes": self.num_bytes.get(name), "num_flops": self.num_flops.get(name)}
        return {"pass": name, "ms": ms} | ceilings.rates(ms, **work) | peak


def _label(machine: Machine, *parts: object) -> str:
    return f"{' x '.join(map(str, parts))} {str(machine.dtype).removeprefix('torch.')}"


def _passes(forward: int, backward: int) -> dict[str, int]:
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}


def _one(function: Callable[..., Tensor]) -> Function:
    """A function of one result as one of a tuple."""
    return lambda *leaves: (function(*leaves),)


@contextmanager
def blas(library: str) -> Iterator[None]:
    """cuBLAS or cuBLASLt for PyTorch's products; a preference, which PyTorch may not follow everywhere."""
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(library)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


# ------------------------------------------------------------------------------------------ limited by memory


def add_layer_norm_cases(machine: Machine, size: Size) -> Iterator[OperatorCase]:
    def inputs() -> tuple[list[Tensor], list[Tensor]]:
        streams = [machine.normal(*size.stream) for _ in range(4)]
        return [*streams[:2], machine.normal(size.width), machine.normal(size.width)], streams[2:]

    stream = size.batch * size.tokens * size.width * machine.dtype.itemsize
    yield OperatorCase(
        operator="add_layer_norm",
        label=_label(machine, *size.stream),
        inputs=inputs,
        providers={
            "triton": Provider(partial(add_layer_norm, backend="triton")),
            "eager": Provider(add_layer_norm_reference),
            "compile": Provider(machine.compile(add_layer_norm_reference)),
        },
        reference=add_layer_norm_reference,
        num_bytes=_passes(4 * stream, 4 * stream),
    )


def packed_attention_cases(machine: Machine, size: Size) -> Iterator[OperatorCase]:
    """Without a bias, as a linear layer leaves it: that is what SDPA can be compared with."""

    def inputs() -> tuple[list[Tensor], list[Tensor]]:
        qkv = machine.normal(size.batch, size.tokens, 3, size.heads, size.head_dim)
        return [qkv], [machine.normal(*size.stream)]

    reference = _one(packed_attention_reference)
    part = size.batch * size.tokens * size.width * machine.dtype.itemsize  # one of q, k, v, out
    yield OperatorCase(
        operator="packed_attention",
        label=_label(machine, size.batch, size.tokens, size.heads, size.head_dim),
        inputs=inputs,
        providers={
            "triton": Provider(_one(partial(packed_attention, backend="triton"))),
            "SDPA flash": Provider(reference, partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION)),
            "SDPA cuDNN": Provider(reference, partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION)),
            "SDPA math": Provider(reference, partial(sdpa_kernel, SDPBackend.MATH)),
            "compile": Provider(_one(machine.compile(packed_attention_reference))),
        },
        reference=reference,
        num_bytes=_passes(4 * part, 7 * part),
    )


def distillation_loss_cases(machine: Machine, size: Size) -> Iterator[OperatorCase]:
    """PyTorch's loss alone: whether a kernel could be worth it (docs/kernels.md says why there is none)."""
    shape = (size.batch, size.num_classes)
    teacher_logits = machine.normal(*shape)
    targets = machine.normal(*shape).softmax(dim=1).float()
    loss = DistillationLoss(DistillConfig())

    def reference(logits: Tensor) -> Tensor:
        return loss(logits, targets, teacher_logits).total

    logits = size.batch * size.num_classes * machine.dtype.itemsize
    yield OperatorCase(
        operator="distillation_loss",
        label=_label(machine, *shape),
        inputs=lambda: ([machine.normal(*shape)], [torch.ones((), device=machine.device)]),
        providers={
            "eager": Provider(_one(reference)),
            "compile": Provider(_one(machine.compile(reference))),
        },
        reference=_one(reference),
        num_bytes=_passes(2 * logits, 3 * logits),  # both logits read; read again, and one gradient written
    )


# -------------------------------------------------------------------------------------- limited by arithmetic


def linear_cases(machine: Machine, size: Size) -> Iterator[OperatorCase]:
    """A block's four products with their biases, by cuBLAS and by cuBLASLt: what `linear_gelu` has to come near."""
    width = size.width
    for name, inner, out in (
        *(("qkv", width, 3 * width), ("proj", width, width)),
        *(("fc1", width, 4 * width), ("fc2", 4 * width, width)),
    ):
        yield _linear_case(machine, size, name, inner, out)


def _linear_case(machine: Machine, size: Size, name: str, inner: int, out: int) -> OperatorCase:
    def inputs() -> tuple[list[Tensor], list[Tensor]]:
        x, d_out = machine.normal(size.batch, size.tokens, inner), machine.normal(size.batch, size.tokens, out)
        return [x, machine.normal(out, inner, deviation=inner**-0.5), machine.normal(out)], [d_out]

    forward = 2 * size.batch * size.tokens * inner * out
    return OperatorCase(
        operator="linear",
        label=f"{name} {_label(machine, size.batch * size.tokens, inner, out)}",
        inputs=inputs,
        providers={
            "cuBLAS": Provider(_one(F.linear), partial(blas, "cublas")),
            "cuBLASLt": Provider(_one(F.linear), partial(blas, "cublaslt")),
            "compile": Provider(_one(machine.compile(F.linear))),
        },
        reference=_one(F.linear),
        num_flops=_passes(forward, 2 * forward),
    )


def _persistent(machine: Machine, function: Function) -> dict[str, Provider]:
    return {"triton, persistent": Provider(function)} if tiles.is_hopper(torch.device(machine.device)) else {}


def linear_gelu_cases(machine: Machine, size: Size) -> Iterator[OperatorCase]:
    """The MLP's first half forward, which also leaves z for the backward; cuBLASLt's epilogue leaves none."""
    inner, hidden, rows = size.width, 4 * size.width, size.batch * size.tokens

    def inputs() -> tuple[list[Tensor], list[Tensor]]:
        first = machine.normal(hidden, inner, deviation=inner**-0.5), machine.normal(hidden)
        return [machine.normal(rows, inner), *first], []

    def reference(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        z = F.linear(x, weight, bias)
        return F.gelu(z), z

    def epilogue(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (torch._addmm_activation(bias, x, weight.t(), use_gelu=True),)  # GELU by tanh

    def ours(*leaves: Tensor, persistent: bool = False) -> tuple[Tensor, ...]:
        return linear_gelu_forward(*leaves, save=True, persistent=persistent)

    yield OperatorCase(
        operator="linear_gelu",
        label=_label(machine, rows, inner, hidden),
        inputs=inputs,
        providers={
            "triton": Provider(ours),
            **_persistent(machine, partial(ours, persistent=True)),
            "eager": Provider(reference),
            "cuBLASLt epilogue, without z": Provider(epilogue, partial(blas, "cublaslt")),
            "compile": Provider(machine.compile(reference)),
        },
        reference=reference,
        num_flops={FORWARD: 2 * rows * inner * hidden},
    )


def linear_gelu_backward_cases(machine: Machine, size: Size) -> Iterator[OperatorCase]:
    """The second layer's input gradient times GELU', the first layer's bias gradient, and GELU(z) again."""
    inner, hidden, rows = size.width, 4 * size.width, size.batch * size.tokens

    def inputs() -> tuple[list[Tensor], list[Tensor]]:
        weight = machine.normal(inner, hidden, deviation=inner**-0.5)
        return [machine.normal(rows, inner), weight, machine.normal(rows, hidden)], []

    def reference(dy: Tensor, weight: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        dz = torch.ops.aten.gelu_backward(dy @ weight, z)
        return dz, F.gelu(z), dz.sum(dim=0, dtype=torch.float32)

    yield OperatorCase(
        operator="linear_gelu_backward",
        label=_label(machine, rows, inner, hidden),
        inputs=inputs,
        providers={
            "triton": Provider(linear_gelu_backward),
            **_persistent(machine, partial(linear_gelu_backward, persistent=True)),
            "eager": Provider(reference),
            "compile": Provider(machine.compile(reference)),
        },
        reference=reference,
        num_flops={FORWARD: 2 * rows * inner * hidden},
    )


def mlp_cases(machine: Machine, size: Size) -> Iterator[OperatorCase]:
    width, hidden = size.width, 4 * size.width

    def inputs() -> tuple[list[Tensor], list[Tensor]]:
        first = machine.normal(hidden, width, deviation=width**-0.5), machine.normal(hidden)
        second = machine.normal(width, hidden, deviation=hidden**-0.5), machine.normal(width)
        return [machine.normal(*size.stream), *first, *second], [machine.normal(*size.stream)]

    forward = 2 * 2 * size.batch * size.tokens * width * hidden
    yield OperatorCase(
        operator="mlp",
        label=_label(machine, *size.stream),
        inputs=inputs,
        providers={
            "triton": Provider(_one(partial(mlp, backend="triton"))),
            "eager": Provider(_one(mlp_reference)),
            "compile": Provider(_one(machine.compile(mlp_reference))),
        },
        reference=_one(mlp_reference),
        num_flops=_passes(forward, 2 * forward),
    )


def block_cases(machine: Machine, size: Size) -> Iterator[OperatorCase]:
    yield _stage_case(machine, size, repeats=1)


def stage_cases(machine: Machine, size: Size) -> Iterator[OperatorCase]:
    yield _stage_case(machine, size, repeats=3)


def _stage_case(machine: Machine, size: Size, repeats: int) -> OperatorCase:
    """A shared stage, or with one repeat a block, against timm's Block run as often on the same weights."""
    width, heads, hidden = size.width, size.heads, 4 * size.width

    def new_block() -> Block:
        norm = partial(torch.nn.LayerNorm, eps=1e-6)
        return Block(width, heads, qkv_bias=True, norm_layer=norm).to(machine.device, machine.dtype)

    timm_block = new_block()
    names = [name for name, _ in timm_block.named_parameters()]

    def inputs() -> tuple[list[Tensor], list[Tensor]]:
        x, dy = machine.normal(*size.stream), machine.normal(*size.stream)
        return [x, *(parameter.detach() for parameter in new_block().parameters())], [dy]

    def ours(x: Tensor, *weights: Tensor, recompute: bool = False, backend: str = "triton") -> tuple[Tensor, ...]:
        return (stage(x, StageWeights(*weights), repeats, heads, recompute=recompute, backend=backend),)

    def timms(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        parameters = dict(zip(names, weights, strict=True))
        for _ in range(repeats):
            x = torch.func.functional_call(timm_block, parameters, (x,))
        return (x,)

    compiled = machine.compile(timms)
    rows = size.batch * size.tokens
    forward = repeats * (2 * rows * width * (4 * width + 2 * hidden) + 4 * rows * size.tokens * width)
    return OperatorCase(
        operator="stage" if repeats > 1 else "block",
        label=f"{_label(machine, *size.stream)}, {repeats} repeats",
        inputs=inputs,
        providers={
            "triton": Provider(ours),
            "triton, recomputed": Provider(partial(ours, recompute=True)),
            "eager timm": Provider(timms),
            "compile timm, flash": Provider(compiled, partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION)),
            "compile timm, cuDNN": Provider(compiled, partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION)),
        },
        reference=partial(ours, backend="reference"),
        num_flops=_passes(forward, 2 * forward),
        tolerance=0.05,  # a chain of bf16 products
    )
