"""The shortest way of a lone stream's token: taken for nearly all of them, with the bits and the books of the ordinary
way, and left as soon as there is anything else to look after."""

from __future__ import annotations

import time
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
from jitgraph.engine.steady import REHEARSE_AHEAD_S
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
        shortest = self.engine._steady.token

        def counted() -> list[TokenChunk] | None:
            found = shortest()
            self.taken += found is not None
            return found

        self.engine._steady.token = counted  # type: ignore[method-assign]

    def avoid(self) -> None:
        """From here on every token goes the ordinary way."""
        self.engine._steady.token = lambda: None  # type: ignore[method-assign]


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
            patch.setattr(engine._steady, "_read", interrupted)
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
    long._steady.token = lambda: None  # type: ignore[method-assign]
    asked = [params(ignore_eos=False), *(params(max_tokens=count) for count in (1, 2, 3, LOOP, LOOP + 1))]
    found = [answer(short, prompt(5), one) for one in asked]
    assert found == [answer(long, prompt(5), one) for one in asked]
    assert found[0][-1][-1] is FinishReason.STOP and [len(one) for one in found[1:]] == [1, 2, 3, LOOP, LOOP + 1]


# ------------------------------------------------------------------------ the first and the last, ahead of the books


def foreseen_and_read(
    engine: Engine, asked: SamplingParams, ids: tuple[int, ...] = prompt(5)
) -> tuple[list[TokenChunk], list[list[TokenChunk]]]:
    """One request's chunks, and those of them that were given ahead."""
    chunks, ahead = list[TokenChunk](), list[list[TokenChunk]]()
    engine.submit(Request(0, ids, asked))
    engine.launch()
    while engine.busy:
        books = (
            engine.pages.free,
            engine.runner.steps,
            len(engine._flights),
            engine._flights and engine._flights[0].read,
        )
        if (early := engine.early_token()) is not None:
            ahead.append(early)
            chunks += early
            assert books == (engine.pages.free, engine.runner.steps, len(engine._flights), engine._flights[0].read)
            assert engine.early_token() is None, "once"
        chunks += engine.step()
    assert_nothing_left(engine)
    return chunks, ahead


@pytest.mark.parametrize("kind", PARAMS)
@pytest.mark.parametrize("tokens", [1, 3, LOOP, LOOP + 1, LOOP + 2, LOOP + 3])
def test_first_and_last_may_be_had_before_their_books(pair: tuple[Watched, Watched], kind: str, tokens: int) -> None:
    """These and no others, each once, and nothing is different for it afterwards."""
    engine = pair[0].engine
    expected = answer(pair[1].engine, prompt(5), params(kind, max_tokens=tokens))
    chunks, ahead = foreseen_and_read(engine, params(kind, max_tokens=tokens))
    assert bits(chunks) == expected
    early = [one for [one] in ahead]
    if tokens > 1 and (tokens - 1) % LOOP == 1:
        assert bits(early) == expected[:1], "the first token of a loop goes the ordinary way"
    else:
        assert bits(early) == (expected[:1] if tokens == 1 else [expected[0], expected[-1]])
        assert early[-1].finish_reason is FinishReason.LENGTH
    assert all(one.time_ns > 0 for one in early)


def test_a_first_token_tells_what_was_cached(device: torch.device) -> None:
    engine = make_engine(device, SPEC, prefix_cache=True, max_model_len=160, page_size=16)
    answers = [foreseen_and_read(engine, params(max_tokens=3), prompt(40)) for _ in range(2)]
    [[first, *_], [again, *_]] = [[one for [one] in ahead] for _, ahead in answers]
    assert first.cached_tokens == 0 and again.cached_tokens == 32
    assert bits([first]) == bits([again])


