"""Define the Triton kernel of `column_sum`. Shapes: N rows, F columns, P programs for each block of C columns."""

import triton
import triton.language as tl


@triton.jit
def column_sum_kernel(
    x_ptr,  # [N, F]
    partials_ptr,  # [P, F] fp32 out
    num_rows,
    F: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
):
    """Sum every P-th tile of R rows of one block of C columns."""
    cols = tl.program_id(1) * C + tl.arange(0, C)
    col_mask = (cols < F)[None, :]
    total = tl.zeros([R, C], tl.float32)  # adding tiles needs no exchange between threads; only the end does
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, R), tl.num_programs(0)):
        rows = tile * R + tl.arange(0, R)
        at = x_ptr + rows.to(tl.int64)[:, None] * F + cols[None, :]  # int64: N * F may exceed 2^31
        total += tl.load(at, mask=(rows < num_rows)[:, None] & col_mask, other=0.0).to(tl.float32)
    tl.store(partials_ptr + tl.program_id(0) * F + cols, tl.sum(total, axis=0), mask=cols < F)
