"""The engine process's loop over an engine that counts: who is answered, refused, withdrawn or sent away, and that
nothing is left.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from service_cases import (
    FACTS,
    PATIENCE_S,
    VOCABULARY,
    Counting,
    Served,
    Talk,
    counted,
    serving,
    small_buffers,
    submission,
    wait_for,
)

from jitgraph.engine import service_hub
from jitgraph.engine.service_client import Client
from jitgraph.engine.service_figures import Figures
from jitgraph.engine.service_needs import Limits
from jitgraph.engine.service_practice import EVERY_S
from jitgraph.engine.service_requests import Requests
from jitgraph.errors import CompileError, DeviceError, RequestError
from jitgraph.ipc.frames import encode
from jitgraph.ipc.messages import (
    PROTOCOL,
    AskStats,
    Beat,
    Cancel,
    Drain,
    Goodbye,
    Grammar,
    Hello,
    Refused,
    Submit,
    Tokens,
    Welcome,
    WireLogprobs,
    pack_ids,
    pack_params,
)
from jitgraph.types import FinishReason, SamplingParams, TokenChunk, TokenLogprobs


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path) as served:
        yield served


def gated(**options: Any) -> Counting:
    """An engine whose steps wait for ``gate.release``."""
    return Counting(gate=threading.Semaphore(0), **options)


# -------------------------------------------------------------------------------------------------------------- answers


def test_a_request_is_answered_by_the_shortest_way(served: Served) -> None:
    talk = served.talk()
    wait_for(lambda: served.engine.armed, "an idle engine prepares itself")
    before = time.perf_counter_ns()
    talk.submit(7, [3, 4, 5], max_tokens=4)
    first = talk.until(Tokens)
    assert first.request_id == 7 and first.token_ids == (12,) and first.finish_reason is None
    assert before < first.received_ns <= first.launched_ns <= first.times_ns[0] < time.perf_counter_ns()
    assert talk.answer(7) == ([13, 14, 15], "length")
    assert served.engine.fired == [12] and len(served.engine.booked) == 1


def test_later_tokens_carry_no_times_of_the_start(served: Served) -> None:
    talk = served.talk()
    talk.submit(1, [1], max_tokens=3)
    records = [talk.until(Tokens) for _ in range(3)]
    assert records[0].received_ns and records[0].launched_ns
    assert [(one.received_ns, one.launched_ns) for one in records[1:]] == [(0, 0)] * 2


def test_first_and_last_go_ahead_of_the_books_and_once(tmp_path: Path) -> None:
    """An engine that fails over its books disturbs nobody who has had everything."""
    engine = Counting(foresees=True)
    with serving(tmp_path, engine) as served:
        talk = served.talk()
        for tokens in (1, 2, 9):
            talk.submit(1, [5, 6], max_tokens=tokens)
            assert talk.answer(1) == (counted([5, 6], tokens), "length")
        assert engine.foreseen == 1 + 2 + 2
        engine.fails_after_last = True
        talk.submit(2, [5, 6], max_tokens=3)
        assert talk.answer(2) == (counted([5, 6], 3), "length")
        talk.submit(3, [7], max_tokens=2)
        assert talk.answer(3) == (counted([7], 2), "length")
        assert talk.stats()["engine_errors"] == {"RuntimeError": 1}


def test_several_clients_use_the_same_ids(served: Served) -> None:
    talks = [served.talk() for _ in range(5)]
    for number, talk in enumerate(talks):
        talk.submit(1, [10 * number], max_tokens=6)
        talk.submit(2, [10 * number, 1], max_tokens=3)
    for number, talk in enumerate(talks):
        assert talk.answer(1) == (counted([10 * number], 6), "length")
        assert talk.answer(2) == (counted([10 * number, 1], 3), "length")


def test_a_waiting_request_says_when_it_was_launched(tmp_path: Path) -> None:
    with serving(tmp_path, gated()) as served:
        talk = served.talk()
        for number in range(3):
            talk.submit(number, [number], max_tokens=1)
        wait_for(lambda: len(served.engine.running) == 2 and served.engine.waiting, "two run, one waits")
        opened = time.perf_counter_ns()
        served.engine.gate.release(3)
        records = sorted((talk.until(Tokens) for _ in range(3)), key=lambda one: one.request_id)
        assert all(one.received_ns < opened for one in records)
        assert records[0].launched_ns < opened and records[1].launched_ns < opened < records[2].launched_ns


def test_everything_asked_for_reaches_the_engine(served: Served) -> None:
    talk = served.talk()
    wanted = SamplingParams(max_tokens=1, temperature=0.5, seed=2**63, stop=("x",), logit_bias={3: 1.5}, logprobs=2)
    grammar = Grammar("regex", "a+")
    talk.say(Submit(1, pack_ids([5]), pack_params(wanted), salt="a", prompt_logprobs=3, grammar=grammar))
    assert talk.answer(1)[1] == "length"
    assert served.engine.fired == [], "the shortest way can do neither"
    (request,) = served.engine.validated
    assert (request.params, request.salt, request.prompt_logprobs) == (wanted, "a", 3)
    assert request.grammar is not None and (request.grammar.kind, request.grammar.source) == ("regex", "a+")


def test_log_probabilities_come_as_they_are(tmp_path: Path) -> None:
    one = TokenLogprobs(7, -0.5, ((7, -0.5), (8, -1.5)))

    class Telling(Counting):
        def step(self) -> list[TokenChunk]:
            return [chunk._replace(logprobs=one, prompt_logprobs=(None, one)) for chunk in super().step()]

    with serving(tmp_path, Telling()) as served:
        talk = served.talk()
        talk.submit(1, [1], max_tokens=2)
        first, second = talk.until(Tokens), talk.until(Tokens)
        wire = WireLogprobs(7, -0.5, ((7, -0.5), (8, -1.5)))
        assert first.logprobs == second.logprobs == (wire,)
        assert first.prompt_logprobs == (None, wire) and second.prompt_logprobs is None


def test_an_answer_too_large_for_a_frame_ends_its_request_alone(tmp_path: Path) -> None:
    class Telling(Counting):
        def step(self) -> list[TokenChunk]:
            top = tuple((1, 0.5) for _ in range(20))
            return [
                chunk._replace(prompt_logprobs=(TokenLogprobs(1, 0.5, top),) * 80_000) if not made else chunk
                for chunk in super().step()
                for made in [chunk.request_id != 1]
            ]

    with serving(tmp_path, Telling()) as served:
        talk = served.talk()
        talk.submit(1, [1], max_tokens=2)
        refused = talk.until(Refused)
        assert refused.kind == "request" and "bytes" in refused.message
        talk.submit(2, [1], max_tokens=2)
        assert talk.answer(2) == (counted([1], 2), "length")


class Compiling:
    """A compiler of grammars that waits to be told. The source says what comes of it."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Compiling.One, Any]] = []

    class One:
        def __init__(self, source: str) -> None:
            self.source = source
            self.done = source == "known"

        def result(self) -> object:
            if self.source == "wrong":
                raise RequestError("the grammar does not compile")
            return object()

    def start(self, grammar: Any, on_done: Any) -> Compiling.One:
        one = Compiling.One(grammar.source)
        self.waiting.append((one, on_done))
        return one

    def finish(self) -> None:
        for one, on_done in self.waiting:
            one.done = True
            on_done()


