"""Helpers of the op tests: slot tables, histories and paged caches whose unused memory is poison; calls of sampling."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch

from jitgraph.ops import sampling
from jitgraph.ops.slots import IN_PROMPT, SlotTable, encode_row, mask_words
from jitgraph.types import MAX_LOGPROBS, SamplingParams

LAYOUTS = ((3, 3, 16), (4, 2, 32), (6, 2, 64), (4, 1, 128))
"""(query heads, KV heads, head size): plain, grouped, an odd group, one KV head; groups of 1 to 4."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
PAGE = 8


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal within the rounding of the dtype; NaN is never equal."""
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@dataclass(frozen=True)
class Paged:
    """Sequences of known lengths in a shuffled cache. ``k``/``v`` hold NaN wherever no token is, ``k0``/``v0`` zero."""

    slots: SlotTable
    k: torch.Tensor
    v: torch.Tensor
    k0: torch.Tensor
    v0: torch.Tensor


def make_paged(
    lengths: list[int], hkv: int, dh: int, dtype: torch.dtype, device: torch.device, page: int = PAGE, seed: int = 0
) -> Paged:
    """A cache with ``lengths[s]`` written tokens for slot s, its pages in random order; the dummy page has one
    token."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-n // page) for n in lengths]
    order = (torch.randperm(sum(counts), generator=generator) + 1).tolist()
    slots = SlotTable.allocate(len(lengths), max(counts) + 1, torch.device("cpu"))
    shape = (sum(counts) + 1, page, hkv, dh)
    values = torch.randn(2, *shape, generator=generator).to(dtype)
    written = torch.zeros(shape[:2], dtype=torch.bool)
    written[0, 0] = True
    for slot, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        pages = [order.pop() for _ in range(count)]
        encode_row(slots.words[slot], SamplingParams(), length, length + 1, (), 0, pages)
        for position in range(length):
            written[pages[position // page], position % page] = True
    mask = written[None, :, :, None, None]
    clean = torch.where(mask, values, torch.zeros_like(values)).to(device)
    poisoned = torch.where(mask, values, torch.full_like(values, torch.nan)).to(device)
    table = SlotTable(slots.words.to(device), slots.pages_per_slot)
    return Paged(table, poisoned[0], poisoned[1], clean[0], clean[1])


def sampling_slots(rows: list[tuple[SamplingParams, int, tuple[int, ...], int]], device: torch.device) -> SlotTable:
    """A slot per (params, prompt length, stop ids, seed), with two pages each."""
    table = SlotTable.allocate(len(rows), 2, torch.device("cpu"))
    for slot, (params, prompt, stops, seed) in enumerate(rows):
        encode_row(table.words[slot], params, prompt, prompt + params.max_tokens, stops, seed, [slot + 1])
    return SlotTable(table.words.to(device), table.pages_per_slot)


def int32(values: list[int], device: torch.device) -> torch.Tensor:
    """An int32 tensor of a list."""
    return torch.tensor(values, dtype=torch.int32, device=device)


def decode_workspace(
    rows: int, hq: int, hkv: int, splits: int, dh: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``partial`` and ``partial_lse``, poisoned, and ``arrivals``, zeroed, of decode attention."""
    partial, lse = poison(rows, hq, splits, dh, device=device), poison(rows, hq, splits, device=device)
    return partial, lse, torch.zeros(rows, hkv, dtype=torch.int32, device=device)


def poison(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor that must be written before it is read: NaN, or a large negative number for integers."""
    return torch.full(shape, torch.nan if dtype.is_floating_point else -(2**30), dtype=dtype, device=device)


# ------------------------------------------------------------------------------------------------------------- sampling

Drawn = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""What ``sample`` writes: tokens, log-probabilities, ids and log-probabilities of the alternatives."""


def history_of(
    sequences: list[tuple[list[int], list[int]] | None], vocabulary: int, device: torch.device
) -> torch.Tensor:
    """History of slots with (prompt, output), made from its definition; None, and the dummy behind, are poison."""
    history = poison(len(sequences) + 1, vocabulary, device=torch.device("cpu"), dtype=torch.int32)
    for row, sequence in zip(history, sequences, strict=False):
        if sequence is not None:
            prompt, output = sequence
            row.zero_()
            row[prompt] = IN_PROMPT
            for token in output:
                row[token] += 1
    return history.to(device)


def scratch_for(logits: torch.Tensor) -> torch.Tensor:
    """Poisoned scratch of a sampling op."""
    return poison(logits.shape[0], sampling.scratch_words(logits.shape[1]), device=logits.device)


def no_masks(slots: SlotTable, vocabulary: int) -> torch.Tensor:
    """Masks of nobody, in host memory as the device reads it."""
    shape = slots.words.shape[0], mask_words(vocabulary)
    return torch.zeros(shape, dtype=torch.int32, pin_memory=slots.words.device.type == "cuda")


def greedy(
    ops: ModuleType, logits: torch.Tensor, slot: torch.Tensor, position: torch.Tensor, slots: SlotTable
) -> torch.Tensor:
    """Tokens of ``ops.greedy``."""
    tokens = poison(logits.shape[0], device=logits.device, dtype=torch.int32)
    ops.greedy(logits, slot, position, slots, scratch_for(logits), tokens)
    return tokens


def sample(
    ops: ModuleType,
    logits: torch.Tensor,
    slot: torch.Tensor,
    position: torch.Tensor,
    slots: SlotTable,
    history: torch.Tensor | None = None,
    masks: torch.Tensor | None = None,
) -> Drawn:
    """Results of ``ops.sample``; without a history it is poison, and no slot may be PENALISED. Without masks they allow
    nothing, and no slot may be CONSTRAINED."""
    rows, vocabulary, device = *logits.shape, logits.device
    if history is None:
        history = history_of([None] * slots.dummy, vocabulary, device)
    tokens, logprobs = poison(rows, device=device, dtype=torch.int32), poison(rows, device=device)
    ids = poison(rows, MAX_LOGPROBS, device=device, dtype=torch.int32)
    values = poison(rows, MAX_LOGPROBS, device=device)
    state = (slots, history, no_masks(slots, vocabulary) if masks is None else masks)
    ops.sample(logits, slot, position, *state, scratch_for(logits), tokens, logprobs, ids, values)
    return tokens, logprobs, ids, values


def draws(
    ops: ModuleType,
    row: torch.Tensor,
    params: SamplingParams,
    count: int,
    seed: int = 5,
    stops: tuple[int, ...] = (),
    sequence: tuple[list[int], list[int]] | None = None,
) -> torch.Tensor:
    """Tokens drawn at positions 1..count of one slot from the same logits ``[V]``, always with the same history."""
    slots = sampling_slots([(params, 3, stops, seed)], row.device)
    history = history_of([sequence], row.shape[0], row.device)
    drawn = []
    for first in range(1, count + 1, 10_000):
        position = torch.arange(first, min(first + 10_000, count + 1), dtype=torch.int32, device=row.device)
        logits = row[None].expand(position.shape[0], -1).contiguous()
        drawn.append(sample(ops, logits, torch.zeros_like(position), position, slots, history)[0])
    return torch.cat(drawn)


def draw_count(device: torch.device, interpreted: int, compiled: int) -> int:
    """How many draws a test takes: the interpreter is slow."""
    return compiled if device.type == "cuda" else interpreted
