"""Triton twins of ``note_prompt``, ``greedy``, ``sample``, ``score`` and ``advance`` in ``reference_sampling.py``.

Signatures and meaning are the reference's. A choice is a launch over blocks of the vocabulary, then one with a program
per row; between them stand the launches that search the thresholds of top-k and top-p. Rows share nothing, so a row
draws the same token whatever the batch. No call allocates or synchronises.
"""

from __future__ import annotations

import torch

from jitgraph.ops.append_kernels import advance_kernel
from jitgraph.ops.elementwise import assert_contiguous, assert_slots, ceil_div, next_power_of_two
from jitgraph.ops.history_kernels import note_prompt_kernel
from jitgraph.ops.pdl import pdl_options
from jitgraph.ops.ring import RING_FIELDS
from jitgraph.ops.sampling_filter_kernels import draw_kernel, narrow_kernel
from jitgraph.ops.sampling_kernels import (
    greedy_blocks_kernel,
    greedy_merge_kernel,
    sample_blocks_kernel,
    sample_rows_kernel,
    score_blocks_kernel,
    score_rows_kernel,
)
from jitgraph.ops.slots import SlotTable, mask_words
from jitgraph.types import MAX_LOGPROBS

_BLOCK = 1024
_PASSES = 6
"""Launches that narrow a bracket: what top-k and then top-p over 128,256 logits take, but for rare cases."""
_FANOUT = 64
_CHUNK = 256
_HISTORY_BLOCK = 2048
_PROMPT_CHUNK = 256
_FIGURES = 7
"""Float32 words that ``sample`` keeps per block: see ``sample_blocks_kernel``."""


def scratch_words(vocab_size: int) -> int:
    """Float32 words of scratch that one row of ``greedy`` or ``sample`` needs."""
    return _areas_at(vocab_size) + 2 * _area_words(vocab_size)


def score_words(vocab_size: int) -> int:
    """Float32 words of scratch that one row of ``score`` needs."""
    return 3 * ceil_div(vocab_size, _BLOCK)


def _areas_at(vocab_size: int) -> int:
    """Words in front of the two areas that the passes of a search write in turns; a multiple of 4."""
    return ceil_div(_FIGURES * ceil_div(vocab_size, _BLOCK) + vocab_size, 4) * 4


def _area_words(vocab_size: int) -> int:
    """Words of an area, a multiple of 4: see ``sampling_filter_kernels``."""
    blocks = ceil_div(vocab_size, _BLOCK)
    return ceil_div(4 + _FANOUT + 2 * blocks + blocks * _FANOUT, 4) * 4


def note_prompt(
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    token_slot: torch.Tensor,
    slots: SlotTable,
    history: torch.Tensor,
) -> None:
    """Marks a prompt chunk's ids in its slot's history; see ``reference_sampling.note_prompt``."""
    assert_contiguous(torch.int32, token_ids, positions, token_slot, history)
    assert_slots(slots)
    assert history.shape[0] == slots.words.shape[0]
    tokens, vocabulary = token_ids.shape[0], history.shape[1]
    assert positions.shape == token_slot.shape == (tokens,)
    note_prompt_kernel[(ceil_div(vocabulary, _HISTORY_BLOCK),)](
        token_ids,
        positions,
        token_slot,
        slots.words,
        history,
        tokens,
        DUMMY=slots.dummy,
        SLOT_STRIDE=slots.stride,
        VOCABULARY=vocabulary,
        BLOCK=_HISTORY_BLOCK,
        CHUNK=_PROMPT_CHUNK,
        num_warps=4,
        **pdl_options(),
    )


