"""Define the Triton kernels of `packed_attention`: non-causal attention on packed QKV, forward and backward.

Shapes: B samples, T tokens, H heads of D. A program handles one head of one sample, M queries by N keys at a time.

Scores, softmax and sums are fp32; p and ds are rounded to qkv's dtype where a matrix product takes them. The scale is
applied to fp32 scores, so that no rounded q * scale exists.

The bias costs next to nothing, because adding a constant to all scores of a query does not change their softmax.
Therefore k's bias is not read (its gradient is zero) and v's is added to the output; only q's is added when q is
loaded. In the backward v's bias cancels between dp and delta.

SINGLE_KV_BLOCK selects one of two structures of the same code.

**Single block**: all T keys are one block, so a program owns a head and reads each of its elements once. The forward
keeps K and V and needs no running maximum. The backward keeps K, V, dK and dV and goes over the queries once. A tile of
queries meets all keys there, so its dQ is complete (no sum over programs) and its delta is a sum over p * dp, which is
already at hand (`out` is not read).

**Many blocks**, for longer T: the forward goes over blocks of keys with a running maximum. The backward takes two
passes, dQ by blocks of queries (which leaves delta), then dK and dV by blocks of keys. That computes the scores twice,
which is the price for sums in a fixed order without atomics.

`launch_config.py` chooses by what registers hold: a single block up to 128 tokens at D = 64 on Hopper. Every element of
d_qkv is written by one program, and d_bias is summed in two stages of fixed order, so equal inputs give equal bits.

Source: Dao et al. 2022, arXiv 2205.14135 and Dao 2023, arXiv 2307.08691 (FlashAttention, FlashAttention-2).
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)  # the hardware has exp2 and log2


# ----------------------------------------------------------------------------------------- helpers in kernels


@triton.jit
def _place(tokens, heads, ROWS: tl.constexpr):
    """Return (block, sample, head) of this program. Neighbours are the blocks of a head, then the heads of a sample."""
    num_blocks = tl.cdiv(tokens, ROWS)
    program = tl.program_id(0)
    pair = program // num_blocks
    return program % num_blocks, (pair // heads).to(tl.int64), pair % heads


@triton.jit
def _load(ptr, bias_ptr, rows, tokens, row_stride, D: tl.constexpr):
    """Load rows of one head [R, D] in their own dtype. Beyond the last token they are zero, or the bias."""
    columns = tl.arange(0, D)
    x = tl.load(ptr + rows[:, None] * row_stride + columns[None, :], mask=(rows < tokens)[:, None], other=0.0)
    if bias_ptr is not None:
        x = (x.to(tl.float32) + _load_bias(bias_ptr, D)).to(ptr.dtype.element_ty)
    return x


@triton.jit
def _load_bias(ptr, D: tl.constexpr):
    """Load one head's part of the bias as a row [1, D], fp32."""
    return tl.load(ptr + tl.arange(0, D)).to(tl.float32)[None, :]


@triton.jit
def _store(ptr, x, rows, tokens, row_stride, D: tl.constexpr):
    """Store [R, D] to rows of one head, rounded to the tensor's dtype."""
    at = ptr + rows[:, None] * row_stride + tl.arange(0, D)[None, :]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=(rows < tokens)[:, None])


@triton.jit
def _dot(a, b, acc=None):
    """Compute a @ b + acc in fp32. "ieee" keeps fp32 inputs from TF32 and has no effect on the others."""
    return tl.dot(a, b, acc, input_precision="ieee")


# --------------------------------------------------------------------------------------------- forward kernel


@triton.jit
def _attend(q, k, v, keys, tokens, log2_scale, acc, l_i, m_i):
    """Add one block of keys to the online softmax.

    Returns:
        (acc, l_i, m_i): the weighted values [M, D], the sum of their weights [M] and the highest score so far [M].
    """
    s = tl.where((keys < tokens)[None, :], _dot(q, tl.trans(k)) * log2_scale, -float("inf"))
    m_new = tl.maximum(m_i, tl.max(s, axis=1))  # finite, because every block has a key that exists
    rescale = tl.exp2(m_i - m_new)
    p = tl.exp2(s - m_new[:, None])
    l_i = l_i * rescale + tl.sum(p, axis=1)
    acc = _dot(p.to(v.dtype), v, acc * rescale[:, None])
    return acc, l_i, m_new


