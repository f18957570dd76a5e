"""Triton kernels of paged attention: a flash-style prefill, a split-KV decode and the merge of its splits.

Launched only by the wrappers in ``attention.py``. Bounds come from the device's ``positions``; a key that no row of a
program may see is never loaded, so cache memory nobody wrote may hold anything. Softmax runs in base 2. Source of the
online softmax: Dao, "FlashAttention-2" (2023); of the split over keys: Dao et al., "Flash-Decoding" (2023).
"""

from __future__ import annotations

import triton
import triton.language as tl

from jitgraph.jit.kernel import kernel
from jitgraph.ops import slots as columns

_BLOCK_TABLE = tl.constexpr(columns.BLOCK_TABLE)
_NO_TOKEN = tl.constexpr(2**30)


@triton.jit
def _cells(words, j, seen, kv_head, PAGE: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr):
    """int64 offset in the cache of each key position in ``j`` of one sequence and KV head."""
    page = tl.load(words + _BLOCK_TABLE + j // PAGE, mask=seen, other=0).to(tl.int64)
    return ((page * PAGE + j % PAGE) * HKV + kv_head) * DH


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """a @ b in float32. WIDEN serves the interpreter, which knows bfloat16 only as bits."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _online_softmax(s, m, total):
    """One block's step of the online softmax: new maximum, probabilities, rescaling of what came before, new sum."""
    m_new = tl.maximum(m, tl.max(s, 1))
    centre = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen nothing yet
    p = tl.exp2(s - centre[:, None])
    alpha = tl.exp2(m - centre)
    return m_new, p, alpha, total * alpha + tl.sum(p, 1)


@kernel
def prefill_attention_kernel(
    q, k_cache, v_cache, positions, token_slot, slots, out, tokens, scale_log2,
    SLOT_STRIDE: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr, BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    block = tl.num_programs(1) - 1 - tl.program_id(1)  # the longest rows first
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    slot = tl.load(token_slot)
    words = slots + slot * SLOT_STRIDE
    inside = rows < tokens
    real = inside & (tl.load(token_slot + rows, mask=inside, other=-1) == slot)  # padding sees nothing and gives 0
    position = tl.load(positions + rows, mask=real, other=-1)
    high = tl.max(position, 0) + 1
    low = 0
    if WINDOW > 0:
        low = tl.maximum(tl.min(tl.where(real, position, _NO_TOKEN), 0) - WINDOW + 1, 0)

    at = (rows[:, None] * HQ + head) * DH + d[None, :]
    query = tl.load(q + at, mask=inside[:, None] & (d < DH)[None, :], other=0.0)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(low, high, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        seen = j < high
        cell = _cells(words, j, seen, head // (HQ // HKV), PAGE, HKV, DH)[:, None] + d[None, :]
        mask = seen[:, None] & (d < DH)[None, :]
        k = tl.load(k_cache + cell, mask=mask, other=0.0)
        s = _dot(query, tl.trans(k), PRECISION, WIDEN) * scale_log2
        visible = j[None, :] <= position[:, None]
        if WINDOW > 0:
            visible = visible & (position[:, None] - j[None, :] < WINDOW)
        m, p, alpha, total = _online_softmax(tl.where(visible, s, float("-inf")), m, total)
        v = tl.load(v_cache + cell, mask=mask, other=0.0)
        acc = acc * alpha[:, None] + _dot(p.to(v.dtype), v, PRECISION, WIDEN)
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside[:, None] & (d < DH)[None, :])


@triton.jit
def _split_bounds(position, split, SPLITS: tl.constexpr, WINDOW: tl.constexpr, ALIGN: tl.constexpr):
    """First and one-past-last key of one split; empty where the context is too short for it."""
    low = 0
    if WINDOW > 0:
        low = tl.maximum(position + 1 - WINDOW, 0)
    keys = position + 1 - low
    chunk = tl.cdiv(tl.cdiv(keys, SPLITS), ALIGN) * ALIGN
    begin = low + split * chunk
    return begin, tl.minimum(begin + chunk, position + 1)


@kernel
def decode_single_kernel(
    q, k_cache, v_cache, positions, token_slot, slots, partial, partial_lse, scale_log2,
    SLOT_STRIDE: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # One query head per KV head: no tensor cores, each lane n keeps its own online softmax over keys n, n + BLOCK_N,
    # ... so that nothing is reduced across lanes before the end.
    row = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    d = tl.arange(0, BLOCK_D)
    words = slots + tl.load(token_slot + row) * SLOT_STRIDE
    begin, end = _split_bounds(tl.load(positions + row), split, SPLITS, WINDOW, 16)
    query = tl.load(q + (row * HKV + head) * DH + d, mask=d < DH, other=0.0).to(tl.float32) * scale_log2
    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        seen = j < end
        cell = _cells(words, j, seen, head, PAGE, HKV, DH)[:, None] + d[None, :]
        mask = seen[:, None] & (d < DH)[None, :]
        k = tl.load(k_cache + cell, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_cache + cell, mask=mask, other=0.0).to(tl.float32)
        s = tl.where(seen, tl.sum(k * query[None, :], 1), float("-inf"))
        m_new = tl.maximum(m, s)
        centre = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - centre)
        alpha = tl.exp2(m - centre)
        total = total * alpha + p
        acc = acc * alpha[:, None] + p[:, None] * v
        m = m_new
    top = tl.max(m, 0)
    weight = tl.exp2(m - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(total * weight, 0)
    mean = tl.sum(acc * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    at = (row * HKV + head) * SPLITS + split
    tl.store(partial_lse + at, tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf")))
    tl.store(partial + at * DH + d, mean, mask=d < tl.where(total > 0, DH, 0))


@kernel
def decode_grouped_kernel(
    q, k_cache, v_cache, positions, token_slot, slots, partial, partial_lse, scale_log2,
    SLOT_STRIDE: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr, BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    # The query heads of one KV head are the rows of one matrix product, padded to BLOCK_M.
    GROUP: tl.constexpr = HQ // HKV
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    d = tl.arange(0, BLOCK_D)
    member = tl.arange(0, BLOCK_M)
    words = slots + tl.load(token_slot + row) * SLOT_STRIDE
    begin, end = _split_bounds(tl.load(positions + row), split, SPLITS, WINDOW, 16)
    head = row * HQ + kv_head * GROUP + member
    wanted = (member < GROUP)[:, None] & (d < DH)[None, :]
    query = tl.load(q + head[:, None] * DH + d[None, :], mask=wanted, other=0.0)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        seen = j < end
        cell = _cells(words, j, seen, kv_head, PAGE, HKV, DH)[:, None] + d[None, :]
        mask = seen[:, None] & (d < DH)[None, :]
        k = tl.load(k_cache + cell, mask=mask, other=0.0)
        s = tl.where(seen[None, :], _dot(query, tl.trans(k), PRECISION, WIDEN) * scale_log2, float("-inf"))
        m, p, alpha, total = _online_softmax(s, m, total)
        v = tl.load(v_cache + cell, mask=mask, other=0.0)
        acc = acc * alpha[:, None] + _dot(p.to(v.dtype), v, PRECISION, WIDEN)
    some = total > 0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    at = head * SPLITS + split
    lse = tl.where(some, m + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
    tl.store(partial_lse + at, lse, mask=member < GROUP)
    tl.store(partial + at[:, None] * DH + d[None, :], acc, mask=wanted & some[:, None])


@kernel
def decode_merge_kernel(
    partial, partial_lse, out,
    DH: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    # One query head: its splits' results weighted by their share of the softmax. An empty split has lse -inf and
    # never wrote its result, which is therefore not read either.
    head = tl.program_id(0)
    split = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    lse = tl.load(partial_lse + head * SPLITS + split, mask=split < SPLITS, other=float("-inf"))
    weight = tl.exp2(lse - tl.max(lse, 0))
    mask = (lse > float("-inf"))[:, None] & (d < DH)[None, :]
    part = tl.load(partial + (head * SPLITS + split)[:, None] * DH + d[None, :], mask=mask, other=0.0)
    mean = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + head * DH + d, mean.to(out.dtype.element_ty), mask=d < DH)
