"""Triton kernels of top-k, top-p and min-p: the search for a row's threshold and the draw from what it keeps.

Launched only by ``sampling.sample``, between the kernels of ``sampling_kernels.py``. A threshold is an *image*, an
int32 that orders as float32 does. The search holds a bracket ``[low, high)`` of images: the weight of all x with image
>= low reaches the target, that of all with image >= high does not. A weight is 1 while the k-th largest is looked for
(COUNT), then exp(x - x_max) for top-p (MASS), whose target is a share of what top-k left; then the row is DONE and
``low`` is its threshold.

Each pass tests FANOUT thresholds of the bracket, a program per block of ids, and every program of the next launch sums
the blocks' weights in one fixed order. So a threshold is exact and the same in any batch. Launches do not depend on
data: the passes of a row that has no filters, or is done, leave at once; what a fixed number of passes leaves open (a
crowd of nearly equal logits about the threshold) the draw finishes by bisection.

The int32 words of an *area*, the part of a row's scratch that a pass writes: low, high, stage, target; FANOUT
thresholds; each block's least image inside the bracket, then each block's greatest; FANOUT weights of each block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from jitgraph.jit.kernel import kernel
from jitgraph.ops import slots as columns
from jitgraph.ops.history_kernels import load_f32
from jitgraph.ops.pdl import enter
from jitgraph.ops.sampling_kernels import filtered, gumbel, load_best, store_best

_TOP_K = tl.constexpr(columns.TOP_K)
_TEMPERATURE = tl.constexpr(columns.TEMPERATURE)
_TOP_P = tl.constexpr(columns.TOP_P)
_MIN_P = tl.constexpr(columns.MIN_P)

_COUNT = tl.constexpr(0)
_MASS = tl.constexpr(1)
_DONE = tl.constexpr(2)
_UNKNOWN = tl.constexpr(-1.0)
"""Target of a search for mass until the mass of what top-k left has been measured."""
_STATE = tl.constexpr(4)
_IMAGE_OF_MINUS_INF = tl.constexpr(-0x7F800001)
_LOWEST = tl.constexpr(-(2**31))
_HIGHEST = tl.constexpr(2**31 - 1)
_SPAN = tl.constexpr(32.0)
"""How far below the bracket's top a pass looks: a weight further down is under 2e-14 of the largest."""


@triton.jit
def _image(x):
    """int32 that orders as the float32 x does (both zeros being +0)."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(image):
    """The float32 of an image."""
    return (image ^ ((image >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _largest(base, words, BLOCKS: tl.constexpr, BLOCKS_PADDED: tl.constexpr):
    """x_max: the largest of a row's x / temperature."""
    value, _ = load_best(base, tl.arange(0, BLOCKS_PADDED), BLOCKS)
    x_max = tl.div_rn(tl.max(value, 0), load_f32(words + _TEMPERATURE))
    return tl.where(x_max == 0, 0.0, x_max)


@triton.jit
def _after_count(words):
    """The stage behind COUNT."""
    return tl.where(load_f32(words + _TOP_P) < 1.0, _MASS, _DONE)


@triton.jit
def _opening(words, x_max, VOCABULARY: tl.constexpr):
    """(low, high, stage, target) before the first pass."""
    top_k = tl.load(words + _TOP_K)
    counts = (top_k > 0) & (top_k < VOCABULARY)
    high = _image(x_max) + 1
    low = tl.zeros_like(high) + _IMAGE_OF_MINUS_INF
    return low, high, tl.where(counts, _COUNT, _after_count(words)), tl.where(counts, top_k.to(tl.float32), _UNKNOWN)


@triton.jit
def _settled(low, high, stage, target, found, words, x_max):
    """The state once more, moved on to the next stage where the bracket has found its threshold."""
    found = found | (high.to(tl.int64) - low <= 1)
    following = tl.where(stage == _COUNT, _after_count(words), _DONE)
    high = tl.where(found, _image(x_max) + 1, high)
    return low, high, tl.where(found, following, stage), tl.where(found, _UNKNOWN, target)


@triton.jit
def _thresholds(low, high, FANOUT: tl.constexpr):
    """FANOUT ascending images, ``low`` the first: evenly spaced as values, or the bracket's every image where it is
    narrow."""
    j = tl.arange(0, FANOUT)
    top = _value(high - 1)
    bottom = tl.maximum(_value(low), top - _SPAN)
    spaced = _image(bottom + (top - bottom) * (j.to(tl.float32) / FANOUT))
    spaced = tl.minimum(tl.maximum(spaced, low + 1), high - 1)
    spaced = tl.where(high.to(tl.int64) - low <= FANOUT, low + j, spaced)
    return tl.where(j == 0, low, spaced)


