"""The batch-invariant mode: a request's tokens and log-probabilities have the same bits whatever runs beside it,
however its prompt is padded or cut, and whichever path its steps take. Without the mode they do not.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_cases import Bits, answer, answers, bits, finish, make_engine, prompt, steps_until, with_changes

from jitgraph import SamplingParams
from jitgraph.engine.engine import Engine
from jitgraph.graphs.key import Path, Phase
from jitgraph.types import Request, TokenChunk

SPECS = {
    "even": with_changes(num_layers=2, layer_windows=(0, 0)),
    "odd": with_changes(
        vocab_size=211,
        hidden_size=35,
        intermediate_size=53,
        num_heads=6,
        num_kv_heads=2,
        head_dim=24,
        qkv_bias=True,
        qk_norm=True,
        tie_embeddings=True,
    ),
    "window": with_changes(num_layers=2, layer_windows=(0, 11), mlp_bias=True, o_bias=True),
}
"""Sizes that fill no vector, and each thing that a layer may have."""
LENGTHS = (1, 3, 16, 20, 37)
PARAMS = (
    SamplingParams(max_tokens=12, temperature=0.9, top_p=0.95, seed=7, logprobs=5),
    SamplingParams(max_tokens=12, logprobs=3, repetition_penalty=1.2),
)


def wanted(vocabulary: int) -> list[tuple[tuple[int, ...], SamplingParams]]:
    """Requests of every length, each with one of the settings."""
    return [(prompt(n, vocabulary=vocabulary), PARAMS[i % len(PARAMS)]) for i, n in enumerate(LENGTHS)]


def company(vocabulary: int) -> list[tuple[tuple[int, ...], SamplingParams]]:
    """Three others, so that eight run at once."""
    params = SamplingParams(max_tokens=14, temperature=1.2, seed=1)
    return [(prompt(n, salt=9, vocabulary=vocabulary), params) for n in (2, 30, 11)]


def invariant(device: torch.device, name: str, **settings: Any) -> Engine:
    return make_engine(device, SPECS[name], batch_invariant=True, page_size=8, **settings)


@pytest.mark.parametrize("name", SPECS)
def test_the_same_bits_in_any_company_and_on_any_path(device: torch.device, name: str) -> None:
    """Alone in loops or step by step, among eight, padded, exact, in chunks, and eagerly: bit for bit one answer."""
    requests = wanted(SPECS[name].vocab_size)
    engine = invariant(device, name)
    expected = [answer(engine, *one) for one in requests]
    assert engine.dispatcher.paths[Phase.DECODE, Path.LOOP] > 0 and engine.dispatcher.paths[Phase.PREFILL, Path.PADDED]

    together = answers(engine, requests + company(SPECS[name].vocab_size))
    assert together[: len(requests)] == expected, "among eight"
    for settings in (
        {"device_loop": False},
        {"precapture_lengths": LENGTHS},
        {"prefill_buckets": (40,)},
        {"prefill_buckets": (3, 7)},
        {"graphs": False},
        {"graph_scope": "static"},
        {"fused_sampling": False},
    ):
        other = invariant(device, name, **settings)
        assert [answer(other, *one) for one in requests] == expected, f"alone, {settings}"
        assert answers(other, requests)[::2] == expected[::2], f"together, {settings}"


def test_neighbours_that_come_and_go(device: torch.device) -> None:
    """The number of rows changes under way; the stream does not notice."""
    requests = wanted(SPECS["even"].vocab_size)
    engine = invariant(device, "even")
    expected = answer(engine, *requests[0])
    for moment in (1, 4, 9):
        chunks: dict[int, list[TokenChunk]] = {}
        engine.submit(Request(0, *requests[0]))
        steps_until(engine, chunks, 0, moment)
        for identity, one in enumerate(requests[1:], start=1):
            engine.submit(Request(identity, *one))
        steps_until(engine, chunks, 0, moment + 1)
        for identity in (1, 3):
            engine.cancel(identity)
        finish(engine, chunks)
        assert bits(chunks[0]) == expected


@pytest.mark.parametrize("tokens_at_once", [1, 2, 5, 8])
def test_logits_of_every_row(device: torch.device, tokens_at_once: int) -> None:
    """The same stream in every row of a batch, beside others: all rows that hold it have its logits' bits."""
    ids, others = prompt(6), prompt(17, salt=3)
    engine = invariant(device, "even")
    expected = answer(engine, ids, PARAMS[0])
    rows: list[tuple[int, ...]] = [ids if i % 2 == 0 else others for i in range(tokens_at_once)]
    found = answers(engine, [(row, PARAMS[0]) for row in rows])
    assert all(one == expected for row, one in zip(rows, found, strict=True) if row is ids)


def _logprobs(found: Bits) -> list[float | None]:
    return [entry[1] for entry in found]


def test_without_the_mode_company_shows(device: torch.device) -> None:
    """The mode is worth something: without it the same requests give other bits in other company, since libraries
    choose their order of summation by size."""
    differing = 0
    for hidden in (32, 64, 128, 256):
        spec = with_changes(hidden_size=hidden, intermediate_size=2 * hidden, num_heads=4, head_dim=hidden // 4)
        engine = make_engine(device, spec)
        requests = [(prompt(n), SamplingParams(max_tokens=8, logprobs=0)) for n in range(9, 17)]
        alone = [answer(engine, *one) for one in requests]
        together = answers(engine, requests)
        differing += sum(_logprobs(a) != _logprobs(b) for a, b in zip(alone, together, strict=True))
    assert differing > 0, "no request of any size noticed its neighbours: the test above proves nothing here"
