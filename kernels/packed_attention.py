"""Non-causal attention that reads packed QKV as the projection wrote it, and writes packed dQKV.

    x = qkv + bias;  q, k, v = x[:, :, 0], x[:, :, 1], x[:, :, 2]
    out = softmax(scale * q k^T) v          for each sample and head

Shapes. B samples, T tokens, H heads of D; a program handles one head of one sample, M queries by N keys at a time.

    qkv, d_qkv                [B, T, 3, H, D]  fp32, fp16 or bf16
    bias                      [3*H*D]          any of these, or None: the projection has added it
    out, d_out                [B, T, H*D]      qkv's dtype; what the next matrix product reads
    lse                       [B, H, T]        fp32, log-sum-exp of the scaled scores, kept for the backward
    delta                     [B, H, T]        fp32, sum of out * d_out over a head; only between two passes
    partials                  [B, P, 3, H, D]  fp32, sums of d_qkv over each of P blocks of tokens, for d_bias

Scores, softmax and sums are fp32; p and ds are rounded to qkv's dtype where a matrix product takes them. The
scale is applied to fp32 scores, so that no rounded q * scale exists.

The bias costs next to nothing, for a softmax does not see a constant added to all scores of a query. So k's bias
is not read (its gradient is zero) and v's is added to the output; only q's is added when q is loaded. In the
backward v's cancels between dp and delta.

Two structures, one code (WHOLE). **Whole**: all T keys are one block, so a program owns a head and reads each
of its elements once. The forward keeps K and V and needs no running maximum. The backward keeps K, V, dK and
dV and goes over the queries once; a tile of queries meets all keys there, so its dQ is complete (no sum over
programs) and its delta is a sum over p * dp already at hand (`out` is not read). **Blocks**, for longer T:
the forward goes over blocks of keys with a running maximum; the backward takes two passes, dQ by blocks of
queries (leaving delta), then dK and dV by blocks of keys. That computes the scores twice, the price for sums
in a fixed order without atomics. `tiles.py` draws the line, by what registers hold: to 256 tokens at D = 64.

Every d_qkv element is written by one program, and d_bias is summed in two stages of fixed order: equal bits.

Source: Dao et al. 2022, arXiv 2205.14135 and Dao 2023, arXiv 2307.08691 (FlashAttention, FlashAttention-2).
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from sws_kernels import tiles
from sws_kernels.common import Backend, check_triton, contiguous, is_triton

HEAD_DIMS = (32, 64, 128)
LOG2_E = tl.constexpr(1.4426950408889634)  # the hardware has exp2 and log2


# ----------------------------------------------------------------------------------------- helpers in kernels


@triton.jit
def _place(tokens, heads, ROWS: tl.constexpr):
    """(block, sample, head) of this program: blocks of a head lie side by side, then heads of a sample."""
    num_blocks = tl.cdiv(tokens, ROWS)
    program = tl.program_id(0)
    pair = program // num_blocks
    return program % num_blocks, (pair // heads).to(tl.int64), pair % heads


@triton.jit
def _load(ptr, bias_ptr, rows, tokens, row_stride, D: tl.constexpr):
    """Rows of one head [R, D], in their own dtype; zero, or the bias, beyond the last token."""
    columns = tl.arange(0, D)
    x = tl.load(ptr + rows[:, None] * row_stride + columns[None, :], mask=(rows < tokens)[:, None], other=0.0)
    if bias_ptr is not None:
        x = (x.to(tl.float32) + _load_bias(bias_ptr, D)).to(ptr.dtype.element_ty)
    return x


@triton.jit
def _load_bias(ptr, D: tl.constexpr):
    """One head's part of the bias as a row [1, D], fp32."""
    return tl.load(ptr + tl.arange(0, D)).to(tl.float32)[None, :]


@triton.jit
def _store(ptr, x, rows, tokens, row_stride, D: tl.constexpr):
    """[R, D] to rows of one head, rounded to the tensor's dtype."""
    at = ptr + rows[:, None] * row_stride + tl.arange(0, D)[None, :]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=(rows < tokens)[:, None])


