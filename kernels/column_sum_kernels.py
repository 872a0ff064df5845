"""Define the Triton kernel of `column_sum`.

Shapes: S matrices of N rows and F columns; P programs for each matrix and block of C columns.
"""

import triton
import triton.language as tl


@triton.jit
def column_sum_kernel(
    x_ptr,  # [S, N, F]
    scale_ptr,  # [N / tokens] or None
    scaled_ptr,  # [S, N, F] out, or None without a scale
    partials_ptr,  # [S, P, F] fp32 out
    num_rows,
    tokens,
    F: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
):
    """Multiply by the scale and store, if there is one, and sum every P-th tile of R rows."""
    program, matrix = tl.program_id(0), tl.program_id(2)
    cols = tl.program_id(1) * C + tl.arange(0, C)
    total = tl.zeros([R, C], tl.float32)  # adding tiles needs no exchange between threads; only the end does
    for tile in range(program, tl.cdiv(num_rows, R), tl.num_programs(0)):
        rows = tile * R + tl.arange(0, R)
        row_mask = rows < num_rows
        mask = row_mask[:, None] & (cols < F)[None, :]
        at = (matrix * num_rows + rows).to(tl.int64)[:, None] * F + cols[None, :]  # int64: N * F may exceed 2^31
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if scale_ptr is not None:
            x *= tl.load(scale_ptr + rows // tokens, mask=row_mask, other=0.0).to(tl.float32)[:, None]
            tl.store(scaled_ptr + at, x.to(scaled_ptr.dtype.element_ty), mask=mask)
        total += x
    at = (matrix * tl.num_programs(0) + program) * F + cols
    tl.store(partials_ptr + at, tl.sum(total, axis=0), mask=cols < F)
