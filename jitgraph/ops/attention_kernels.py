"""Triton kernels of paged attention: what prefill and decode share, and the flash-style prefill.

Launched only by the wrappers in ``attention.py``. Bounds come from the device's ``positions``; a key that no row of a
program may see is never loaded, so cache memory nobody wrote may hold anything. Softmax runs in base 2. A rolling
window (RECENT > 0) is walked by its cells; ``Rolling`` in ``reference.py`` has the geometry. Source of the online
softmax: Dao, "FlashAttention-2" (2023).
"""

from __future__ import annotations

import triton
import triton.language as tl

from jitgraph.jit.kernel import kernel
from jitgraph.ops import slots as columns
from jitgraph.ops.pdl import enter

_BLOCK_TABLE = tl.constexpr(columns.BLOCK_TABLE)
_NO_TOKEN = tl.constexpr(2**30)


@triton.jit
def load_pages(words, j, seen, PAGE: tl.constexpr):
    """The page of each key in ``j`` (a position, or a cell of a rolling window) of one sequence."""
    return tl.load(words + _BLOCK_TABLE + j // PAGE, mask=seen, other=0)


@triton.jit
def cell_offsets(page, j, kv_head, PAGE: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr):
    """int64 offset in the cache of each key in ``j``, given its page."""
    return ((page.to(tl.int64) * PAGE + j % PAGE) * HKV + kv_head) * DH


@triton.jit
def load_vectors(base, offset, seen, DH: tl.constexpr, BLOCK_D: tl.constexpr):
    """[N, BLOCK_D]: the DH elements at each offset; zeros where ``seen`` is false and past DH."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(base + offset[:, None] + d[None, :], mask=seen[:, None] & (d < DH)[None, :], other=0.0)


@triton.jit
def window_token(cell, last, SINKS: tl.constexpr, RECENT: tl.constexpr):
    """Absolute index of the token in each cell of a rolling window (cells up to ``last`` have one)."""
    return tl.where(cell < SINKS, cell, last - (last - cell) % RECENT)


@triton.jit
def load_rotated(
    k_cache, cell, seen, token, last, cos_sin,
    DH: tl.constexpr, BLOCK_H: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr,
):  # fmt: skip
    """Both halves [N, BLOCK_H] of a rolling window's keys, rotated by their window positions and rounded as an ordinary
    cache holds them."""
    HALF: tl.constexpr = DH // 2
    dtype: tl.constexpr = k_cache.dtype.element_ty
    a = load_vectors(k_cache, cell, seen, HALF, BLOCK_H).to(tl.float32)
    b = load_vectors(k_cache + HALF, cell, seen, HALF, BLOCK_H).to(tl.float32)
    position = tl.where(token < SINKS, token, token - tl.maximum(last + 1 - (SINKS + RECENT), 0))
    cos = load_vectors(cos_sin, position * DH, seen, HALF, BLOCK_H)
    sin = load_vectors(cos_sin + HALF, position * DH, seen, HALF, BLOCK_H)
    return (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """a @ b in float32. WIDEN serves the interpreter, which knows bfloat16 only as bits."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def load_query(q, offset, wanted, DH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, RECENT: tl.constexpr):
    """The rows at each offset as ``scores`` wants them: whole and unused, or the two halves."""
    if RECENT > 0:
        first = load_vectors(q, offset, wanted, DH // 2, BLOCK_H)
        second = load_vectors(q + DH // 2, offset, wanted, DH // 2, BLOCK_H)
    else:
        first = load_vectors(q, offset, wanted, DH, BLOCK_D)
        second = first
    return first, second


@triton.jit
def scores(
    first, second, k_cache, cell, seen, token, last, cos_sin,
    DH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """[M, N] float32: queries, as ``load_query`` gave them, times the keys at ``cell``."""
    if RECENT > 0:
        a, b = load_rotated(k_cache, cell, seen, token, last, cos_sin, DH, BLOCK_H, SINKS, RECENT)
        s = dot(first, tl.trans(a), PRECISION, WIDEN) + dot(second, tl.trans(b), PRECISION, WIDEN)
    else:
        s = dot(first, tl.trans(load_vectors(k_cache, cell, seen, DH, BLOCK_D)), PRECISION, WIDEN)
    return s


@triton.jit
def online_softmax(s, m, total):
    """One block's step of the online softmax: new maximum, probabilities, rescaling of what came before, new sum."""
    m_new = tl.maximum(m, tl.max(s, 1))
    centre = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen nothing yet
    p = tl.exp2(s - centre[:, None])
    alpha = tl.exp2(m - centre)
    return m_new, p, alpha, total * alpha + tl.sum(p, 1)


@kernel
def prefill_attention_kernel(
    q, k_cache, v_cache, positions, token_slot, slots, sample_position, cos_sin, out, tokens, scale_log2,
    SLOT_STRIDE: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    enter(PDL)
    head = tl.program_id(0)
    block = tl.num_programs(1) - 1 - tl.program_id(1)  # the longest rows first
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < tokens
    at = (rows * HQ + head) * DH
    first, second = load_query(q, at, inside, DH, BLOCK_D, BLOCK_H, RECENT)
    slot = tl.load(token_slot)
    words = slots + slot * SLOT_STRIDE
    position = tl.load(positions + rows, mask=inside, other=-1)
    real = tl.load(token_slot + rows, mask=inside, other=-1) == slot
    position = tl.where(real, position, -1)  # padding sees nothing and gives 0
    last = 0
    low = 0
    high = tl.max(position, 0) + 1
    if RECENT > 0:
        last = tl.load(sample_position) - 1
        if last >= SINKS + RECENT:  # the cells are out of order: any may be seen
            high = tl.where(high > 0, SINKS + RECENT, 0)
    if WINDOW > 0:
        low = tl.maximum(tl.min(tl.where(real, position, _NO_TOKEN), 0) - WINDOW + 1, 0)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    n = tl.arange(0, BLOCK_N)
    # Blocks of keys begin at multiples of BLOCK_N whatever the chunk, so a row is summed in the same order in each.
    # A block's pages are loaded one block ahead: its keys then wait for one load, not for two in a row.
    begin = low // BLOCK_N * BLOCK_N
    page = load_pages(words, begin + n, (begin + n >= low) & (begin + n < high), PAGE)
    for start in tl.range(begin, high, BLOCK_N, num_stages=STAGES):
        j = start + n
        seen = (j >= low) & (j < high)
        cell = cell_offsets(page, j, head // (HQ // HKV), PAGE, HKV, DH)
        page = load_pages(words, j + BLOCK_N, j + BLOCK_N < high, PAGE)
        token = j
        if RECENT > 0:
            token = window_token(j, last, SINKS, RECENT)
        s = scores(
            first, second, k_cache, cell, seen, token, last, cos_sin, DH, BLOCK_D, BLOCK_H, SINKS, RECENT,
            PRECISION, WIDEN,
        )  # fmt: skip
        visible = (token[None, :] <= position[:, None]) & (j < high)[None, :]
        if WINDOW > 0:
            visible = visible & (position[:, None] - j[None, :] < WINDOW)
        m, p, alpha, total = online_softmax(tl.where(visible, s * scale_log2, float("-inf")), m, total)
        v = load_vectors(v_cache, cell, seen, DH, BLOCK_D)
        acc = acc * alpha[:, None] + dot(p.to(v.dtype), v, PRECISION, WIDEN)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    d = tl.arange(0, BLOCK_D)
    tl.store(
        out + at[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=inside[:, None] & (d < DH)[None, :]
    )  # fmt: skip
