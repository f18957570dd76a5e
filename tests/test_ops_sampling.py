"""The Triton sampling kernels and the append against their PyTorch meaning."""

from __future__ import annotations

import pytest
import torch
from ops_cases import DTYPES, draw_count, draws, greedy, history_of, int32, sample, sampling_slots

from jitgraph.ops import reference_sampling as reference
from jitgraph.ops import sampling
from jitgraph.ops.ring import RING_FIELDS, RING_LOGPROB, RING_TOP_IDS, RING_TOP_LOGPROBS
from jitgraph.types import SamplingParams

# --------------------------------------------------------------------------------------------------------------- greedy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,vocabulary", [(1, 5), (3, 1024), (8, 1025), (2, 5000)])
def test_greedy(device: torch.device, dtype: torch.dtype, rows: int, vocabulary: int) -> None:
    slots = sampling_slots([(SamplingParams(), 3, (1,), 0)] * rows, device)
    logits = torch.randn(rows, vocabulary, device=device).to(dtype)
    slot = torch.arange(rows, dtype=torch.int32, device=device)
    actual = greedy(sampling, logits, slot, slot + 3, slots)
    assert torch.equal(actual.long(), logits.float().argmax(-1))


def test_greedy_prefers_the_lowest_id_among_equals(device: torch.device) -> None:
    slots = sampling_slots([(SamplingParams(), 3, (), 0)] * 2, device)
    logits = torch.zeros(2, 3000, device=device)
    logits[0, [2999, 1500, 1023]] = 2.0
    actual = greedy(sampling, logits, int32([0, 1], device), int32([4, 4], device), slots)
    assert actual.tolist() == [1023, 0]


def test_greedy_bars_stop_ids_below_min_length(device: torch.device) -> None:
    params = SamplingParams(min_tokens=2)
    slots = sampling_slots([(params, 10, (7, 2000), 0)] * 3, device)
    logits = torch.zeros(3, 2500, device=device)
    logits[:, 7], logits[:, 2000], logits[:, 42] = 3.0, 2.0, 1.0
    args = (logits, int32([0, 1, 2], device), int32([10, 11, 12], device), slots)
    assert greedy(sampling, *args).tolist() == greedy(reference, *args).tolist() == [42, 42, 7]


@pytest.mark.filterwarnings("ignore:All-NaN")
def test_tokens_stay_in_the_vocabulary_on_nan(device: torch.device) -> None:
    slots = sampling_slots([(SamplingParams(), 3, (), 0), (SamplingParams(temperature=1.0, top_k=3), 3, (), 0)], device)
    logits = torch.full((2, 1500), torch.nan, device=device)
    args = (logits, int32([0, 1], device), int32([4, 4], device), slots)
    for tokens in (greedy(sampling, *args), sample(sampling, *args)[0]):
        assert all(0 <= token < 1500 for token in tokens.tolist())


# --------------------------------------------------------------------------------------------------------------- sample

FILTERS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=1.0, top_k=1),
    SamplingParams(temperature=1.5, top_k=7),
    SamplingParams(temperature=1.0, top_k=10**6),
    SamplingParams(temperature=1.0, top_p=0.5),
    SamplingParams(temperature=2.0, top_p=0.9),
    SamplingParams(temperature=1.0, top_p=1e-6),
    SamplingParams(temperature=1.0, min_p=0.2),
    SamplingParams(temperature=1.0, min_p=1.0),
    SamplingParams(temperature=0.8, top_k=40, top_p=0.8, min_p=0.05),
    SamplingParams(temperature=0.0, top_k=5),
]


@pytest.mark.parametrize("params", FILTERS, ids=range(len(FILTERS)))
@pytest.mark.parametrize("tied", [False, True])
def test_sample_draws_the_reference_token(device: torch.device, params: SamplingParams, tied: bool) -> None:
    row = torch.randn(1100, generator=torch.Generator().manual_seed(1)).to(device) * 1.5
    if tied:
        row = (row * 2).round() / 2  # thresholds fall into the middle of ties, zeros of both signs included
    actual, expected = (draws(ops, row, params, draw_count(device, 3, 50)) for ops in (sampling, reference))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("params", FILTERS[2:11], ids=range(9))
