"""Triton kernels of penalties and bias, and of the history of ids that penalties need.

``note_prompt_kernel`` is launched by ``sampling.note_prompt``; the sampling kernels call the functions. A slot's row of
the history is read and written only where the slot is PENALISED; for others it may hold anything.
"""

from __future__ import annotations

import triton
import triton.language as tl

from jitgraph.jit.kernel import kernel
from jitgraph.ops import slots as columns
from jitgraph.ops.pdl import enter
from jitgraph.types import MAX_LOGIT_BIAS

_REPETITION = tl.constexpr(columns.REPETITION)
_PRESENCE = tl.constexpr(columns.PRESENCE)
_FREQUENCY = tl.constexpr(columns.FREQUENCY)
_PENALISED = tl.constexpr(columns.PENALISED)
_NUM_BIAS = tl.constexpr(columns.NUM_BIAS)
_BIAS_IDS = tl.constexpr(columns.BIAS_IDS)
_BIAS_VALUES = tl.constexpr(columns.BIAS_VALUES)
_IN_PROMPT = tl.constexpr(columns.IN_PROMPT)
_COUNT = tl.constexpr(columns.IN_PROMPT - 1)
_BIAS_LANES = tl.constexpr(1 << (MAX_LOGIT_BIAS - 1).bit_length())
_NO_ID = tl.constexpr(2**31 - 1)


@triton.jit
def load_f32(address):
    """A float32 column of the slot table."""
    return tl.load(address).to(tl.float32, bitcast=True)


@triton.jit
def penalised(x, ids, words, history_row, VOCABULARY: tl.constexpr):
    """x with the penalties of its row, if there are any."""
    if tl.load(words + _PENALISED) != 0:
        seen = tl.load(history_row + ids, mask=ids < VOCABULARY, other=0)
        count = seen & _COUNT
        repetition = tl.zeros_like(x) + load_f32(words + _REPETITION)
        x = tl.where(seen != 0, tl.where(x > 0, tl.div_rn(x, repetition), x * repetition), x)
        frequency = load_f32(words + _FREQUENCY)
        if frequency != 0:  # in float64 the product is exact: fused with the subtraction or not, the result is the same
            x = (x.to(tl.float64) - frequency.to(tl.float64) * count.to(tl.float64)).to(tl.float32)
        x = tl.where(count > 0, x - load_f32(words + _PRESENCE), x)
    return x


@triton.jit
def biased(x, ids, first, words, BLOCK: tl.constexpr):
    """x of the ids ``[first, first + BLOCK)`` with the biases of its row; the list ascends, so they are one run of
    it."""
    count = tl.load(words + _NUM_BIAS)
    if count > 0:
        lane = tl.arange(0, _BIAS_LANES)
        listed = tl.load(words + _BIAS_IDS + lane, mask=lane < count, other=_NO_ID)
        start = tl.sum((listed < first).to(tl.int32), 0)
        end = tl.sum((listed < first + BLOCK).to(tl.int32), 0)
        for i in range(start, end):
            x = tl.where(ids == tl.load(words + _BIAS_IDS + i), x + load_f32(words + _BIAS_VALUES + i), x)
    return x


@kernel
def note_prompt_kernel(
    token_ids, positions, token_slot, slots, history, tokens,
    DUMMY: tl.constexpr, SLOT_STRIDE: tl.constexpr, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    enter(PDL)
    # One block of ids: clears it, then marks those of the prompt's ids that fall into it. No other program writes here.
    first = tl.program_id(0) * BLOCK
    slot = tl.load(token_slot)
    if tl.load(slots + slot * SLOT_STRIDE + _PENALISED) != 0:
        row = history + slot * VOCABULARY
        if tl.load(positions) == 0:
            block = first + tl.arange(0, BLOCK)
            tl.store(row + block, tl.zeros([BLOCK], tl.int32), mask=block < VOCABULARY)
            tl.debug_barrier()  # another thread of this program may mark what this one clears
        for start in range(0, tokens, CHUNK):
            index = start + tl.arange(0, CHUNK)
            ids = tl.load(token_ids + index, mask=index < tokens, other=0)
            real = tl.load(token_slot + index, mask=index < tokens, other=DUMMY) != DUMMY
            here = real & (ids >= first) & (ids < first + BLOCK)
            tl.store(row + ids, tl.full([CHUNK], _IN_PROMPT, tl.int32), mask=here)
