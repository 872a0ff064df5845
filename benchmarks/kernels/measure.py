"""Prepare, check and time a case and put it into rows; measure what the GPU reaches on a plain task."""

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

import torch

Row = dict[str, Any]
CACHE_BYTES = 2**28  # more than any GPU's L2 cache
CLOCK_HZ = 2e9  # at least a GPU's; it turns seconds into the cycles of torch.cuda._sleep


@dataclass(frozen=True)
class Size:
    """Hold a model's geometry and batch. The defaults are the paper's auxiliary model at the batch of our estimates."""

    name: str
    width: int
    batch: int = 256
    image: int = 224
    patch: int = 16
    head_dim: int = 64
    schedule: tuple[int, ...] = (3, 3, 4, 3, 3)
    num_classes: int = 1000
    teacher: str = "levit_384"  # with random weights: a teacher's time does not depend on them

    @property
    def tokens(self) -> int:
        return (self.image // self.patch) ** 2

    @property
    def heads(self) -> int:
        return self.width // self.head_dim

    @property
    def stream(self) -> tuple[int, int, int]:
        return self.batch, self.tokens, self.width


@dataclass(frozen=True)
class Machine:
    """Say where and in which dtype cases are timed: on a GPU in bf16. The tests take a CPU, tiny sizes and fp32."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    rounds: int = 3
    calls: int = 25  # of an operator
    compile_mode: str = "max-autotune"  # of torch.compile; "reduce-overhead" compiles in a minute and takes cuBLAS

    def compile(self, function: Callable, *, cuda_graphs: bool = False) -> Callable:
        """Apply torch.compile in `compile_mode`; on a CPU the same tracing without a code generator."""
        if self.device != "cuda":
            return torch.compile(function, backend="aot_eager", dynamic=False)
        without_graphs = {"max-autotune": "max-autotune-no-cudagraphs", "reduce-overhead": "default"}
        mode = self.compile_mode if cuda_graphs else without_graphs[self.compile_mode]
        return torch.compile(function, mode=mode, dynamic=False)

    def normal(self, *size: int, deviation: float = 1.0) -> torch.Tensor:
        """Draw in fp32, so that the numbers are the same in every dtype."""
        return (torch.randn(size, device=self.device) * deviation).to(self.dtype)

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def kernel_ms(self, run: Callable[[], Any]) -> float:
        """Return the median of the device's time of one call, with the cache cleared before each.

        The device sleeps until all launches of the call are queued. Otherwise a call of several short kernels would be
        measured by what their launches take.
        """
        if self.device != "cuda":
            return self.wall_ms(run, calls=1)
        run()
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        queueing = time.perf_counter() - start
        torch.cuda.synchronize()
        cache = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=self.device)
        times = []
        for _ in range(self.calls):
            cache.zero_()
            torch.cuda._sleep(int(2 * queueing * CLOCK_HZ))
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            run()
            after.record()
            after.synchronize()
            times.append(before.elapsed_time(after))
        return median(times)

    def wall_ms(self, run: Callable[[], Any], calls: int = 30) -> float:
        """Return the clock's time of one call among many, launches included: the median of ``rounds`` rounds."""
        times = []
        for _ in range(self.rounds):
            self.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                run()
            self.synchronize()
            times.append(1e3 * (time.perf_counter() - start) / calls)
        return median(times)

    def peak_allocated(self, run: Callable[[], Any]) -> Row:
        """Return the most memory that one call holds beyond what is allocated before it."""
        if self.device != "cuda":
            return {}
        self.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return {"peak_bytes": torch.cuda.max_memory_allocated() - before}

    def reserved_bytes(self, *, peak: bool = False) -> int:
        """Return the device memory that this process holds, or the most that it has held since `fresh`."""
        if self.device != "cuda":
            return 0
        return torch.cuda.max_memory_reserved() if peak else torch.cuda.memory_reserved()

    def fresh(self, *, keep_code: bool = False) -> None:
        """Give back unused memory and drop compiled code, which torch.compile finds again by its source alone.

        It does not see that attention's backend has changed: without this, flash's code would run as cuDNN's.
        """
        if not keep_code:
            torch.compiler.reset()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


@dataclass(frozen=True)
class Ceilings:
    """Hold what this GPU reaches on a plain task, with which the operators are compared."""

    copy_gb_per_s: float
    matmul_tflop_per_s: float

    def rates(self, ms: float, *, num_bytes: int | None = None, num_flops: int | None = None) -> Row:
        """Return GB/s or TFLOP/s of the work that every provider must do, and its share of the ceiling."""
        rates = {}
        if num_bytes is not None:
            gb_per_s = num_bytes / ms / 1e6
            rates |= {"gb_per_s": gb_per_s, "of_copy": gb_per_s / self.copy_gb_per_s}
        if num_flops is not None:
            tflop_per_s = num_flops / ms / 1e9
            rates |= {"tflop_per_s": tflop_per_s, "of_matmul": tflop_per_s / self.matmul_tflop_per_s}
        return rates


def measure_ceilings(machine: Machine, side: int = 8192, copied: int = 2**31) -> Ceilings:
    """Time a copy of ``copied`` bytes, read plus write, and a square product of ``side``."""
    source = torch.empty(copied, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    copy_ms = machine.kernel_ms(lambda: target.copy_(source))
    a, b = machine.normal(2, side, side)
    product_ms = machine.kernel_ms(lambda: a @ b)
    return Ceilings(2 * copied / copy_ms / 1e6, 2 * side**3 / product_ms / 1e9)


class Case(Protocol):
    """Describe what can be measured: `operator_case.OperatorCase` or `training_step.StepCase`."""

    operator: str
    label: str

    @property
    def providers(self) -> dict[str, Any]: ...

    def measure(self, provider: str, machine: Machine, ceilings: Ceilings) -> list[Row]: ...


def rows_of(case: Case, machine: Machine, ceilings: Ceilings, providers: Iterable[str] | None = None) -> list[Row]:
    """Return the rows of every provider, or of some. One that fails or is wrong has a row that says so."""
    rows = []
    for provider in case.providers if providers is None else providers:
        machine.fresh()
        head = {"operator": case.operator, "case": case.label, "provider": provider}
        try:
            rows += [head | row for row in case.measure(provider, machine, ceilings)]
        except Exception as error:  # a backend that this GPU or torch lacks, no memory: whatever the provider meets
            rows.append(head | {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"})
    return rows


@dataclass
class Results:
    """Hold what goes into the JSON: where it was measured, and the rows."""

    provenance: Row
    compile_mode: str
    ceilings: Ceilings
    rows: list[Row] = field(default_factory=list)

    def to_dict(self) -> Row:
        return self.provenance | {"compile_mode": self.compile_mode, "ceilings": vars(self.ceilings), "rows": self.rows}
