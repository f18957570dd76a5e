"""Masks of constrained slots: the Triton kernels against their PyTorch meaning, and both against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_cases import DTYPES, Drawn, draw_count, history_of, int32, poison, sample

from jitgraph.ops import reference_sampling as reference
from jitgraph.ops import sampling
from jitgraph.ops.slots import CONSTRAINED, MIN_LENGTH, NUM_BIAS, SlotTable, encode_row, mask_words
from jitgraph.types import MAX_LOGPROBS, SamplingParams

PROMPT = 3
KINDS = [
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.4, top_k=3),
    SamplingParams(temperature=1.0, top_k=10**6),
    SamplingParams(temperature=1.5, top_p=0.8),
    SamplingParams(temperature=1.0, min_p=0.3),
    SamplingParams(temperature=0.8, top_k=40, top_p=0.9, min_p=0.02, logprobs=3),
    SamplingParams(temperature=1.0, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=-0.5),
    SamplingParams(logit_bias={5: 100.0, 7: -100.0}, logprobs=20),
]
"""Every kind of choice; greedy parameters too, since a grammar takes any request to this op."""


@pytest.fixture
def few_passes(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many passes as are quickest in the interpreter; any number gives the same thresholds: test_ops_filters.py."""
    if device.type == "cpu":
        monkeypatch.setattr(sampling, "_PASSES", 2)


def constrained_slots(params: list[SamplingParams], constrained: list[bool], device: torch.device) -> SlotTable:
    table = SlotTable.allocate(len(params), 2, torch.device("cpu"))
    for slot, (one, bound) in enumerate(zip(params, constrained, strict=True)):
        row = (one, PROMPT, PROMPT + one.max_tokens, (1,), 7 + slot, [slot + 1])
        encode_row(table.words[slot], *row, constrained=bound)
    return SlotTable(table.words.to(device), table.pages_per_slot)


def masks_of(allowed: list[set[int] | None], vocabulary: int, device: torch.device) -> torch.Tensor:
    """Masks as the host writes them; None, the dummy, and all bits past the vocabulary are set at random."""
    words = mask_words(vocabulary)
    generator = torch.Generator().manual_seed(vocabulary)
    masks = torch.randint(-(2**31), 2**31, (len(allowed) + 1, words), dtype=torch.int32, generator=generator)
    for row, ids in zip(masks.tolist(), allowed, strict=False):
        if ids is None:
            continue
        for i in range(vocabulary):
            bit = 1 << (i % 32)
            row[i // 32] = (row[i // 32] & 0xFFFFFFFF) | bit if i in ids else row[i // 32] & 0xFFFFFFFF & ~bit
        masks[allowed.index(ids)] = torch.tensor([w - 2**32 if w >= 2**31 else w for w in row], dtype=torch.int32)
    return masks.pin_memory() if device.type == "cuda" else masks


def some_ids(vocabulary: int, count: int, seed: int) -> set[int]:
    generator = torch.Generator().manual_seed(seed)
    return set(torch.randperm(vocabulary, generator=generator)[:count].tolist())


def lived(vocabulary: int, slots: int, device: torch.device) -> torch.Tensor:
    return history_of([([5, 6, 7], [7, 8, 8])] * slots, vocabulary, device)


@pytest.mark.parametrize("vocabulary", [211, 1000, 32000])
def test_every_kind_of_choice_stays_inside_its_mask(device: torch.device, vocabulary: int) -> None:
    """Rows of every kind, each with another mask: the reference's token, and one that is allowed."""
    kinds = KINDS if vocabulary < 5000 or device.type == "cuda" else [KINDS[1], KINDS[6]]  # the interpreter is slow
    rows = len(kinds)
    allowed: list[set[int] | None] = [some_ids(vocabulary, 1 + 7 * r, r) for r in range(rows)]
    masks = masks_of(allowed, vocabulary, device)
    slots = constrained_slots(kinds, [True] * rows, device)
    history, slot = lived(vocabulary, rows, device), torch.arange(rows, dtype=torch.int32, device=device)
    for draw in range(draw_count(device, 1 if vocabulary > 5000 else 4, 40)):
        logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(draw)).to(device) * 3
        args = (logits, slot, slot + 10 * (draw + 1), slots, history, masks)
        actual, expected = sample(sampling, *args), sample(reference, *args)
        assert torch.equal(actual[0], expected[0])
        for token, ids in zip(actual[0].tolist(), allowed, strict=True):
            assert ids is not None and token in ids


