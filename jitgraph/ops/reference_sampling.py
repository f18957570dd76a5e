"""Plain PyTorch meaning of sampling and append: the second half of ``reference.py``, under the same rules and
letters."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from jitgraph.ops import slots as slot_columns
from jitgraph.ops.ring import RING_FIELDS
from jitgraph.ops.slots import IN_PROMPT, MASK_BITS, SlotTable
from jitgraph.types import MAX_LOGPROBS


def note_prompt(
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    token_slot: torch.Tensor,
    slots: SlotTable,
    history: torch.Tensor,
) -> None:
    """Marks the ids of a prompt's chunk in its slot's row of the history, where the slot is PENALISED.

    ``history`` int32 ``[S, V]``: IN_PROMPT for an id of the prompt, plus how often the id was chosen as output.
    ``token_ids``, ``positions``, ``token_slot`` int32 ``[T]`` as ``prepare_prefill`` writes them: real tokens of one
    slot, then padding. A chunk that starts at position 0 clears the row first; nothing has been chosen while the
    prompt still comes, so marking is storing the flag.
    """
    slot = token_slot[:1].long()
    kept = slots.column(slot_columns.PENALISED)[slot][:, None] != 0
    row = torch.where(kept & (positions[:1, None] == 0), 0, history[slot])
    marked = torch.zeros(1, row.shape[1] + 1, dtype=torch.bool, device=row.device)
    ids = torch.where(token_slot != slots.dummy, token_ids, row.shape[1])
    marked.scatter_(1, ids.long()[None], True)
    history.index_copy_(0, slot, torch.where(kept & marked[:, :-1], IN_PROMPT, row))


def greedy(
    logits: torch.Tensor,
    sample_slot: torch.Tensor,
    sample_position: torch.Tensor,
    slots: SlotTable,
    scratch: torch.Tensor,
    tokens: torch.Tensor,
) -> None:
    """tokens[r] = argmax of logits[r], the lowest id among equals; stop ids are barred below the slot's MIN_LENGTH.

    logits ``[R, V]``; sample_slot, sample_position, tokens int32 ``[R]``; ``scratch`` float32 is the kernel's, unused
    here.
    """
    del scratch
    tokens.copy_(_bar_stop_ids(logits.float(), sample_slot, sample_position, slots).argmax(-1))


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
    """Draws tokens[r] by each slot's own parameters, and reports log-probabilities of the raw distribution.

    Penalties and bias first, on float32 logits, with ``history`` int32 ``[S, V]`` as in ``note_prompt``: ids in the
    prompt or the output are divided by REPETITION where above 0, else multiplied; FREQUENCY times the id's count in
    the output is subtracted, then PRESENCE where that count is not 0; bias is added. Stop ids are barred below
    MIN_LENGTH, and where the slot is CONSTRAINED all ids whose bit in its row of ``masks`` is 0 (int32
    ``[S, ceil(V / 32)]`` in host memory, see ``slots.py``).

    Then with x = logits / temperature: keep x >= the k-th largest; of these the smallest set of largest values whose
    probability reaches top_p; of these x >= max + log(min_p); then argmax(x + Gumbel noise), which samples the softmax
    exactly. The noise is -log(-log(u)) with u from Philox4x32-10, key = the slot's seed, counter = (id, position): same
    seed, same logits, same token, whatever the batch. Temperature 0 is argmax.

    tokens int32 ``[R]``, logprobs float32 ``[R]``, top_ids int32 and top_logprobs float32 ``[R, MAX_LOGPROBS]``: the
    NUM_LOGPROBS most likely, lowest id first among equals; rows and columns nobody asked for hold anything.
    """
    del scratch
    slot = sample_slot.long()
    x = _penalise(logits.float(), slot, slots, history) + _bias(slot, slots, logits.shape[1])
    x = _allow(_bar_stop_ids(x, sample_slot, sample_position, slots), slot, slots, masks)
    temperature = slots.column_f32(slot_columns.TEMPERATURE)[slot][:, None]
    scaled = x / torch.where(temperature > 0, temperature, 1.0)
    kept = _filter(scaled, slots, slot)
    noise = _gumbel(scaled.shape[1], sample_position, slots, slot)
    drawn = torch.where(kept, scaled + noise, -torch.inf).argmax(-1)
    tokens.copy_(torch.where(temperature[:, 0] > 0, drawn, x.argmax(-1)))
    raw = torch.log_softmax(logits.float(), dim=-1)
    logprobs.copy_(raw.gather(1, tokens.long()[:, None])[:, 0])
    _report_top(raw, top_ids, top_logprobs)


def score(
    logits: torch.Tensor,
    targets: torch.Tensor,
    scratch: torch.Tensor,
    logprobs: torch.Tensor,
    top_ids: torch.Tensor,
    top_logprobs: torch.Tensor,
) -> None:
    """Log-probabilities of given ids: logprobs[r] is that of targets[r] under softmax(logits[r]), in float32, and the
    top lists are the MAX_LOGPROBS most likely (all of a smaller vocabulary), lowest id first among equals.

    logits ``[R, V]``; targets int32 ``[R]``, inside the vocabulary; the others as in ``sample``. ``scratch`` float32 is
    the kernel's, unused here.
    """
    del scratch
    raw = torch.log_softmax(logits.float(), dim=-1)
    logprobs.copy_(raw.gather(1, targets.long()[:, None])[:, 0])
    _report_top(raw, top_ids, top_logprobs)


def _report_top(raw: torch.Tensor, top_ids: torch.Tensor, top_logprobs: torch.Tensor) -> None:
    values, ids = torch.sort(raw, dim=-1, descending=True, stable=True)
    width = min(MAX_LOGPROBS, raw.shape[1])
    top_ids[:, :width].copy_(ids[:, :width])
    top_logprobs[:, :width].copy_(values[:, :width])


def _penalise(x: torch.Tensor, slot: torch.Tensor, slots: SlotTable, history: torch.Tensor) -> torch.Tensor:
    """x ``[R, V]`` with the penalties of rows that are PENALISED; the history of other slots is never used."""
    repetition, presence, frequency = (
        slots.column_f32(column)[slot][:, None]
        for column in (slot_columns.REPETITION, slot_columns.PRESENCE, slot_columns.FREQUENCY)
    )
    penalised = slots.column(slot_columns.PENALISED)[slot][:, None] != 0
    seen = torch.where(penalised, history[slot], 0)
    count = seen & (IN_PROMPT - 1)
    x = torch.where(seen != 0, torch.where(x > 0, x / repetition, x * repetition), x)
    # In float64 the product is exact, so it does not matter whether a compiler fuses it with the subtraction.
    x = (x.double() - frequency.double() * count).float()
    return torch.where(count > 0, x - presence, x)


def _bias(slot: torch.Tensor, slots: SlotTable, vocabulary: int) -> torch.Tensor:
    """What the rows' biases add, ``[R, V]``."""
    ids, values = slots.bias_ids()[slot], slots.bias_values()[slot]
    valid = torch.arange(ids.shape[1], device=slot.device)[None] < slots.column(slot_columns.NUM_BIAS)[slot][:, None]
    added = torch.zeros(slot.shape[0], vocabulary + 1, dtype=torch.float32, device=slot.device)
    added.scatter_(1, torch.where(valid, ids, vocabulary).long(), values)
    return added[:, :-1]


