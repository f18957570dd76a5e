"""Graphs that come and go while serving: what prompts ask for is captured when nobody waits, within the limits, and the
tokens stay what they were.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engine_cases import answer, answers, assert_nothing_left, finish, make_engine, prompt, steps_until, take

from jitgraph import LLM, SamplingParams
from jitgraph.engine.engine import Engine
from jitgraph.graphs.key import GraphKey, Path, Phase, Sampling
from jitgraph.graphs.store_records import State
from jitgraph.idle import IdleThread
from jitgraph.types import Request, TokenChunk

BUCKETS = (8, 16, 48)
LARGEST = BUCKETS[-1]
GREEDY = SamplingParams(max_tokens=3)
PATIENCE_S = 60.0
"""After which a test that waits for a thread gives up."""


def rolling(device: torch.device, **settings: Any) -> Engine:
    return make_engine(device, **{"rolling": True, "prefill_buckets": BUCKETS, "max_streams": 2, **settings})


def prefill(length: int) -> GraphKey:
    return GraphKey(Phase.PREFILL, length, Sampling.FULL)


def path_of(engine: Engine, length: int) -> Path:
    """The path that a prompt of this length takes now."""
    engine.dispatcher.reset()
    answer(engine, prompt(length), GREEDY)
    (found,) = {path for phase, path in engine.dispatcher.paths if phase is Phase.PREFILL}
    return found


def settle(engine: Engine) -> int:
    """All idle work; how many pieces it was."""
    pieces = 0
    while engine.idle_work:
        engine.work_while_idle()
        pieces += 1
        assert pieces < 100_000
    return pieces


def test_unseen_lengths_run_padded_and_become_exact(device: torch.device) -> None:
    """Below the largest bucket never eagerly; the path of a request captures nothing, whatever it asks for."""
    engine = rolling(device, max_graphs=LARGEST + 10)
    at_start = engine.store.counters.captures
    for length in range(1, LARGEST + 1):
        expected = Path.EXACT if length in BUCKETS else Path.PADDED
        assert path_of(engine, length) is expected
        assert engine.store.state(prefill(length)) is (State.READY if length in BUCKETS else State.QUEUED)
    if engine.emulated:  # on a GPU captures advance in the shadow of its steps
        assert engine.store.counters.captures == at_start
    assert settle(engine) > 0
    assert engine.store.counters.captures == at_start + LARGEST - len(BUCKETS)
    assert all(path_of(engine, length) is Path.EXACT for length in range(1, LARGEST + 1))
    assert settle(engine) <= 1 and not engine.work_while_idle(), "nothing is left but to prepare for the next prompt"
    assert engine.store.counters.captures == at_start + LARGEST - len(BUCKETS) and engine.runner.compiles == 0


def test_longer_prompts_ask_for_what_is_left_of_them(device: torch.device) -> None:
    """The whole chunks have their graph; the rest of the prompt is what is captured."""
    engine = rolling(device)
    answer(engine, prompt(2 * LARGEST + 11), GREEDY)
    assert engine.dispatcher.paths[Phase.PREFILL, Path.EXACT] == 2
    assert engine.dispatcher.paths[Phase.PREFILL, Path.PADDED] == 1
    settle(engine)
    assert engine.store.state(prefill(11)) is State.READY
    assert engine.store.state(prefill(2 * LARGEST + 11)) is State.MISSING


def test_a_fixed_set_stays_as_it_is(device: torch.device) -> None:
    engine = rolling(device, rolling=False)
    at_start = set(engine.store.ready_keys)
    for length in range(1, LARGEST, 5):
        path_of(engine, length)
        assert settle(engine) <= 1
    assert set(engine.store.ready_keys) == at_start
    assert path_of(engine, 3) is Path.PADDED


@pytest.mark.parametrize("spare", [0, 1, 4])
def test_the_limit_holds_and_tokens_stay_right(device: torch.device, spare: int) -> None:
    """Many lengths one after the other, with room for a few: never more graphs than allowed, decoding keeps all of its
    own, and no eviction changes a token."""
    kept = 2 * 2 + len(BUCKETS)
    engine = rolling(device, max_graphs=kept + spare, batch_invariant=True)
    fixed = rolling(device, rolling=False, batch_invariant=True)
    decode = {key for key in engine.store.ready_keys if key.phase is Phase.DECODE}
    assert len(decode) == 4
    sampled = SamplingParams(max_tokens=4, temperature=0.9, seed=2, logprobs=1)
    for turn in range(3):
        for length in (*range(1, LARGEST, 7), 2, 2, 9):
            ids = prompt(length, salt=turn)
            assert answer(engine, ids, sampled) == answer(fixed, ids, sampled)
            settle(engine)
            assert len(engine.store.ready_keys) <= kept + spare
            assert decode <= set(engine.store.ready_keys)
    assert engine.store.budget.most_graphs <= kept + spare
    assert engine.store.counters.evictions > 0 or spare == 0, "without room to spare the buckets are wanted more"
    assert engine.store.counters.failures == {}


def test_with_no_room_at_all_everything_runs_eagerly_and_nothing_waits(device: torch.device) -> None:
    engine = rolling(device, max_graphs=0, device_loop=False)
    assert path_of(engine, 9) is Path.EAGER
    settle(engine)
    assert engine.store.ready_keys == () and path_of(engine, 9) is Path.EAGER


def test_a_request_finds_the_engine_at_once(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever piece idle work has come to: a request runs without another piece of it, and what was begun is finished
    when it is quiet again."""
    for pieces in range(1, 30):
        engine = rolling(device)
        answers(engine, [(prompt(length), GREEDY) for length in (3, 5, 7)])
        for _ in range(pieces):
            engine.work_while_idle()
        done = 0
        advance = engine._shadow.advance

        def counted(*arguments: Any, advance: Callable[..., bool] = advance, **settings: Any) -> bool:
            nonlocal done
            done += 1
            return advance(*arguments, **settings)

        with monkeypatch.context() as patch:
            patch.setattr(engine._shadow, "advance", counted)
            chunks: dict[int, list[TokenChunk]] = {}
            engine.submit(Request(9, prompt(6), GREEDY))
            assert not engine.idle_work and not engine.work_while_idle(), "somebody is there"
            finish(engine, chunks)
            assert len(chunks[9]) == 3 and (done == 0 or not engine.emulated)
        settle(engine)
        assert all(path_of(engine, length) is Path.EXACT for length in (3, 5, 6, 7))