def test_grammars_are_compiled_while_others_are_served(tmp_path: Path) -> None:
    grammars = Compiling()
    with serving(tmp_path, grammars=grammars) as served:
        talk, leaver = served.talk(), served.talk()

        def ask(to: Talk, number: int, source: str) -> None:
            grammar = Grammar("regex", source)
            to.say(Submit(number, pack_ids([number]), pack_params(SamplingParams(max_tokens=2)), grammar=grammar))

        ask(talk, 1, "right")
        ask(talk, 2, "wrong")
        ask(talk, 3, "withdrawn")
        ask(leaver, 4, "left")
        ask(talk, 5, "known")
        assert talk.answer(5) == (counted([5], 2), "length"), "what is known needs not wait"
        talk.submit(6, [6], max_tokens=2)
        assert talk.answer(6) == (counted([6], 2), "length"), "nor does what has none"
        talk.say(Cancel(3))
        assert talk.answer(3) == ([], "cancelled")
        leaver.close()
        wait_for(lambda: len(served.hub.clients) == 1, "one has left")
        grammars.finish()
        assert talk.answer(2) == ([], "refused request")
        assert talk.answer(1) == (counted([1], 2), "length")
        assert [request.prompt_token_ids for request in served.engine.validated[-1:]] == [(1,)]


# ------------------------------------------------------------------------------------------------------------- refusals


def params(**values: Any) -> msgspec.Raw:
    return msgspec.Raw(msgspec.msgpack.encode(values))