@triton.jit
def packed_attention_forward_kernel(
    qkv_ptr,  # [B, T, 3, H, D]
    bias_ptr,  # [3, H, D] or None
    out_ptr,  # [B, T, H, D] out
    lse_ptr,  # [B, H, T] fp32 out, in units of log2
    tokens,
    heads,
    scale,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    SINGLE_KV_BLOCK: tl.constexpr,  # N >= T: the program takes all queries of its head, otherwise M of them
):
    """Compute out and lse of all queries of a head, or of M of them, over all keys in blocks of N."""
    block, sample, head = _place(tokens, heads, N if SINGLE_KV_BLOCK else M)
    row_stride = 3 * heads * D
    qkv_ptr += sample * tokens * row_stride + head * D
    out_ptr += sample * tokens * heads * D + head * D
    lse_ptr += (sample * heads + head) * tokens
    if bias_ptr is not None:
        bias_ptr += head * D
    k_ptr, v_ptr = qkv_ptr + heads * D, qkv_ptr + 2 * heads * D
    if SINGLE_KV_BLOCK:
        keys = tl.arange(0, N)
        k = _load(k_ptr, None, keys, tokens, row_stride, D)
        v = _load(v_ptr, None, keys, tokens, row_stride, D)

    for start in range(block * M, tokens if SINGLE_KV_BLOCK else (block + 1) * M, M):
        queries = start + tl.arange(0, M)
        q = _load(qkv_ptr, bias_ptr, queries, tokens, row_stride, D)
        acc = tl.zeros([M, D], tl.float32)
        l_i = tl.zeros([M], tl.float32)
        m_i = tl.full([M], -float("inf"), tl.float32)
        if SINGLE_KV_BLOCK:
            acc, l_i, m_i = _attend(q, k, v, keys, tokens, scale * LOG2_E, acc, l_i, m_i)
        else:
            for first in range(0, tokens, N):
                keys = first + tl.arange(0, N)
                k = _load(k_ptr, None, keys, tokens, row_stride, D)
                v = _load(v_ptr, None, keys, tokens, row_stride, D)
                acc, l_i, m_i = _attend(q, k, v, keys, tokens, scale * LOG2_E, acc, l_i, m_i)
        out = acc / l_i[:, None]
        if bias_ptr is not None:
            out += _load_bias(bias_ptr + 2 * heads * D, D)
        _store(out_ptr, out, queries, tokens, heads * D, D)
        tl.store(lse_ptr + queries, m_i + tl.log2(l_i), mask=queries < tokens)


# ------------------------------------------------------------------------------------------- backward kernels


@triton.jit
def _store_bias_sums(partials_ptr, dq_sum, dv, third, D: tl.constexpr, SINGLE_KV_BLOCK: tl.constexpr):
    """Store this program's share of d_bias: the sums of dv, zeros for dk and, with SINGLE_KV_BLOCK, the sums of dq."""
    columns = tl.arange(0, D)
    if SINGLE_KV_BLOCK:
        tl.store(partials_ptr + columns, dq_sum)
    tl.store(partials_ptr + third + columns, tl.zeros([D], tl.float32))
    tl.store(partials_ptr + 2 * third + columns, tl.sum(dv, axis=0))


