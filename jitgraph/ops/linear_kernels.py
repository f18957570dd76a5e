"""Triton kernels of matrix products with few tokens: one row per token, weights streamed once.

Launched only by the wrappers in ``linear.py``. At one token a product is a stream of weights, and nothing else counts:
``gemv_kernel`` gives each program whole rows of the weight and fuses what stands before it (RMSNorm) and after it
(residual, SiLU and product). From two tokens on, ``skinny_kernel`` takes the weight's rows as the rows of a tensor-core
product, so that few tokens waste little of it.

Each output is summed in one order, fixed by the matrix's shape and the constants of the launch. PDL (``pdl.py``): the
first tile of the weight, which no kernel writes, is loaded before the wait for the kernel in front.
"""

from __future__ import annotations

import triton
import triton.language as tl

from jitgraph.jit.kernel import kernel


@triton.jit
def _silu_mul(gate, up, dtype: tl.constexpr):
    """silu(gate) * up with the roundings of the separate ops."""
    gate = gate.to(dtype).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    return activated * up.to(dtype).to(tl.float32)


@triton.jit
def _rms_scale(x, eps, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """1 / rms of the row ``x`` [K]."""
    squares = tl.zeros([BLOCK_K], tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        wide = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        squares += wide * wide
    return tl.rsqrt(tl.sum(squares, 0) / K + eps)


@triton.jit
def _load_x(x, norm_weight, scale, k, K: tl.constexpr, NORM: tl.constexpr, EVEN: tl.constexpr):
    """float32 piece of the (normalised) row of activations."""
    inside = k < K
    raw = tl.load(x + k) if EVEN else tl.load(x + k, mask=inside, other=0.0)
    wide = raw.to(tl.float32)
    if NORM:
        g = tl.load(norm_weight + k) if EVEN else tl.load(norm_weight + k, mask=inside, other=0.0)
        dtype: tl.constexpr = x.dtype.element_ty
        wide = ((wide * scale).to(dtype).to(tl.float32) * g.to(tl.float32)).to(dtype).to(tl.float32)
    return wide


@triton.jit
def _load_w(at, row_ok, k, K: tl.constexpr, EVEN: tl.constexpr):
    """A tile of the weight; it is read once, so it should leave the cache first."""
    if EVEN:
        return tl.load(at, eviction_policy="evict_first")
    return tl.load(at, mask=row_ok[:, None] & (k < K)[None, :], other=0.0, eviction_policy="evict_first")


@kernel
def gemv_kernel(
    x, norm_weight, eps, weight, bias, residual, out,
    N: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    EVEN: tl.constexpr = (N % ROWS == 0) and (K % BLOCK_K == 0)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row_ok = row < N
    k = tl.arange(0, BLOCK_K)
    at = weight + row.to(tl.int64)[:, None] * K + k[None, :]
    w = _load_w(at, row_ok, k, K, EVEN)
    u = w
    if GATED:
        u = _load_w(at + N * K, row_ok, k, K, EVEN)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    scale = 1.0
    if NORM:
        scale = _rms_scale(x, eps, K, BLOCK_K)
    acc = tl.zeros([ROWS, BLOCK_K], tl.float32)
    acc_up = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        xs = _load_x(x, norm_weight, scale, start + k, K, NORM, EVEN)[None, :]
        acc += w.to(tl.float32) * xs
        if GATED:
            acc_up += u.to(tl.float32) * xs
        if start + BLOCK_K < K:
            w = _load_w(at + start + BLOCK_K, row_ok, start + BLOCK_K + k, K, EVEN)
            if GATED:
                u = _load_w(at + N * K + start + BLOCK_K, row_ok, start + BLOCK_K + k, K, EVEN)
    y = tl.sum(acc, 1)
    dtype: tl.constexpr = out.dtype.element_ty
    if BIAS:
        y += tl.load(bias + row, mask=row_ok, other=0.0).to(tl.float32)
    if GATED:
        up = tl.sum(acc_up, 1)
        if BIAS:
            up += tl.load(bias + N + row, mask=row_ok, other=0.0).to(tl.float32)
        y = _silu_mul(y, up, dtype)
    if ADD:
        y = y.to(dtype).to(tl.float32) + tl.load(residual + row, mask=row_ok, other=0.0).to(tl.float32)
    tl.store(out + row, y.to(dtype), mask=row_ok)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """acc + a @ b. WIDEN serves the interpreter, which knows bfloat16 only as bits."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _merge_splits(
    partial, at, acc, ok, arrivals, split, tile, stride, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """Sum of the tile over all splits in their order, in the program that came last; that program's flag.

    Each program writes its part, a barrier makes the whole program's writes happen before the release of its arrival,
    and the last one's acquire makes everybody's parts visible to it; they are read past the first-level cache.
    """
    tl.store(partial + split * stride + at, acc, mask=ok)
    tl.debug_barrier()
    last = tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == SPLIT_K - 1
    total = tl.zeros_like(acc)
    if last:
        tl.store(arrivals + tile, 0)
        for other in tl.static_range(SPLIT_K):
            total += tl.load(partial + other * stride + at, mask=ok, other=0.0, cache_modifier=".cg")
    return total, last


@kernel
def skinny_kernel(
    x, weight, bias, residual, out, partial, arrivals, tokens,
    N: tl.constexpr, K: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # out[m, n] = sum_k weight[n, k] x[m, k]; the product is computed as [BLOCK_N, BLOCK_M].
    EVEN_K: tl.constexpr = K % (BLOCK_K * SPLIT_K) == 0
    split = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    row_ok = row < N
    token_ok = m < tokens
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    blocks: tl.constexpr = (K + BLOCK_K * SPLIT_K - 1) // (BLOCK_K * SPLIT_K)
    w_at = weight + tl.where(row_ok, row, 0).to(tl.int64)[:, None] * K + k[None, :]
    x_at = x + tl.where(token_ok, m, 0)[None, :] * K + k[:, None]  # rows past the end repeat row 0 and are not stored
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    acc_up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in range(blocks):
        start = (split * blocks + block) * BLOCK_K
        if EVEN_K:
            w = tl.load(w_at + start, eviction_policy="evict_first")
            b = tl.load(x_at + start)
        else:
            w = tl.load(w_at + start, mask=(start + k < K)[None, :], other=0.0, eviction_policy="evict_first")
            b = tl.load(x_at + start, mask=(start + k < K)[:, None], other=0.0)
        acc = _dot(w, b, acc, PRECISION, WIDEN)
        if GATED:
            if EVEN_K:
                u = tl.load(w_at + N * K + start, eviction_policy="evict_first")
            else:
                u = tl.load(w_at + N * K + start, mask=(start + k < K)[None, :], other=0.0)
            acc_up = _dot(u, b, acc_up, PRECISION, WIDEN)
    at = m[None, :] * N + row[:, None]
    ok = row_ok[:, None] & token_ok[None, :]
    last = True
    if SPLIT_K > 1:
        tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        acc, last = _merge_splits(partial, at, acc, ok, arrivals, split, tile, tokens * N, SPLIT_K)
    if last:
        dtype: tl.constexpr = out.dtype.element_ty
        if BIAS:
            acc += tl.load(bias + row, mask=row_ok, other=0.0).to(tl.float32)[:, None]
            if GATED:
                acc_up += tl.load(bias + N + row, mask=row_ok, other=0.0).to(tl.float32)[:, None]
        if GATED:
            acc = _silu_mul(acc, acc_up, dtype)
        if ADD:
            acc = acc.to(dtype).to(tl.float32) + tl.load(residual + at, mask=ok, other=0.0).to(tl.float32)
        tl.store(out + at, acc.to(dtype), mask=ok)