def test_the_kept_set_is_the_references(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, params: SamplingParams
) -> None:
    """Drawing from a nearly flat distribution, a kept set that is off by one id soon shows in the tokens."""
    if device.type == "cpu":
        monkeypatch.setattr(sampling, "_PASSES", 2)  # quicker, and the same: see test_ops_filters.py
    row = torch.tensor([0.5, 0.1, 0.4, 0.4, -0.0, 0.0, 0.3, 0.2, 0.45, 0.4], device=device)
    slots = sampling_slots([(params, 3, (), 5)], device)
    kept = reference._filter(row[None] / params.temperature, slots, torch.zeros(1, dtype=torch.long, device=device))
    count = draw_count(device, 12, 2000)
    actual, expected = (draws(ops, row, params, count).tolist() for ops in (sampling, reference))
    assert actual == expected
    assert set(actual) <= set(kept[0].nonzero()[:, 0].tolist())


def test_sample_bars_stop_ids(device: torch.device) -> None:
    row = torch.zeros(6, device=device)
    row[2] = 50.0
    params = SamplingParams(temperature=1.0, top_p=0.9, min_tokens=4)
    tokens = draws(sampling, row, params, 9, stops=(2,)).tolist()  # positions 1..9, MIN_LENGTH 7
    assert 2 not in tokens[:6] and tokens[6:] == [2, 2, 2]


def test_a_seed_gives_the_same_token_in_any_row(device: torch.device) -> None:
    params = SamplingParams(temperature=1.0, top_k=50)
    other = (SamplingParams(temperature=0.9, top_p=0.7), 3, (), 11)
    slots = sampling_slots([(params, 3, (), 77), other, (params, 9, (), 77), other], device)
    logits = torch.randn(4, 2000, device=device)
    logits[2] = logits[0]
    position = int32([20, 21, 20, 22], device)
    tokens = sample(sampling, logits, int32([0, 1, 2, 3], device), position, slots)[0].tolist()
    alone = sample(sampling, logits[2:3].contiguous(), int32([0], device), position[:1], slots)[0].tolist()
    assert tokens[0] == tokens[2] == alone[0]


def test_large_seeds_and_their_halves_matter(device: torch.device) -> None:
    row = torch.zeros(1000, device=device)
    params = SamplingParams(temperature=1.0)
    seeds = (0, 1, 2**32, 2**63 + 5, 2**64 - 1)
    drawn = [draws(sampling, row, params, 4, seed=s).tolist() for s in seeds]
    assert drawn == [draws(reference, row, params, 4, seed=s).tolist() for s in seeds]
    assert len({tuple(d) for d in drawn}) == len(seeds)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [25, 1024, 3000])
def test_logprobs(device: torch.device, dtype: torch.dtype, vocabulary: int) -> None:
    wanted = (20, 0, None, 5)
    rows = [(SamplingParams(temperature=t, logprobs=n), 3, (), 1) for t, n in zip((0, 1, 1, 2), wanted, strict=True)]
    slots = sampling_slots(rows, device)
    logits = (torch.randn(4, vocabulary, device=device) * 3).round().to(dtype)  # full of ties
    args = (logits, int32([0, 1, 2, 3], device), int32([9, 9, 9, 9], device), slots)
    actual, expected = sample(sampling, *args), sample(reference, *args)
    assert torch.equal(actual[0], expected[0])
    for r, n in enumerate(wanted):
        if n is None:
            assert actual[1][r].isnan() and actual[3][r].isnan().all()  # untouched
        else:
            torch.testing.assert_close(actual[1][r], expected[1][r], atol=1e-4, rtol=1e-5)
            assert actual[2][r, :n].tolist() == expected[2][r, :n].tolist()
            torch.testing.assert_close(actual[3][r, :n], expected[3][r, :n], atol=1e-4, rtol=1e-5)


def test_more_logprobs_than_the_vocabulary_has(device: torch.device) -> None:
    slots = sampling_slots([(SamplingParams(logprobs=20), 3, (), 1)], device)
    logits = torch.randn(1, 6, device=device)
    _, _, ids, _ = sample(sampling, logits, int32([0], device), int32([9], device), slots)
    assert ids[0, :6].tolist() == logits[0].argsort(descending=True).tolist()


