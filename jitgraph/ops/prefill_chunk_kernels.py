"""Triton kernel of a prompt chunk's attention whose own queries, keys and values stand in ``qkv``, rotated.

Launched only by the wrapper in ``prefill_chunk.py``. The chunk's own keys come from where the product left them, so no
load of theirs waits for a page table, and none needs a register: tensor cores read them in shared memory. Older keys
come from the cache. A row sees at least the chunk's first key that its window reaches, so its maximum is finite from
the first block on. Softmax runs in base 2; source of its online form: Dao, "FlashAttention-2" (2023).
"""

from __future__ import annotations

import triton
import triton.language as tl

from jitgraph.jit.kernel import kernel
from jitgraph.ops.attention_kernels import cell_offsets, dot, load_pages, load_vectors, online_softmax
from jitgraph.ops.pdl import enter


@triton.jit
def attend_block(
    q, k, v, visible, m, total, acc, scale_log2, MASKED: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One block of keys and values [N, D]; ``visible`` [M, N] counts where MASKED."""
    s = dot(q, tl.trans(k), PRECISION, WIDEN) * scale_log2
    if MASKED:
        s = tl.where(visible, s, float("-inf"))
    m, p, alpha, total = online_softmax(s, m, total)
    return m, total, acc * alpha[:, None] + dot(p.to(v.dtype), v, PRECISION, WIDEN)


@kernel
def chunk_attention_kernel(
    qkv, k_cache, v_cache, positions, token_slot, slots, out, tokens, scale_log2,
    SLOT_STRIDE: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr, BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    enter(PDL)
    WIDTH: tl.constexpr = (HQ + 2 * HKV) * DH
    head = tl.program_id(0)
    kv_head = head // (HQ // HKV)
    block = tl.num_programs(1) - 1 - tl.program_id(1)  # the longest rows first
    first_row = block * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    inside = rows < tokens
    keys = qkv + (HQ + kv_head) * DH
    values = keys + HKV * DH
    q = load_vectors(qkv + head * DH, rows * WIDTH, inside, DH, BLOCK_D)
    start = tl.load(positions)
    slot = tl.load(token_slot)
    real = tl.load(token_slot + rows, mask=inside, other=-1) == slot
    stop = first_row + tl.sum(real.to(tl.int32), 0)  # padding comes last
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(first_row - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # Blocks in front of the rows' own, which need no mask and hold no padding; then those up to the last row.
    own = begin
    if BLOCK_M % BLOCK_N == 0:
        own = tl.where(stop > first_row, first_row, begin)
        for first in tl.range(begin, own, BLOCK_N, num_stages=STAGES):
            j = first + n
            k = load_vectors(keys, j * WIDTH, j < own, DH, BLOCK_D)
            v = load_vectors(values, j * WIDTH, j < own, DH, BLOCK_D)
            visible = rows[:, None] - j[None, :] < WINDOW
            m, total, acc = attend_block(q, k, v, visible, m, total, acc, scale_log2, WINDOW > 0, PRECISION, WIDEN)
    for first in tl.range(own, tl.where(stop > first_row, stop, 0), BLOCK_N, num_stages=STAGES):
        j = first + n
        k = load_vectors(keys, j * WIDTH, j < stop, DH, BLOCK_D)
        v = load_vectors(values, j * WIDTH, j < stop, DH, BLOCK_D)  # padding's count as 0: 0 x NaN is NaN
        visible = (j[None, :] <= rows[:, None]) & (j < stop)[None, :]
        if WINDOW > 0:
            visible = visible & (rows[:, None] - j[None, :] < WINDOW)
        m, total, acc = attend_block(q, k, v, visible, m, total, acc, scale_log2, True, PRECISION, WIDEN)

    if start > 0:  # not the first chunk of its prompt
        low = 0
        if WINDOW > 0:
            low = tl.maximum(start + first_row - WINDOW + 1, 0)
        high = tl.where(stop > first_row, start, 0)
        words = slots + slot * SLOT_STRIDE
        cached = low // BLOCK_N * BLOCK_N
        page = load_pages(words, cached + n, (cached + n >= low) & (cached + n < high), PAGE)
        for first in tl.range(cached, high, BLOCK_N, num_stages=STAGES):
            j = first + n
            seen = (j >= low) & (j < high)
            cell = cell_offsets(page, j, kv_head, PAGE, HKV, DH)
            page = load_pages(words, j + BLOCK_N, j + BLOCK_N < high, PAGE)  # one block ahead
            k = load_vectors(k_cache, cell, seen, DH, BLOCK_D)
            v = load_vectors(v_cache, cell, seen, DH, BLOCK_D)
            visible = seen[None, :]
            if WINDOW > 0:
                visible = visible & (start + rows[:, None] - j[None, :] < WINDOW)
            m, total, acc = attend_block(q, k, v, visible, m, total, acc, scale_log2, True, PRECISION, WIDEN)
    result = tl.where(real[:, None], acc * (1.0 / total)[:, None], 0.0)
    d = tl.arange(0, BLOCK_D)
    at = (rows * HQ + head) * DH
    tl.store(
        out + at[:, None] + d[None, :], result.to(out.dtype.element_ty), mask=inside[:, None] & (d < DH)[None, :]
    )  # fmt: skip
