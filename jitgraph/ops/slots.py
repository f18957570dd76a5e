"""The slot table: everything about a running sequence that a step must know, kept on the device.

One row of int32 words per slot; a new sequence's row comes with its prompt's first launch, and a replay takes no
arguments. The last row is the dummy slot: padding belongs to it, its pages are all page 0, and it is always finished.
Owned by the engine's stream: ``receive`` writes whole rows, and kernels update ``next_token``, ``length`` and
``finished`` inside a step. Float columns are bit patterns of float32.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch

from jitgraph.types import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, SamplingParams

# Columns. ``STOP_IDS``, ``BIAS_IDS``, ``BIAS_VALUES`` and ``BLOCK_TABLE`` are runs; the block table fills the rest of
# the row.
NEXT_TOKEN = 0
"""Token the next decode step feeds."""
LENGTH = 1
"""Tokens whose K and V are in the cache: the position of ``NEXT_TOKEN``."""
FINISHED = 2
"""1 once a stop id was chosen or the length reached; the slot's row is then treated as padding."""
PROMPT_LENGTH = 3
MIN_LENGTH = 4
"""Stop ids cannot be chosen for a position below this (prompt + min_tokens)."""
MAX_LENGTH = 5
"""Tokens of prompt and output together at which the sequence ends."""
TOP_K = 6
NUM_LOGPROBS = 7
"""Alternatives to report; -1 reports nothing."""
SEED_LO = 8
SEED_HI = 9
NUM_STOP = 10
TEMPERATURE = 11
TOP_P = 12
MIN_P = 13
REPETITION = 14
PRESENCE = 15
FREQUENCY = 16
PENALISED = 17
"""1 where a history of the slot's ids is kept: one of the three penalties is in use."""
NUM_BIAS = 18
CONSTRAINED = 19
"""1 where the slot's row of the masks says which ids can be chosen."""
STOP_IDS = 20
BIAS_IDS = STOP_IDS + MAX_STOP_TOKEN_IDS
"""Ascending; the first ``NUM_BIAS`` count."""
BIAS_VALUES = BIAS_IDS + MAX_LOGIT_BIAS
BLOCK_TABLE = BIAS_VALUES + MAX_LOGIT_BIAS

# The history: int32 ``[S, V]`` beside the table, kept for the slots that are ``PENALISED`` and stale for the others.
IN_PROMPT = 1 << 30
"""Bit of a history word: the id stands in the prompt. The bits below count how often it was chosen as output."""

# The masks: int32 ``[S, ceil(V / 32)]`` in host memory that the device reads. Bit i % 32 of word i // 32 is 1 where the
# id i can be chosen next. The host writes them for the slots that are ``CONSTRAINED``; others hold anything.
MASK_BITS = 32