def test_a_first_token_is_rehearsed_before_it_is_due(
    pair: tuple[Watched, Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where it is known when that is, not once it is there, and nothing comes of it."""
    engine, steady = pair[0].engine, pair[0].engine._steady
    steady._took_s.clear()
    calls, moments = list[None](), list[float]()

    def first(come: bool) -> list[TokenChunk]:
        def looked(step: int, until_s: float) -> bool:
            moments.append(until_s)
            return not come

        monkeypatch.setattr(steady, "_look_out", looked)
        engine.submit(Request(0, prompt(5), params(max_tokens=LOOP)))
        engine.launch()
        chunks = list[TokenChunk]()
        while engine.busy:
            chunks += engine.early_token(lambda: calls.append(None)) or []
            chunks += engine.step()
        return chunks

    expected = bits(first(False))
    assert not calls and not moments
    [key] = steady._took_s
    steady._took_s[key] = 5.0
    assert bits(first(False)) == expected
    assert len(calls) == len(REHEARSE_AHEAD_S) and moments[1] - moments[0] == pytest.approx(300e-6)
    assert steady._took_s[key] < 5.0
    assert bits(first(True)) == expected and len(calls) == len(REHEARSE_AHEAD_S)


def test_looking_out_for_a_token(device: torch.device) -> None:
    """It ends when the token comes, or when its time is over."""
    engine = make_engine(device, SPEC)
    reader = engine.runner.reader
    begun = time.perf_counter()
    assert engine._steady._look_out(12345, begun + 0.05)
    assert time.perf_counter() >= begun + 0.05
    engine.submit(Request(0, prompt(5), params(max_tokens=1)))
    engine.launch()
    step = engine._flights[0].first
    assert not engine._steady._look_out(step, time.perf_counter() + 60)
    assert reader.token(step) == engine.step()[0].token_id


def test_what_ends_otherwise_is_not_foreseen(pair: tuple[Watched, Watched]) -> None:
    engine = pair[0].engine
    whole = [entry[0] for entry in answer(pair[1].engine, prompt(5), params())]
    at = next(i for i in range(LOOP, TOKENS) if whole[i] not in whole[:i] and (i + 1) % LOOP not in (1, 2))
    stopped = params(stop_token_ids=(whole[at],), max_tokens=at + 1)
    chunks, ahead = foreseen_and_read(engine, stopped)
    assert chunks[-1].finish_reason is FinishReason.STOP and len(chunks) == at + 1 and ahead == [chunks[:1]]
    chunks, ahead = foreseen_and_read(engine, params(stop_token_ids=(whole[0],)))
    assert [one.finish_reason for one in chunks] == [FinishReason.STOP] and not ahead
    assert foreseen_and_read(engine, params(logprobs=1))[1] == []
    found: dict[int, list[TokenChunk]] = {}
    engine.submit(Request(0, prompt(5), params(max_tokens=LOOP)))
    steps_until(engine, found, 0, LOOP - 1)
    engine.submit(Request(1, prompt(7), params(max_tokens=5)))
    assert engine.early_token() is None, "somebody waits, whose prompt goes first"
    finish(engine, found)
    assert [len(found[identity]) for identity in (0, 1)] == [LOOP, 5]


@pytest.mark.parametrize("moment", ["while it waits", "while it tells"])
@pytest.mark.parametrize("before", [0, LOOP - 1])
def test_an_interrupt_of_an_early_one(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, before: int, moment: str
) -> None:
    engine = Watched(device).engine
    expected = answer(engine, prompt(5), params(max_tokens=LOOP))
    chunks: dict[int, list[TokenChunk]] = {}
    engine.submit(Request(0, prompt(5), params(max_tokens=LOOP)))
    steps_until(engine, chunks, 0, before)
    engine.launch()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "while it waits":
            patch.setattr(engine._steady, "_read", interrupted)
        else:
            patch.setattr("jitgraph.engine.steady.TokenChunk", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.early_token()
    finish(engine, chunks)
    assert bits(chunks[0]) == expected
    assert_nothing_left(engine)
