"""Triton kernels of greedy choice and sampling, but for what top-k, top-p and min-p keep.

Launched only by the wrappers in ``sampling.py``. Rows are independent; every sum runs in one fixed order. A row's
parameters are read from the slot table, so one launch serves any mixture of requests, and what a row did not ask for
costs it a branch. Maxima of blocks are combined with the lowest id winning among equals.
"""

from __future__ import annotations

import triton
import triton.language as tl

from jitgraph.jit.kernel import kernel
from jitgraph.ops import slots as columns
from jitgraph.ops.history_kernels import biased, load_f32, penalised
from jitgraph.ops.pdl import enter
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
_CONSTRAINED = tl.constexpr(columns.CONSTRAINED)
_STOP_IDS = tl.constexpr(columns.STOP_IDS)
_MASK_BITS = tl.constexpr(columns.MASK_BITS)
_MAX_TOP = tl.constexpr(MAX_LOGPROBS)

_NO_ID = tl.constexpr(2**31 - 1)


@triton.jit
def _barred(x, ids, words, position):
    """x with -inf at the row's stop ids while its position is below MIN_LENGTH: normally no iteration."""
    count = tl.where(position < tl.load(words + _MIN_LENGTH), tl.load(words + _NUM_STOP), 0)
    for i in range(count):
        x = tl.where(ids == tl.load(words + _STOP_IDS + i), float("-inf"), x)
    return x