def greedy(
    logits: torch.Tensor,
    sample_slot: torch.Tensor,
    sample_position: torch.Tensor,
    slots: SlotTable,
    scratch: torch.Tensor,
    tokens: torch.Tensor,
) -> None:
    """tokens[r] = argmax of logits[r]; see ``reference_sampling.greedy``. ``scratch`` ``[R, >= scratch_words(V)]``."""
    _check(logits, sample_slot, sample_position, slots, scratch, tokens)
    rows, vocabulary = logits.shape
    blocks = ceil_div(vocabulary, _BLOCK)
    greedy_blocks_kernel[(rows, blocks)](
        logits,
        sample_slot,
        sample_position,
        slots.words,
        scratch,
        SLOT_STRIDE=slots.stride,
        SCRATCH_STRIDE=scratch.stride(0),
        VOCABULARY=vocabulary,
        BLOCKS=blocks,
        BLOCK=_BLOCK,
        num_warps=4,
        **pdl_options(),
    )
    greedy_merge_kernel[(rows,)](
        scratch,
        tokens,
        SCRATCH_STRIDE=scratch.stride(0),
        VOCABULARY=vocabulary,
        BLOCKS=blocks,
        BLOCKS_PADDED=next_power_of_two(blocks),
        num_warps=1,
        **pdl_options(),
    )


def sample(
    logits: torch.Tensor,
    sample_slot: torch.Tensor,
    sample_position: torch.Tensor,
    slots: SlotTable,
    history: torch.Tensor,
    masks: torch.Tensor,
    scratch: torch.Tensor,
    tokens: torch.Tensor,
    logprobs: torch.Tensor,
    top_ids: torch.Tensor,
    top_logprobs: torch.Tensor,
) -> None:
    """Draws a token per row by its slot's parameters; see ``reference_sampling.sample``. ``scratch`` as in ``greedy``.

    Thresholds are exact: the k-th largest value and the top-p boundary are found by search over the ordered bits of
    x / temperature, spread over the blocks. Rows without log-probabilities leave ``logprobs`` and the top lists as they
    were.
    """
    _check(logits, sample_slot, sample_position, slots, scratch, tokens)
    assert_contiguous(torch.float32, logprobs, top_logprobs)
    assert_contiguous(torch.int32, top_ids, history, masks)
    rows, vocabulary = logits.shape
    assert history.shape == (slots.words.shape[0], vocabulary)
    assert masks.shape == (slots.words.shape[0], mask_words(vocabulary))
    assert top_ids.shape == top_logprobs.shape == (rows, MAX_LOGPROBS)
    blocks = ceil_div(vocabulary, _BLOCK)
    geometry = {
        "SLOT_STRIDE": slots.stride,
        "SCRATCH_STRIDE": scratch.stride(0),
        "VOCABULARY": vocabulary,
        "BLOCKS": blocks,
        "BLOCK": _BLOCK,
        **pdl_options(),
    }
    given = (logits, sample_slot, sample_position, slots.words, history, masks, scratch)
    sample_blocks_kernel[(rows, blocks)](*given, MASK_STRIDE=masks.shape[1], **geometry, num_warps=4)
    geometry["BLOCKS_PADDED"] = next_power_of_two(blocks)
    areas = scratch.view(torch.int32)[:, _areas_at(vocabulary) :]
    before, after = areas[:, _area_words(vocabulary) :], areas
    for index in range(_PASSES):
        search = {"CHUNK": _CHUNK, "FANOUT": _FANOUT, "FIRST": index == 0, "num_warps": 8}
        narrow_kernel[(rows, blocks)](sample_slot, slots.words, scratch, before, after, **geometry, **search)
        before, after = after, before
    draw_kernel[(rows, blocks)](
        sample_slot, sample_position, slots.words, scratch, before, **geometry, FANOUT=_FANOUT, num_warps=4
    )
    sample_rows_kernel[(rows,)](
        logits, sample_slot, slots.words, scratch, tokens, logprobs, top_ids, top_logprobs, **geometry, num_warps=4
    )


