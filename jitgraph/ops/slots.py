"""The slot table: everything about a running sequence that a step must know, kept on the device.

One row of int32 words per slot, so that admitting a request is one small copy and a replay takes no arguments.
The last row is the dummy slot: padding belongs to it, its pages are all page 0, and it is always finished.
Owned by the engine's thread and stream: the host writes whole rows between steps, the kernels update ``next_token``,
``length`` and ``finished`` inside a step. Float columns are bit patterns of float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from jitgraph.types import MAX_STOP_TOKEN_IDS, SamplingParams

# Columns. ``STOP_IDS`` and ``BLOCK_TABLE`` are runs; the block table fills the rest of the row.
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
STOP_IDS = 16
BLOCK_TABLE = STOP_IDS + MAX_STOP_TOKEN_IDS


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

    def block_table(self) -> torch.Tensor:
        """KV pages by position // page_size, a view ``[S, P]``."""
        return self.words[:, BLOCK_TABLE : BLOCK_TABLE + self.pages_per_slot]


def encode_row(
    out: torch.Tensor,
    params: SamplingParams,
    prompt_length: int,
    max_length: int,
    stop_ids: tuple[int, ...],
    seed: int,
    pages: list[int],
) -> None:
    """Writes a freshly admitted sequence into one host row ``[W]`` int32 (pinned staging memory).

    ``stop_ids`` are the EOS and stop ids together, at most ``MAX_STOP_TOKEN_IDS``; ``pages`` cover
    ``max_length - 1`` positions, the rest of the block table points at page 0.
    """
    assert len(stop_ids) <= MAX_STOP_TOKEN_IDS and len(pages) <= out.numel() - BLOCK_TABLE
    out.zero_()
    ints = out.numpy()
    floats = out.view(torch.float32).numpy()
    ints[PROMPT_LENGTH] = prompt_length
    ints[MIN_LENGTH] = min(prompt_length + params.min_tokens, max_length)
    ints[MAX_LENGTH] = max_length
    ints[TOP_K] = params.top_k
    ints[NUM_LOGPROBS] = -1 if params.logprobs is None else params.logprobs
    ints[SEED_LO] = _signed(seed & 0xFFFFFFFF)
    ints[SEED_HI] = _signed(seed >> 32)
    ints[NUM_STOP] = len(stop_ids)
    floats[TEMPERATURE] = 0.0 if params.coldest else params.temperature
    floats[TOP_P] = params.top_p
    floats[MIN_P] = params.min_p
    ints[STOP_IDS : STOP_IDS + len(stop_ids)] = stop_ids
    ints[BLOCK_TABLE : BLOCK_TABLE + len(pages)] = pages


def _signed(word: int) -> int:
    """The int32 with the same 32 bits as an unsigned word."""
    return word - 2**32 if word >= 2**31 else word
