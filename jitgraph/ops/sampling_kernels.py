"""Triton kernels of greedy choice and sampling.

Launched only by the wrappers in ``sampling.py``. Rows are independent; every sum runs in one fixed order. A row's
parameters are read from the slot table, so one launch serves any mixture of requests, and what a row did not ask for
costs it a branch. Maxima of blocks are combined with the lowest id winning among equals.
"""

from __future__ import annotations

import triton
import triton.language as tl

from jitgraph.jit.kernel import kernel
from jitgraph.ops import slots as columns
from jitgraph.types import MAX_LOGPROBS

_MIN_LENGTH = tl.constexpr(columns.MIN_LENGTH)
_TOP_K = tl.constexpr(columns.TOP_K)
_NUM_LOGPROBS = tl.constexpr(columns.NUM_LOGPROBS)
_SEED_LO = tl.constexpr(columns.SEED_LO)
_SEED_HI = tl.constexpr(columns.SEED_HI)
_NUM_STOP = tl.constexpr(columns.NUM_STOP)
_TEMPERATURE = tl.constexpr(columns.TEMPERATURE)
_TOP_P = tl.constexpr(columns.TOP_P)
_MIN_P = tl.constexpr(columns.MIN_P)
_STOP_IDS = tl.constexpr(columns.STOP_IDS)
_MAX_TOP = tl.constexpr(MAX_LOGPROBS)

_NO_ID = tl.constexpr(2**31 - 1)
_IMAGE_OF_MINUS_INF = tl.constexpr(-0x7F800001)


@triton.jit
def _f32(address):
    """A float32 column of the slot table."""
    return tl.load(address).to(tl.float32, bitcast=True)


@triton.jit
def _barred(x, ids, words, position):
    """x with -inf at the row's stop ids while its position is below MIN_LENGTH: normally no iteration."""
    count = tl.where(position < tl.load(words + _MIN_LENGTH), tl.load(words + _NUM_STOP), 0)
    for i in range(count):
        x = tl.where(ids == tl.load(words + _STOP_IDS + i), float("-inf"), x)
    return x


@triton.jit
def _store_best(at, x, first, BLOCKS: tl.constexpr):
    """Writes a block's maximum and, BLOCKS words on, the bits of its lowest id."""
    value, index = tl.max(x, 0, return_indices=True)
    tl.store(at, value)
    tl.store(at + BLOCKS, (first + index).to(tl.float32, bitcast=True))


@triton.jit
def _load_best(at, b, BLOCKS: tl.constexpr):
    """The blocks' maxima and ids as ``_store_best`` wrote them."""
    value = tl.load(at + b, mask=b < BLOCKS, other=float("-inf"))
    ids = tl.load(at + BLOCKS + b, mask=b < BLOCKS, other=0.0).to(tl.int32, bitcast=True)
    return value, tl.where(b < BLOCKS, ids, _NO_ID)


@triton.jit
def _lowest_id(value, ids, best, VOCABULARY: tl.constexpr):
    """Lowest id whose value is the best; inside the vocabulary even where the values are NaN."""
    return tl.minimum(tl.min(tl.where(value == best, ids, _NO_ID), 0), VOCABULARY - 1)


@triton.jit
def _best_id(at, b, VOCABULARY: tl.constexpr, BLOCKS: tl.constexpr):
    """Id of the largest of the blocks' maxima."""
    value, ids = _load_best(at, b, BLOCKS)
    return _lowest_id(value, ids, tl.max(value, 0), VOCABULARY)


# --------------------------------------------------------------------------------------------------------------- greedy


