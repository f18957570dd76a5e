"""Triton kernels of decode attention: split over the keys, and merged by the last split to finish.

Launched only by the wrapper in ``attention.py``. One launch: a program is one split of one (row, KV head). How many
splits have keys depends on the row's position alone, and the merge adds them in their order, so bits depend neither on
neighbours nor on which split was last. Idle splits leave at once. Source of the split over keys: Dao et al.,
"Flash-Decoding" (2023).
"""

from __future__ import annotations

import triton
import triton.language as tl

from jitgraph.jit.kernel import kernel
from jitgraph.ops.attention_kernels import (
    cell_offsets,
    dot,
    load_pages,
    load_query,
    load_rotated,
    load_vectors,
    online_softmax,
    scores,
    window_token,
)
from jitgraph.ops.pdl import enter


@triton.jit
def _key_range(
    position, WINDOW: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr, SPLITS: tl.constexpr,
    MIN_KEYS: tl.constexpr,
):  # fmt: skip
    """First key, one past the last key, and how many splits share them: none has fewer than MIN_KEYS on average."""
    low = 0
    high = position + 1
    if WINDOW > 0:
        low = tl.maximum(high - WINDOW, 0)
    if RECENT > 0:
        high = tl.minimum(high, SINKS + RECENT)
    return low, high, tl.minimum(tl.cdiv(high - low, MIN_KEYS), SPLITS)


