"""Inputs and checks of stage, shared by the interpreter's tests and the GPU's."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sws_kernels.stage import StageWeights, stage
from tests.kernels.numerics import Tensors, assert_as_accurate

EPS = 1e-6


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    weights: StageWeights
    repeats: int
    num_heads: int
    scales: Tensor | None
    dy: Tensor

    def double(self) -> "Inputs":
        weights = StageWeights(*(None if w is None else w.double() for w in self.weights))
        scales = None if self.scales is None else self.scales.double()
        return replace(self, x=self.x.double(), weights=weights, scales=scales, dy=self.dy.double())


def make_inputs(
    shape: tuple[int, int, int],
    repeats: int,
    num_heads: int,
    dtype: torch.dtype,
    device: str,
    *,
    hidden: int | None = None,
    drop_path: bool = False,
    qkv_bias: bool = True,
) -> Inputs:
    """x [B, T, D] and the rest. Weights as a trained network might have them: every branch matters."""
    generator = torch.Generator().manual_seed(sum(shape) + repeats)
    num_samples, _, width = shape
    hidden = hidden or 4 * width

    def normal(*size: int, deviation: float = 1.0) -> Tensor:
        return (deviation * torch.randn(size, generator=generator)).to(device, dtype)

    def linear(out: int, inner: int) -> tuple[Tensor, Tensor]:
        return normal(out, inner, deviation=inner**-0.5), normal(out, deviation=0.2)

    def norm() -> tuple[Tensor, Tensor]:
        return 1 + normal(width, deviation=0.2), normal(width, deviation=0.2)

    weights = StageWeights(
        *norm(), *linear(3 * width, width), *linear(width, width), *norm(), *linear(hidden, width),
        *linear(width, hidden),
    )  # fmt: skip
    if not qkv_bias:
        weights = weights._replace(b_qkv=None)
    scales = None
    if drop_path:  # dropped here and there; 1/0.75 is inexact in every dtype
        kept = torch.arange(repeats * 2 * num_samples).view(repeats, 2, num_samples) % 3 != 1
        scales = (kept / 0.75).to(device, torch.float32)
    return Inputs(normal(*shape), weights, repeats, num_heads, scales, normal(*shape))


def run(inputs: Inputs, backend: str, function=stage, **arguments) -> Tensors:
    """The output and all gradients, by name."""
    x = inputs.x.detach().requires_grad_()
    weights = StageWeights(*(None if w is None else w.detach().requires_grad_() for w in inputs.weights))
    y = function(x, weights, inputs.repeats, inputs.num_heads, EPS, inputs.scales, backend=backend, **arguments)
    leaves = {"x": x} | {name: w for name, w in weights._asdict().items() if w is not None}
    gradients = torch.autograd.grad(y, list(leaves.values()), inputs.dy)
    return {"y": y.detach(), **{f"d_{name}": d for name, d in zip(leaves, gradients, strict=True)}}


def check_accuracy(inputs: Inputs, **arguments) -> None:
    """Triton against PyTorch in the same dtype, both against fp64; and no input is written to."""
    tensors = [inputs.x, inputs.dy, *(w for w in inputs.weights if w is not None)]
    before = [tensor.clone() for tensor in tensors]
    got = run(inputs, "triton", **arguments)
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True)), "an input was changed"
    assert_as_accurate(got, run(inputs, "reference"), run(inputs.double(), "reference"))


def check_bitwise_repeatable(inputs: Inputs) -> None:
    first, second = run(inputs, "triton"), run(inputs, "triton")
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def check_compiled(inputs: Inputs, compiler: str) -> None:
    """torch.compile takes the stage whole (no graph break). Inductor may round PyTorch's parts otherwise."""
    torch.compiler.reset()
    compiled = torch.compile(stage, backend=compiler, fullgraph=True)
    eager = run(inputs, "triton")
    for name, value in run(inputs, "triton", compiled).items():
        if compiler == "aot_eager":
            assert torch.equal(value, eager[name]), name
        else:
            distance = (value.float() - eager[name].float()).norm() / eager[name].float().norm()
            assert distance < 0.02, f"{name}: {distance:.3g}"