GOOD = pack_params(SamplingParams(max_tokens=2))
WRONG = {
    "no ids": (Submit(1, b"", GOOD), "request", "empty"),
    "half an id": (Submit(1, b"\0" * 5, GOOD), "request", "5 bytes"),
    "an id out of the vocabulary": (submission(1, [VOCABULARY]), "request", "vocabulary"),
    "a prompt over the context": (submission(1, [1] * 512), "request", "512 tokens"),
    "more than the cache holds": (submission(1, [1], max_tokens=401), "capacity", "cache"),
    "an unknown parameter": (Submit(1, pack_ids([1]), params(max_tokens=2, beams=4)), "request", "beams"),
    "a value out of its range": (Submit(1, pack_ids([1]), params(temperature=-1.0)), "request", "temperature"),
    "a value of another type": (Submit(1, pack_ids([1]), params(max_tokens="2")), "request", "max_tokens"),
    "no map": (Submit(1, pack_ids([1]), msgspec.Raw(msgspec.msgpack.encode([1]))), "request", "parameters"),
    "no msgpack": (Submit(1, pack_ids([1]), msgspec.Raw(b"\xc1")), None, ""),
    "not a number": (Submit(1, pack_ids([1]), params(top_p=math.nan)), "request", "top_p"),
    "a map as a key": (Submit(1, pack_ids([1]), msgspec.Raw(b"\x81\x80\x01")), "request", ""),
    "a long salt": (Submit(1, pack_ids([1]), GOOD, salt="x" * 5000), "request", "salt"),
    "time below zero": (submission(1, [1], timeout_s=-1.0), "request", "timeout_s"),
    "no time at all": (submission(1, [1], timeout_s=math.nan), "request", "timeout_s"),
    "time for ever": (submission(1, [1], timeout_s=math.inf), "request", "timeout_s"),
    "an unknown grammar": (Submit(1, pack_ids([1]), GOOD, grammar=Grammar("poem")), "request", "grammar"),
    "too many prompt logprobs": (Submit(1, pack_ids([1]), GOOD, prompt_logprobs=21), "request", "prompt_logprobs"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_run_is_refused_and_nothing_else_happens(served: Served, name: str) -> None:
    record, kind, words = WRONG[name]
    talk, other = served.talk(), served.talk()
    talk.say(record)
    if kind is None:  # not even a record
        assert isinstance(talk.closed()[-1], Goodbye)
    else:
        refused = talk.until(Refused)
        assert (refused.request_id, refused.kind) == (1, kind) and words in refused.message
        talk.submit(1, [5], max_tokens=2)
        assert talk.answer(1) == (counted([5], 2), "length"), "the id is free, and the connection as good as before"
    other.submit(1, [6], max_tokens=2)
    assert other.answer(1) == (counted([6], 2), "length")


def test_an_id_in_use_is_refused_and_its_request_runs_on(tmp_path: Path) -> None:
    with serving(tmp_path, gated()) as served:
        talk = served.talk()
        talk.submit(1, [5], max_tokens=3)
        talk.submit(1, [6], max_tokens=3)
        refused = talk.until(Refused)
        assert refused.kind == "request" and "in use" in refused.message
        served.engine.gate.release(3)
        assert talk.answer(1) == (counted([5], 3), "length")


def test_the_queue_has_an_end(tmp_path: Path) -> None:
    with serving(tmp_path, gated(), max_queued=3) as served:
        talk = served.talk()
        for number in range(7):
            talk.submit(number, [number], max_tokens=1)
        refused = [talk.until(Refused) for _ in range(2)]
        assert [one.request_id for one in refused] == [5, 6] and {one.kind for one in refused} == {"overloaded"}
        assert all(0.1 <= one.retry_after_s <= 60.0 for one in refused)
        served.engine.gate.release(5)
        for number in range(5):
            assert talk.answer(number) == (counted([number], 1), "length")
        talk.submit(9, [9], max_tokens=1)
        served.engine.gate.release()
        assert talk.answer(9) == (counted([9], 1), "length")
        assert talk.stats()["requests"] == {"length": 6, "refused_overloaded": 2}


# --------------------------------------------------------------------------------------------------------- cancellation


def test_cancelled_requests_end_at_once(tmp_path: Path) -> None:
    with serving(tmp_path, gated()) as served:
        talk = served.talk()
        for number in range(3):
            talk.submit(number, [number], max_tokens=50)
        wait_for(lambda: len(served.engine.running) == 2 and served.engine.waiting, "two run, one waits")
        talk.say(Cancel(2), Cancel(0), Cancel(77))
        assert talk.answer(2) == ([], "cancelled") and talk.answer(0) == ([], "cancelled")
        wait_for(lambda: served.engine.pages == 1, "the page comes back")
        talk.say(Cancel(0))
        talk.submit(0, [9], max_tokens=2)
        served.engine.gate.release(60)
        assert talk.answer(0) == (counted([9], 2), "length"), "nothing of the first request with this id is left"
        assert talk.answer(1)[1] == "length"


# ------------------------------------------------------------------------------------------------------------ deadlines


def test_time_that_is_over_ends_what_waits_and_what_runs(tmp_path: Path) -> None:
    with serving(tmp_path, gated()) as served:
        talk = served.talk()
        served.engine.gate.release(1)
        talk.submit(0, [5], max_tokens=50, timeout_s=0.2)
        assert talk.until(Tokens).token_ids == (5,)
        talk.submit(1, [1], max_tokens=50)
        talk.submit(2, [2], max_tokens=50, timeout_s=0.2)
        refused = {one.request_id: one for one in (talk.until(Refused) for _ in range(2))}
        assert set(refused) == {0, 2} and {one.kind for one in refused.values()} == {"deadline"}
        assert "0.2 s" in refused[0].message and "in part" in refused[0].message
        assert "first token" in refused[2].message
        wait_for(lambda: served.engine.pages == 1, "the page is free again")
        talk.submit(0, [9], max_tokens=1)
        served.engine.gate.release(60)
        assert talk.answer(0) == (counted([9], 1), "length"), "the id may be used again"
        assert talk.answer(1) == (counted([1], 50), "length"), "nobody else is disturbed"
        assert talk.stats()["requests"] == {"length": 2, "refused_deadline": 2}


def test_time_enough_changes_nothing_and_leaves_nothing(served: Served) -> None:
    talk = served.talk()
    for number in range(1500):
        talk.submit(number, [number % 9], max_tokens=1, timeout_s=10_000.0)
        assert talk.answer(number) == (counted([number % 9], 1), "length")
    assert len(served.service._requests._deadlines) < 600, "what has ended is sorted out"


def test_a_grammar_that_takes_too_long_is_not_waited_for(tmp_path: Path) -> None:
    """The engine itself is idle meanwhile."""
    grammars = Compiling()
    with serving(tmp_path, grammars=grammars) as served:
        talk = served.talk()
        plain = submission(1, [1], max_tokens=3, timeout_s=0.1)
        talk.say(msgspec.structs.replace(plain, grammar=Grammar("regex", "slow")))
        refused = talk.until(Refused)
        assert (refused.request_id, refused.kind) == (1, "deadline")
        assert not served.engine.validated
        grammars.finish()
        assert talk.stats()["requests"] == {"refused_deadline": 1} and not served.engine.validated


@pytest.mark.parametrize("lost", [True, False])
def test_who_is_lost_over_the_last_frame_is_counted_once(lost: bool) -> None:
    engine, figures = Counting(), Figures()
    client: Any = Client(mock.Mock(), 1)
    hub: Any = SimpleNamespace(send_owned=lambda one, _: books.left(one) if lost else None, most_unsent=100)
    books = Requests(engine, hub, Limits(2, 100, None), figures, lambda error: None)
    books.submit(client, submission(1, [1], max_tokens=1))
    books.deliver(engine.step())
    assert figures.outcomes == ({"abandoned": 1} if lost else {"length": 1}) and not len(books)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.booleans()), max_size=40), st.integers(0, 60))