@triton.jit
def _dot(a, b, acc=None):
    """a @ b + acc in fp32; "ieee" matters for fp32 inputs only: no TF32."""
    return tl.dot(a, b, acc, input_precision="ieee")


# --------------------------------------------------------------------------------------------- forward kernel


@triton.jit
def _attend(q, k, v, keys, tokens, log2_scale, acc, total, highest):
    """One block of keys: the weighted values [M, D], their weights' sum [M] and the highest score so far [M]."""
    s = tl.where((keys < tokens)[None, :], _dot(q, tl.trans(k)) * log2_scale, -float("inf"))
    now_highest = tl.maximum(highest, tl.max(s, axis=1))  # finite: every block has a live key
    rescale = tl.exp2(highest - now_highest)
    p = tl.exp2(s - now_highest[:, None])
    total = total * rescale + tl.sum(p, axis=1)
    acc = _dot(p.to(v.dtype), v, acc * rescale[:, None])
    return acc, total, now_highest


@triton.jit
def _forward_kernel(
    qkv_ptr,  # [B, T, 3, H, D]
    bias_ptr,  # [3, H, D] or None
    out_ptr,  # [B, T, H, D] out
    lse_ptr,  # [B, H, T] fp32 out
    tokens,
    heads,
    scale,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    WHOLE: tl.constexpr,  # N >= T: the program takes all queries of its head; otherwise M of them
):
    block, sample, head = _place(tokens, heads, N if WHOLE else M)
    row_stride = 3 * heads * D
    qkv_ptr += sample * tokens * row_stride + head * D
    out_ptr += sample * tokens * heads * D + head * D
    lse_ptr += (sample * heads + head) * tokens
    if bias_ptr is not None:
        bias_ptr += head * D
    k_ptr, v_ptr = qkv_ptr + heads * D, qkv_ptr + 2 * heads * D
    if WHOLE:
        keys = tl.arange(0, N)
        k = _load(k_ptr, None, keys, tokens, row_stride, D)
        v = _load(v_ptr, None, keys, tokens, row_stride, D)

    for start in range(block * M, tokens if WHOLE else (block + 1) * M, M):
        queries = start + tl.arange(0, M)
        q = _load(qkv_ptr, bias_ptr, queries, tokens, row_stride, D)
        acc = tl.zeros([M, D], tl.float32)
        total = tl.zeros([M], tl.float32)
        highest = tl.full([M], -float("inf"), tl.float32)
        if WHOLE:
            acc, total, highest = _attend(q, k, v, keys, tokens, scale * LOG2_E, acc, total, highest)
        else:
            for first in range(0, tokens, N):
                keys = first + tl.arange(0, N)
                k = _load(k_ptr, None, keys, tokens, row_stride, D)
                v = _load(v_ptr, None, keys, tokens, row_stride, D)
                acc, total, highest = _attend(q, k, v, keys, tokens, scale * LOG2_E, acc, total, highest)
        out = acc / total[:, None]
        if bias_ptr is not None:
            out += _load_bias(bias_ptr + 2 * heads * D, D)
        _store(out_ptr, out, queries, tokens, heads * D, D)
        tl.store(lse_ptr + queries, (highest + tl.log2(total)) / LOG2_E, mask=queries < tokens)


# ------------------------------------------------------------------------------------------- backward kernels