def mask_words(vocab_size: int) -> int:
    """Words of a slot's mask."""
    return -(-vocab_size // MASK_BITS)


class SlotTable(NamedTuple):
    """``words``: int32 ``[S, W]``, S = max_streams + 1 (the last is the dummy), W = BLOCK_TABLE + P padded to 4."""

    words: torch.Tensor
    pages_per_slot: int

    @classmethod
    def allocate(cls, slots: int, pages_per_slot: int, device: torch.device) -> SlotTable:
        """A table of idle slots plus the dummy: all finished, all pages 0."""
        width = (BLOCK_TABLE + pages_per_slot + 3) // 4 * 4
        words = torch.zeros(slots + 1, width, dtype=torch.int32, device=device)
        words[:, FINISHED] = 1
        words[:, NUM_LOGPROBS] = -1
        words[:, LENGTH] = 0
        floats = words.view(torch.float32)
        floats[:, TOP_P] = 1.0
        floats[:, REPETITION] = 1.0
        return cls(words, pages_per_slot)

    @property
    def dummy(self) -> int:
        """Index of the dummy slot."""
        return self.words.shape[0] - 1

    @property
    def stride(self) -> int:
        """int32 words between one slot and the next."""
        return self.words.stride(0)

    def column(self, index: int) -> torch.Tensor:
        """One int32 column, a view ``[S]``."""
        return self.words[:, index]

    def column_f32(self, index: int) -> torch.Tensor:
        """One float32 column, a view ``[S]``."""
        return self.words.view(torch.float32)[:, index]

    def stop_ids(self) -> torch.Tensor:
        """Stop ids, a view ``[S, MAX_STOP_TOKEN_IDS]``; the first ``NUM_STOP`` of a row count."""
        return self.words[:, STOP_IDS : STOP_IDS + MAX_STOP_TOKEN_IDS]

    def bias_ids(self) -> torch.Tensor:
        """Biased ids, a view ``[S, MAX_LOGIT_BIAS]``; the first ``NUM_BIAS`` of a row count."""
        return self.words[:, BIAS_IDS : BIAS_IDS + MAX_LOGIT_BIAS]

    def bias_values(self) -> torch.Tensor:
        """What is added to the logits of ``bias_ids``, a float32 view ``[S, MAX_LOGIT_BIAS]``."""
        return self.words.view(torch.float32)[:, BIAS_VALUES : BIAS_VALUES + MAX_LOGIT_BIAS]

    def block_table(self) -> torch.Tensor:
        """KV pages by position // page_size, a view ``[S, P]``."""
        return self.words[:, BLOCK_TABLE : BLOCK_TABLE + self.pages_per_slot]


SCALARS = struct.Struct("@11i6f2i4x")
"""The columns before ``STOP_IDS``, in their order: from ``NEXT_TOKEN``, from ``TEMPERATURE``, from ``PENALISED``; then
``CONSTRAINED``, which becomes 0."""


def encode_row(
    out: torch.Tensor,
    params: SamplingParams,
    prompt_length: int,
    max_length: int,
    stop_ids: tuple[int, ...],
    seed: int,
    pages: list[int],
    constrained: bool = False,
) -> None:
    """``pack_row`` into one host row ``[W]`` int32."""
    words = memoryview(out.numpy().data).cast("B")
    pack_row(words, 0, out.numel(), params, prompt_length, max_length, stop_ids, seed, pages, constrained)


def pack_row(
    buffer: memoryview,
    offset: int,
    words: int,
    params: SamplingParams,
    prompt_length: int,
    max_length: int,
    stop_ids: tuple[int, ...],
    seed: int,
    pages: list[int],
    constrained: bool = False,
) -> None:
    """Writes a freshly admitted sequence into the ``words`` of a row at byte ``offset`` of a buffer. On the path to the
    first token, hence few calls.

    ``stop_ids`` are the EOS and stop ids together, at most ``MAX_STOP_TOKEN_IDS``; ``pages`` cover
    ``max_length - 1`` positions, the rest of the block table points at page 0. Where the slot is ``constrained``, its
    mask says all, ``min_tokens`` included: the two barring ids apart from each other might leave none.
    """
    bias = params.bias_entries
    unused = words - BLOCK_TABLE - len(pages)
    assert len(stop_ids) <= MAX_STOP_TOKEN_IDS and unused >= 0
    SCALARS.pack_into(
        buffer,
        offset,
        *(0, 0, 0),
        prompt_length,
        prompt_length if constrained else min(prompt_length + params.min_tokens, max_length),
        max_length,
        *params.kernel_ints,
        _signed(seed & 0xFFFFFFFF),
        _signed(seed >> 32),
        len(stop_ids),
        *params.kernel_floats,
        params.penalised,
        len(bias),
    )
    struct.pack_into(f"@{len(stop_ids)}i", buffer, offset + 4 * STOP_IDS, *stop_ids)
    if constrained:
        struct.pack_into("@i", buffer, offset + 4 * CONSTRAINED, 1)
    if bias:
        struct.pack_into(f"@{len(bias)}i", buffer, offset + 4 * BIAS_IDS, *(token for token, _ in bias))
        struct.pack_into(f"@{len(bias)}f", buffer, offset + 4 * BIAS_VALUES, *(value for _, value in bias))
    struct.pack_into(f"@{len(pages)}i{4 * unused}x", buffer, offset + 4 * BLOCK_TABLE, *pages)


def _signed(word: int) -> int:
    """The int32 with the same 32 bits as an unsigned word."""
    return word - 2**32 if word >= 2**31 else word
