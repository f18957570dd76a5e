"""Triton kernel of a prompt chunk's RoPE, KV append and attention in one launch.

Launched only by the wrapper in ``prefill_fused.py``. The chunk's own keys and values come from ``qkv``, older ones from
the cache, so no program reads a cell that another writes in the same launch, and a first chunk waits for no page table.
A program's own tokens are loaded, rotated and appended once, and are the first keys it attends to (the diagonal): each
row sees at least itself there, so its maximum is finite ever after. Softmax runs in base 2; source of its online form:
Dao, "FlashAttention-2" (2023).

Where several programs share a block of queries, the first does all this, each takes its part of the context, and the
last to arrive adds their sums in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from jitgraph.jit.kernel import kernel
from jitgraph.ops.attention_decode_kernels import last_to_arrive
from jitgraph.ops.attention_kernels import cell_offsets, dot, load_pages, load_vectors
from jitgraph.ops.pdl import enter

_NOTHING_SEEN = tl.constexpr(-1e30)
"""The maximum of a row that has seen no key yet: finite, and below that of any that has."""


@triton.jit
def load_halves(base, offset, seen, DH: tl.constexpr, BLOCK_H: tl.constexpr):
    """Both halves [N, BLOCK_H] of the DH elements at each offset."""
    HALF: tl.constexpr = DH // 2
    return load_vectors(base, offset, seen, HALF, BLOCK_H), load_vectors(base + HALF, offset, seen, HALF, BLOCK_H)


@triton.jit
def store_vectors(base, offset, x, seen, DH: tl.constexpr):
    """The first DH columns of x [N, >= DH] to each offset."""
    d = tl.arange(0, x.shape[1])
    tl.store(base + offset[:, None] + d[None, :], x, mask=seen[:, None] & (d < DH)[None, :])


@triton.jit
def rotate(a, b, cos, sin):
    """The rotated halves in float32."""
    a = a.to(tl.float32)
    b = b.to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def load_block(
    keys, values, cos_sin, start, j, stop,
    WIDTH: tl.constexpr, DH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Of the chunk's tokens ``j`` below ``stop``: the halves of the keys, the cosines, the sines, the values."""
    seen = j < stop
    a, b = load_halves(keys, j * WIDTH, seen, DH, BLOCK_H)
    cos, sin = load_halves(cos_sin, (start + j) * DH, seen, DH, BLOCK_H)
    return a, b, cos, sin, load_vectors(values, j * WIDTH, seen, DH, BLOCK_D)