@triton.jit
def _backward_keys_kernel(
    d_out_ptr,  # [B, T, H, D]
    qkv_ptr,  # [B, T, 3, H, D]
    bias_ptr,  # [3, H, D] or None
    lse_ptr,  # [B, H, T] fp32
    delta_ptr,  # [B, H, T] fp32, or None where WHOLE
    d_qkv_ptr,  # [B, T, 3, H, D] out: dk and dv; dq too where WHOLE
    partials_ptr,  # [B, P, 3, H, D] fp32 out: the same parts
    tokens,
    heads,
    scale,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    WHOLE: tl.constexpr,  # N >= T
):
    """dk and dv of N keys, over all queries in tiles of M; everything is held with keys as rows.

    p = exp(scale * k q^T - lse), dv = p d_out, dp = v d_out^T, ds = p * (dp - delta), dk = scale * ds q,
    dq = scale * ds^T k.
    """
    block, sample, head = _place(tokens, heads, N)
    row_stride = 3 * heads * D
    third = heads * D
    qkv_ptr += sample * tokens * row_stride + head * D
    d_qkv_ptr += sample * tokens * row_stride + head * D
    d_out_ptr += sample * tokens * third + head * D
    lse_ptr += (sample * heads + head) * tokens
    if bias_ptr is not None:
        bias_ptr += head * D
        partials_ptr += (sample * tl.cdiv(tokens, N) + block) * row_stride + head * D
    keys = block * N + tl.arange(0, N)
    live = (keys < tokens)[:, None]
    k = _load(qkv_ptr + third, None, keys, tokens, row_stride, D)
    v = _load(qkv_ptr + 2 * third, None, keys, tokens, row_stride, D)
    dk = tl.zeros([N, D], tl.float32)
    dv = tl.zeros([N, D], tl.float32)
    dq_sum = tl.zeros([D], tl.float32)

    for start in range(0, tokens, M):
        queries = start + tl.arange(0, M)
        q = _load(qkv_ptr, bias_ptr, queries, tokens, row_stride, D)
        d_out = _load(d_out_ptr, None, queries, tokens, third, D)
        # p = exp(-inf) = 0 for a query that does not exist, and for a key.
        lse = tl.load(lse_ptr + queries, mask=queries < tokens, other=float("inf"))
        s = _dot(k, tl.trans(q)) * (scale * LOG2_E)
        p = tl.exp2(tl.where(live, s, -float("inf")) - (lse * LOG2_E)[None, :])
        dv = _dot(p.to(d_out.dtype), d_out, dv)
        dp = _dot(v, tl.trans(d_out))
        if WHOLE:
            delta = tl.sum(p * dp, axis=0)
        else:
            delta = tl.load(delta_ptr + (sample * heads + head) * tokens + queries, mask=queries < tokens, other=0.0)
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = _dot(ds, q, dk)
        if WHOLE:
            # Transposed, so that the long side, keys, is summed and D, not the few queries, are the rows.
            dq = _dot(tl.trans(k), ds) * scale
            _store(d_qkv_ptr, tl.trans(dq), queries, tokens, row_stride, D)
            if bias_ptr is not None:
                dq_sum += tl.sum(dq, axis=1)

    dk *= scale
    _store(d_qkv_ptr + third, dk, keys, tokens, row_stride, D)
    _store(d_qkv_ptr + 2 * third, dv, keys, tokens, row_stride, D)
    if bias_ptr is not None:
        columns = tl.arange(0, D)
        if WHOLE:
            tl.store(partials_ptr + columns, dq_sum)
        tl.store(partials_ptr + third + columns, tl.zeros([D], tl.float32))
        tl.store(partials_ptr + 2 * third + columns, tl.sum(dv, axis=0))