@pytest.mark.parametrize("ops", [sampling, reference], ids=["kernel", "reference"])
@pytest.mark.parametrize("vocabulary", [1, 31, 32, 33, 211, 1025])
def test_the_only_allowed_id_is_taken(device: torch.device, ops: object, vocabulary: int) -> None:
    """At the borders of words, blocks and the vocabulary; however unlikely it is."""
    ids = sorted({0, 30, 31, 32, vocabulary // 2, vocabulary - 1} & set(range(vocabulary)))
    params = [SamplingParams(temperature=r % 2, top_p=0.9 if r % 3 else 1.0) for r in range(len(ids))]
    masks = masks_of([{i} for i in ids], vocabulary, device)
    slots = constrained_slots(params, [True] * len(ids), device)
    logits = torch.full((len(ids), vocabulary), 50.0, device=device)
    logits[torch.arange(len(ids)), ids] = -50.0
    slot = torch.arange(len(ids), dtype=torch.int32, device=device)
    assert sample(ops, logits, slot, slot + 9, slots, None, masks)[0].tolist() == ids


@pytest.mark.usefixtures("few_passes")
@pytest.mark.parametrize("ops", [sampling, reference], ids=["kernel", "reference"])
def test_a_mask_comes_after_penalties_and_bias_and_before_top_k(device: torch.device, ops: object) -> None:
    """A bias cannot lift the bar, and top-k counts what is allowed alone."""
    vocabulary = 300
    row = torch.zeros(vocabulary, device=device)
    row[[10, 20, 30, 40]] = torch.tensor([9.0, 8.0, 7.0, 6.0], device=device)
    for params, allowed, expected in (
        (SamplingParams(logit_bias={10: 100.0}), {20, 30}, {20}),
        (SamplingParams(temperature=1e-2, top_k=2), {20, 40}, {20}),
        (SamplingParams(temperature=100.0, top_k=2), {20, 40}, {20, 40}),
        (SamplingParams(presence_penalty=2.0), {20, 30}, {30}),  # 20 was said already
    ):
        slots = constrained_slots([params], [True], device)
        masks = masks_of([allowed], vocabulary, device)
        history = history_of([([10], [20])], vocabulary, device)
        drawn = set()
        for position in range(draw_count(device, 12, 60)):
            where = (int32([0], device), int32([position], device))
            drawn.add(int(sample(ops, row[None].contiguous(), *where, slots, history, masks)[0]))
        assert drawn == expected, params


@pytest.mark.parametrize("ops", [sampling, reference], ids=["kernel", "reference"])
def test_logprobs_are_those_of_the_raw_distribution(device: torch.device, ops: object) -> None:
    row = torch.randn(211, generator=torch.Generator().manual_seed(3)).to(device)
    slots = constrained_slots([SamplingParams(logprobs=4)], [True], device)
    masks = masks_of([{17}], 211, device)
    result = sample(ops, row[None].contiguous(), int32([0], device), int32([9], device), slots, None, masks)
    raw = torch.log_softmax(row, -1)
    assert result[0].tolist() == [17]
    torch.testing.assert_close(result[1][0], raw[17], atol=1e-5, rtol=1e-5)
    assert result[2][0, :4].tolist() == row.argsort(descending=True)[:4].tolist()


@pytest.mark.usefixtures("few_passes")
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_grammar_ignore_their_mask(device: torch.device, dtype: torch.dtype) -> None:
    """Whatever stands there, and whoever is beside them: the same tokens and log-probabilities, bit for bit."""
    vocabulary, rows = 1100, len(KINDS)
    bound = [r % 2 == 1 for r in range(rows)]
    masks = masks_of([some_ids(vocabulary, 9, r) if bound[r] else None for r in range(rows)], vocabulary, device)
    history = lived(vocabulary, rows, device)
    slot = torch.arange(rows, dtype=torch.int32, device=device)
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    args = (logits, slot, slot + 9)
    free = sample(sampling, *args, constrained_slots(KINDS, [False] * rows, device), history, masks)
    mixed = sample(sampling, *args, constrained_slots(KINDS, bound, device), history, masks)
    changed = [r for r in range(rows) if not _same(free, mixed, r)]
    assert changed and all(bound[r] for r in changed)


def _same(a: Drawn, b: Drawn, row: int) -> bool:
    return all(torch.equal(x[row].nan_to_num(7), y[row].nan_to_num(7)) for x, y in zip(a, b, strict=True))


def test_a_constrained_row_has_no_other_bar() -> None:
    """``min_tokens`` is in the mask of a constrained slot, and the next sequence in the slot is free again."""
    table = SlotTable.allocate(1, 2, torch.device("cpu"))
    params = SamplingParams(min_tokens=4, max_tokens=9, logit_bias={3: 1.0})
    encode_row(table.words[0], params, PROMPT, 12, (1,), 0, [1], constrained=True)
    assert table.words[0, [CONSTRAINED, MIN_LENGTH, NUM_BIAS]].tolist() == [1, PROMPT, 1]
    encode_row(table.words[0], params, PROMPT, 12, (1,), 0, [1])
    assert table.words[0, [CONSTRAINED, MIN_LENGTH, NUM_BIAS]].tolist() == [0, PROMPT + 4, 1]


@given(vocabulary=st.integers(1, 10**6))
def test_words_of_a_mask(vocabulary: int) -> None:
    assert 32 * (mask_words(vocabulary) - 1) < vocabulary <= 32 * mask_words(vocabulary)


# ---------------------------------------------------------------------------------------------------------------- score


def score(ops: object, logits: torch.Tensor, targets: torch.Tensor) -> Drawn:
    """(targets, results of ``ops.score``); scratch and results are poisoned before."""
    rows, vocabulary, device = *logits.shape, logits.device
    logprobs, values = poison(rows, device=device), poison(rows, MAX_LOGPROBS, device=device)
    ids = poison(rows, MAX_LOGPROBS, device=device, dtype=torch.int32)
    scratch = poison(rows + 1, sampling.score_words(vocabulary) + 5, device=device)
    ops.score(logits, targets, scratch, logprobs, ids, values)  # type: ignore[attr-defined]
    return targets, logprobs, ids, values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,vocabulary", [(1, 7), (3, 211), (2, 1024), (2, 3001)])
def test_score(device: torch.device, dtype: torch.dtype, rows: int, vocabulary: int) -> None:
    """Against the reference, with many equal logits, and against float64."""
    generator = torch.Generator().manual_seed(rows)
    logits = (torch.randn(rows, vocabulary, generator=generator) * 3).round().to(device, dtype)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator, dtype=torch.int32).to(device)
    actual, expected = score(sampling, logits, targets), score(reference, logits, targets)
    width = min(MAX_LOGPROBS, vocabulary)
    assert torch.equal(actual[2][:, :width], expected[2][:, :width])
    torch.testing.assert_close(actual[1], expected[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(actual[3][:, :width], expected[3][:, :width], atol=1e-5, rtol=1e-5)
    exact = torch.log_softmax(logits.double(), -1)
    torch.testing.assert_close(actual[1].double(), exact.gather(1, targets.long()[:, None])[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ops", [sampling, reference], ids=["kernel", "reference"])
def test_score_of_barred_and_certain_ids(device: torch.device, ops: object) -> None:
    logits = torch.full((2, 40), -math.inf, device=device)
    logits[0, 3] = 5.0
    logits[1, :2] = 0.0
    _, logprobs, ids, values = score(ops, logits, int32([3, 39], device))
    assert logprobs.tolist() == [0.0, -math.inf] and ids[0, 0] == 3
    torch.testing.assert_close(values[1, :2].cpu(), torch.tensor([0.5, 0.5]).log(), atol=1e-6, rtol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [32000, 128256])
def test_large_vocabularies(device: torch.device, vocabulary: int) -> None:
    logits = torch.randn(64, vocabulary, device=device).half() * 3
    targets = torch.randint(0, vocabulary, (64,), device=device, dtype=torch.int32)
    actual, expected = score(sampling, logits, targets), score(reference, logits, targets)
    assert torch.equal(actual[2], expected[2])
    torch.testing.assert_close(actual[1], expected[1], atol=1e-4, rtol=1e-5)