def test_exactly_those_whose_time_is_over_end(requests: list[tuple[int, bool]], now: int) -> None:
    """(Seconds given, whether it has ended by itself); all of them come at second 0."""
    engine = Counting()
    client: Any = Client(mock.Mock(), 1)
    sent: list[Any] = []
    hub: Any = SimpleNamespace(send=lambda _, record: sent.append(record), most_unsent=100)
    books = Requests(engine, hub, Limits(2, 100, None), Figures(), lambda error: None)
    with mock.patch("jitgraph.engine.service_requests.time.monotonic", lambda: 0.0):
        for number, (seconds, _) in enumerate(requests):
            books.submit(client, submission(number, [1], max_tokens=5, timeout_s=seconds))
    for number, (_, ended) in enumerate(requests):
        if ended:
            books.cancel(client, number)
    sent.clear()
    late = [n for n, (seconds, ended) in enumerate(requests) if not ended and seconds <= now]
    assert not late or books.next_deadline_s <= now
    books.expire(now)
    assert sorted(record.request_id for record in sent) == late
    assert len(books) == sum(not ended for _, ended in requests) - len(late)
    assert books.next_deadline_s > now


def test_a_client_that_goes_takes_its_requests_along(tmp_path: Path) -> None:
    with serving(tmp_path, gated()) as served:
        leaver, other = served.talk(), served.talk()
        for number in range(4):
            leaver.submit(number, [number], max_tokens=50)
        other.submit(0, [8], max_tokens=2)
        wait_for(lambda: len(served.engine.waiting) == 3, "two run, three wait")
        leaver.close()
        wait_for(lambda: len(served.engine.running) + len(served.engine.waiting) == 1, "they are withdrawn")
        served.engine.gate.release(2)
        assert other.answer(0) == (counted([8], 2), "length")
        assert other.settled().free_pages == 2
        assert other.stats()["requests"] == {"abandoned": 4, "length": 1}


def test_ten_thousand_cancels_leave_nothing(served: Served) -> None:
    talk = served.talk()
    for batch in range(200):
        records: list[Any] = []
        for number in range(50):
            records += [submission(number, [batch, number], max_tokens=400), Cancel(number)]
        talk.say(*records)
        ends = 0
        while ends < 50:
            record = talk.until(Tokens)
            ends += record.finish_reason is not None
            assert record.finish_reason in (None, "cancelled")
    beat = talk.settled()
    assert beat.free_pages == beat.total_pages == 2
    requests = served.service._requests
    assert not requests._live and not any(client.requests for client in served.hub.clients)
    talk.submit(1, [3], max_tokens=2)
    assert talk.answer(1) == (counted([3], 2), "length")
    assert not requests.unlaunched and talk.stats()["requests"] == {"cancelled": 10_000, "length": 1}


# ------------------------------------------------------------------------------------------------------- bad neighbours


def frame(payload: bytes) -> bytes:
    return len(payload).to_bytes(4, "little") + payload