@triton.jit
def _backward_queries_kernel(
    d_out_ptr,  # [B, T, H, D]
    qkv_ptr,  # [B, T, 3, H, D]
    bias_ptr,  # [3, H, D] or None
    out_ptr,  # [B, T, H, D]
    lse_ptr,  # [B, H, T] fp32
    delta_ptr,  # [B, H, T] fp32 out
    d_qkv_ptr,  # [B, T, 3, H, D] out: dq
    partials_ptr,  # [B, P, 3, H, D] fp32 out: dq's sums
    tokens,
    heads,
    scale,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """dq and delta of M queries, over all keys in blocks of N; as above, with queries as rows."""
    block, sample, head = _place(tokens, heads, M)
    row_stride = 3 * heads * D
    third = heads * D
    qkv_ptr += sample * tokens * row_stride + head * D
    d_qkv_ptr += sample * tokens * row_stride + head * D
    out_ptr += sample * tokens * third + head * D
    d_out_ptr += sample * tokens * third + head * D
    lse_ptr += (sample * heads + head) * tokens
    delta_ptr += (sample * heads + head) * tokens
    if bias_ptr is not None:
        bias_ptr += head * D
        partials_ptr += (sample * tl.cdiv(tokens, M) + block) * row_stride + head * D
    queries = block * M + tl.arange(0, M)
    live = queries < tokens
    q = _load(qkv_ptr, bias_ptr, queries, tokens, row_stride, D)
    d_out = _load(d_out_ptr, None, queries, tokens, third, D)
    lse = tl.load(lse_ptr + queries, mask=live, other=float("inf")) * LOG2_E
    out = _load(out_ptr, None, queries, tokens, third, D).to(tl.float32)
    if bias_ptr is not None:
        out -= _load_bias(bias_ptr + 2 * third, D)
    delta = tl.sum(out * d_out.to(tl.float32), axis=1)
    tl.store(delta_ptr + queries, delta, mask=live)

    dq = tl.zeros([M, D], tl.float32)
    for first in range(0, tokens, N):
        keys = first + tl.arange(0, N)
        k = _load(qkv_ptr + third, None, keys, tokens, row_stride, D)
        v = _load(qkv_ptr + 2 * third, None, keys, tokens, row_stride, D)
        s = _dot(q, tl.trans(k)) * (scale * LOG2_E)
        p = tl.exp2(tl.where((keys < tokens)[None, :], s, -float("inf")) - lse[:, None])
        ds = p * (_dot(d_out, tl.trans(v)) - delta[:, None])
        dq = _dot(ds.to(k.dtype), k, dq)
    dq *= scale
    _store(d_qkv_ptr, dq, queries, tokens, row_stride, D)
    if bias_ptr is not None:
        tl.store(partials_ptr + tl.arange(0, D), tl.sum(dq, axis=0))


# -------------------------------------------------------------------------------------------------- launchers


def _launches(qkv: Tensor, bias: Tensor | None) -> dict[str, tiles.Launch]:
    hopper = tiles.is_hopper(qkv.device)
    return tiles.packed_attention(qkv.shape[1], qkv.shape[4], qkv.dtype, hopper=hopper, bias=bias is not None)


@torch.library.custom_op("sws_kernels::packed_attention", mutates_args=())
def _forward(qkv: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse): shapes and dtypes in the legend. custom_op, not triton_op, for add_layer_norm's reasons."""
    num_samples, tokens, _, heads, head_dim = qkv.shape
    out = torch.empty((num_samples, tokens, heads * head_dim), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((num_samples, heads, tokens), dtype=torch.float32, device=qkv.device)
    if out.numel():
        tile = _launches(qkv, bias)["forward"]
        num_blocks = 1 if tile["WHOLE"] else triton.cdiv(tokens, tile["M"])
        with torch.cuda.device_of(qkv):  # Triton launches on the current device, not on the tensors'
            _forward_kernel[(num_blocks * num_samples * heads,)](
                contiguous(qkv), contiguous(bias), out, lse, tokens, heads, scale, **tile
            )
    return out, lse


@_forward.register_fake
def _(qkv: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    num_samples, tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty((num_samples, tokens, heads * head_dim))
    return out, qkv.new_empty((num_samples, heads, tokens), dtype=torch.float32)


@torch.library.custom_op("sws_kernels::packed_attention_backward", mutates_args=())
def _backward(
    d_out: Tensor, qkv: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(d_qkv, d_bias): [B, T, 3, H, D] in qkv's dtype, and fp32 [3*H*D], or [0] where there is no bias."""
    num_samples, tokens, _, heads, head_dim = qkv.shape
    launches = _launches(qkv, bias)
    keys, queries = launches["backward_keys"], launches.get("backward_queries")
    num_blocks = triton.cdiv(tokens, keys["N"])
    d_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    delta = torch.empty_like(lse) if queries else None
    width = 3 * heads * head_dim
    partials = None if bias is None else lse.new_empty((num_samples * num_blocks, width))
    if d_qkv.numel():
        grid = (num_blocks * num_samples * heads,)
        d_out, qkv, bias = d_out.contiguous(), qkv.contiguous(), contiguous(bias)
        with torch.cuda.device_of(qkv):
            if queries:
                _backward_queries_kernel[grid](
                    d_out, qkv, bias, out.contiguous(), lse, delta, d_qkv, partials, tokens, heads, scale, **queries
                )
            _backward_keys_kernel[grid](d_out, qkv, bias, lse, delta, d_qkv, partials, tokens, heads, scale, **keys)
    # The second stage of d_bias: a fixed number of rows in a fixed order, no atomics.
    return d_qkv, lse.new_empty(0) if partials is None else partials.sum(dim=0)


@_backward.register_fake
def _(d_out: Tensor, qkv: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), lse.new_empty(0 if bias is None else bias.shape[0])


# --------------------------------------------------------------------------------------------------- autograd


def _setup_context(ctx, inputs, output) -> None:
    qkv, bias, scale = inputs
    out, lse = output
    ctx.save_for_backward(qkv, bias, out, lse)
    ctx.scale = scale
    ctx.mark_non_differentiable(lse)


def _differentiate(ctx, d_out, _d_lse):
    qkv, bias, out, lse = ctx.saved_tensors
    d_qkv, d_bias = _backward(d_out, qkv, bias, out, lse, ctx.scale)
    return d_qkv, None if bias is None else d_bias.to(bias.dtype), None


_forward.register_autograd(_differentiate, setup_context=_setup_context)


# -------------------------------------------------------------------------------------------- public function


def packed_attention(
    qkv: Tensor, bias: Tensor | None = None, scale: float | None = None, *, backend: Backend = "reference"
) -> Tensor:
    """softmax(scale * q k^T) v of every head, without a causal mask: [B, T, 3, H, D] -> [B, T, H*D].

    bias: [3*H*D], added to qkv here, or None where the projection has added it. scale: positive, D**-0.5
    where it is None. The result has qkv's dtype. Differentiable once.

    backend: "reference" is plain PyTorch on any device. "triton" needs CUDA tensors (or, for tests,
    TRITON_INTERPRET=1 set before triton is imported), fp32, fp16 or bf16, and heads of 32, 64 or 128; anything
    else is a ValueError, never a fallback.
    """
    _check_shapes(qkv, bias)
    scale = qkv.shape[4] ** -0.5 if scale is None else float(scale)
    if not (0 < scale < math.inf):
        raise ValueError(f"packed_attention: scale must be positive and finite, got {scale}")
    if not is_triton("packed_attention", backend):
        return packed_attention_reference(qkv, bias, scale)
    check_triton("packed_attention", {"qkv": qkv, "bias": bias}, one_dtype=False)
    _check_size(qkv)
    return _forward(qkv, bias, scale)[0]


def _check_shapes(qkv: Tensor, bias: Tensor | None) -> None:
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"packed_attention: qkv must be [B, T, 3, H, D], got {list(qkv.shape)}")
    width = 3 * qkv.shape[3] * qkv.shape[4]
    if bias is not None and bias.shape != (width,):
        raise ValueError(f"packed_attention: bias must be [3*H*D] = [{width}], got {list(bias.shape)}")


def _check_size(qkv: Tensor) -> None:
    _, tokens, _, heads, head_dim = qkv.shape
    if head_dim not in HEAD_DIMS:
        raise ValueError(
            f"packed_attention: backend='triton' takes heads of {', '.join(map(str, HEAD_DIMS))}, "
            f"got D={head_dim}; choose backend='reference'"
        )
    if tokens * 3 * heads * head_dim >= 2**31:  # offsets inside a sample are 32-bit, samples' are 64-bit
        raise ValueError(
            f"packed_attention: backend='triton' takes samples of fewer than 2^31 elements, got T={tokens}, "
            f"H={heads}, D={head_dim}; choose backend='reference'"
        )


# -------------------------------------------------------------------------------------------------- reference


def packed_attention_reference(qkv: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """The same in PyTorch's operators: shapes as `packed_attention`, any device, any head size, fp64 too."""
    num_samples, tokens, _, heads, head_dim = qkv.shape
    if bias is not None:
        qkv = (qkv + bias.view(3, heads, head_dim)).to(qkv.dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, H, T, D] each
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).reshape(num_samples, tokens, heads * head_dim)