@triton.jit
def _allowed(x, ids, words, mask_row, VOCABULARY: tl.constexpr):
    """x with -inf at the ids that the row's mask does not allow, if the row has one; the mask lies in host memory."""
    if tl.load(words + _CONSTRAINED) != 0:
        bits = tl.load(mask_row + ids // _MASK_BITS, mask=ids < VOCABULARY, other=0)
        x = tl.where((bits >> (ids % _MASK_BITS)) & 1 != 0, x, float("-inf"))
    return x


@triton.jit
def store_best(at, x, first, BLOCKS: tl.constexpr):
    """Writes a block's maximum and, BLOCKS words on, the bits of its lowest id."""
    value, index = tl.max(x, 0, return_indices=True)
    tl.store(at, value)
    tl.store(at + BLOCKS, (first + index).to(tl.float32, bitcast=True))


@triton.jit
def load_best(at, b, BLOCKS: tl.constexpr):
    """The blocks' maxima and ids as ``store_best`` wrote them."""
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
    value, ids = load_best(at, b, BLOCKS)
    return _lowest_id(value, ids, tl.max(value, 0), VOCABULARY)


# --------------------------------------------------------------------------------------------------------------- greedy


@kernel
def greedy_blocks_kernel(
    logits, sample_slot, sample_position, slots, scratch,
    SLOT_STRIDE: tl.constexpr, SCRATCH_STRIDE: tl.constexpr, VOCABULARY: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    enter(PDL)
    row = tl.program_id(0)
    first = tl.program_id(1) * BLOCK
    ids = first + tl.arange(0, BLOCK)
    words = slots + tl.load(sample_slot + row) * SLOT_STRIDE
    x = tl.load(logits + row * VOCABULARY + ids, mask=ids < VOCABULARY, other=float("-inf")).to(tl.float32)
    x = _barred(x, ids, words, tl.load(sample_position + row))
    store_best(scratch + row * SCRATCH_STRIDE + tl.program_id(1), x, first, BLOCKS)


@kernel
def greedy_merge_kernel(
    scratch, tokens,
    SCRATCH_STRIDE: tl.constexpr, VOCABULARY: tl.constexpr, BLOCKS: tl.constexpr, BLOCKS_PADDED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    enter(PDL)
    row = tl.program_id(0)
    at = scratch + row * SCRATCH_STRIDE
    tl.store(tokens + row, _best_id(at, tl.arange(0, BLOCKS_PADDED), VOCABULARY, BLOCKS))


# --------------------------------------------------------------------------------------------------------------- sample


@triton.jit
def filtered(words):
    """Whether a row draws, and asks for top-k, top-p or min-p."""
    filters = (tl.load(words + _TOP_K) > 0) | (load_f32(words + _TOP_P) < 1.0) | (load_f32(words + _MIN_P) > 0.0)
    return filters & (load_f32(words + _TEMPERATURE) > 0)


@triton.jit
def gumbel(ids, position, words):
    """Standard Gumbel noise of each id: Philox4x32-10, key = the slot's seed, counter = (id, position, 0, 0)."""
    low = tl.load(words + _SEED_LO).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(words + _SEED_HI).to(tl.uint32, bitcast=True).to(tl.uint64)
    zero = tl.zeros_like(ids)
    word, _, _, _ = tl.philox((high << 32) | low, ids, zero + position, zero, zero)
    u = ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
    return -tl.log(-tl.log(u))


@triton.jit
def _store_mass(at, raw, first, BLOCKS: tl.constexpr):
    """A block's maximum, its lowest id and the sum of exp(raw - maximum), BLOCKS words apart, for ``_report``."""
    store_best(at, raw, first, BLOCKS)
    top = tl.max(raw, 0)
    centre = tl.where(top == float("-inf"), 0.0, top)
    tl.store(at + 2 * BLOCKS, tl.sum(tl.exp(raw - centre), 0))


@kernel
def sample_blocks_kernel(
    logits, sample_slot, sample_position, slots, history, masks, scratch,
    SLOT_STRIDE: tl.constexpr, SCRATCH_STRIDE: tl.constexpr, MASK_STRIDE: tl.constexpr, VOCABULARY: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    enter(PDL)
    # One block of ids of one row. Scratch per row, BLOCKS words each: maximum and id of x; of x / T + noise (left to
    # ``draw_kernel`` where there are filters); maximum, id and sum of exp of the raw logits (rows with
    # log-probabilities). Rows with filters leave x / T in the words behind.
    row = tl.program_id(0)
    first = tl.program_id(1) * BLOCK
    ids = first + tl.arange(0, BLOCK)
    inside = ids < VOCABULARY
    slot = tl.load(sample_slot + row)
    words = slots + slot * SLOT_STRIDE
    position = tl.load(sample_position + row)
    raw = tl.load(logits + row * VOCABULARY + ids, mask=inside, other=float("-inf")).to(tl.float32)
    x = penalised(raw, ids, words, history + slot * VOCABULARY, VOCABULARY)
    x = _barred(biased(x, ids, first, words, BLOCK), ids, words, position)
    x = _allowed(x, ids, words, masks + slot * MASK_STRIDE, VOCABULARY)
    base = scratch + row * SCRATCH_STRIDE
    at = base + tl.program_id(1)
    store_best(at, x, first, BLOCKS)
    temperature = load_f32(words + _TEMPERATURE)
    if temperature > 0:
        scaled = tl.div_rn(x, tl.zeros_like(x) + temperature)
        if filtered(words):
            tl.store(base + 7 * BLOCKS + ids, tl.where(scaled == 0, 0.0, scaled), mask=inside)  # -0 equals 0
        else:
            store_best(at + 2 * BLOCKS, scaled + gumbel(ids, position, words), first, BLOCKS)
    if tl.load(words + _NUM_LOGPROBS) >= 0:
        _store_mass(at + 4 * BLOCKS, raw, first, BLOCKS)


@triton.jit
def _report(
    raw_row, at, b, token, wanted, logprob, top_ids, top_logprobs,
    VOCABULARY: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Log-probabilities of the token and of the ``wanted`` most likely ids, found as in a tournament.

    The blocks' maxima are at hand; the winner's block is read again for its next best, so each rank costs one block.
    """
    value, ids = load_best(at, b, BLOCKS)
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
    logits, sample_slot, slots, scratch, tokens, logprobs, top_ids, top_logprobs,
    SLOT_STRIDE: tl.constexpr, SCRATCH_STRIDE: tl.constexpr, VOCABULARY: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCKS_PADDED: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    enter(PDL)
    row = tl.program_id(0)
    words = slots + tl.load(sample_slot + row) * SLOT_STRIDE
    base = scratch + row * SCRATCH_STRIDE
    b = tl.arange(0, BLOCKS_PADDED)
    drawn = load_f32(words + _TEMPERATURE) > 0
    token = _best_id(base + tl.where(drawn, 2 * BLOCKS, 0), b, VOCABULARY, BLOCKS)
    tl.store(tokens + row, token)
    wanted = tl.load(words + _NUM_LOGPROBS)
    if wanted >= 0:
        _report(
            logits + row * VOCABULARY, base + 4 * BLOCKS, b, token, wanted,
            logprobs + row, top_ids + row * _MAX_TOP, top_logprobs + row * _MAX_TOP, VOCABULARY, BLOCKS, BLOCK,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- score


@kernel
def score_blocks_kernel(
    logits, scratch,
    SCRATCH_STRIDE: tl.constexpr, VOCABULARY: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    enter(PDL)
    row = tl.program_id(0)
    first = tl.program_id(1) * BLOCK
    ids = first + tl.arange(0, BLOCK)
    raw = tl.load(logits + row * VOCABULARY + ids, mask=ids < VOCABULARY, other=float("-inf")).to(tl.float32)
    _store_mass(scratch + row * SCRATCH_STRIDE + tl.program_id(1), raw, first, BLOCKS)


@kernel
def score_rows_kernel(
    logits, targets, scratch, logprobs, top_ids, top_logprobs,
    SCRATCH_STRIDE: tl.constexpr, VOCABULARY: tl.constexpr, BLOCKS: tl.constexpr, BLOCKS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    enter(PDL)
    row = tl.program_id(0)
    _report(
        logits + row * VOCABULARY, scratch + row * SCRATCH_STRIDE, tl.arange(0, BLOCKS_PADDED),
        tl.load(targets + row), _MAX_TOP, logprobs + row, top_ids + row * _MAX_TOP, top_logprobs + row * _MAX_TOP,
        VOCABULARY, BLOCKS, BLOCK,
    )  # fmt: skip