# --------------------------------------------------------------------------------------------------------------- append


@pytest.mark.parametrize("reported", [False, True])
@pytest.mark.parametrize("rows", [[0], [2, 4, 0], [4, 1, 3, 4, 2]])
def test_advance(device: torch.device, rows: list[int], reported: bool) -> None:
    """Stop ids, the length limit, the dummy row, counts in the history, and a counter past 32 bits."""
    stops = ((), (5, 6), (5,), (9,))
    params = [SamplingParams(max_tokens=4, presence_penalty=penalty) for penalty in (0.0, 1.0, 0.5, 0.0)]
    kinds = [(p, 10, s, 0) for p, s in zip(params, stops, strict=True)]
    n, step = len(rows), 2**33 + 5
    slot = int32(rows, device)
    position = int32([{0: 13, 1: 11, 2: 10, 3: 12, 4: 1}[r] for r in rows], device)
    tokens = int32([{0: 5, 1: 6, 2: 6, 3: 2**30, 4: 0}[r] for r in rows], device)
    top = (torch.randn(n, device=device), torch.randint(0, 99, (n, 20), dtype=torch.int32, device=device))
    extras = (*top, torch.randn(n, 20, device=device)) if reported else (None, None, None)
    results = []
    for ops in (sampling, reference):
        slots = sampling_slots(kinds, device)
        counter = torch.tensor([step], dtype=torch.int64, device=device)
        ring = torch.full((7, 8, RING_FIELDS), -1, dtype=torch.int64, pin_memory=device.type == "cuda")
        before = history_of([None, ([6, 8], []), ([6], [6, 6]), None], 50, device)
        history = before.clone() if reported else None
        ops.advance(slot, position, tokens, *extras, slots, history, counter, ring, step)
        if device.type == "cuda":
            torch.cuda.synchronize()
        width = RING_FIELDS if reported else 1
        assert (ring[step % 7, n:] == -1).all() and (ring[:4] == -1).all()
        counts = None if history is None else (history - before).cpu()
        results.append((slots.words, counter, ring[step % 7, :n, :width].clone()))
        if counts is not None:
            assert counts.nonzero().tolist() == [[s, 6] for s in sorted({1, 2} & set(rows))]
            assert counts.sum() == len({1, 2} & set(rows))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)
    assert int(results[0][1]) == step + 1
    record = results[0][2]
    assert (record >> 32 & 0xFFFFFFFF == step & 0xFFFFFFFF).all()
    assert (record[:, 0] & 0xFFFFFFFF).tolist() == tokens.tolist()
    if reported:
        bits = (record & 0xFFFFFFFF).to(torch.int32)  # ids are small; floats compare by their bits
        assert torch.equal(bits[:, RING_TOP_IDS : RING_TOP_IDS + 20], extras[1].cpu())
        floats = (record & 0xFFFFFFFF).where(record & 0xFFFFFFFF < 2**31, (record & 0xFFFFFFFF) - 2**32).to(torch.int32)
        assert torch.equal(floats[:, RING_LOGPROB].contiguous().view(torch.float32), extras[0].cpu())
        assert torch.equal(floats[:, RING_TOP_LOGPROBS:].contiguous().view(torch.float32), extras[2].cpu())


# --------------------------------------------------------------------------------------------------------- large shapes


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [32000, 128256, 262144])
def test_large_vocabularies(device: torch.device, vocabulary: int) -> None:
    choices = [*FILTERS[:4], *FILTERS[5:7], FILTERS[10], SamplingParams(temperature=1.0, logprobs=20)]
    slots = sampling_slots([(p, 3, (), 7 + i) for i, p in enumerate(choices)], device)
    slot = torch.arange(8, dtype=torch.int32, device=device)
    for step in range(10):
        logits = torch.randn(8, vocabulary, device=device).mul_(3)
        args = (logits, slot, slot + 10 * step, slots)
        assert torch.equal(greedy(sampling, *args), greedy(reference, *args))
        actual, expected = sample(sampling, *args), sample(reference, *args)
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[2][7], expected[2][7])
        torch.testing.assert_close(actual[3][7], expected[3][7], atol=1e-4, rtol=1e-5)