@triton.jit
def _after_pass(
    area, words, x_max, BLOCKS: tl.constexpr, BLOCKS_PADDED: tl.constexpr, FANOUT: tl.constexpr,
):  # fmt: skip
    """(low, high, stage, target) as the pass that filled ``area`` leaves them."""
    low = tl.load(area)
    high = tl.load(area + 1)
    stage = tl.load(area + 2)
    target = tl.load(area + 3).to(tl.float32, bitcast=True)
    if stage != _DONE:
        j = tl.arange(0, FANOUT)
        b = tl.arange(0, BLOCKS_PADDED)
        thresholds = tl.load(area + _STATE + j)
        ends = area + _STATE + FANOUT + b
        least = tl.min(tl.load(ends, mask=b < BLOCKS, other=_HIGHEST), 0)
        greatest = tl.max(tl.load(ends + BLOCKS, mask=b < BLOCKS, other=_LOWEST), 0)
        at = area + _STATE + FANOUT + 2 * BLOCKS + b[:, None] * FANOUT + j[None, :]
        weights = tl.sum(tl.load(at, mask=b[:, None] < BLOCKS, other=0).to(tl.float32, bitcast=True), 0)
        share = load_f32(words + _TOP_P) * tl.sum(tl.where(j == 0, weights, 0.0), 0)
        target = tl.where(target == _UNKNOWN, share, target)
        reached = tl.maximum(tl.sum((weights >= target).to(tl.int32), 0), 1)
        found = (stage == _COUNT) & (tl.sum(tl.where(j == reached - 1, weights, 0.0), 0) == target)
        low = tl.sum(tl.where(j == reached - 1, thresholds, 0), 0)
        high = tl.where(reached < FANOUT, tl.sum(tl.where(j == reached, thresholds, 0), 0), high)
        low = tl.where(least <= greatest, tl.maximum(low, least), low)  # what lies between are no x
        high = tl.where(least <= greatest, tl.minimum(high, greatest + 1), high)
        low, high, stage, target = _settled(low, high, stage, target, found, words, x_max)
    return low, high, stage, target


@triton.jit
def _images(x_row, ids, VOCABULARY: tl.constexpr):
    """Images of a row's x / temperature; behind the vocabulary lower than any."""
    x = tl.load(x_row + ids, mask=ids < VOCABULARY, other=0.0)
    return tl.where(ids < VOCABULARY, _image(x), _LOWEST)


@triton.jit
def _weight(image, x_max, stage):
    """What an x counts for in a stage."""
    return tl.where(stage == _COUNT, 1.0, tl.exp(_value(image) - x_max))


@triton.jit
def _weigh(
    x_row, area, block, low, high, stage, x_max, thresholds,
    VOCABULARY: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, FANOUT: tl.constexpr,
):  # fmt: skip
    """One block's part of a pass: its weight at and above each threshold, its least and greatest image inside the
    bracket."""
    image = _images(x_row, block * BLOCK + tl.arange(0, BLOCK), VOCABULARY)  # now in the cache for the loop below
    inside = (image >= low) & (image < high)
    ends = area + _STATE + FANOUT + block
    tl.store(ends, tl.min(tl.where(inside, image, _HIGHEST), 0))
    tl.store(ends + BLOCKS, tl.max(tl.where(inside, image, _LOWEST), 0))
    weights = tl.zeros([CHUNK, FANOUT], tl.float32)
    for start in range(0, BLOCK, CHUNK):
        part = _images(x_row, block * BLOCK + start + tl.arange(0, CHUNK), VOCABULARY)
        reaches = part[:, None] >= thresholds[None, :]
        weights += tl.where(reaches, _weight(part, x_max, stage)[:, None], 0.0)
    at = area + _STATE + FANOUT + 2 * BLOCKS + block * FANOUT + tl.arange(0, FANOUT)
    tl.store(at, tl.sum(weights, 0).to(tl.int32, bitcast=True))