def test_what_a_cancelled_stream_left_behind_does_not_stop_idle_work(device: torch.device) -> None:
    """Its loop is read to the end first; then what its prompt wanted is captured."""
    engine = rolling(device)
    chunks: dict[int, list[TokenChunk]] = {}
    engine.submit(Request(0, prompt(5), SamplingParams(max_tokens=200)))
    steps_until(engine, chunks, 0, 3)
    engine.cancel(0)
    assert engine.busy and engine.idle_work
    settle(engine)
    assert not engine.busy and path_of(engine, 5) is Path.EXACT
    engine.submit(Request(1, prompt(5), SamplingParams(max_tokens=200)))
    take(engine, chunks)
    assert not engine.idle_work, "a request that runs is no idle time"
    engine.cancel(1)
    assert_nothing_left(engine)


def test_lengths_asked_for_at_start(device: torch.device) -> None:
    engine = rolling(device, precapture_lengths="1-3, 11, buckets")
    assert {key.tokens for key in engine.store.ready_keys if key.phase is Phase.PREFILL} == {1, 2, 3, 11, *BUCKETS}
    assert all(path_of(engine, length) is Path.EXACT for length in (1, 2, 3, 11, 48))
    assert settle(engine) <= 1


# --------------------------------------------------------------------------------------------------- as a user meets it


@pytest.fixture(scope="module")
def llm(device: torch.device) -> Iterator[LLM]:
    settings: dict[str, Any] = {"max_model_len": 256, "prefill_buckets": (8, 32), "max_streams": 2, "max_graphs": 12}
    with LLM("tiny", device=str(device), **settings) as llm:
        yield llm


