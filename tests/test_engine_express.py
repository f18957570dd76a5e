"""The shortest way of a prompt to an idle GPU: the same bits as the ordinary way, whenever it is taken, and never taken
when anything stands in its way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import (
    Bits,
    answer,
    assert_nothing_left,
    bits,
    finish,
    make_engine,
    prompt,
    run_ahead,
    steps_until,
    with_changes,
)

from jitgraph import LLM, SamplingParams
from jitgraph.engine.engine import Engine
from jitgraph.errors import RequestError
from jitgraph.ops.slots import NUM_STOP, STOP_IDS
from jitgraph.types import MAX_STOP_TOKEN_IDS, FinishReason, Request, TokenChunk

SPEC = with_changes(eos_token_ids=(3, 77))
LENGTHS = (1, 4, 5, 16, 30, 48)
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.001, "logprobs": 2},
    "penalised": {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": -0.3, "logprobs": 0},
    "endless": {"ignore_eos": True, "min_tokens": 3, "temperature": 1.0},
    "minimum": {"min_tokens": 9, "max_tokens": 9, "temperature": 0.7},
    "one": {"max_tokens": 1},
    "longest": {"max_tokens": 2**31 - 1, "temperature": 0.5, "ignore_eos": True},
}
SEEDS = (0, 7, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1)


def params(kind: str, index: int = 1) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 12, "seed": SEEDS[index % len(SEEDS)], **PARAMS[kind]})


def arm(engine: Engine) -> None:
    """All idle work, the last of which is to prepare for the next prompt."""
    while engine.idle_work:
        engine.work_while_idle()
    assert engine._express.armed


def fire(engine: Engine, identity: int, ids: tuple[int, ...], one: SamplingParams) -> bool:
    """Sends a request by the shortest way; whether that was possible."""
    shot = engine.fire(ids, one)
    if shot is not None:
        engine.book(Request(identity, ids, one), shot)
    return shot is not None


def fired(engine: Engine, ids: tuple[int, ...], one: SamplingParams) -> Bits:
    """What a request gets by the shortest way, of which a rehearsal leaves nothing behind."""
    arm(engine)
    engine.rehearse()
    assert fire(engine, 0, ids, one)
    chunks: dict[int, list[TokenChunk]] = {}
    finish(engine, chunks)
    assert_nothing_left(engine)
    return bits(chunks[0])


@pytest.fixture(scope="module")
def pair(device: torch.device) -> tuple[Engine, Engine]:
    """(one for the shortest way, one for the ordinary way)."""
    return make_engine(device, SPEC, max_model_len=80), make_engine(device, SPEC, max_model_len=80)


def words_that_count(engine: Engine) -> torch.Tensor:
    """The slot table without the stop ids past their number."""
    slots = engine.buffers.slots
    words = slots.words.clone()
    unused = torch.arange(MAX_STOP_TOKEN_IDS, device=words.device)[None] >= slots.column(NUM_STOP)[:, None]
    words[:, STOP_IDS : STOP_IDS + MAX_STOP_TOKEN_IDS].masked_fill_(unused, 0)
    return words


@pytest.mark.parametrize("kind", PARAMS)
def test_the_same_bits(pair: tuple[Engine, Engine], kind: str) -> None:
    """Exact and padded, for every setting: the answer, the slot's row on the device, and the books."""
    express, ordinary = pair
    for index, length in enumerate(LENGTHS):
        one = params(kind, index)
        for engine in pair:
            engine.reset_counters()
            engine.buffers.slots.words[: engine.config.max_streams] = -7
        assert fired(express, prompt(length), one) == answer(ordinary, prompt(length), one)
        assert torch.equal(*(words_that_count(engine) for engine in pair))
        assert express.dispatcher.paths == ordinary.dispatcher.paths
        assert express.dispatcher.reasons == ordinary.dispatcher.reasons
        assert (express.runner.steps, express.runner.launches) == (ordinary.runner.steps, ordinary.runner.launches)