def score(
    logits: torch.Tensor,
    targets: torch.Tensor,
    scratch: torch.Tensor,
    logprobs: torch.Tensor,
    top_ids: torch.Tensor,
    top_logprobs: torch.Tensor,
) -> None:
    """Log-probabilities of given ids and of the most likely ones; see ``reference_sampling.score``. ``scratch``
    ``[R, >= score_words(V)]``."""
    assert_contiguous(logits.dtype, logits)
    assert_contiguous(torch.int32, targets, top_ids)
    assert_contiguous(torch.float32, logprobs, top_logprobs)
    rows, vocabulary = logits.shape
    assert targets.shape == logprobs.shape == (rows,) and top_ids.shape == top_logprobs.shape == (rows, MAX_LOGPROBS)
    assert scratch.dtype == torch.float32 and scratch.stride(1) == 1
    assert scratch.shape[0] >= rows and scratch.shape[1] >= score_words(vocabulary)
    blocks = ceil_div(vocabulary, _BLOCK)
    geometry = {
        "SCRATCH_STRIDE": scratch.stride(0),
        "VOCABULARY": vocabulary,
        "BLOCKS": blocks,
        "BLOCK": _BLOCK,
        "num_warps": 4,
        **pdl_options(),
    }
    score_blocks_kernel[(rows, blocks)](logits, scratch, **geometry)
    outputs = (logprobs, top_ids, top_logprobs)
    padded = next_power_of_two(blocks)
    score_rows_kernel[(rows,)](logits, targets, scratch, *outputs, BLOCKS_PADDED=padded, **geometry)


def _check(
    logits: torch.Tensor,
    sample_slot: torch.Tensor,
    sample_position: torch.Tensor,
    slots: SlotTable,
    scratch: torch.Tensor,
    tokens: torch.Tensor,
) -> None:
    assert_contiguous(logits.dtype, logits)
    assert_contiguous(torch.int32, sample_slot, sample_position, tokens)
    assert_slots(slots)
    rows, vocabulary = logits.shape
    assert sample_slot.shape == sample_position.shape == tokens.shape == (rows,)
    assert scratch.dtype == torch.float32 and scratch.stride(1) == 1
    assert scratch.shape[0] >= rows and scratch.shape[1] >= scratch_words(vocabulary)


def advance(
    sample_slot: torch.Tensor,
    sample_position: torch.Tensor,
    tokens: torch.Tensor,
    logprobs: torch.Tensor | None,
    top_ids: torch.Tensor | None,
    top_logprobs: torch.Tensor | None,
    slots: SlotTable,
    history: torch.Tensor | None,
    counter: torch.Tensor,
    ring: torch.Tensor,
    host_step: int,
) -> None:
    """Appends the tokens and publishes the step; see ``reference_sampling.advance``.

    ``ring`` is written in place, in pinned host memory mapped into the device's address space; the step's number is
    read from ``counter``, so ``host_step`` is not needed. Without log-probabilities only the token words are written.
    """
    del host_step
    assert_contiguous(torch.int32, sample_slot, sample_position, tokens)
    assert_contiguous(torch.int64, counter, ring)
    assert_slots(slots)
    depth, ring_rows, fields = ring.shape
    rows = tokens.shape[0]
    assert fields == RING_FIELDS and rows <= ring_rows
    if history is not None:
        assert_contiguous(torch.int32, history)
        assert history.shape[0] == slots.words.shape[0]
    reported = logprobs is not None and top_ids is not None and top_logprobs is not None
    if logprobs is not None and top_ids is not None and top_logprobs is not None:
        assert_contiguous(torch.float32, logprobs, top_logprobs)
        assert_contiguous(torch.int32, top_ids)
    advance_kernel[(1,)](
        sample_slot,
        sample_position,
        tokens,
        logprobs if reported else tokens,  # never read without LOGPROBS
        top_ids if reported else tokens,
        top_logprobs if reported else tokens,
        slots.words,
        tokens if history is None else history,  # not touched where HISTORY_STRIDE is 0
        counter,
        ring,
        rows,
        DUMMY=slots.dummy,
        SLOT_STRIDE=slots.stride,
        HISTORY_STRIDE=0 if history is None else history.shape[1],
        DEPTH=depth,
        RING_ROWS=ring_rows,
        BLOCK_R=next_power_of_two(ring_rows),
        BLOCK_TOP=next_power_of_two(MAX_LOGPROBS),
        LOGPROBS=reported,
        num_warps=1,
        **pdl_options(),
    )