RUBBISH = {
    "a frame without end": (2**32 - 1).to_bytes(4, "little"),
    "no msgpack": frame(b"\xc1"),
    "an unknown record": frame(msgspec.msgpack.encode({"type": "Reboot"})),
    "a field too many": frame(msgspec.msgpack.encode({"type": "Cancel", "request_id": 1, "now": True})),
    "deep nesting": frame(b"\x91" * 5000),
    "an engine's record": frame(msgspec.msgpack.encode({"type": "Beat"})),
    "hello again": encode(Hello(PROTOCOL, "again")),
    "a drain without a time": encode(Drain(math.nan)),
    "a drain before now": encode(Drain(-1.0)),
    "a drain for ever": encode(Drain(math.inf)),
}


@pytest.mark.parametrize("name", RUBBISH)
def test_rubbish_closes_its_own_connection_alone(tmp_path: Path, name: str) -> None:
    with serving(tmp_path, gated()) as served:
        bad, good = served.talk(), served.talk()
        bad.submit(1, [1], max_tokens=100)
        good.submit(1, [2], max_tokens=3)
        bad.socket.sendall(RUBBISH[name])
        last = bad.closed()[-1]
        assert isinstance(last, Goodbye) and last.reason
        served.engine.gate.release(3)
        assert good.answer(1) == (counted([2], 3), "length")
        assert good.settled().free_pages == 2, "what the bad one had running is withdrawn"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (Hello(PROTOCOL + 1, "new"), f"version {PROTOCOL + 1}"),
        (AskStats(), "Hello"),
        (submission(1, [1]), "Hello"),
    ],
)
def test_the_first_record_is_hello_in_the_same_version(served: Served, record: Any, words: str) -> None:
    talk = Talk(served.path, hello=False)
    talk.say(record)
    (goodbye,) = talk.closed()
    assert isinstance(goodbye, Goodbye) and words in goodbye.reason
    talk.close()


def test_who_comes_when_the_engine_is_ready_is_told_at_once(served: Served) -> None:
    talk = served.talk(ready=False)
    welcome = talk.read()
    assert isinstance(welcome, Welcome) and welcome.facts == FACTS and welcome.version == PROTOCOL
    assert talk.ready().phases_s == {"load": 1.0}
    assert talk.until(Beat).total_pages == 2


def test_a_slow_reader_loses_its_connection_and_stalls_nobody(tmp_path: Path) -> None:
    with serving(tmp_path, most_unsent=20_000) as served:
        slow, other = served.talk(), served.talk()
        small_buffers(slow)
        slow.submit(1, [1], max_tokens=400)
        for number in range(3000):
            try:
                slow.say(AskStats())
            except OSError:
                break
            if number % 500 == 0:
                other.submit(number, [number % 7], max_tokens=3)
                assert other.answer(number) == (counted([number % 7], 3), "length")
        wait_for(lambda: len(served.hub.clients) == 1, "the slow reader is given up")
        assert other.settled().free_pages == 2
        last = slow.closed()[-1]
        assert isinstance(last, Goodbye) and "20000 bytes unread" in last.reason, "and told so, once it reads"
        slow.close()
        wait_for(lambda: not served.hub._parting, "nothing is left of it")


def test_who_is_sent_away_while_sending_hears_why(tmp_path: Path) -> None:
    """The engine must not close a connection with something unread in it: that resets it, whatever was said before."""
    with serving(tmp_path) as served:
        talk = served.talk()
        talk.say(Hello(PROTOCOL, "again"))
        for number in range(2000):
            talk.submit(number, [1] * 50, max_tokens=1)  # into a connection that is closing, and never refused
        records = []
        with contextlib.suppress(EOFError):
            while True:
                data = talk.socket.recv(2**16)  # not ``Talk.read``, which takes a reset for an end
                if not data:
                    break
                records += talk._framer.feed(data)
        assert isinstance(records[-1], Goodbye) and "Hello comes once" in records[-1].reason
        assert not any(isinstance(record, Tokens) for record in records), "nothing of it was heard"


