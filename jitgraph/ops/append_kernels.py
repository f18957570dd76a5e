"""Triton kernel of the append that ends a step: slot table, history of ids, and token ring.

Launched only by ``sampling.advance``, as the last kernel of a step on the engine's stream.
"""

from __future__ import annotations

import triton
import triton.language as tl

from jitgraph.jit.kernel import kernel
from jitgraph.ops import ring
from jitgraph.ops import slots as columns
from jitgraph.ops.pdl import enter
from jitgraph.types import MAX_LOGPROBS, MAX_STOP_TOKEN_IDS

_NEXT_TOKEN = tl.constexpr(columns.NEXT_TOKEN)
_LENGTH = tl.constexpr(columns.LENGTH)
_FINISHED = tl.constexpr(columns.FINISHED)
_MAX_LENGTH = tl.constexpr(columns.MAX_LENGTH)
_NUM_STOP = tl.constexpr(columns.NUM_STOP)
_STOP_IDS = tl.constexpr(columns.STOP_IDS)
_PENALISED = tl.constexpr(columns.PENALISED)
_MAX_STOP = tl.constexpr(MAX_STOP_TOKEN_IDS)
_MAX_TOP = tl.constexpr(MAX_LOGPROBS)
_RING_TOKEN = tl.constexpr(ring.RING_TOKEN)
_RING_LOGPROB = tl.constexpr(ring.RING_LOGPROB)
_RING_TOP_IDS = tl.constexpr(ring.RING_TOP_IDS)
_RING_TOP_LOGPROBS = tl.constexpr(ring.RING_TOP_LOGPROBS)
_RING_FIELDS = tl.constexpr(ring.RING_FIELDS)


@triton.jit
def _publish(at, payload, stamp, mask):
    """Words of the ring: the step in the upper half, 32 bits of payload in the lower."""
    tl.store(at, stamp | payload.to(tl.uint32, bitcast=True).to(tl.int64), mask=mask)


@kernel
def advance_kernel(
    sample_slot, sample_position, tokens, logprobs, top_ids, top_logprobs, slots, history, counter, ring, rows,
    DUMMY: tl.constexpr, SLOT_STRIDE: tl.constexpr, HISTORY_STRIDE: tl.constexpr, DEPTH: tl.constexpr,
    RING_ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_TOP: tl.constexpr, LOGPROBS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    enter(PDL)
    # One program of one warp: every read of the counter and the table comes before the writes in program order.
    row = tl.arange(0, BLOCK_R)
    inside = row < rows
    slot = tl.load(sample_slot + row, mask=inside, other=DUMMY)
    position = tl.load(sample_position + row, mask=inside, other=0)
    token = tl.load(tokens + row, mask=inside, other=0)
    words = slots + slot * SLOT_STRIDE
    column = tl.arange(0, _MAX_STOP)
    listed = column[None, :] < tl.load(words + _NUM_STOP)[:, None]
    stops = tl.load(words[:, None] + _STOP_IDS + column[None, :], mask=listed, other=-1)
    stopped = tl.max((listed & (stops == token[:, None])).to(tl.int32), 1) > 0
    ended = stopped | (position + 1 >= tl.load(words + _MAX_LENGTH))
    live = inside & (slot != DUMMY)
    counted = live & (tl.load(words + _PENALISED) != 0)
    step = tl.load(counter)

    tl.store(words + _NEXT_TOKEN, token, mask=live)
    tl.store(words + _LENGTH, position, mask=live)
    tl.store(words + _FINISHED, ended.to(tl.int32), mask=live)
    if HISTORY_STRIDE > 0:  # no two live rows share a slot
        count = history + slot * HISTORY_STRIDE + token
        tl.store(count, tl.load(count, mask=counted, other=0) + 1, mask=counted)
    tl.store(counter, step + 1)
    stamp = step << 32
    record = ring + (step % DEPTH) * (RING_ROWS * _RING_FIELDS) + row * _RING_FIELDS
    _publish(record + _RING_TOKEN, token, stamp, inside)
    if LOGPROBS:
        _publish(record + _RING_LOGPROB, tl.load(logprobs + row, mask=inside, other=0.0), stamp, inside)
        rank = tl.arange(0, BLOCK_TOP)
        mask = inside[:, None] & (rank < _MAX_TOP)[None, :]
        source = row[:, None] * _MAX_TOP + rank[None, :]
        at = record[:, None] + rank[None, :]
        _publish(at + _RING_TOP_IDS, tl.load(top_ids + source, mask=mask, other=0), stamp, mask)
        _publish(at + _RING_TOP_LOGPROBS, tl.load(top_logprobs + source, mask=mask, other=0.0), stamp, mask)