@triton.jit
def half_scores(q1, q2, k1, k2, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """[M, N] float32: queries times keys, both as halves."""
    return dot(q1, tl.trans(k1), PRECISION, WIDEN) + dot(q2, tl.trans(k2), PRECISION, WIDEN)


@triton.jit
def attend(s, v, m, total, acc, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """One block's step of the online softmax, for rows whose maximum is finite already."""
    m_new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - m_new[:, None])
    alpha = tl.exp2(m - m_new)
    return m_new, total * alpha + tl.sum(p, 1), acc * alpha[:, None] + dot(p.to(v.dtype), v, PRECISION, WIDEN)


@triton.jit
def attend_chunk(
    q1, q2, m, total, acc, a, b, cos, sin, v, keys, values, cos_sin, start, rows, begin, stop,
    WIDTH: tl.constexpr, DH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The chunk's keys ``begin`` to ``stop``, in front of the program's own, rotated as their own program does it.

    With one stage a block waits in registers, where it must go for the rotation anyway, while the one before it is at
    work; the first is ``a`` to ``v``. With more, blocks wait in shared memory and ``a`` to ``v`` are not needed.
    """
    n = tl.arange(0, BLOCK_N)
    for first in tl.range(begin, stop, BLOCK_N, num_stages=STAGES):
        j = first + n
        if STAGES > 1:
            a, b, cos, sin, v = load_block(keys, values, cos_sin, start, j, stop, WIDTH, DH, BLOCK_D, BLOCK_H)
        k1, k2 = rotate(a, b, cos, sin)
        k1 = k1.to(v.dtype)
        k2 = k2.to(v.dtype)
        own_v = v
        if STAGES == 1:
            after = j + BLOCK_N
            a, b, cos, sin, v = load_block(keys, values, cos_sin, start, after, stop, WIDTH, DH, BLOCK_D, BLOCK_H)
        s = half_scores(q1, q2, k1, k2, PRECISION, WIDEN)
        if BLOCK_M % BLOCK_N != 0:  # else every block is whole
            s = tl.where((j < stop)[None, :], s, float("-inf"))
        if WINDOW > 0:
            s = tl.where(rows[:, None] - j[None, :] < WINDOW, s, float("-inf"))
        m, total, acc = attend(s, own_v, m, total, acc, PRECISION, WIDEN)
    return m, total, acc


@triton.jit
def attend_cache(
    q1, q2, m, total, acc, k_cache, v_cache, words, kv_head, position, low, high,
    HKV: tl.constexpr, DH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The keys of positions ``low`` to ``high`` in the cache. Pages are loaded one block ahead."""
    n = tl.arange(0, BLOCK_N)
    begin = low // BLOCK_N * BLOCK_N
    page = load_pages(words, begin + n, (begin + n >= low) & (begin + n < high), PAGE)
    for first in tl.range(begin, high, BLOCK_N, num_stages=max(STAGES, 2)):
        j = first + n
        seen = (j >= low) & (j < high)
        cell = cell_offsets(page, j, kv_head, PAGE, HKV, DH)
        page = load_pages(words, j + BLOCK_N, j + BLOCK_N < high, PAGE)
        k1, k2 = load_halves(k_cache, cell, seen, DH, BLOCK_H)
        v = load_vectors(v_cache, cell, seen, DH, BLOCK_D)
        visible = seen[None, :]
        if WINDOW > 0:
            visible = visible & (position[:, None] - j[None, :] < WINDOW)
        s = tl.where(visible, half_scores(q1, q2, k1, k2, PRECISION, WIDEN), float("-inf"))
        m, total, acc = attend(s, v, m, total, acc, PRECISION, WIDEN)
    return m, total, acc


@triton.jit
def exchange(
    acc, m, total, partial, counter, tile, split, active,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Leaves one split's sums [M, D], maxima and totals [M] in the workspace; whether it is the last to do so. That one
    gets the sums and totals of all."""
    SIZE: tl.constexpr = BLOCK_M * (BLOCK_D + 2)
    r = tl.arange(0, BLOCK_M)
    sums = r[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    base = partial + tile * SPLITS * SIZE
    mine = base + split * SIZE
    tl.store(mine + sums, acc)
    tl.store(mine + BLOCK_M * BLOCK_D + r, m)
    tl.store(mine + BLOCK_M * (BLOCK_D + 1) + r, total)
    last = last_to_arrive(counter, active)
    if last:
        m = tl.full([BLOCK_M], _NOTHING_SEEN, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for one in range(0, active):
            at = base + one * SIZE
            part = tl.load(at + sums, cache_modifier=".cg")
            part_m = tl.load(at + BLOCK_M * BLOCK_D + r, cache_modifier=".cg")
            part_total = tl.load(at + BLOCK_M * (BLOCK_D + 1) + r, cache_modifier=".cg")
            m_new = tl.maximum(m, part_m)
            before = tl.exp2(m - m_new)
            now = tl.exp2(part_m - m_new)
            acc = acc * before[:, None] + part * now[:, None]
            total = total * before + part_total * now
            m = m_new
    return last, acc, total


@kernel
def rope_prefill_attention_kernel(
    qkv, positions, token_slot, slots, cos_sin, k_cache, v_cache, out, partial, arrivals, tokens, scale_log2,
    SLOT_STRIDE: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr, MIN_KEYS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    enter(PDL)
    start = tl.load(positions)
    split = tl.program_id(2)
    active = tl.minimum(tl.maximum(tl.cdiv(start, MIN_KEYS), 1), SPLITS)
    if SPLITS > 1:  # noqa: SIM102 - decided when the kernel is compiled
        if split >= active:
            return
    WIDTH: tl.constexpr = (HQ + 2 * HKV) * DH
    GROUP: tl.constexpr = HQ // HKV
    dtype: tl.constexpr = qkv.dtype.element_ty
    head = tl.program_id(0)
    kv_head = head // GROUP
    block = tl.num_programs(1) - 1 - tl.program_id(1)  # the longest rows first
    first_row = block * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    inside = rows < tokens
    keys = qkv + (HQ + kv_head) * DH
    values = keys + HKV * DH

    # What no other load must come before goes out first.
    position = tl.load(positions + rows, mask=inside, other=0)
    row_slot = tl.load(token_slot + rows, mask=inside, other=0)
    slot = tl.load(token_slot)
    live = tl.load(token_slot + first_row) == slot  # padding comes last: else there is nothing else in the block
    q1, q2 = load_halves(qkv + head * DH, rows * WIDTH, inside, DH, BLOCK_H)
    k1, k2 = load_halves(keys, rows * WIDTH, inside, DH, BLOCK_H)
    v = load_vectors(values, rows * WIDTH, inside, DH, BLOCK_D)
    cos, sin = load_halves(cos_sin, position * DH, inside, DH, BLOCK_H)
    real = inside & (row_slot == slot)
    appended = real & (head % GROUP == 0)  # the first query head of a group writes the KV head that they share
    if SPLITS > 1:
        appended = appended & (split == 0)
    page = load_pages(slots + slot * SLOT_STRIDE, position, appended, PAGE)

    q1, q2 = rotate(q1, q2, cos, sin)
    k1, k2 = rotate(k1, k2, cos, sin)
    # The scale goes into the queries before they are rounded. A factor that is not loaded also keeps the compiler from
    # changing the layout in front of the rotation, which takes four tiles through shared memory instead of two.
    q1 = (q1 * scale_log2).to(dtype)
    q2 = (q2 * scale_log2).to(dtype)
    # Padding's keys and values become 0: nobody sees them, but 0 x NaN is NaN.
    k1 = tl.where(real[:, None], k1, 0.0).to(dtype)
    k2 = tl.where(real[:, None], k2, 0.0).to(dtype)
    v = tl.where(real[:, None], v, tl.zeros_like(v))
    cell = cell_offsets(page, position, kv_head, PAGE, HKV, DH)
    store_vectors(k_cache, cell, k1, appended, DH // 2)
    store_vectors(k_cache + DH // 2, cell, k2, appended, DH // 2)
    store_vectors(v_cache, cell, v, appended, DH)

    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(first_row - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    stop = tl.where(live & (split == 0), first_row, 0)
    n = begin + tl.arange(0, BLOCK_N)
    a, b, next_cos, next_sin, next_v = load_block(
        keys, values, cos_sin, start, n, stop, WIDTH, DH, BLOCK_D, BLOCK_H
    )  # fmt: skip

    # The diagonal. Padding's rows run along.
    visible = rows[None, :] <= rows[:, None]
    if WINDOW > 0:
        visible = visible & (rows[:, None] - rows[None, :] < WINDOW)
    if SPLITS > 1:
        visible = visible & (split == 0)
    s = tl.where(visible, half_scores(q1, q2, k1, k2, PRECISION, WIDEN), float("-inf"))
    m = tl.max(s, 1)
    if SPLITS > 1:
        m = tl.maximum(m, _NOTHING_SEEN)
    p = tl.exp2(s - m[:, None])
    total = tl.sum(p, 1)
    acc = dot(p.to(dtype), v, PRECISION, WIDEN)

    m, total, acc = attend_chunk(
        q1, q2, m, total, acc, a, b, next_cos, next_sin, next_v, keys, values, cos_sin, start, rows, begin, stop,
        WIDTH, DH, BLOCK_D, BLOCK_H, WINDOW, BLOCK_M, BLOCK_N, PRECISION, WIDEN, STAGES,
    )  # fmt: skip
    if start > 0:  # not the first chunk of its prompt
        low = 0
        if WINDOW > 0:
            low = tl.maximum(start + first_row - WINDOW + 1, 0)
        words, high = slots + slot * SLOT_STRIDE, tl.where(live, start, 0)
        if SPLITS > 1:
            first = low // BLOCK_N * BLOCK_N
            share = tl.cdiv(tl.cdiv(start - first, BLOCK_N), active) * BLOCK_N
            low = tl.maximum(low, first + split * share)
            high = tl.minimum(high, first + (split + 1) * share)
        m, total, acc = attend_cache(
            q1, q2, m, total, acc, k_cache, v_cache, words, kv_head, start + rows, low, high,
            HKV, DH, BLOCK_D, BLOCK_H, PAGE, WINDOW, BLOCK_N, PRECISION, WIDEN, STAGES,
        )  # fmt: skip
    delivers = inside
    if SPLITS > 1:  # noqa: SIM102
        if active > 1:
            tile = block * HQ + head
            last, acc, total = exchange(
                acc, m, total, partial, arrivals + tile, tile, split, active, BLOCK_M, BLOCK_D, SPLITS
            )  # fmt: skip
            delivers = delivers & last
    result = tl.where(real[:, None], acc * (1.0 / total)[:, None], 0.0)
    store_vectors(out, (rows * HQ + head) * DH, result.to(dtype), delivers, DH)
