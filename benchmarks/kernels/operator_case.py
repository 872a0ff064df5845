"""Check and time the providers of one operator at one shape."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
import torch._functorch.config
from torch import Tensor

from benchmarks.kernels.measure import Ceilings, Machine, Row

Function = Callable[..., tuple[Tensor, ...]]
Inputs = Callable[[], tuple[list[Tensor], list[Tensor]]]
FORWARD, BACKWARD, BOTH = "forward", "backward", "both"


@dataclass(frozen=True)
class Provider:
    """Hold one way to compute an operator, and a context for all of it: checking, compiling and timing."""

    function: Function
    context: Callable[[], AbstractContextManager] = nullcontext


@dataclass(frozen=True)
class OperatorCase:
    """Hold one operator at one shape. `inputs` makes (leaves, output gradients); the work is given for each pass.

    num_bytes is for operators that memory limits, num_flops for those that arithmetic limits. The other is left empty.
    """

    operator: str
    label: str
    inputs: Inputs
    providers: dict[str, Provider]
    reference: Function
    num_bytes: dict[str, int] = field(default_factory=dict)
    num_flops: dict[str, int] = field(default_factory=dict)
    tolerance: float = 0.02  # relative, of the whole tensor: it keeps nonsense from being timed; the tests are stricter

    @property
    def has_backward(self) -> bool:
        return BACKWARD in self.num_bytes | self.num_flops

    def measure(self, provider: str, machine: Machine, ceilings: Ceilings) -> list[Row]:
        """Return a row for each pass.

        Raises:
            ValueError: the provider's results are wrong.
        """
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
        """Return the outputs, and the leaves' gradients where there is a backward."""
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


def label(machine: Machine, *parts: object) -> str:
    """Return the shape and the dtype as text."""
    return f"{' x '.join(map(str, parts))} {str(machine.dtype).removeprefix('torch.')}"


def work(forward: int, backward: int) -> dict[str, int]:
    """Return the work of each pass."""
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}


def tupled(function: Callable[..., Tensor]) -> Function:
    """Wrap a function of one result as one that returns a tuple."""
    return lambda *leaves: (function(*leaves),)


@contextmanager
def blas(library: str) -> Iterator[None]:
    """Prefer cuBLAS or cuBLASLt for PyTorch's products. PyTorch may not follow the preference everywhere."""
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(library)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)