@pytest.mark.parametrize(
    ("ids", "values"),
    [
        (prompt(49), {}),
        ((), {}),
        ((5, 509), {}),
        ((-1, 5), {}),
        ((5, 2**40), {}),
        ((5, True), {}),
        ((np.int64(5), 6), {}),
        (prompt(5), {"stop_token_ids": (9,)}),
        (prompt(5), {"logit_bias": {7: 1.0}}),
    ],
)
def test_what_goes_the_ordinary_way(pair: tuple[Engine, Engine], ids: tuple[int, ...], values: dict[str, Any]) -> None:
    """A prompt in chunks, ids that are none, stop ids and biases: not fired, and nothing was done."""
    express = pair[0]
    arm(express)
    launches, words = express.runner.launches, express.buffers.slots.words.clone()
    assert express.fire(ids, SamplingParams(max_tokens=3, **values)) is None
    assert express.runner.launches == launches and not express.busy
    assert torch.equal(express.buffers.slots.words, words)
    assert fired(express, prompt(5), params("greedy")) == answer(pair[1], prompt(5), params("greedy"))


def test_not_while_anything_else_is_there(device: torch.device) -> None:
    """Not before it is prepared, not twice, not while a request runs or waits, nor one that was cancelled."""
    engine, one = make_engine(device, SPEC), params("endless")
    assert not fire(engine, 0, prompt(4), one), "nobody has prepared it"
    arm(engine)
    assert fire(engine, 0, prompt(4), one)
    assert not fire(engine, 1, prompt(4), one), "the first runs"
    assert not engine.idle_work
    engine.cancel(0)
    assert not fire(engine, 1, prompt(4), one), "its loop may still run"
    arm(engine)
    engine.submit(Request(2, prompt(4), one))
    assert not fire(engine, 3, prompt(4), one), "somebody waits"
    finish(engine, {})
    arm(engine)
    engine.launch()
    assert not fire(engine, 4, prompt(4), one), "a launch gives the place up"
    assert_nothing_left(engine)


def test_where_there_is_no_such_way(device: torch.device) -> None:
    for settings in ({"graphs": False}, {"fused_sampling": False}, {"graph_scope": "static"}, {"max_graphs": 0}):
        engine = make_engine(device, SPEC, **settings)
        while engine.idle_work:
            engine.work_while_idle()
        assert engine.fire(prompt(4), params("greedy")) is None
        assert len(answer(engine, prompt(4), params("endless"))) == 12


def test_short_memory(device: torch.device) -> None:
    """A request that needs more pages than are there is refused by the ordinary way."""
    budget = 3 * SPEC.kv_bytes_per_token(2 if device.type == "cuda" else 4) * 16
    engine = make_engine(device, SPEC, kv_cache_memory=budget)
    arm(engine)
    assert engine.fire(prompt(30), params("greedy")) is None, "it needs three pages of two"
    assert fired(engine, prompt(20), params("endless")) == answer(engine, prompt(20), params("endless"))


@pytest.mark.parametrize("read", range(1, 10))
@pytest.mark.parametrize("ahead", [0, 3, 10**6])
def test_after_a_cancelled_loop(device: torch.device, read: int, ahead: int) -> None:
    """However far the device had come when the stream before was closed: the next one begins at its first token, and
    one that joins it at its own."""
    engine = make_engine(device, SPEC, loop_steps=4, batch_invariant=True)
    expected, other = (answer(engine, prompt(length), params("sampled")) for length in (5, 7))
    chunks: dict[int, list[TokenChunk]] = {}
    engine.submit(Request(1, prompt(9), params("endless")))
    steps_until(engine, chunks, 1, read)
    run_ahead(engine, ahead)
    engine.cancel(1)
    arm(engine)
    assert fire(engine, 2, prompt(5), params("sampled"))
    run_ahead(engine, ahead)
    engine.submit(Request(3, prompt(7), params("sampled")))
    finish(engine, chunks)
    assert bits(chunks[2]) == expected and bits(chunks[3]) == other
    assert_nothing_left(engine)