@kernel
def narrow_kernel(
    sample_slot, slots, scratch, before, after,
    SLOT_STRIDE: tl.constexpr, SCRATCH_STRIDE: tl.constexpr, VOCABULARY: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCKS_PADDED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, FANOUT: tl.constexpr, FIRST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    enter(PDL)
    # One pass over one block of one row: takes the state from the area ``before``, leaves the area ``after``.
    row = tl.program_id(0)
    block = tl.program_id(1)
    words = slots + tl.load(sample_slot + row) * SLOT_STRIDE
    if filtered(words):
        base = scratch + row * SCRATCH_STRIDE
        area = after + row * SCRATCH_STRIDE
        x_max = _largest(base, words, BLOCKS, BLOCKS_PADDED)
        if FIRST:
            low, high, stage, target = _opening(words, x_max, VOCABULARY)
        else:
            earlier = before + row * SCRATCH_STRIDE
            low, high, stage, target = _after_pass(earlier, words, x_max, BLOCKS, BLOCKS_PADDED, FANOUT)
        thresholds = _thresholds(low, high, FANOUT)
        if block == 0:
            tl.store(area, low)
            tl.store(area + 1, high)
            tl.store(area + 2, stage)
            tl.store(area + 3, target.to(tl.int32, bitcast=True))
            tl.store(area + _STATE + tl.arange(0, FANOUT), thresholds)
        if stage != _DONE:
            _weigh(
                base + 7 * BLOCKS, area, block, low, high, stage, x_max, thresholds,
                VOCABULARY, BLOCKS, BLOCK, CHUNK, FANOUT,
            )  # fmt: skip


@triton.jit
def _finished(x_row, low, high, stage, target, words, x_max, VOCABULARY: tl.constexpr, WIDTH: tl.constexpr):
    """The threshold, by bisection of what the passes left of the bracket; normally no iteration."""
    while stage != _DONE:
        unknown = target == _UNKNOWN
        middle = tl.where(unknown, low, (low + (high.to(tl.int64) - low) // 2).to(tl.int32))
        weights = tl.zeros([WIDTH], tl.float32)
        above = tl.full([WIDTH], _HIGHEST, tl.int32)
        below = tl.full([WIDTH], _LOWEST, tl.int32)
        for start in range(0, VOCABULARY, WIDTH):
            image = _images(x_row, start + tl.arange(0, WIDTH), VOCABULARY)
            weights += tl.where(image >= middle, _weight(image, x_max, stage), 0.0)
            above = tl.minimum(above, tl.where(image >= middle, image, _HIGHEST))
            below = tl.maximum(below, tl.where(image < middle, image, _LOWEST))
        total = tl.sum(weights, 0)
        target = tl.where(unknown, load_f32(words + _TOP_P) * total, target)
        reached = total >= target
        # The ends move to the next x, but never past the middle nor by nothing: weights may be NaN.
        high = tl.where(reached, high, tl.maximum(tl.minimum(tl.max(below, 0), middle - 1), low) + 1)
        low = tl.where(reached, tl.maximum(tl.minimum(tl.min(above, 0), high - 1), middle), low)
        found = (stage == _COUNT) & (total == target)
        low, high, stage, target = _settled(low, high, stage, target, found, words, x_max)
    return low


@kernel
def draw_kernel(
    sample_slot, sample_position, slots, scratch, before,
    SLOT_STRIDE: tl.constexpr, SCRATCH_STRIDE: tl.constexpr, VOCABULARY: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCKS_PADDED: tl.constexpr, BLOCK: tl.constexpr, FANOUT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    enter(PDL)
    # One block of one row with filters: best x / T + noise of what is kept, where rows without filters have theirs.
    row = tl.program_id(0)
    block = tl.program_id(1)
    words = slots + tl.load(sample_slot + row) * SLOT_STRIDE
    if filtered(words):
        base = scratch + row * SCRATCH_STRIDE
        x_row = base + 7 * BLOCKS
        x_max = _largest(base, words, BLOCKS, BLOCKS_PADDED)
        earlier = before + row * SCRATCH_STRIDE
        low, high, stage, target = _after_pass(earlier, words, x_max, BLOCKS, BLOCKS_PADDED, FANOUT)
        low = _finished(x_row, low, high, stage, target, words, x_max, VOCABULARY, BLOCK)
        min_p = load_f32(words + _MIN_P)
        floor = tl.where(min_p > 0, x_max + tl.log(tl.where(min_p > 0, min_p, 1.0)), float("-inf"))
        ids = block * BLOCK + tl.arange(0, BLOCK)
        image = _images(x_row, ids, VOCABULARY)
        x = _value(image)
        kept = (image >= low) & (x >= floor)
        score = tl.full([BLOCK], float("-inf"), tl.float32)
        if tl.max(kept.to(tl.int32), 0) > 0:
            score = tl.where(kept, x + gumbel(ids, tl.load(sample_position + row), words), float("-inf"))
        store_best(base + 2 * BLOCKS + block, score, block * BLOCK, BLOCKS)