def test_settle(llm: LLM) -> None:
    """New lengths run padded, then exact, with the tokens of before; the statistics tell."""
    prompts = [list(range(5, 5 + length)) for length in (3, 13)]
    llm.reset_stats()
    before = llm.generate(prompts, SamplingParams(max_tokens=6))
    assert llm.stats()["prefill_paths"] == {"padded": 2}
    assert llm.settle()
    stats = llm.stats()
    assert stats["ready_graphs"] == 8 and stats["captures"] == 8 and stats["evictions"] == 0
    llm.reset_stats()
    after = llm.generate(prompts, SamplingParams(max_tokens=6))
    assert llm.stats()["prefill_paths"] == {"exact": 2}
    assert [output.token_ids for output in after] == [output.token_ids for output in before]
    assert llm.settle(), "nothing left"


def test_settle_after_a_stream_was_closed(llm: LLM) -> None:
    with llm.stream(list(range(7)), SamplingParams(max_tokens=100)) as stream:
        next(stream)
    assert llm.settle()
    assert not llm._engine.busy and llm._engine.store.state(prefill(7)) is State.READY


def test_settle_gives_up_in_time(llm: LLM) -> None:
    assert not llm.settle(timeout_s=0.0)


def test_the_idle_thread_does_it_unasked(llm: LLM) -> None:
    """Nobody calls anything after the request; the graph comes all the same, and a request meanwhile is served."""
    quiet = threading.Event()
    llm.generate([list(range(11))], SamplingParams(max_tokens=2))
    for _ in range(int(PATIENCE_S / 0.01)):
        with llm._lock:
            if llm._engine.store.state(prefill(11)) is State.READY:
                return
        quiet.wait(0.01)
    raise AssertionError("the idle thread has not captured what was asked for")


def test_a_request_waits_for_one_piece_at_most(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The idle thread is held in the middle of a piece, a request comes: it is next, before any other piece."""
    settings: dict[str, Any] = {"max_model_len": 64, "prefill_buckets": (16,), "max_streams": 1, "device": str(device)}
    with LLM("tiny", **settings) as llm:
        engine, log, answered = llm._engine, list[str](), list[tuple[int, ...]]()
        in_piece, go_on = threading.Event(), threading.Event()
        work, step = engine.work_while_idle, engine.step

        def held() -> bool:
            log.append("piece")
            in_piece.set()
            assert go_on.wait(PATIENCE_S)
            return work()

        def noted() -> list[TokenChunk]:
            log.append("step")
            return step()

        monkeypatch.setattr(engine, "work_while_idle", held)
        monkeypatch.setattr(engine, "step", noted)
        expected = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4))[0].token_ids
        assert in_piece.wait(PATIENCE_S), "the idle thread begins by itself"
        log.clear()

        def ask() -> None:
            answered.append(llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4))[0].token_ids)

        asking = threading.Thread(target=ask)
        asking.start()
        while not llm._lock._waiting:
            assert asking.is_alive()
        go_on.set()
        asking.join(PATIENCE_S)
        assert answered == [expected]
        last = len(log) - log[::-1].index("step")
        assert "piece" not in log[:last] and log[:last].count("step") >= 4


# ------------------------------------------------------------------------------------------------------ the idle thread


class Owner:
    """Has so many pieces of work."""

    def __init__(self, pieces: int) -> None:
        self.left, self.done = pieces, threading.Event()
        self.thread = IdleThread(self.work)

    def work(self) -> bool:
        self.left -= 1
        if self.left <= 0:
            self.done.set()
        return self.left > 0


def test_the_idle_thread_works_until_there_is_no_more() -> None:
    owner = Owner(5)
    assert owner.thread._thread is None, "no thread before there is anything to do"
    for _ in range(3):
        owner.thread.wake()
        assert owner.done.wait(PATIENCE_S)
        owner.left, owner.done = 5, threading.Event()
    owner.thread.stop()
    thread = owner.thread._thread
    assert thread is not None and thread.daemon
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    owner.thread.wake()
    assert not thread.is_alive() and owner.thread._thread is thread, "stopped for good"


def test_the_idle_thread_keeps_nobody_alive() -> None:
    owner = Owner(1)
    owner.thread.wake()
    assert owner.done.wait(PATIENCE_S)
    idle = owner.thread
    thread = idle._thread
    assert thread is not None
    del owner
    idle.wake()
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "its owner is gone, and so is the thread"