def test_graphs_that_come_and_go(device: torch.device) -> None:
    """A way that was found is forgotten with the graphs it was found among: an evicted graph is never replayed."""
    engine = make_engine(device, SPEC, rolling=True, max_graphs=6, max_streams=1, prefill_buckets=(16, 48))
    ordinary = make_engine(device, SPEC, max_streams=1, prefill_buckets=(16, 48))
    for length in (5, 5, 7, 7, 7, 9, 9, 9, 9, 5, 48, 16, 5, 5, 5, 5, 5):
        one = params("sampled", length)
        tokens = [entry[0] for entry in answer(ordinary, prompt(length), one)]
        assert [entry[0] for entry in fired(engine, prompt(length), one)] == tokens
        way, best = engine._express._ways[length], engine.dispatcher.choose(engine.runner._prompt_key(length))
        assert way.shot.decision.key == best.key, "the best graph there is, which is a better one than last time"
        arm(engine)
    assert engine.store.counters.evictions > 0


# ----------------------------------------------------------------------------------------------------------- interrupts


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("moment", ["before the launch", "after the launch", "before the books", "in the books"])
@pytest.mark.parametrize("then", ["fire", "submit"])
def test_an_interrupt(device: torch.device, monkeypatch: pytest.MonkeyPatch, moment: str, then: str) -> None:
    """Wherever it comes, the engine is ready for the next request, whichever way that takes."""
    engine = make_engine(device, SPEC)
    expected, one = answer(engine, prompt(5), params("sampled")), params("sampled")
    arm(engine)
    way = engine._express._find(5)
    assert way is not None

    def replay_and_interrupt(replay: Callable[[], None] = way.replay) -> None:
        replay()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "before the books":  # between the two calls, where nobody can catch it
            assert engine.fire(prompt(5), one) is not None
        else:
            if moment == "in the books":
                patch.setattr(engine.runner, "book", interrupted)
            else:
                replay = interrupted if moment == "before the launch" else replay_and_interrupt
                object.__setattr__(way, "replay", replay)
            with pytest.raises(KeyboardInterrupt):
                fire(engine, 0, prompt(5), one)
    chunks: dict[int, list[TokenChunk]] = {}
    engine._express._ways.clear()
    if then == "fire":
        finish(engine, chunks)
        assert fired(engine, prompt(5), one) == expected
    else:
        engine.submit(Request(1, prompt(5), one))
        finish(engine, chunks)
        assert bits(chunks[1]) == expected
    assert all(chunk.finish_reason is FinishReason.CANCELLED for chunk in chunks.get(0, ()))
    assert_nothing_left(engine)


# --------------------------------------------------------------------------------------------------- as a user meets it


@pytest.fixture(scope="module")
def llm(device: torch.device) -> Iterator[LLM]:
    settings: dict[str, Any] = {"max_model_len": 128, "prefill_buckets": (16, 32), "max_streams": 2, "max_graphs": 6}
    with LLM("tiny", rolling=False, device=str(device), **settings) as llm:
        yield llm


def test_streams_take_it(llm: LLM) -> None:
    """A stream on an idle engine, of text or of ids, gives what ``generate`` gives, which goes the ordinary way."""
    text, one = "The train leaves at nine.", SamplingParams(max_tokens=10, temperature=0.9, seed=2**64 - 1, logprobs=1)
    whole = llm.generate(text, one)[0]
    for given in (text, list(whole.prompt_token_ids), whole.prompt_token_ids, np.array(whole.prompt_token_ids)):
        llm.settle()
        assert llm._engine._express.armed
        chunks = list(llm.stream(given, one))
        assert tuple(chunk.token_id for chunk in chunks) == whole.token_ids
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert tuple(chunk.logprobs for chunk in chunks) == whole.logprobs
    assert llm.stats()["free_pages"] == llm._engine.pages.total


@pytest.mark.parametrize("given", [[], [5, 2048], [-1], [3, 4.5], [True], [3] * 128, ["a", "b"]])
def test_refusals_are_the_ordinary_ones(llm: LLM, given: Any) -> None:
    llm.settle()
    with pytest.raises(RequestError) as ordinary:
        llm.generate([given], SamplingParams(max_tokens=2))
    llm.settle()
    with pytest.raises(RequestError) as shortest:
        llm.stream(given, SamplingParams(max_tokens=2))
    assert str(shortest.value) == str(ordinary.value)
    assert len(list(llm.stream([5, 6], SamplingParams(max_tokens=2, ignore_eos=True)))) == 2