def test_who_was_sent_away_and_does_not_read_is_closed(
    hub: service_hub.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talks = [joined(hub, tmp_path / "hub.sock", f"number {n}") for n in range(5)]
    monkeypatch.setattr(service_hub, "MAX_CLIENTS", 3)
    for client in hub.clients:
        hub.dismiss(client, "the test wants it")
        hub.dismiss(client, "twice does no harm")
    assert hub.handler.gone == [f"number {n}" for n in range(5)]
    assert len(hub._parting) == 3, "a flood of them takes no more places than clients do"
    hub.tick()
    assert len(hub._parting) == 3
    for client in hub._parting.values():
        client.until_s = 0.0
    hub.tick()
    assert not hub._parting and not hub.clients
    assert all(talk.closed()[-1] == Goodbye("the test wants it") for talk in talks)


def test_the_end_is_told_to_who_is_sending(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    hub = service_hub.Hub(service_hub.Listener(tmp_path / "hub.sock"))
    hub.handler = Listening()
    talk = joined(hub, tmp_path / "hub.sock", "busy")
    talk.say(*(Cancel(number) for number in range(5000)))
    hub.close("the end")
    received = bytearray()
    while data := talk.socket.recv(2**16):  # a reset would raise
        received += data
    assert list(talk._framer.feed(bytes(received)))[-1] == Goodbye("the end")


def test_any_signal_wakes_the_hub_whichever_thread_gets_it(hub: service_hub.Hub) -> None:
    """The kernel may hand a signal to any thread; Python's handler runs in the main one, which waits in the poller."""
    caught: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: caught.append(number))
    hub.wake_on_signals()

    def interrupt() -> None:
        time.sleep(0.05)
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

    thread = threading.Thread(target=interrupt)
    try:
        begun = time.monotonic()
        thread.start()
        hub.look(PATIENCE_S)
        assert time.monotonic() - begun < PATIENCE_S / 2, "it slept on"
        assert caught == [signal.SIGUSR1]
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, before)
    hub.close("the test is over")
    assert signal.set_wakeup_fd(-1) == -1, "the process is left as it was"


