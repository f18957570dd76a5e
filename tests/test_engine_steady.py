"""The shortest way of a lone stream's token: taken for nearly all of them, with the bits and the books of the ordinary
way, and left as soon as there is anything else to look after."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_cases import (
    SPEC,
    answer,
    assert_nothing_left,
    bits,
    finish,
    make_engine,
    prompt,
    steps_until,
    with_changes,
)

from jitgraph import SamplingParams
from jitgraph.engine.engine import Engine
from jitgraph.types import FinishReason, Request, TokenChunk

TOKENS = 100
LOOP = 16
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "top_k": 40, "seed": 7},
    "penalised": {"repetition_penalty": 1.3, "presence_penalty": 0.4, "seed": 7},
}


def params(kind: str = "greedy", **changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": TOKENS, "ignore_eos": True, **PARAMS[kind], **changes})


class Watched:
    """An engine, and how many of its tokens went the shortest way."""

    def __init__(self, device: torch.device, **settings: Any) -> None:
        self.engine: Engine = make_engine(device, SPEC, loop_steps=LOOP, **settings)
        self.taken = 0
        shortest = self.engine._steady_token

        def counted() -> list[TokenChunk] | None:
            found = shortest()
            self.taken += found is not None
            return found

        self.engine._steady_token = counted  # type: ignore[method-assign, assignment]

    def avoid(self) -> None:
        """From here on every token goes the ordinary way."""
        self.engine._steady_token = lambda: None  # type: ignore[method-assign, assignment]


@pytest.fixture(scope="module")
def pair(device: torch.device) -> Iterator[tuple[Watched, Watched]]:
    """(one that may take it, one that may not)."""
    found = Watched(device), Watched(device)
    found[1].avoid()
    yield found


@pytest.mark.parametrize("kind", PARAMS)
def test_the_same_bits_and_books(pair: tuple[Watched, Watched], kind: str) -> None:
    short, long = pair
    for watched in pair:
        watched.engine.reset_counters()
        watched.taken = 0
    assert answer(short.engine, prompt(5), params(kind)) == answer(long.engine, prompt(5), params(kind))
    loops = -(-(TOKENS - 1) // LOOP)
    assert long.taken == 0 and short.taken >= TOKENS - 1 - 2 * loops - 2, "all but the first and last of each loop"
    assert short.engine.dispatcher.paths == long.engine.dispatcher.paths
    assert short.engine.dispatcher.reasons == long.engine.dispatcher.reasons
    assert short.engine.runner.steps == long.engine.runner.steps
    assert short.engine.store._completed == long.engine.store._completed, "the store has heard of every step"


def test_a_stop_id_ends_it(pair: tuple[Watched, Watched]) -> None:
    """Wherever in a loop it comes."""
    short, long = pair
    whole = [entry[0] for entry in answer(long.engine, prompt(5), params())]
    for at in (1, 5, LOOP - 1, LOOP, LOOP + 1, 40):
        stop = params(stop_token_ids=(whole[at],))
        found = answer(short.engine, prompt(5), stop)
        assert found == answer(long.engine, prompt(5), stop) and found[-1][-1] is FinishReason.STOP


def test_log_probabilities_take_the_ordinary_way(pair: tuple[Watched, Watched]) -> None:
    short, long = pair
    short.taken = 0
    assert answer(short.engine, prompt(5), params(logprobs=2)) == answer(long.engine, prompt(5), params(logprobs=2))
    assert short.taken == 0


def test_work_for_the_shadow_takes_the_ordinary_way(device: torch.device) -> None:
    """Only the ordinary wait lends its time. The first prompt of a length asks for a graph of its own."""
    watched = Watched(device, rolling=True)
    engine, chunks = watched.engine, dict[int, list[TokenChunk]]()
    engine.submit(Request(0, prompt(5), params()))
    steps_until(engine, chunks, 0, 2 * LOOP)
    assert engine._shadow.pending and watched.taken == 0
    finish(engine, chunks)
    while engine.idle_work:
        engine.work_while_idle()
    engine.submit(Request(1, prompt(5), params()))
    finish(engine, chunks)
    assert not engine._shadow.pending and watched.taken > TOKENS // 2


@pytest.mark.parametrize("read", [3, LOOP + 5])
def test_a_newcomer_or_a_cancel_ends_it(pair: tuple[Watched, Watched], read: int) -> None:
    short, long = pair
    for end in ("newcomer", "cancel"):
        found = []
        for watched in (short, long):
            engine, chunks = watched.engine, dict[int, list[TokenChunk]]()
            engine.submit(Request(0, prompt(5), params()))
            steps_until(engine, chunks, 0, read)
            if end == "cancel":
                engine.cancel(0)
            engine.submit(Request(1, prompt(7), params(max_tokens=9)))
            finish(engine, chunks)
            assert_nothing_left(engine)
            found.append({identity: [bit[0] for bit in bits(got)] for identity, got in chunks.items()})
        assert found[0][1] == found[1][1] and len(found[0][1]) == 9
        assert found[0][0] == found[1][0] and len(found[0][0]) == (read if end == "cancel" else TOKENS)


@pytest.mark.parametrize("moment", ["while it waits", "while it records"])
def test_an_interrupt(device: torch.device, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """While it waits it costs nothing; while a token is recorded it may cost that one, so the request ends."""
    engine = Watched(device).engine
    expected = answer(engine, prompt(5), params())
    chunks: dict[int, list[TokenChunk]] = {}
    engine.submit(Request(0, prompt(5), params()))
    steps_until(engine, chunks, 0, 5)
    assert engine._flights[0].steady

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "while it waits":
            patch.setattr(engine.runner.reader, "_pump", interrupted)
            patch.setattr(engine.runner.reader, "token", interrupted)
        else:
            patch.setattr("jitgraph.engine.steady.TokenChunk", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    finish(engine, chunks)
    if moment == "while it waits":
        assert bits(chunks[0]) == expected
    else:
        assert chunks[0][-1].finish_reason is FinishReason.CANCELLED and len(chunks[0]) == 6
    assert_nothing_left(engine)
    assert answer(engine, prompt(5), params()) == expected


def test_the_end_of_the_text(device: torch.device, pair: tuple[Watched, Watched]) -> None:
    """The model's own end, and a request for very few tokens."""
    whole = [entry[0] for entry in answer(pair[1].engine, prompt(5), params())]
    spec = with_changes(eos_token_ids=(next(token for token in whole[LOOP + 4 :] if token not in whole[:LOOP]),))
    short, long = (make_engine(device, spec, loop_steps=LOOP) for _ in range(2))
    long._steady_token = lambda: None  # type: ignore[method-assign, assignment]
    asked = [params(ignore_eos=False), *(params(max_tokens=count) for count in (1, 2, 3, LOOP, LOOP + 1))]
    found = [answer(short, prompt(5), one) for one in asked]
    assert found == [answer(long, prompt(5), one) for one in asked]
    assert found[0][-1][-1] is FinishReason.STOP and [len(one) for one in found[1:]] == [1, 2, 3, LOOP, LOOP + 1]
