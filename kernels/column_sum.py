"""Sum the rows of a matrix, which is the bias gradient of a linear layer, in one pass over memory.

    sums[f] = sum over n of x[n, f]

Shapes: N rows, F columns, P programs for each block of C columns.

    x                         [N, F]     fp32, fp16 or bf16
    partials                  [P, F]     fp32, each program's share
    sums                      [F]        fp32

PyTorch's own sum over the rows of a tall half-precision matrix reached a fifth of an H200's memory bandwidth
(benchmarks/results/kernels.json).
"""

import torch
import triton
from torch import Tensor

from sws_kernels import launch_config
from sws_kernels.column_sum_kernels import column_sum_kernel


@torch.library.custom_op("sws_kernels::column_sum", mutates_args=())
def column_sum(x: Tensor) -> Tensor:
    """Sum x [N, F] over its rows, to fp32 [F]. Equal inputs give equal bits on equal GPUs."""
    num_rows, width = x.shape
    launch = launch_config.column_sum(width)
    num_blocks = triton.cdiv(width, launch["C"])
    wanted = launch_config.COLUMN_SUM_PROGRAMS_PER_SM * launch_config.num_multiprocessors(x.device)
    num_programs = max(1, min(triton.cdiv(num_rows, launch["R"]), wanted // num_blocks))
    partials = x.new_empty((num_programs, width), dtype=torch.float32)
    with torch.cuda.device_of(x):  # Triton launches on the current device, not on the tensors'
        column_sum_kernel[(num_programs, num_blocks)](x.contiguous(), partials, num_rows, width, **launch)
    # The second stage adds a fixed number of rows in a fixed order, without atomics.
    return partials.sum(dim=0)


@column_sum.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=torch.float32)