@triton.jit
def packed_attention_backward_keys_kernel(
    d_out_ptr,  # [B, T, H, D]
    qkv_ptr,  # [B, T, 3, H, D]
    bias_ptr,  # [3, H, D] or None
    lse_ptr,  # [B, H, T] fp32, in units of log2
    delta_ptr,  # [B, H, T] fp32, or None with SINGLE_KV_BLOCK
    d_qkv_ptr,  # [B, T, 3, H, D] out: dk and dv; with SINGLE_KV_BLOCK dq too
    partials_ptr,  # [B, P, 3, H, D] fp32 out: the same parts
    tokens,
    heads,
    scale,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    SINGLE_KV_BLOCK: tl.constexpr,  # N >= T
):
    """Compute dk and dv of N keys over all queries in tiles of M. All tiles have keys as rows.

    p = exp2(scale * log2(e) * k q^T - lse), dv = p d_out, dp = v d_out^T, ds = p * (dp - delta), dk = scale * ds q,
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
    row_mask = (keys < tokens)[:, None]
    k = _load(qkv_ptr + third, None, keys, tokens, row_stride, D)
    v = _load(qkv_ptr + 2 * third, None, keys, tokens, row_stride, D)
    dk = tl.zeros([N, D], tl.float32)
    dv = tl.zeros([N, D], tl.float32)
    dq_sum = tl.zeros([D], tl.float32)

    for start in range(0, tokens, M):
        queries = start + tl.arange(0, M)
        q = _load(qkv_ptr, bias_ptr, queries, tokens, row_stride, D)
        d_out = _load(d_out_ptr, None, queries, tokens, third, D)
        # For a query or key that does not exist, p = exp(-inf) = 0.
        lse = tl.load(lse_ptr + queries, mask=queries < tokens, other=float("inf"))
        s = _dot(k, tl.trans(q)) * (scale * LOG2_E) - lse[None, :]  # one instruction an element
        p = tl.exp2(tl.where(row_mask, s, -float("inf")))
        dv = _dot(p.to(d_out.dtype), d_out, dv)
        dp = _dot(v, tl.trans(d_out))
        if SINGLE_KV_BLOCK:
            delta = tl.sum(p * dp, axis=0)
        else:
            delta = tl.load(delta_ptr + (sample * heads + head) * tokens + queries, mask=queries < tokens, other=0.0)
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = _dot(ds, q, dk)
        if SINGLE_KV_BLOCK:
            # The product is transposed, so that the long side, the keys, is summed and the rows are D instead of the
            # few queries.
            dq = _dot(tl.trans(k), ds) * scale
            _store(d_qkv_ptr, tl.trans(dq), queries, tokens, row_stride, D)
            if bias_ptr is not None:
                dq_sum += tl.sum(dq, axis=1)

    dk *= scale
    _store(d_qkv_ptr + third, dk, keys, tokens, row_stride, D)
    _store(d_qkv_ptr + 2 * third, dv, keys, tokens, row_stride, D)
    if bias_ptr is not None:
        _store_bias_sums(partials_ptr, dq_sum, dv, third, D, SINGLE_KV_BLOCK)


@triton.jit
def packed_attention_backward_queries_kernel(
    d_out_ptr,  # [B, T, H, D]
    qkv_ptr,  # [B, T, 3, H, D]
    bias_ptr,  # [3, H, D] or None
    out_ptr,  # [B, T, H, D]
    lse_ptr,  # [B, H, T] fp32, in units of log2
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
    """Compute dq and delta of M queries over all keys in blocks of N, by the same formulas with queries as rows."""
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
    row_mask = queries < tokens
    q = _load(qkv_ptr, bias_ptr, queries, tokens, row_stride, D)
    d_out = _load(d_out_ptr, None, queries, tokens, third, D)
    lse = tl.load(lse_ptr + queries, mask=row_mask, other=float("inf"))
    out = _load(out_ptr, None, queries, tokens, third, D).to(tl.float32)
    if bias_ptr is not None:
        out -= _load_bias(bias_ptr + 2 * third, D)
    delta = tl.sum(out * d_out.to(tl.float32), axis=1)
    tl.store(delta_ptr + queries, delta, mask=row_mask)

    dq = tl.zeros([M, D], tl.float32)
    for first in range(0, tokens, N):
        keys = first + tl.arange(0, N)
        k = _load(qkv_ptr + third, None, keys, tokens, row_stride, D)
        v = _load(qkv_ptr + 2 * third, None, keys, tokens, row_stride, D)
        s = _dot(q, tl.trans(k)) * (scale * LOG2_E) - lse[:, None]
        p = tl.exp2(tl.where((keys < tokens)[None, :], s, -float("inf")))
        ds = p * (_dot(d_out, tl.trans(v)) - delta[:, None])
        dq = _dot(ds.to(k.dtype), k, dq)
    dq *= scale
    _store(d_qkv_ptr, dq, queries, tokens, row_stride, D)
    if bias_ptr is not None:
        tl.store(partials_ptr + tl.arange(0, D), tl.sum(dq, axis=0))
