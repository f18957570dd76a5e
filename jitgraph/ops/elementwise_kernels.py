"""Triton kernels of step preparation, embedding, norms, activation, and RoPE with the KV append.

Launched only by the wrappers in ``elementwise.py``, which assert what these kernels assume: contiguous tensors, int32
indices. Every figure that varies from step to step is read from device memory; constexprs are the model's geometry.
"""

from __future__ import annotations

import triton
import triton.language as tl

from jitgraph.jit.kernel import kernel
from jitgraph.ops import inbox as words_of
from jitgraph.ops import slots as columns
from jitgraph.ops.pdl import enter

_ADMIT = tl.constexpr(words_of.ADMIT)
_SLOT = tl.constexpr(words_of.SLOT)
_HEADER = tl.constexpr(words_of.HEADER)
_NEXT_TOKEN = tl.constexpr(columns.NEXT_TOKEN)
_LENGTH = tl.constexpr(columns.LENGTH)
_FINISHED = tl.constexpr(columns.FINISHED)
_PROMPT_LENGTH = tl.constexpr(columns.PROMPT_LENGTH)
_BLOCK_TABLE = tl.constexpr(columns.BLOCK_TABLE)


@kernel
def receive_kernel(
    inbox, launches, inputs, slots,
    DEPTH: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr, SLOT_WORDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program: it alone reads and bumps the count. All words are asked for at once, in wide loads, since each trip
    # to the host's memory takes about a microsecond.
    launch = tl.load(launches)
    row = inbox + (launch % DEPTH) * WIDTH
    word = tl.arange(0, BLOCK)
    value = tl.load(row + word, mask=word < WORDS, other=0)
    tl.store(inputs + word, value, mask=word < WORDS)
    if WORDS > _HEADER:
        admit = tl.load(row + _ADMIT)
        slot = tl.load(row + _SLOT)
        at = word - _HEADER
        tl.store(slots + slot * SLOT_WORDS + at, value, mask=(admit != 0) & (at >= 0) & (at < SLOT_WORDS))
    tl.debug_barrier()
    tl.store(launches, launch + 1)


@kernel
def prepare_prefill_kernel(
    header, prompt, token_ids, positions, token_slot, sample_index, sample_slot, sample_position, tokens,
    DUMMY: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    enter(PDL)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(header)
    start = tl.load(header + 1)
    n = tl.load(header + 2)
    emit = tl.load(header + 3)
    inside = index < tokens
    real = inside & (index < n)
    tl.store(token_ids + index, tl.load(prompt + index, mask=real, other=0), mask=inside)
    tl.store(positions + index, tl.where(real, start + index, 0), mask=inside)
    tl.store(token_slot + index, tl.where(real, slot, DUMMY), mask=inside)
    if tl.program_id(0) == 0:
        tl.store(sample_index, tl.maximum(n - 1, 0))
        tl.store(sample_slot, tl.where(emit > 0, slot, DUMMY))
        tl.store(sample_position, start + n)


@kernel
def prepare_decode_kernel(
    row_slot, slots, token_ids, positions, token_slot, sample_index, sample_slot, sample_position, rows,
    DUMMY: tl.constexpr, SLOT_STRIDE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    enter(PDL)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    wanted = tl.load(row_slot + row, mask=inside, other=DUMMY)
    words = slots + wanted * SLOT_STRIDE
    live = tl.load(words + _FINISHED) == 0
    position = tl.where(live, tl.load(words + _LENGTH), 0)
    slot = tl.where(live, wanted, DUMMY)
    tl.store(token_ids + row, tl.where(live, tl.load(words + _NEXT_TOKEN), 0), mask=inside)
    tl.store(positions + row, position, mask=inside)
    tl.store(token_slot + row, slot, mask=inside)
    tl.store(sample_index + row, row, mask=inside)
    tl.store(sample_slot + row, slot, mask=inside)
    tl.store(sample_position + row, position + 1, mask=inside)


@kernel
def embed_kernel(token_ids, table, out, D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    enter(PDL)
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < D
    source = tl.load(token_ids + row).to(tl.int64) * D  # V * D passes 2^31 in large vocabularies
    tl.store(out + row * D + column, tl.load(table + source + column, mask=inside), mask=inside)


@triton.jit
def _normalise(wide, weight, eps, D: tl.constexpr, dtype: tl.constexpr):
    """RMS norm of one float32 row, rounded to ``dtype`` before the weight as the models were trained."""
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / D + eps)
    return (wide * scale).to(dtype).to(tl.float32) * weight


@kernel
def rms_norm_kernel(x, weight, eps, out, D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = column < D
    at = tl.program_id(0) * D + column
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)  # no kernel writes it: it need not wait
    enter(PDL)
    wide = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    tl.store(out + at, _normalise(wide, w, eps, D, dtype).to(dtype), mask=inside)


@kernel
def add_rms_norm_kernel(x, residual, weight, eps, out, D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = column < D
    at = tl.program_id(0) * D + column
    dtype: tl.constexpr = out.dtype.element_ty
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    enter(PDL)
    added = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    total = (tl.load(residual + at, mask=inside, other=0.0).to(tl.float32) + added).to(dtype)
    tl.store(residual + at, total, mask=inside)
    tl.store(out + at, _normalise(total.to(tl.float32), w, eps, D, dtype).to(dtype), mask=inside)


@kernel
def silu_mul_kernel(gate_up, out, INTERMEDIATE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    enter(PDL)
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < INTERMEDIATE
    at = gate_up + row * (2 * INTERMEDIATE) + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + INTERMEDIATE, mask=inside, other=0.0).to(tl.float32)
    dtype: tl.constexpr = out.dtype.element_ty
    activated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out + row * INTERMEDIATE + column, (activated * up).to(dtype), mask=inside)


@triton.jit
def _dynamic_cos_sin(
    cos, sin, d, position, prompt, base0, factor, DH: tl.constexpr, ORIGINAL: tl.constexpr,
):  # fmt: skip
    """Dynamic NTK: frequencies from the sequence's length once it passes ORIGINAL; powers in float64, as exact as
    torch's."""
    length = tl.maximum(prompt, position + 1).to(tl.float32)
    stretch = tl.maximum(factor * length / ORIGINAL - (factor - 1.0), 1.0)
    grown: tl.constexpr = DH / (DH - 2)
    log_base = tl.log2(tl.full([1], base0, tl.float64)) + tl.log2(stretch.to(tl.float64)) * grown
    frequency = tl.exp2(-log_base * (2 * d).to(tl.float64) / DH).to(tl.float32)
    angle = position.to(tl.float32) * frequency
    stretched = length > ORIGINAL
    return tl.where(stretched, tl.cos(angle), cos), tl.where(stretched, tl.sin(angle), sin)


@triton.jit
def _head_weights(q_norm, k_norm, d, inside, is_q):
    """The norm weight of each head in the block: q's or k's."""
    wq = tl.load(q_norm + d, mask=inside, other=0.0).to(tl.float32)
    wk = tl.load(k_norm + d, mask=inside, other=0.0).to(tl.float32)
    return tl.where(is_q, wq[None, :], wk[None, :])


@kernel
def rope_append_kernel(
    qkv, q_norm, k_norm, eps, positions, token_slot, slots, cos_sin, sample_position, dynamic_base, dynamic_factor,
    k_cache, v_cache, q_out,
    SLOT_STRIDE: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr, DH: tl.constexpr, PAGE: tl.constexpr,
    NORM: tl.constexpr, DYNAMIC_ORIGINAL: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr,
    ROW_LAST: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    # One token, BLOCK_H heads of q, k and v alike: v's rotation is the identity. a and b are the halves of a head.
    enter(PDL)
    HALF: tl.constexpr = DH // 2
    token = tl.program_id(0)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    d = tl.arange(0, BLOCK_D)
    inside = d < HALF
    mask = (head < HQ + 2 * HKV) & inside[None, :]
    is_q = head < HQ
    is_v = head >= HQ + HKV
    source = qkv + (token * (HQ + 2 * HKV) + head) * DH + d[None, :]
    dtype: tl.constexpr = qkv.dtype.element_ty
    a = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / DH + eps)[:, None]
        wa = _head_weights(q_norm, k_norm, d, inside, is_q)
        wb = _head_weights(q_norm + HALF, k_norm + HALF, d, inside, is_q)
        a = tl.where(is_v, a, ((a * scale).to(dtype).to(tl.float32) * wa).to(dtype).to(tl.float32))
        b = tl.where(is_v, b, ((b * scale).to(dtype).to(tl.float32) * wb).to(dtype).to(tl.float32))
    position = tl.load(positions + token)
    words = slots + tl.load(token_slot + token) * SLOT_STRIDE
    angle = position
    plain = is_v
    if RECENT > 0:  # a rolling window: q turns by its position inside it, k is cached as it is, in the window's cell
        last = tl.load(sample_position + (token if ROW_LAST else 0)) - 1
        shift = tl.maximum(last + 1 - (SINKS + RECENT), 0)
        angle = tl.where(position < SINKS, position, tl.maximum(position - shift, 0))  # 0 for padding out of it
        position = tl.where(position < SINKS, position, SINKS + (position - SINKS) % RECENT)
        plain = head >= HQ
    cos = tl.load(cos_sin + angle * DH + d, mask=inside, other=1.0)
    sin = tl.load(cos_sin + angle * DH + HALF + d, mask=inside, other=0.0)
    if DYNAMIC_ORIGINAL > 0:
        prompt = tl.load(words + _PROMPT_LENGTH)
        cos, sin = _dynamic_cos_sin(cos, sin, d, position, prompt, dynamic_base, dynamic_factor, DH, DYNAMIC_ORIGINAL)
    cos = tl.where(plain, 1.0, cos[None, :])
    sin = tl.where(plain, 0.0, sin[None, :])
    first = (a * cos - b * sin).to(dtype)
    second = (b * cos + a * sin).to(dtype)

    to_q = q_out + (token * HQ + head) * DH + d[None, :]
    turned = mask & is_q
    if IN_PLACE:  # where it was read, by this program alone, and k as well
        to_q = source
        turned = mask & (head < HQ + HKV)
    tl.store(to_q, first, mask=turned)
    tl.store(to_q + HALF, second, mask=turned)
    page = tl.load(words + _BLOCK_TABLE + position // PAGE).to(tl.int64)
    cell = (page * PAGE + position % PAGE) * (HKV * DH)
    is_k = (head >= HQ) & (head < HQ + HKV)
    to_k = k_cache + cell + (head - HQ) * DH + d[None, :]
    tl.store(to_k, first, mask=mask & is_k)
    tl.store(to_k + HALF, second, mask=mask & is_k)
    to_v = v_cache + cell + (head - HQ - HKV) * DH + d[None, :]
    tl.store(to_v, first, mask=mask & is_v)
    tl.store(to_v + HALF, second, mask=mask & is_v)