def _bar_stop_ids(
    x: torch.Tensor, sample_slot: torch.Tensor, sample_position: torch.Tensor, slots: SlotTable
) -> torch.Tensor:
    """x with -inf at the stop ids of rows whose position is below MIN_LENGTH."""
    slot = sample_slot.long()
    ids = slots.stop_ids()[slot]
    count = slots.column(slot_columns.NUM_STOP)[slot]
    barred = (sample_position < slots.column(slot_columns.MIN_LENGTH)[slot])[:, None]
    valid = barred & (torch.arange(ids.shape[1], device=x.device)[None] < count[:, None])
    spare = torch.zeros(x.shape[0], x.shape[1] + 1, dtype=x.dtype, device=x.device)
    spare.scatter_(1, torch.where(valid, ids, x.shape[1]).long(), -torch.inf)
    return x + spare[:, :-1]


def _allow(x: torch.Tensor, slot: torch.Tensor, slots: SlotTable, masks: torch.Tensor) -> torch.Tensor:
    """x with -inf at the ids that the masks of CONSTRAINED rows do not allow."""
    ids = torch.arange(x.shape[1], device=x.device)
    words = masks.to(x.device, non_blocking=True)[slot][:, ids // MASK_BITS]
    allowed = (words >> (ids % MASK_BITS).int()) & 1 != 0
    constrained = slots.column(slot_columns.CONSTRAINED)[slot][:, None] != 0
    return torch.where(constrained & ~allowed, -torch.inf, x)


def _filter(scaled: torch.Tensor, slots: SlotTable, slot: torch.Tensor) -> torch.Tensor:
    """bool ``[R, V]``: what top-k, top-p and min-p keep."""
    vocabulary = scaled.shape[1]
    top_k = slots.column(slot_columns.TOP_K)[slot].long()[:, None]
    top_p = slots.column_f32(slot_columns.TOP_P)[slot][:, None]
    min_p = slots.column_f32(slot_columns.MIN_P)[slot][:, None]
    ranked = torch.sort(scaled, dim=-1, descending=True).values
    k = torch.where(top_k > 0, top_k.clamp(max=vocabulary), vocabulary)
    kth = ranked.gather(1, k - 1)
    ranked = torch.where(ranked >= kth, ranked, -torch.inf)
    probability = torch.softmax(ranked, dim=-1)
    before = probability.cumsum(-1) - probability
    needed = (before < top_p).sum(-1, keepdim=True).clamp(min=1)
    pth = torch.where(top_p < 1.0, ranked.gather(1, needed - 1), -torch.inf)
    floor = torch.where(min_p > 0, ranked[:, :1] + torch.log(min_p), -torch.inf)
    return (scaled >= kth) & (scaled >= pth) & (scaled >= floor)


def _gumbel(vocabulary: int, sample_position: torch.Tensor, slots: SlotTable, slot: torch.Tensor) -> torch.Tensor:
    """float32 ``[R, V]`` standard Gumbel noise."""
    ids = torch.arange(vocabulary, device=slot.device)[None]
    key = slots.words.long()[slot] & 0xFFFFFFFF
    u = philox_uniform(
        ids, sample_position.long()[:, None], key[:, slot_columns.SEED_LO, None], key[:, slot_columns.SEED_HI, None]
    )
    return -torch.log(-torch.log(u))


def philox_uniform(
    counter0: torch.Tensor, counter1: torch.Tensor, key0: torch.Tensor, key1: torch.Tensor
) -> torch.Tensor:
    """Uniform float32 in (0, 1): (top 23 bits + 0.5) / 2^23 of the first word of Philox4x32-10, counter = (c0, c1, 0,
    0).

    Arguments are int64 holding uint32, broadcast together. Source: Salmon et al., "Parallel Random Numbers: As Easy as
    1, 2, 3" (SC 2011).
    """
    mask = 0xFFFFFFFF
    c0, c1, k0, k1 = torch.broadcast_tensors(counter0, counter1, key0, key1)
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    for _ in range(10):
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((high >> 32) & mask) ^ c1 ^ k0,
            high & mask,
            ((low >> 32) & mask) ^ c3 ^ k1,
            low & mask,
        )
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    uniform: torch.Tensor = ((c0 >> 9).float() + 0.5) * 2.0**-23
    return uniform


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
    """Appends the new tokens to their slots, checks stop ids and lengths, and publishes the step in the token ring.

    For each row: NEXT_TOKEN = token, LENGTH = sample_position, FINISHED = 1 if the token is a stop id or
    sample_position + 1 >= MAX_LENGTH; the dummy slot stays as it is. Where the slot is PENALISED, the token's count in
    ``history`` int32 ``[S, V]`` grows by 1; ``history`` is None where no row can be (after ``greedy``). Then counter
    += 1 and the record of step number ``counter`` (its value before the increment) goes to ``ring[counter % depth]``:
    int64 ``[depth, R_max, RING_FIELDS]`` in mapped host memory. All rows of ``tokens`` are published,
    log-probabilities only where given.

    ``counter`` int64 ``[1]`` on the device. Plain PyTorch cannot index host memory by a device counter, so here the
    host passes the same number as ``host_step``; the kernel ignores it.
    """
    depth, rows = ring.shape[0], tokens.shape[0]
    slot = sample_slot.long()
    table = slots.words[slot]
    column = torch.arange(slots.stop_ids().shape[1], device=tokens.device)[None]
    is_stop = (slots.stop_ids()[slot] == tokens[:, None]) & (column < table[:, slot_columns.NUM_STOP, None])
    ended = is_stop.any(-1) | (sample_position + 1 >= table[:, slot_columns.MAX_LENGTH])
    live = sample_slot != slots.dummy
    for index, value in (
        (slot_columns.NEXT_TOKEN, tokens),
        (slot_columns.LENGTH, sample_position),
        (slot_columns.FINISHED, ended.int()),
    ):
        slots.column(index).index_copy_(0, slot, torch.where(live, value, table[:, index]))
    if history is not None:
        counted = live & (table[:, slot_columns.PENALISED] != 0)
        where = (slot, torch.where(counted, tokens, 0).long())
        history.index_put_(where, counted.int(), accumulate=True)
    columns = [tokens[:, None]]
    if logprobs is not None and top_ids is not None and top_logprobs is not None:
        columns += [logprobs.view(torch.int32)[:, None], top_ids, top_logprobs.view(torch.int32)]
    payload = torch.cat(columns, dim=1).long() & 0xFFFFFFFF
    stamped = F.pad(payload, (0, RING_FIELDS - payload.shape[1])) | (counter & 0xFFFFFFFF) << 32
    ring[host_step % depth, :rows].copy_(stamped, non_blocking=True)  # one contiguous copy: others would synchronise
    counter.add_(1)