def test_a_reader_that_is_late_gets_everything(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        late, other = served.talk(), served.talk()
        small_buffers(late)
        for number in range(20):
            late.submit(number, [number], max_tokens=200)
        other.submit(1, [1], max_tokens=1)
        assert other.answer(1)[1] == "length", "by now the others have ended: first come, first served"
        ends, ids = 0, 0
        while ends < 20:
            record = late.until(Tokens)
            ids += len(record.token_ids)
            ends += record.finish_reason is not None
        assert ids == 20 * 200


class Listening:
    """Notes who said what, in order."""

    facts = None

    def __init__(self) -> None:
        self.heard: list[tuple[str, int]] = []
        self.gone: list[str] = []

    def joined(self, client: service_hub.Client) -> None: ...

    def hear(self, client: service_hub.Client, record: Any) -> None:
        self.heard.append((client.name, record.request_id))

    def left(self, client: service_hub.Client) -> None:
        self.gone.append(client.name)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[service_hub.Hub]:
    tmp_path.chmod(0o700)
    hub = service_hub.Hub(service_hub.Listener(tmp_path / "hub.sock"))
    hub.handler = Listening()
    yield hub
    hub.close("the test is over")
    hub.close("twice does no harm")
    hub.wake()


def joined(hub: service_hub.Hub, path: Path, name: str) -> Talk:
    talk = Talk(path, hello=False)
    talk.say(Hello(PROTOCOL, name))
    for _ in range(3):
        hub.look(0.1)
    return talk


def test_a_flood_is_handled_in_turns(hub: service_hub.Hub, tmp_path: Path) -> None:
    loud, quiet = (joined(hub, tmp_path / "hub.sock", name) for name in ("loud", "quiet"))
    loud.say(*(Cancel(number) for number in range(1000)))
    quiet.say(Cancel(1))
    hub.look(0.1)
    heard = hub.handler.heard
    assert ("quiet", 1) in heard and len(heard) <= 2 * service_hub.RECORDS_A_LOOK + 1
    for _ in range(100):
        hub.look(0.0)
    assert [number for name, number in heard if name == "loud"] == list(range(1000)), "all of it, in order"
    loud.say(*(Cancel(number) for number in range(1000)))
    hub.look(0.1)
    loud.close()
    for _ in range(100):
        hub.look(0.0)
    assert hub.handler.gone == ["loud"] and not hub._behind


def test_silent_connections_are_closed_and_too_many_are_sent_away(
    hub: service_hub.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "hub.sock"
    monkeypatch.setattr(service_hub, "MAX_CLIENTS", 3)
    talks = [Talk(path, hello=False) for _ in range(4)]
    for _ in range(6):
        hub.look(0.05)
    assert "3 clients" in talks[3].closed()[-1].reason
    hub.tick()
    assert len(hub._clients) == 3
    monkeypatch.setattr(service_hub, "HELLO_S", 0.0)
    hub.tick()
    assert all("Hello" in talk.closed()[-1].reason for talk in talks[:3]) and not hub._clients


def test_without_file_descriptors_the_queue_waits(
    hub: service_hub.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Talk(tmp_path / "hub.sock")
    with monkeypatch.context() as patch:
        patch.setattr(hub.listener, "accept", lambda _: (_ for _ in ()).throw(OSError(24, "too many open files")))
        for _ in range(3):
            hub.look(0.0)
    monkeypatch.setattr(service_hub, "_ACCEPT_AGAIN_S", 0.0)
    hub._accept_again_s = 0.0
    hub.tick()
    for _ in range(3):
        hub.look(0.1)
    assert isinstance(talk.read(), Welcome)


def test_the_socket_of_a_successor_stays(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    path = tmp_path / "e.sock"
    first = service_hub.Listener(path)
    path.rename(tmp_path / "moved")
    second = service_hub.Listener(path)
    first.close()
    assert path.exists(), "it belongs to another engine now"
    second.close()
    second.close()
    assert not path.exists()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.one_of(
        st.binary(max_size=300),
        st.binary(max_size=80).map(frame),
        st.tuples(st.integers(0, 60), st.integers(0, 255)).map(
            lambda at: bytes(
                byte ^ at[1] if index == at[0] else byte
                for index, byte in enumerate(encode(submission(1, [1, 2], max_tokens=2)))
            )
        ),
    )
)
def test_no_bytes_disturb_the_others(fuzzed: tuple[Served, Talk], data: bytes) -> None:
    served, good = fuzzed
    bad = Talk(served.path)
    bad.socket.sendall(data)
    bad.close()
    good.submit(1, [4, 4], max_tokens=2)
    assert good.answer(1) == (counted([4, 4], 2), "length")


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Talk]]:
    with serving(tmp_path_factory.mktemp("fuzz"), max_queued=10_000) as served:
        yield served, served.talk()


# ---------------------------------------------------------------------------------------------------------------- drain


def test_a_drain_lets_the_running_ones_finish(tmp_path: Path) -> None:
    with serving(tmp_path, gated()) as served:
        talk, other = served.talk(), served.talk()
        for number in range(3):
            talk.submit(number, [number], max_tokens=4)
        wait_for(lambda: served.engine.waiting, "one waits")
        other.say(Drain(PATIENCE_S))
        wait_for(lambda: served.service.draining, "the drain is heard")
        other.submit(5, [5])
        assert other.answer(5) == ([], "refused draining")
        served.engine.gate.release(8)
        for number in range(3):
            assert talk.answer(number) == (counted([number], 4), "length")
        assert served.ended() is None
        assert isinstance(talk.closed()[-1], Goodbye) and isinstance(other.closed()[-1], Goodbye)


def test_a_drain_ends_when_its_time_is_over(tmp_path: Path) -> None:
    with serving(tmp_path, gated()) as served:
        talk = served.talk()
        talk.submit(1, [1], max_tokens=4)
        talk.submit(2, [2], max_tokens=4)
        wait_for(lambda: len(served.engine.running) == 2, "both run")
        talk.say(Drain(0.05))
        assert served.ended() is None
        records = [record for record in talk.closed() if not isinstance(record, Beat)]
        assert [(one.request_id, one.kind) for one in records[:-1]] == [(1, "draining"), (2, "draining")]
        assert isinstance(records[-1], Goodbye)


def test_a_second_drain_can_only_come_earlier(tmp_path: Path) -> None:
    with serving(tmp_path, gated()) as served:
        talk = served.talk()
        talk.submit(1, [1], max_tokens=4)
        talk.say(Drain(PATIENCE_S))
        wait_for(lambda: served.service.draining, "the drain is heard")
        talk.say(Drain(0.0))
        assert served.ended() is None


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("error", [RuntimeError("odd"), CompileError("strict"), MemoryError()])
def test_an_engine_that_recovers_goes_on(tmp_path: Path, error: Exception) -> None:
    with serving(tmp_path, gated()) as served:
        talk = served.talk()
        for number in range(3):
            talk.submit(number, [number], max_tokens=4)
        wait_for(lambda: served.engine.waiting, "two run, one waits")
        served.engine.errors.append(error)
        served.engine.gate.release()
        for number in range(3):
            assert talk.answer(number) == ([], "refused internal")
        served.engine.gate.release(4)
        talk.submit(1, [9], max_tokens=4)
        assert talk.answer(1) == (counted([9], 4), "length")
        stats = talk.stats()
        assert stats["engine_errors"] == {type(error).__name__: 1} and stats["requests"]["refused_internal"] == 3


def test_an_engine_that_is_lost_ends_the_process(tmp_path: Path) -> None:
    with serving(tmp_path, Counting()) as served:
        served.engine.errors.append(DeviceError("the GPU failed"))
        talk = served.talk()
        talk.submit(1, [1], max_tokens=4)
        last = talk.closed()[-1]
        assert isinstance(last, Goodbye) and "the GPU failed" in last.reason
        assert "the GPU failed" in (served.ended() or "")


def test_an_engine_that_never_gets_further_ends_the_process(tmp_path: Path) -> None:
    with serving(tmp_path, Counting()) as served:
        served.engine.errors.extend(RuntimeError(str(number)) for number in range(10))
        talk = served.talk()
        for number in range(3):
            talk.submit(number, [1], max_tokens=4)
            assert talk.answer(number) == ([], "refused internal")
        talk.submit(4, [1], max_tokens=4)
        assert isinstance(talk.closed()[-1], Goodbye)
        assert served.ended() is not None


def test_what_fails_over_one_request_is_told_to_its_client(tmp_path: Path) -> None:
    class Breaking(Counting):
        def fire(self, ids: tuple[int, ...], *rest: Any) -> Any:
            if ids[0] == 13:
                raise RuntimeError("it broke")
            return super().fire(ids, *rest)

    with serving(tmp_path, Breaking()) as served:
        talk = served.talk()
        talk.submit(1, [13], max_tokens=2)
        refused = talk.until(Refused)
        assert refused.kind == "internal" and "it broke" in refused.message
        talk.submit(1, [5], max_tokens=2)
        assert talk.answer(1) == (counted([5], 2), "length")


def test_idle_work_that_fails_does_no_harm(tmp_path: Path) -> None:
    engine = Counting()
    engine.idle_errors.extend(RuntimeError("no memory for a graph") for _ in range(5))
    with serving(tmp_path, engine) as served:
        talk = served.talk()
        wait_for(lambda: len(engine.idle_errors) < 5, "it is tried")
        talk.submit(1, [5], max_tokens=2)
        assert talk.answer(1) == (counted([5], 2), "length")
        assert engine.fired == [], "it was never prepared"


def test_a_request_that_the_engine_ends_itself_is_cancelled(tmp_path: Path) -> None:
    class Impatient(Counting):
        def step(self) -> list[TokenChunk]:
            (identity,) = self.running
            self.cancel(identity)
            return [TokenChunk(identity, None, 0, finish_reason=FinishReason.CANCELLED)]

    with serving(tmp_path, Impatient()) as served:
        talk = served.talk()
        talk.submit(1, [1], max_tokens=4)
        assert talk.answer(1) == ([], "cancelled")


# ---------------------------------------------------------------------------------------------------- beats and figures


def test_signs_of_life_come_idle_and_busy(tmp_path: Path) -> None:
    with serving(tmp_path, gated()) as served:
        talk = served.talk()
        beats = [talk.until(Beat) for _ in range(3)]
        assert {(beat.running, beat.waiting, beat.free_pages, beat.steps) for beat in beats} == {(0, 0, 2, 0)}
        assert beats[0].now_ns < beats[1].now_ns < beats[2].now_ns
        for number in range(3):
            talk.submit(number, [number], max_tokens=50)
        wait_for(lambda: served.engine.waiting, "two run, one waits")
        beat = talk.until(Beat)
        while beat.running == 0:
            beat = talk.until(Beat)
        assert (beat.running, beat.waiting, beat.free_pages) == (2, 1, 0)
        served.engine.gate.release(10)
        while beat.steps == 0:
            beat = talk.until(Beat)


def test_figures_are_numbers_or_numbers_by_label(served: Served) -> None:
    talk = served.talk()
    for number in range(5):
        talk.submit(number, [number], max_tokens=2)
    for number in range(5):
        talk.answer(number)
    talk.say(Submit(9, b"", GOOD))
    talk.until(Refused)
    values = talk.stats()
    assert values["requests"] == {"length": 5, "refused_request": 1}
    assert values["received_to_launched_count"] == 5 and values["received_to_launched_longest_seconds"] > 0
    assert values["steps"] == served.engine.steps
    for value in values.values():
        numbers = value.values() if isinstance(value, dict) else [value]
        assert all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers)


