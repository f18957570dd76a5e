"""Triton twins of ``greedy``, ``sample`` and ``advance`` in ``reference.py``.

Signatures and meaning are the reference's. A choice is two launches: blocks of the vocabulary in parallel, then one
program per row. Rows share nothing, so a row draws the same token whatever the batch. No call allocates or
synchronises.
"""

from __future__ import annotations

import torch

from jitgraph.ops.append_kernels import advance_kernel
from jitgraph.ops.elementwise import assert_contiguous, assert_slots, ceil_div, next_power_of_two
from jitgraph.ops.ring import RING_FIELDS
from jitgraph.ops.sampling_kernels import (
    greedy_blocks_kernel,
    greedy_merge_kernel,
    sample_blocks_kernel,
    sample_rows_kernel,
)
from jitgraph.ops.slots import SlotTable
from jitgraph.types import MAX_LOGPROBS

_BLOCK = 1024
_WIDTH = 8192
_FIGURES = 7
"""Float32 words that ``sample`` keeps per block: see ``sample_blocks_kernel``."""


def scratch_words(vocab_size: int) -> int:
    """Float32 words of scratch that one row of ``greedy`` or ``sample`` needs."""
    return _FIGURES * ceil_div(vocab_size, _BLOCK) + vocab_size


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
    )
    greedy_merge_kernel[(rows,)](
        scratch,
        tokens,
        SCRATCH_STRIDE=scratch.stride(0),
        VOCABULARY=vocabulary,
        BLOCKS=blocks,
        BLOCKS_PADDED=next_power_of_two(blocks),
        num_warps=1,
    )


def sample(
    logits: torch.Tensor,
    sample_slot: torch.Tensor,
    sample_position: torch.Tensor,
    slots: SlotTable,
    scratch: torch.Tensor,
    tokens: torch.Tensor,
    logprobs: torch.Tensor,
    top_ids: torch.Tensor,
    top_logprobs: torch.Tensor,
) -> None:
    """Draws a token per row by its slot's parameters; see ``reference_sampling.sample``. ``scratch`` as in ``greedy``.

    Thresholds are exact: the k-th largest value and the top-p boundary are found by search over the ordered bits of
    x / temperature. Rows without log-probabilities leave ``logprobs`` and the top lists as they were.
    """
    _check(logits, sample_slot, sample_position, slots, scratch, tokens)
    assert_contiguous(torch.float32, logprobs, top_logprobs)
    assert_contiguous(torch.int32, top_ids)
    rows, vocabulary = logits.shape
    assert top_ids.shape == top_logprobs.shape == (rows, MAX_LOGPROBS)
    blocks = ceil_div(vocabulary, _BLOCK)
    tensors = (logits, sample_slot, sample_position, slots.words, scratch)
    geometry = {
        "SLOT_STRIDE": slots.stride,
        "SCRATCH_STRIDE": scratch.stride(0),
        "VOCABULARY": vocabulary,
        "BLOCKS": blocks,
        "BLOCK": _BLOCK,
    }
    sample_blocks_kernel[(rows, blocks)](*tensors, **geometry, num_warps=4)
    sample_rows_kernel[(rows,)](
        *tensors,
        tokens,
        logprobs,
        top_ids,
        top_logprobs,
        **geometry,
        BLOCKS_PADDED=next_power_of_two(blocks),
        WIDTH=min(_WIDTH, next_power_of_two(vocabulary)),
        num_warps=16,
    )


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
        counter,
        ring,
        rows,
        DUMMY=slots.dummy,
        SLOT_STRIDE=slots.stride,
        DEPTH=depth,
        RING_ROWS=ring_rows,
        BLOCK_R=next_power_of_two(ring_rows),
        BLOCK_TOP=next_power_of_two(MAX_LOGPROBS),
        LOGPROBS=reported,
        num_warps=1,
    )