@triton.jit
def last_to_arrive(counter, active):
    """Whether this program is the last of ``active`` to get here; that one leaves the counter at 0 for the next launch.

    Why the last one may read what the others wrote. Every thread of a program stores its part of the result, then all
    meet at the barrier; the one thread that does the atomic is ordered behind them by it, and the atomic's release at
    GPU scope is cumulative: it publishes what that thread has observed, the stores of its block included. The atomics
    on one counter form a chain, so the last one's acquire sees the releases of all before it. Its result reaches the
    other threads through shared memory and a barrier, which orders their loads behind the acquire. These loads bypass
    L1 (.cg): it is not coherent, and only the acquiring thread's view is known to be fresh.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == active - 1
    if last:
        tl.store(counter, 0)  # nobody else comes any more
    return last


@triton.jit
def _merge(
    partial, partial_lse, out, first_head, active,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, DH: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The splits' means [GROUP, active, DH], weighted by their share of the softmax, to ``out``. Loads depend on
    nothing but ``active``, so that all of a chunk are in flight together."""
    member = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    head = first_head + member
    wanted = member < GROUP
    split = tl.arange(0, BLOCK_S)
    some = wanted[:, None] & (split < active)[None, :]
    at = head[:, None] * SPLITS
    lse = tl.load(partial_lse + at + split[None, :], mask=some, other=float("-inf"), cache_modifier=".cg")
    top = tl.where(wanted, tl.max(lse, 1), 0.0)
    total = tl.sum(tl.exp2(lse - top[:, None]), 1)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for start in range(0, active, CHUNK):
        part = start + tl.arange(0, CHUNK)
        of_chunk = wanted[:, None] & (part < active)[None, :]
        share = tl.load(partial_lse + at + part[None, :], mask=of_chunk, other=float("-inf"), cache_modifier=".cg")
        mean = tl.load(
            partial + (at + part[None, :])[:, :, None] * DH + d[None, None, :],
            mask=of_chunk[:, :, None] & (d < DH)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        acc += tl.sum(mean * tl.exp2(share - top[:, None])[:, :, None], 1)
    acc = acc / tl.where(wanted, total, 1.0)[:, None]
    to = out + head[:, None] * DH + d[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=wanted[:, None] & (d < DH)[None, :])


@triton.jit
def _deliver(
    mean, lse, partial, partial_lse, counter, out, first_head, split, active,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr, DH: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One split's result, mean [M, BLOCK_D] and lse [M] of its query heads: straight to ``out`` where it is alone, else
    to the workspace, and from there to ``out`` by the last."""
    member = tl.arange(0, mean.shape[0])
    d = tl.arange(0, BLOCK_D)
    head = first_head + member
    mask = (member < GROUP)[:, None] & (d < DH)[None, :]
    if active == 1:
        tl.store(out + head[:, None] * DH + d[None, :], mean.to(out.dtype.element_ty), mask=mask)
    if SPLITS > 1 and active > 1:
        at = head * SPLITS + split
        tl.store(partial_lse + at, lse, mask=member < GROUP)
        tl.store(partial + at[:, None] * DH + d[None, :], mean, mask=mask)
        if last_to_arrive(counter, active):
            _merge(
                partial, partial_lse, out, first_head, active, GROUP, BLOCK_G, DH, BLOCK_D, SPLITS, BLOCK_S, CHUNK
            )  # fmt: skip


@triton.jit
def _vector(base, DH: tl.constexpr, BLOCK_D: tl.constexpr):
    """DH elements in float32, padded with zeros."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(base + d, mask=d < DH, other=0.0).to(tl.float32)


@kernel
def decode_single_kernel(
    q, k_cache, v_cache, positions, token_slot, slots, cos_sin, partial, partial_lse, arrivals, out, scale_log2,
    SLOT_STRIDE: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr,
    SPLITS: tl.constexpr, MIN_KEYS: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # One query head per KV head: no tensor cores, each lane n keeps its own online softmax over keys n, n + BLOCK_N,
    # ... so that nothing is reduced across lanes before the end.
    enter(PDL)
    row = tl.program_id(0)
    head = row * HKV + tl.program_id(1)
    split = tl.program_id(2)
    # The query is on its way before the first wait, which is for the position.
    if RECENT > 0:
        first = _vector(q + head * DH, DH // 2, BLOCK_H) * scale_log2
        second = _vector(q + head * DH + DH // 2, DH // 2, BLOCK_H) * scale_log2
    else:
        first = _vector(q + head * DH, DH, BLOCK_D) * scale_log2
    position = tl.load(positions + row)
    words = slots + tl.load(token_slot + row) * SLOT_STRIDE
    low, high, active = _key_range(position, WINDOW, SINKS, RECENT, SPLITS, MIN_KEYS)
    if split < active:
        m = tl.full([BLOCK_N], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_N], tl.float32)
        acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        # Blocks are dealt to the splits in turn. The pages of the next one are loaded ahead of its keys.
        step = active * BLOCK_N
        j = low + split * BLOCK_N + tl.arange(0, BLOCK_N)
        page = load_pages(words, j, j < high, PAGE)
        for start in tl.range(low + split * BLOCK_N, high, step, num_stages=STAGES):
            j = start + tl.arange(0, BLOCK_N)
            seen = j < high
            cell = cell_offsets(page, j, tl.program_id(1), PAGE, HKV, DH)
            page = load_pages(words, j + step, j + step < high, PAGE)
            v = load_vectors(v_cache, cell, seen, DH, BLOCK_D).to(tl.float32)
            if RECENT > 0:
                token = window_token(j, position, SINKS, RECENT)
                a, b = load_rotated(k_cache, cell, seen, token, position, cos_sin, DH, BLOCK_H, SINKS, RECENT)
                s = tl.sum(a.to(tl.float32) * first[None, :], 1) + tl.sum(b.to(tl.float32) * second[None, :], 1)
            else:
                s = tl.sum(load_vectors(k_cache, cell, seen, DH, BLOCK_D).to(tl.float32) * first[None, :], 1)
            s = tl.where(seen, s, float("-inf"))
            m_new = tl.maximum(m, s)
            centre = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(s - centre)
            alpha = tl.exp2(m - centre)
            total = total * alpha + p
            acc = acc * alpha[:, None] + p[:, None] * v
            m = m_new
        top = tl.max(m, 0, keep_dims=True)
        weight = tl.exp2(m - top)
        total = tl.sum(total * weight, 0, keep_dims=True)
        mean = tl.sum(acc * weight[:, None], 0, keep_dims=True) / total[:, None]
        _deliver(
            mean, top + tl.log2(total), partial, partial_lse, arrivals + head, out, head, split, active,
            1, 1, DH, BLOCK_D, SPLITS, BLOCK_S, CHUNK,
        )  # fmt: skip


@kernel
def decode_grouped_kernel(
    q, k_cache, v_cache, positions, token_slot, slots, cos_sin, partial, partial_lse, arrivals, out, scale_log2,
    SLOT_STRIDE: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr,
    SPLITS: tl.constexpr, MIN_KEYS: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    # The query heads of one KV head are the rows of one matrix product, padded to BLOCK_M.
    GROUP: tl.constexpr = HQ // HKV
    enter(PDL)
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    member = tl.arange(0, BLOCK_M)
    first_head = row * HQ + kv_head * GROUP
    first, second = load_query(q, (first_head + member) * DH, member < GROUP, DH, BLOCK_D, BLOCK_H, RECENT)
    position = tl.load(positions + row)
    words = slots + tl.load(token_slot + row) * SLOT_STRIDE
    low, high, active = _key_range(position, WINDOW, SINKS, RECENT, SPLITS, MIN_KEYS)
    if split < active:
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        step = active * BLOCK_N
        j = low + split * BLOCK_N + tl.arange(0, BLOCK_N)
        page = load_pages(words, j, j < high, PAGE)
        for start in tl.range(low + split * BLOCK_N, high, step, num_stages=STAGES):
            j = start + tl.arange(0, BLOCK_N)
            seen = j < high
            cell = cell_offsets(page, j, kv_head, PAGE, HKV, DH)
            page = load_pages(words, j + step, j + step < high, PAGE)
            token = j
            if RECENT > 0:
                token = window_token(j, position, SINKS, RECENT)
            s = scores(
                first, second, k_cache, cell, seen, token, position, cos_sin, DH, BLOCK_D, BLOCK_H, SINKS, RECENT,
                PRECISION, WIDEN,
            )  # fmt: skip
            s = tl.where(seen[None, :], s * scale_log2, float("-inf"))
            m, p, alpha, total = online_softmax(s, m, total)
            v = load_vectors(v_cache, cell, seen, DH, BLOCK_D)
            acc = acc * alpha[:, None] + dot(p.to(v.dtype), v, PRECISION, WIDEN)
        _deliver(
            acc / total[:, None], m + tl.log2(total), partial, partial_lse, arrivals + row * HKV + kv_head, out,
            first_head, split, active, GROUP, BLOCK_G, DH, BLOCK_D, SPLITS, BLOCK_S, CHUNK,
        )  # fmt: skip