@kernel
def greedy_blocks_kernel(
    logits, sample_slot, sample_position, slots, scratch,
    SLOT_STRIDE: tl.constexpr, SCRATCH_STRIDE: tl.constexpr, VOCABULARY: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    first = tl.program_id(1) * BLOCK
    ids = first + tl.arange(0, BLOCK)
    words = slots + tl.load(sample_slot + row) * SLOT_STRIDE
    x = tl.load(logits + row * VOCABULARY + ids, mask=ids < VOCABULARY, other=float("-inf")).to(tl.float32)
    x = _barred(x, ids, words, tl.load(sample_position + row))
    _store_best(scratch + row * SCRATCH_STRIDE + tl.program_id(1), x, first, BLOCKS)


@kernel
def greedy_merge_kernel(
    scratch, tokens,
    SCRATCH_STRIDE: tl.constexpr, VOCABULARY: tl.constexpr, BLOCKS: tl.constexpr, BLOCKS_PADDED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    at = scratch + row * SCRATCH_STRIDE
    tl.store(tokens + row, _best_id(at, tl.arange(0, BLOCKS_PADDED), VOCABULARY, BLOCKS))


# --------------------------------------------------------------------------------------------------------------- sample


@triton.jit
def _filtered(words):
    """Whether a row asks for top-k, top-p or min-p."""
    return (tl.load(words + _TOP_K) > 0) | (_f32(words + _TOP_P) < 1.0) | (_f32(words + _MIN_P) > 0.0)


@triton.jit
def _gumbel(ids, position, words):
    """Standard Gumbel noise of each id: Philox4x32-10, key = the slot's seed, counter = (id, position, 0, 0)."""
    low = tl.load(words + _SEED_LO).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(words + _SEED_HI).to(tl.uint32, bitcast=True).to(tl.uint64)
    zero = tl.zeros_like(ids)
    word, _, _, _ = tl.philox((high << 32) | low, ids, zero + position, zero, zero)
    u = ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
    return -tl.log(-tl.log(u))


@kernel
def sample_blocks_kernel(
    logits, sample_slot, sample_position, slots, scratch,
    SLOT_STRIDE: tl.constexpr, SCRATCH_STRIDE: tl.constexpr, VOCABULARY: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # One block of ids of one row. Scratch per row, BLOCKS words each: maximum and id of x; of x / T + noise (rows
    # without filters); maximum, id and sum of exp of the raw logits (rows with log-probabilities). Rows with filters
    # leave x / T for the second kernel in the words behind.
    row = tl.program_id(0)
    first = tl.program_id(1) * BLOCK
    ids = first + tl.arange(0, BLOCK)
    inside = ids < VOCABULARY
    words = slots + tl.load(sample_slot + row) * SLOT_STRIDE
    position = tl.load(sample_position + row)
    raw = tl.load(logits + row * VOCABULARY + ids, mask=inside, other=float("-inf")).to(tl.float32)
    x = _barred(raw, ids, words, position)
    base = scratch + row * SCRATCH_STRIDE
    at = base + tl.program_id(1)
    _store_best(at, x, first, BLOCKS)
    temperature = _f32(words + _TEMPERATURE)
    if temperature > 0:
        scaled = tl.div_rn(x, tl.zeros_like(x) + temperature)
        if _filtered(words):
            tl.store(base + 7 * BLOCKS + ids, tl.where(scaled == 0, 0.0, scaled), mask=inside)  # -0 equals 0
        else:
            _store_best(at + 2 * BLOCKS, scaled + _gumbel(ids, position, words), first, BLOCKS)
    if tl.load(words + _NUM_LOGPROBS) >= 0:
        _store_best(at + 4 * BLOCKS, raw, first, BLOCKS)
        top = tl.max(raw, 0)
        centre = tl.where(top == float("-inf"), 0.0, top)
        tl.store(at + 6 * BLOCKS, tl.sum(tl.exp(raw - centre), 0))


@triton.jit
def _image(x):
    """int32 that orders as the float32 x does (both zeros being +0)."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _search(x_row, low, high, target, x_max, COUNT: tl.constexpr, VOCABULARY: tl.constexpr, WIDTH: tl.constexpr):
    """Largest image t in [low, high) such that the weights of all x with image >= t reach the target.

    A weight is 1 (COUNT) or exp(x - x_max). ``low`` must satisfy this and ``high`` must not. Each pass over the row
    tests three thresholds, so the interval shrinks fourfold: 16 passes at most. A count may stop at any t that keeps
    the same ids.
    """
    while high - low > 1:
        step = tl.maximum((high - low) // 4, 1)
        t1 = (low + step).to(tl.int32)
        t2 = (low + 2 * step).to(tl.int32)
        t3 = (low + 3 * step).to(tl.int32)
        w1 = tl.zeros([WIDTH], tl.float32)
        w2 = tl.zeros([WIDTH], tl.float32)
        w3 = tl.zeros([WIDTH], tl.float32)
        for start in tl.range(0, VOCABULARY, WIDTH, num_stages=3):
            ids = start + tl.arange(0, WIDTH)
            x = tl.load(x_row + ids, mask=ids < VOCABULARY, other=float("-inf"))
            u = _image(x)
            weight = tl.full([WIDTH], 1.0, tl.float32)
            if not COUNT:
                weight = tl.exp(x - x_max)
            w1 += tl.where(u >= t1, weight, 0.0)
            w2 += tl.where(u >= t2, weight, 0.0)
            w3 += tl.where(u >= t3, weight, 0.0)
        s1 = tl.sum(w1, 0)
        s2 = tl.sum(w2, 0)
        s3 = tl.sum(w3, 0)
        passed = (s1 >= target).to(tl.int64) + (s2 >= target).to(tl.int64) + (s3 >= target).to(tl.int64)
        high = tl.where(passed < 3, tl.minimum(high, low + (passed + 1) * step), high)
        low = low + passed * step
        if COUNT:  # exactly k are above: what lies between here and the k-th largest is empty
            reached = tl.where(passed == 3, s3, tl.where(passed == 2, s2, s1))
            high = tl.where((passed > 0) & (reached == target), low + 1, high)
    return low


@triton.jit
def _mass(x_row, low, x_max, VOCABULARY: tl.constexpr, WIDTH: tl.constexpr):
    """Sum of exp(x - x_max) over all x with image >= low, in the order of ``_search``, so that the two compare
    exactly."""
    total = tl.zeros([WIDTH], tl.float32)
    for start in tl.range(0, VOCABULARY, WIDTH, num_stages=3):
        ids = start + tl.arange(0, WIDTH)
        x = tl.load(x_row + ids, mask=ids < VOCABULARY, other=float("-inf"))
        total += tl.where(_image(x) >= low.to(tl.int32), tl.exp(x - x_max), 0.0)
    return tl.sum(total, 0)


@triton.jit
def _draw_filtered(x_row, x_max, position, words, VOCABULARY: tl.constexpr, WIDTH: tl.constexpr):
    """Token drawn from what top-k, then top-p, then min-p keep of the scaled logits."""
    low = tl.zeros_like(position).to(tl.int64) + _IMAGE_OF_MINUS_INF
    high = _image(x_max).to(tl.int64) + 1
    top_k = tl.load(words + _TOP_K)
    if (top_k > 0) & (top_k < VOCABULARY):
        low = _search(x_row, low, high, top_k.to(tl.float32), x_max, True, VOCABULARY, WIDTH)
    top_p = _f32(words + _TOP_P)
    if top_p < 1.0:
        target = top_p * _mass(x_row, low, x_max, VOCABULARY, WIDTH)
        low = _search(x_row, low, high, target, x_max, False, VOCABULARY, WIDTH)
    min_p = _f32(words + _MIN_P)
    floor = tl.where(min_p > 0, x_max + tl.log(tl.where(min_p > 0, min_p, 1.0)), float("-inf"))
    best = tl.full([WIDTH], float("-inf"), tl.float32)
    best_id = tl.full([WIDTH], _NO_ID, tl.int32)
    for start in range(0, VOCABULARY, WIDTH):
        ids = start + tl.arange(0, WIDTH)
        x = tl.load(x_row + ids, mask=ids < VOCABULARY, other=float("-inf"))
        kept = (ids < VOCABULARY) & (_image(x) >= low.to(tl.int32)) & (x >= floor)
        if tl.max(kept.to(tl.int32), 0) > 0:
            score = tl.where(kept, x + _gumbel(ids, position, words), float("-inf"))
            better = score > best
            best = tl.where(better, score, best)
            best_id = tl.where(better, ids, best_id)
    return _lowest_id(best, best_id, tl.max(best, 0), VOCABULARY)


@triton.jit
def _report(
    raw_row, at, b, token, wanted, logprob, top_ids, top_logprobs,
    VOCABULARY: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Log-probabilities of the token and of the ``wanted`` most likely ids, found as in a tournament.

    The blocks' maxima are at hand; the winner's block is read again for its next best, so each rank costs one block.
    """
    value, ids = _load_best(at, b, BLOCKS)
    top = tl.max(value, 0)
    sums = tl.load(at + 2 * BLOCKS + b, mask=b < BLOCKS, other=0.0)
    normaliser = top + tl.log(tl.sum(sums * tl.exp(value - top), 0))
    tl.store(logprob, tl.load(raw_row + token).to(tl.float32) - normaliser)
    for rank in range(tl.minimum(wanted, VOCABULARY)):
        best = tl.max(value, 0)
        best_id = _lowest_id(value, ids, best, VOCABULARY)
        tl.store(top_ids + rank, best_id)
        tl.store(top_logprobs + rank, best - normaliser)
        block = best_id // BLOCK
        near = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(raw_row + near, mask=near < VOCABULARY, other=float("-inf")).to(tl.float32)
        below = (x < best) | ((x == best) & (near > best_id))
        following, index = tl.max(tl.where(below, x, float("-inf")), 0, return_indices=True)
        value = tl.where(b == block, following, value)
        ids = tl.where(b == block, block * BLOCK + index, ids)


@kernel
def sample_rows_kernel(
    logits, sample_slot, sample_position, slots, scratch, tokens, logprobs, top_ids, top_logprobs,
    SLOT_STRIDE: tl.constexpr, SCRATCH_STRIDE: tl.constexpr, VOCABULARY: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCKS_PADDED: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    words = slots + tl.load(sample_slot + row) * SLOT_STRIDE
    position = tl.load(sample_position + row)
    base = scratch + row * SCRATCH_STRIDE
    b = tl.arange(0, BLOCKS_PADDED)
    token = _best_id(base, b, VOCABULARY, BLOCKS)
    temperature = _f32(words + _TEMPERATURE)
    if temperature > 0:
        if _filtered(words):
            value, _ = _load_best(base, b, BLOCKS)
            x_max = tl.div_rn(tl.max(value, 0), temperature)
            x_max = tl.where(x_max == 0, 0.0, x_max)
            token = _draw_filtered(base + 7 * BLOCKS, x_max, position, words, VOCABULARY, WIDTH)
        else:
            token = _best_id(base + 2 * BLOCKS, b, VOCABULARY, BLOCKS)
    tl.store(tokens + row, token)
    wanted = tl.load(words + _NUM_LOGPROBS)
    if wanted >= 0:
        _report(
            logits + row * VOCABULARY, base + 4 * BLOCKS, b, token, wanted,
            logprobs + row, top_ids + row * _MAX_TOP, top_logprobs + row * _MAX_TOP, VOCABULARY, BLOCKS, BLOCK,
        )  # fmt: skip
