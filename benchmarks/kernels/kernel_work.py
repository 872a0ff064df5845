"""Say what work the kernels and a training step do, and how long an H100 or an H200 would need for it.

A kernel is its bytes, its matrix products, the instructions that it issues (counted in machine-code.md) and how many of
its programs fit on a multiprocessor. Nothing overlaps within a program but its loads and products:

    chain   = max(read, product) + issue + write
    busiest = max(read + write, product, issue)
    time    = launch + (busiest + (chain - busiest) / resident programs) * whole waves / waves

So the unit that has most to do is always busy, and each of the programs that share a multiprocessor hides its part of
the rest. What is not counted is a constant below, with its source. No constant was fitted to a kernel's time, but the
form of the model was chosen when the H200's times were known. No figure of it is a measurement.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.kernels.measure import Machine, Size
from benchmarks.kernels.operator_case import BACKWARD, FORWARD
from benchmarks.kernels.public_figures import ATTENTION
from sws_kernels import launch_config

RESULTS = Path(__file__).parents[1] / "results"

# ---------------------------------------------------------------------------------------------------- assumptions

# The peak: 4096 operations a cycle and multiprocessor at 1.83 GHz, as in NVIDIA's data sheets of the H100 and H200 SXM.
MULTIPROCESSORS, CLOCK_HZ = 132, 1.83e9
PEAK_FLOPS = MULTIPROCESSORS * CLOCK_HZ * 4096
PEAK_BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}  # bytes/s, from the same data sheets
# What an H200 reached of these peaks on a plain product of 8192 and a copy of 2 GiB: the ceilings in kernels.json. An
# H100 is assumed to reach the same shares.
PRODUCT_SHARE, COPY_SHARE = 0.80, 0.885
SCHEDULERS = 4  # of a multiprocessor; each issues an instruction of a warp in a cycle (NVIDIA's H100 white paper)
CYCLES_PER_INSTRUCTION = 1.7  # of a warp, with its compiled stalls; `cuxray sched` estimates 1.4 to 2.1 in our loops
LAUNCH_S = 2e-6  # from a kernel's end to the start of the next one in a CUDA graph; assumed
# cuBLAS: one program on a multiprocessor, no part of a tile is wasted, few instructions beside the products; assumed.
# AdamW, the average and the copies: fp32 master, two moments and average read and written, gradients and weights.
OPTIMIZER_BYTES_A_PARAMETER = 4 * 8 + 2 + 4 + 4 + 4 + 2
BF16, FP32 = 2, 4  # bytes
# The most that cuDNN's attention was published to reach with heads of 64.
CUDNN_FLOPS = {
    name: 1e12 * max(figure.tflop_per_s for figure in ATTENTION if (figure.provider, figure.passes) == ("cuDNN", name))
    for name in (FORWARD, BACKWARD)
}
ADDS_A_REPEAT = 12  # launches that add a repeat's weight gradients to the stage's or round them (kernels/stage.py)


@dataclass(frozen=True)
class Work:
    """Hold what a kernel does: bytes, operations, instructions of warps, and programs, all together and at once."""

    read: float
    written: float
    flops: float = 0
    issued: float = 0
    programs: int = MULTIPROCESSORS
    resident: int = 1  # programs on a multiprocessor

    def seconds(self, gpu: str) -> float:
        bandwidth = PEAK_BANDWIDTH[gpu] * COPY_SHARE
        read, written = self.read / bandwidth, self.written / bandwidth
        product = self.flops / (PEAK_FLOPS * PRODUCT_SHARE)
        issue = self.issued * CYCLES_PER_INSTRUCTION / (SCHEDULERS * MULTIPROCESSORS * CLOCK_HZ)
        busiest = max(read + written, product, issue)
        chain = max(read, product) + issue + written
        waves = self.programs / (self.resident * MULTIPROCESSORS)
        return LAUNCH_S + (busiest + max(0.0, chain - busiest) / self.resident) * math.ceil(waves) / waves


def total(works: Iterable[Work], gpu: str) -> float:
    return sum(work.seconds(gpu) for work in works)


# --------------------------------------------------------------------------------------------------------- kernels


def read_machine_code() -> dict[tuple[str, str], dict[str, int]]:
    """Return {(kernel, shape): columns} of machine-code.md for Hopper in bf16."""
    lines = (RESULTS / "machine-code.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    rows = [dict(zip(cells[0], row, strict=True)) for row in cells[1:]]
    return {
        (row["kernel"], row["shape"]): {name: int(value) for name, value in row.items() if value.isdigit()}
        for row in rows
        if (row["dtype"], row["arch"]) == ("bf16", "90")
    }


class Kernels:
    """Give the work of each kernel at one size of model, in bf16 on Hopper."""

    def __init__(self, size: Size) -> None:
        self.size, self.code = size, read_machine_code()
        self.rows, self.hidden = size.batch * size.tokens, 4 * size.width
        self.stream = self.rows * size.width * BF16  # bytes of a [B, T, D] tensor

    def own(
        self, kernel: str, shape: str, read: float, written: float, programs: int, *, flops: float = 0, trips: float = 0
    ) -> Work:  # fmt: skip
        """Return a kernel of ours, of which ``programs`` are launched and repeat their loop ``trips`` times."""
        code = self.code[kernel, shape]
        issued = (code["instructions"] + trips * code["in_loop"]) * code["threads"] / 32 * programs
        return Work(read, written, flops, issued, programs, code["programs"])

    def norm_forward(self, tensors_read: int = 2, tensors_written: int = 2) -> list[Work]:
        tile = launch_config.add_layer_norm(self.size.width)["forward"]["R"]
        moved = tensors_read * self.stream, tensors_written * self.stream
        return [self.own("add_layer_norm_forward", self._width, *moved, programs=math.ceil(self.rows / tile))]

    def norm_backward(self, tensors_written: int) -> list[Work]:
        tile = launch_config.add_layer_norm(self.size.width)["backward"]["R"]
        programs = launch_config.norm_programs(self.size.width) * MULTIPROCESSORS
        trips = self.rows / tile / programs
        moved = 3 * self.stream, tensors_written * self.stream
        work = self.own("add_layer_norm_backward", self._width, *moved, programs=programs, trips=trips)
        return [work, self._partial_sums(programs * 3 * self.size.width)]

    def gelu_forward(self) -> list[Work]:
        h = self.rows * self.hidden * BF16
        return [self.own("linear_gelu_forward", self._width, self.stream, 2 * h, **self._gelu_work())]

    def gelu_backward(self) -> list[Work]:
        z = self.rows * self.hidden * BF16
        work = self.own("linear_gelu_backward", self._width, self.stream + z, 2 * z, **self._gelu_work())
        return [work, self._partial_sums(self._gelu_tiles[0] * self.hidden)]

    def _gelu_work(self) -> dict[str, int]:
        return {"flops": 2 * self.rows * self.size.width * self.hidden, "programs": math.prod(self._gelu_tiles)}

    @property
    def _gelu_tiles(self) -> tuple[int, int]:
        """Return the number of tiles along the rows and along the columns."""
        tile = launch_config.linear_gelu(self.size.width, self.hidden, Machine().dtype, hopper=True)["forward"]
        return math.ceil(self.rows / tile["BM"]), math.ceil(self.hidden / tile["BN"])

    def attention_forward(self) -> list[Work]:
        return [self._attention("forward", "M", "N", 2, 3 * self.stream, self.stream)]

    def attention_backward(self) -> list[Work]:
        queries = self._attention("backward_queries", "M", "N", 3, 5 * self.stream, self.stream)
        return [queries, self._attention("backward_keys", "N", "M", 4, 4 * self.stream, 2 * self.stream)]

    def _attention(self, kernel: str, own: str, other: str, products: int, read: float, written: float) -> Work:
        """Return a pass in which a program has ``own`` rows of a head and goes over all in steps of ``other``."""
        size = self.size
        launch = launch_config.packed_attention(size.tokens, size.head_dim, Machine().dtype, hopper=True)[kernel]
        blocks, trips = math.ceil(size.tokens / launch[own]), math.ceil(size.tokens / launch[other])
        programs = blocks * size.batch * size.heads
        flops = products * 2 * launch[own] * trips * launch[other] * size.head_dim * programs
        shape = f"577 tokens, heads of {size.head_dim}"  # the same tiles
        return self.own(f"packed_attention_{kernel}", shape, read, written, flops=flops, programs=programs, trips=trips)

    def linear(self, inner: int, out: int) -> list[Work]:
        """Return cuBLAS's product of [rows, inner] with a weight; also the gradient of its input, turned round."""
        read, written = (self.rows + out) * inner * BF16, self.rows * out * BF16
        return [Work(read, written, 2 * self.rows * inner * out)]

    def weight_gradient(self, inner: int, out: int, element: int = FP32) -> list[Work]:
        read = self.rows * (inner + out) * BF16
        return [Work(read, inner * out * element, 2 * self.rows * inner * out)]

    def column_sum(self, columns: int) -> list[Work]:
        read = self.rows * columns * BF16
        return [Work(read, 0), self._partial_sums(4 * MULTIPROCESSORS * columns)]

    def _partial_sums(self, elements: float) -> Work:
        return Work(elements * FP32, 0)

    @property
    def _width(self) -> str:
        return f"width {self.size.width}"

    # ------------------------------------------------------------------------------------------------- operators

    def mlp(self) -> dict[str, list[Work]]:
        width, hidden = self.size.width, self.hidden
        forward = self.gelu_forward() + self.linear(hidden, width)
        backward = self.gelu_backward() + self.linear(hidden, width) + 2 * self.weight_gradient(width, hidden)
        return {FORWARD: forward, BACKWARD: backward}

    def stage(self, repeats: int, *, drop_path: bool = False) -> dict[str, list[Work]]:
        width, mlp = self.size.width, self.mlp()
        forward = 2 * self.norm_forward() + self.linear(width, 3 * width) + self.attention_forward()
        forward += self.linear(width, width) + mlp[FORWARD]
        backward = mlp[BACKWARD] + 2 * self.norm_backward(3 if drop_path else 2) + self.attention_backward()
        backward += self.linear(width, width) + self.linear(3 * width, width)
        backward += self.weight_gradient(width, width) + self.weight_gradient(width, 3 * width)
        backward += self.column_sum(3 * width) + ADDS_A_REPEAT * [Work(0, 0)]
        return {FORWARD: repeats * forward, BACKWARD: repeats * backward}

    def step(self) -> list[Work]:
        """Return a step whose launches cost nothing: stages, patch embedding, optimizer; head and loss are left out."""
        stages = self.stage(sum(self.size.schedule), drop_path=True)
        return stages[FORWARD] + stages[BACKWARD] + self._rest_of_step()

    def compiled_timm_step(self) -> list[Work]:
        """Return a step of compiled timm with everything in its favour.

        Elementwise code is fused into as few kernels as the products and attention between it allow, and into none of
        these; attention reaches cuDNN's best published rate; no bias gradient costs a read of its own, and no gradient
        a copy.
        """
        width, hidden, stream = self.size.width, self.hidden, self.stream
        layers = (width, 3 * width), (width, width), (width, hidden), (hidden, width)
        attention = 4 * self.rows * self.size.tokens * width * PEAK_FLOPS * PRODUCT_SHARE  # over cuDNN's rate
        forward = [
            *(work for inner, out in layers for work in self.linear(inner, out)),
            *2 * [Work(2 * stream, 2 * stream)],  # add, LayerNorm
            Work(4 * stream, 4 * stream),  # GELU
            Work(3 * stream, stream, attention / CUDNN_FLOPS[FORWARD]),
        ]
        backward = [
            *(work for inner, out in layers for work in self.linear(out, inner)),
            *(work for inner, out in layers for work in self.weight_gradient(inner, out, BF16)),
            *2 * [Work(3 * stream, 2 * stream)],
            Work(8 * stream, 4 * stream),
            Work(5 * stream, 3 * stream, 2.5 * attention / CUDNN_FLOPS[BACKWARD]),
        ]
        return sum(self.size.schedule) * (forward + backward) + self._rest_of_step()

    def _rest_of_step(self) -> list[Work]:
        size, pixels = self.size, 3 * self.size.patch**2
        works = self.linear(pixels, size.width) + self.weight_gradient(pixels, size.width)
        parameters = len(size.schedule) * 12 * size.width**2 + (size.num_classes + pixels + size.tokens) * size.width
        return [*works, Work(parameters * OPTIMIZER_BYTES_A_PARAMETER, 0)]