def test_quiet_moments_are_used(tmp_path: Path) -> None:
    engine = Counting(capturing=True)
    with serving(tmp_path, engine, spin_s=0.01) as served:
        wait_for(lambda: engine.pieces == 1, "what is wanted is captured once it has been quiet")
        assert served.tidied == 0, "nothing has happened that would leave garbage"
        talk = served.talk()
        talk.submit(1, [1], max_tokens=2)
        talk.answer(1)
        wait_for(lambda: engine.pieces == 2 and engine.armed, "prepared again")
        wait_for(lambda: served.tidied == 1, "garbage is collected")
        assert talk.settled().free_pages == 2
        assert served.tidied == 1


# ------------------------------------------------------------------------------------------------------------- practice


@pytest.mark.parametrize("polls", [True, False])
def test_an_engine_that_polls_practises_on_nobody(tmp_path: Path, polls: bool) -> None:
    """It reads and writes for nothing while it polls, and a beat goes the way of a first token ahead of it. No request
    comes of it, and one that sleeps does nothing of the kind."""
    with serving(tmp_path, spin_s=0.3 if polls else 0.0) as served:
        engine = served.engine
        talk = served.talk()
        with mock.patch.object(served.service, "_rehearse", wraps=served.service._rehearse) as rehearse:
            talk.submit(1, [5], max_tokens=2)
            assert talk.answer(1) == (counted([5], 2), "length")
            assert rehearse.call_count == polls
        if polls:
            before = engine.rehearsed
            wait_for(lambda: engine.rehearsed >= before + 5, "it goes on while it polls")
        time.sleep(0.4)
        at_rest = engine.rehearsed
        time.sleep(10 * EVERY_S)
        assert engine.rehearsed == at_rest, "and ends with the polling"
        assert polls or at_rest == 0
        assert engine.fired == [5] and talk.stats()["requests"] == {"length": 1}
