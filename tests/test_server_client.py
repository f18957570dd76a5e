"""The clients of an engine process against an engine that says what the test wants: order, cancellation, connection
loss, damaged bytes, refusals, slow readers, many threads, and text that equals what one process makes."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_engine import VOCABULARY, Asked, ScriptedEngine, count_up, wait_until

from jitgraph import AsyncClient, Client, SamplingParams
from jitgraph.errors import CapacityError, CheckpointError, ConfigError, RequestError
from jitgraph.ipc import messages as m
from jitgraph.ipc.frames import encode
from jitgraph.server import client_channel, client_link
from jitgraph.server.client import EngineClient, EngineGone, RequestRefused
from jitgraph.server.client_base import Wishes
from jitgraph.server.client_handoff import Handoff, Mailbox
from jitgraph.text.detokenize import IncrementalDetokenizer
from jitgraph.text.tokenizer import Tokenizer, bundled_tokenizer_folder
from jitgraph.types import FinishReason, Grammar, RequestOutput, TokenLogprobs

T = TypeVar("T")
TEXT = "Überall blüht 🌸 im Mai, sagt 京都 — naïve 👩‍👩‍👧 words."
Run = Callable[[Awaitable[T]], T]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path / "e.sock"


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Run[Any]]:
    loop = uvloop.new_event_loop() if request.param == "uvloop" else asyncio.new_event_loop()
    yield lambda work: loop.run_until_complete(asyncio.wait_for(work, 60))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(bundled_tokenizer_folder())


def hold(asked: Asked) -> None:
    """Answers nothing; the test does."""


def says(*ids: int, finish: str = "length", lumps: int = 1) -> Callable[[Asked], None]:
    """Answers every request with these ids, ``lumps`` in a record."""

    def answer(asked: Asked) -> None:
        for i in range(0, len(ids), lumps):
            asked.tokens(ids[i : i + lumps], finish if i + lumps >= len(ids) else None)

    return answer


async def ids_of(stream: Any) -> list[int]:
    return [token async for record in stream for token in record.token_ids]


# --------------------------------------------------------------------------------------------------------- EngineClient


def test_tokens_come_in_order_for_many_streams_at_once(run: Run[Any], path: Path) -> None:
    async def work() -> None:
        client = await EngineClient.connect(path)
        assert client.facts.vocab_size == VOCABULARY and client.ready.phases_s == {"load": 1.0}
        streams = [client.submit([i, 2 * i], SamplingParams(max_tokens=30 + i)) for i in range(40)]
        assert client.in_flight == 40
        found = await asyncio.gather(*(ids_of(stream) for stream in streams))
        assert found == [[3 * i + k for k in range(30 + i)] for i in range(40)]
        assert client.in_flight == 0 and len({stream.request_id for stream in streams}) == 40
        assert await ids_of(streams[0]) == [], "it is over, and says so again"
        await client.close()
        await client.close()
        assert client.closed.is_set()

    with ScriptedEngine(path):
        run(work())


def test_what_a_request_says_arrives(run: Run[Any], path: Path) -> None:
    async def work() -> None:
        client = await EngineClient.connect(path, name="somebody")
        params = SamplingParams(max_tokens=1, temperature=0.5, seed=7, logit_bias={3: -1.5}, stop=("x",))
        grammar = m.Grammar("json_object")
        await ids_of(client.submit([5, 6], params, salt="s", prompt_logprobs=2, grammar=grammar))
        [asked] = engine.requests
        assert (asked.ids, asked.params) == ((5, 6), params)
        assert (asked.record.salt, asked.record.prompt_logprobs, asked.record.grammar) == ("s", 2, grammar)
        assert engine.hellos[0].startswith("somebody")
        for wrong in ([2**31], [-(2**40)], ["a"], [1.5]):
            with pytest.raises(RequestError, match="whole numbers"):
                client.submit(wrong, params)  # type: ignore[arg-type]
        assert client.in_flight == 0
        assert await client.stats() == {"steps": 1}
        assert [values["steps"] for values in await asyncio.gather(*(client.stats() for _ in range(5)))] == [1] * 5
        before = client.last_seen_ns
        await asyncio.sleep(0.3)
        assert client.last_beat is not None and client.last_seen_ns > before

    with ScriptedEngine(path) as engine:
        run(work())


def test_cancel_is_sent_once_and_ends_with_the_engines_word(run: Run[Any], path: Path) -> None:
    async def work() -> None:
        client = await EngineClient.connect(path)
        stream = client.submit([1], SamplingParams(max_tokens=9))
        wait_until(lambda: bool(engine.requests))
        engine.requests[0].tokens([4])
        assert (await stream.__anext__()).token_ids == (4,)
        stream.cancel()
        stream.cancel()
        last = await stream.__anext__()
        assert (last.token_ids, last.finish_reason) == ((), "cancelled")
        with pytest.raises(StopAsyncIteration):
            await stream.__anext__()
        stream.cancel()
        await client.stats()
        assert engine.cancelled == [stream.request_id]

    with ScriptedEngine(path, hold) as engine:
        run(work())


@pytest.mark.parametrize("how", ["task", "drop", "timeout"])
def test_a_reader_that_goes_ends_its_request(run: Run[Any], path: Path, how: str) -> None:
    async def work() -> None:
        client = await EngineClient.connect(path)
        stream = client.submit([1], SamplingParams(max_tokens=9))
        request_id = stream.request_id
        if how == "task":
            task = asyncio.ensure_future(ids_of(stream))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif how == "timeout":
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(stream.__anext__(), 0.01)
        else:
            del stream
            gc.collect()
        await asyncio.sleep(0.05)
        await client.stats()
        assert engine.cancelled == [request_id]
        assert how != "drop" or client.in_flight == 0
        other = client.submit([1], SamplingParams(max_tokens=1))
        wait_until(lambda: len(engine.requests) == 2)
        engine.requests[1].tokens([8], "stop")
        assert await ids_of(other) == [8]

    with ScriptedEngine(path, hold) as engine:
        run(work())


def test_the_end_of_the_connection_reaches_every_reader(run: Run[Any], path: Path) -> None:
    """What came before is given first; whoever waits hears at once; later calls say the same."""

    async def work() -> None:
        client = await EngineClient.connect(path)
        early, waiting, late = (client.submit([i], SamplingParams()) for i in range(3))
        wait_until(lambda: len(engine.requests) == 3)
        engine.requests[0].tokens([7])
        engine.requests[2].tokens([9])
        assert (await late.__anext__()).token_ids == (9,)
        waiter = asyncio.ensure_future(waiting.__anext__())
        asked = asyncio.ensure_future(client.stats())
        await asyncio.sleep(0.05)
        assert (await asked) == {"steps": 3}
        engine.hang_up()
        with pytest.raises(EngineGone, match="closed the connection"):
            await waiter
        assert (await early.__anext__()).token_ids == (7,)
        for stream in (early, late, waiting):
            with pytest.raises(EngineGone, match="closed the connection"):
                await stream.__anext__()
        with pytest.raises(EngineGone) as caught:
            client.submit([1], SamplingParams())
        assert caught.value.reason == client.gone
        with pytest.raises(EngineGone):
            await client.stats()
        early.cancel()
        await asyncio.wait_for(client.closed.wait(), 1)

    with ScriptedEngine(path, hold) as engine:
        run(work())


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        b"\x03\x00\x00\x00abc",
        b"\x00\x00\x00\x00",
        encode(m.Hello(1, "me")),
        encode(m.Tokens(1, (1, 2), (5,))),
        encode(m.Tokens(1, (-1,), (5,))),
        encode(m.Tokens(1, (1,), (5,), logprobs=(m.WireLogprobs(1, 0.0), m.WireLogprobs(1, 0.0)))),
        encode(m.Tokens(1, (1,), (5,), finish_reason="tired")),
    ],
    ids=str,
)
def test_damaged_bytes_end_the_connection(run: Run[Any], path: Path, data: bytes) -> None:
    async def work() -> None:
        client = await EngineClient.connect(path)
        stream = client.submit([1], SamplingParams())
        wait_until(lambda: bool(engine.requests))
        engine.raw(data)
        with pytest.raises(EngineGone, match="does not keep to the protocol"):
            await stream.__anext__()
        assert client.closed.is_set()

    with ScriptedEngine(path, hold) as engine:
        run(work())
        with Client(path) as client:
            stream = client.stream([1])
            wait_until(lambda: len(engine.requests) == 2)
            engine.raw(data)
            with pytest.raises(EngineGone):
                next(stream)


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=80), cut=st.integers(0, 200))
def test_no_bytes_break_the_reading_side(data: bytes, cut: int) -> None:
    """Whatever arrives, in whatever pieces: records, or the end of the connection; never another exception."""

    async def work() -> None:
        channel = client_channel.Channel("fuzz", None, None)
        channel.started.add_done_callback(lambda done: done.exception())
        inbox = channel.inboxes[1] = client_channel.Inbox()
        good = encode(m.Tokens(1, (1,), (5,)))
        stream = good + data + good
        for piece in (stream[:cut], stream[cut:]):
            channel.data_received(piece)
        assert len(inbox.records) >= (1 if cut else 0) and (channel.gone is None or inbox.error is not None)

    asyncio.run(work())


@pytest.mark.parametrize("kind", ["request", "capacity", "overloaded", "draining", "internal"])
def test_a_refusal_has_kind_message_and_time(run: Run[Any], path: Path, kind: str) -> None:
    def answer(asked: Asked) -> None:
        asked.refuse(kind, "no, because", 2.5) if asked.ids == (1,) else count_up(asked)

    async def work() -> None:
        client = await EngineClient.connect(path)
        refused, fine = client.submit([1], SamplingParams()), client.submit([2], SamplingParams(max_tokens=2))
        with pytest.raises(RequestRefused, match="no, because") as caught:
            await ids_of(refused)
        assert (caught.value.kind, caught.value.retry_after_s) == (kind, 2.5)
        assert await ids_of(fine) == [2, 3]
        async with AsyncClient(path) as users:
            with pytest.raises(ERRORS.get(kind, RequestRefused), match="no, because"):
                await users.generate([[1]])
            with pytest.raises(ERRORS.get(kind, RequestRefused), match="no, because"):
                await users.stream([1]).__anext__()

    with ScriptedEngine(path, answer):
        run(work())
        with Client(path) as client:
            with pytest.raises(ERRORS.get(kind, RequestRefused), match="no, because") as caught:
                client.generate([[2], [1], [3]])
            assert type(caught.value) is ERRORS.get(kind, RequestRefused)
            with pytest.raises(ERRORS.get(kind, RequestRefused), match="no, because"):
                next(client.stream([1]))
            assert client.generate([2], SamplingParams(max_tokens=2))[0].token_ids == (2, 3)


ERRORS: dict[str, type[Exception]] = {"request": RequestError, "capacity": CapacityError}


def test_a_slow_reader_holds_up_nobody_and_costs_bounded_memory(
    run: Run[Any], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_channel, "MAX_UNREAD", 2000)
    monkeypatch.setattr(client_link, "MAX_UNREAD", 2000)

    async def work() -> None:
        client = await EngineClient.connect(path)
        slow = client.submit([1], SamplingParams(max_tokens=3000))
        small = client.submit([2], SamplingParams(max_tokens=1900))
        for i in range(5):
            assert len(await ids_of(client.submit([i], SamplingParams(max_tokens=300)))) == 300
        assert slow.request_id in engine.cancelled
        assert len(await ids_of(small)) == 1900, "not too much for a reader that comes late"
        with pytest.raises(RequestRefused, match="unread"):
            await ids_of(slow)
        assert slow._inbox.unread == 0 and client.in_flight == 0

    with ScriptedEngine(path) as engine:
        run(work())
        engine.cancelled.clear()
        with Client(path) as client:
            slow, small = client.stream([1], SamplingParams(max_tokens=3000)), client.stream([2])
            assert len(client.generate([3], SamplingParams(max_tokens=300))[0].token_ids) == 300
            assert [chunk.token_id for chunk in small] == [2, 3, 4, 5]
            with pytest.raises(RequestRefused, match="unread"):
                list(slow)
            client.stats()
            assert len(engine.cancelled) == 1


def test_an_engine_that_does_not_read_is_said_to(run: Run[Any], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_channel, "MAX_UNSENT_BYTES", 1000)

    async def work() -> None:
        client = await EngineClient.connect(path)
        with engine._lock, pytest.raises(RequestRefused, match="does not read") as caught:
            streams = [client.submit([1] * 40_000, SamplingParams()) for _ in range(20)]
            assert not streams
        assert caught.value.retry_after_s > 0
        await client.close()

    with ScriptedEngine(path) as engine:
        run(work())


def test_one_reader_for_each_stream(run: Run[Any], path: Path) -> None:
    async def work() -> None:
        client = await EngineClient.connect(path)
        stream = client.submit([1], SamplingParams())
        first = asyncio.ensure_future(stream.__anext__())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="one reader"):
            await stream.__anext__()
        wait_until(lambda: bool(engine.requests))
        engine.requests[0].tokens([3], "stop")
        assert (await first).token_ids == (3,)

    with ScriptedEngine(path, hold) as engine:
        run(work())


# --------------------------------------------------------------------------------------------------------------- start


def test_the_start_is_told_and_waited_for(run: Run[Any], path: Path) -> None:
    phases = [("load", 1, 2), ("load", 2, 2), ("capture", 1, 1)]

    def begin(engine: ScriptedEngine) -> None:
        wait_until(lambda: bool(engine.hellos))
        for phase, done, total in phases:
            engine.broadcast(m.StartPhase(phase, done, total, 0.1, 1.0))
        engine.get_ready()

    async def work() -> list[tuple[str, int, int]]:
        told: list[m.StartPhase] = []
        client = await EngineClient.connect(path, told.append)
        assert client.ready.phases_mib == {"load": 2.0}
        await client.close()
        return [(one.phase, one.done, one.total) for one in told]

    def waiting() -> ScriptedEngine:
        engine = ScriptedEngine(path)
        engine.wait_ready = True
        threading.Thread(target=begin, args=(engine,), daemon=True).start()
        return engine

    with waiting():
        assert run(work()) == phases
    told = list[tuple[str, int, int]]()
    with waiting(), Client(path, progress=lambda *news: told.append(news)) as client:
        assert told == phases and client.ready.phases_s == {"load": 1.0}


def test_an_engine_that_never_is_ready(run: Run[Any], path: Path) -> None:
    with ScriptedEngine(path) as engine:
        engine.wait_ready = True
        with pytest.raises(EngineGone, match=r"not ready after 0\.2 s"):
            run(EngineClient.connect(path, timeout_s=0.2))
        with pytest.raises(EngineGone, match=r"not ready after 0\.2 s"):
            Client(path, timeout_s=0.2)
        threading.Timer(0.1, lambda: engine.broadcast(m.Goodbye("no weights: fetch them"))).start()
        with pytest.raises(EngineGone, match="no weights: fetch them"):
            run(EngineClient.connect(path))
        threading.Timer(0.1, lambda: engine.broadcast(m.Goodbye("no weights: fetch them"))).start()
        with pytest.raises(EngineGone, match="no weights: fetch them"):
            Client(path)
        engine.wait_ready, engine.version = False, 99
        with pytest.raises(ConfigError, match="version 99"):
            run(EngineClient.connect(path))
        with pytest.raises(ConfigError, match="version 99"):
            Client(path)

        def broken(_: m.StartPhase) -> None:
            raise ValueError("the listener's own")

        engine.wait_ready, engine.version = True, m.PROTOCOL
        threading.Timer(0.1, lambda: engine.broadcast(m.StartPhase("load", 1, 1, 0.0, 0.0))).start()
        with pytest.raises(ValueError, match="the listener's own"):
            run(EngineClient.connect(path, broken))


def test_nobody_there(run: Run[Any], path: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineGone, match="jitgraph engine MODEL"):
        run(EngineClient.connect(path, appear_s=0.1))
    with pytest.raises(EngineGone, match="jitgraph engine MODEL"):
        Client(path, appear_s=0.1)
    with pytest.raises(ConfigError, match="at most 107 bytes"):
        Client(tmp_path / ("x" * 200))
    with pytest.raises(ConfigError, match="cannot be connected to"):
        Client(Path("/proc/version") / "no", appear_s=0.1)
    with pytest.raises(ConfigError, match="not connected"):
        AsyncClient(path).stream("hello")


def test_an_engine_that_comes_later_is_found(run: Run[Any], path: Path) -> None:
    engine = ScriptedEngine.__new__(ScriptedEngine)
    threading.Timer(0.2, lambda: engine.__init__(path) or engine.start()).start()  # type: ignore[misc,func-returns-value]
    client: EngineClient = run(EngineClient.connect(path))
    run(client.close())
    engine.close()


def test_silence_ends_a_connection(run: Run[Any], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_link, "SILENT_S", 0.3)

    async def work() -> None:
        client = await EngineClient.connect(path, silence_s=0.5)
        stream = client.submit([1], SamplingParams())
        await asyncio.sleep(0.7)
        assert client.gone is None, "it beats"
        engine.beats = False
        with pytest.raises(EngineGone, match="hangs"):
            await stream.__anext__()

    with ScriptedEngine(path, hold) as engine:
        run(work())
        engine.beats = True
        client = Client(path)
        engine.beats = False
        with pytest.raises(EngineGone, match="hangs"):
            next(client.stream([1]))


def test_drain_waits_for_the_end(run: Run[Any], path: Path) -> None:
    async def work() -> None:
        client = await EngineClient.connect(path)
        await client.drain(1.0)
        assert engine.drained.is_set() and client.gone == "the engine has been drained"
        await client.drain(1.0)

    with ScriptedEngine(path) as engine:
        run(work())


# ---------------------------------------------------------------------------------------------------------------- text


def whole_text(tokenizer: Tokenizer, ids: list[int], prompt: list[int], stop: tuple[str, ...] = ()) -> str:
    """What one process makes of it, cut by hand."""
    shown = IncrementalDetokenizer(tokenizer, prompt)
    text = "".join(map(shown.push, ids)) + shown.finish()
    ends = [text.index(one) for one in stop if one in text]
    return text[: min(ends)] if ends else text


@pytest.mark.parametrize("lumps", [1, 2, 3, 7])
def test_text_is_the_same_however_it_arrives(run: Run[Any], path: Path, tokenizer: Tokenizer, lumps: int) -> None:
    """Characters of several tokens, tokens in lumps, and an unfinished character at the end."""
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert any("�" in tokenizer.decode([token]) for token in ids), "some characters span tokens"
    ids = ids + tokenizer.encode("🌸", add_special_tokens=False)[:-1]
    prompt = tokenizer.encode("Es war einmal")
    expected = whole_text(tokenizer, ids, prompt)
    assert expected.endswith("�")

    async def work() -> None:
        async with AsyncClient(path) as client:
            [output] = await client.generate("Es war einmal")
            assert (output.text, output.token_ids) == (expected, tuple(ids))
            chunks = [chunk async for chunk in client.stream("Es war einmal")]
            assert "".join(chunk.text for chunk in chunks) == expected
            assert [chunk.finish_reason for chunk in chunks] == [None] * (len(ids) - 1) + [FinishReason.LENGTH]

    with ScriptedEngine(path, says(*ids, lumps=lumps)) as engine:
        run(work())
        with Client(path) as client:
            [output] = client.generate("Es war einmal")
            assert (output.text, output.token_ids) == (expected, tuple(ids))
            assert output.finish_reason is FinishReason.LENGTH and engine.requests[0].ids == tuple(prompt)
            chunks = list(client.stream("Es war einmal"))
            assert "".join(chunk.text for chunk in chunks) == expected and not any("�" in c.text for c in chunks[:-1])


@pytest.mark.parametrize("lumps", [1, 4])
def test_stop_strings_over_token_borders(run: Run[Any], path: Path, tokenizer: Tokenizer, lumps: int) -> None:
    """The text ends before the first one wherever the tokens' borders fall, and the engine is told to stop."""
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    text = whole_text(tokenizer, ids, [])
    stops = [text[i : i + n] for i, n in itertools.product(range(1, len(text) - 4, 3), (1, 3))]

    def answer(asked: Asked) -> None:
        for i in range(0, len(ids), lumps):
            asked.tokens(ids[i : i + lumps])  # and never an end: the client must end it

    async def work() -> None:
        async with AsyncClient(path) as client:
            for stop in stops[::5]:
                [output] = await client.generate([ids[:1]], SamplingParams(max_tokens=99, stop=(stop,)))
                assert output.text == whole_text(tokenizer, ids, ids[:1], (stop,))

    with ScriptedEngine(path, answer) as engine:
        run(work())
        with Client(path) as client:
            for stop in stops:
                params = SamplingParams(max_tokens=99, stop=(stop, "never there"))
                [output] = client.generate([ids[:1]], params)
                assert output.text == whole_text(tokenizer, ids, ids[:1], (stop,)), stop
                assert output.finish_reason is FinishReason.STOP
            streamed = "".join(chunk.text for chunk in client.stream(ids[:1], SamplingParams(stop=("京都",))))
            assert streamed == whole_text(tokenizer, ids, ids[:1], ("京都",))
            client.stats()
            wait_until(lambda: len(engine.cancelled) == len(engine.requests))  # each, also over the other connection


def test_what_llm_reports_is_reported(path: Path) -> None:
    def answer(asked: Asked) -> None:
        time.sleep(0.02)
        asked.tokens([5], logprobs=(m.WireLogprobs(5, -0.5, ((5, -0.5), (6, -1.0))),), cached_tokens=2)
        time.sleep(0.02)
        asked.tokens([6], "stop", logprobs=(m.WireLogprobs(6, -0.25, ((6, -0.25),)),))

    with ScriptedEngine(path, answer) as engine, Client(path) as client:
        [output] = client.generate([[1, 2]], SamplingParams(logprobs=2))
        assert output.prompt_token_ids == (1, 2) and output.finish_reason is FinishReason.STOP
        assert output.logprobs is not None and output.logprobs[0].top == ((5, -0.5), (6, -1.0))
        assert output.logprobs[1].logprob == -0.25 and output.cached_tokens == 2
        timings = output.timings
        assert timings.ttft_ms >= 20 and len(timings.itl_ms) == 1 and timings.itl_ms[0] >= 15
        assert timings.latency_ms == pytest.approx(timings.ttft_ms + timings.itl_ms[0])
        assert client.generate([1])[0].logprobs is not None or engine.requests[-1].params.max_tokens == 4
        assert client.default_params() == SamplingParams(max_tokens=4)


def test_grammar_and_prompt_logprobs_go_there_and_back(run: Run[Any], path: Path) -> None:
    scores = (None, m.WireLogprobs(2, -1.5, ((2, -1.5), (3, -2.0))))

    def answer(asked: Asked) -> None:
        asked.tokens([5, 6], "stop", prompt_logprobs=scores)

    def check(output: RequestOutput) -> None:
        assert output.prompt_logprobs == (None, TokenLogprobs(2, -1.5, ((2, -1.5), (3, -2.0))))
        record = engine.requests[-1].record
        assert (record.prompt_logprobs, record.grammar) == (1, m.Grammar("regex", "a+"))

    async def work() -> None:
        async with AsyncClient(path) as client:
            [output] = await client.generate([[1, 2]], prompt_logprobs=1, grammar=Grammar("regex", "a+"))
            check(output)
            stream = client.stream([1, 2], prompt_logprobs=1, grammar=Grammar("regex", "a+"))
            chunks = [chunk async for chunk in stream]
            assert chunks[0].prompt_logprobs and not chunks[1].prompt_logprobs
            check(await client.stream([1, 2], prompt_logprobs=1, grammar=Grammar("regex", "a+")).finish())

    with ScriptedEngine(path, answer) as engine:
        run(work())
        with Client(path) as client:
            check(client.generate([[1, 2]], prompt_logprobs=1, grammar=Grammar("regex", "a+"))[0])
            stream = client.stream([1, 2], prompt_logprobs=1, grammar=Grammar("regex", "a+"))
            assert [chunk.prompt_logprobs is None for chunk in stream] == [False, True]
            with pytest.raises(RequestError, match="prompt_logprobs must be between"):
                client.stream([1], prompt_logprobs=99)


def test_a_folder_without_tokenizer(path: Path, tmp_path: Path) -> None:
    with ScriptedEngine(path, folder=str(tmp_path)), Client(path) as client:
        assert client.generate([[1], [5]])[1].token_ids == (5, 6, 7, 8)
        assert client.generate([1])[0].text == ""
        for prompt, params in (("text", None), ([1], SamplingParams(stop=("x",)))):
            with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
                client.generate(prompt, params)
            with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
                client.stream(prompt, params)  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt", [[], "", None, {"a": 1}, b"abc", [3, 4.5], [[True]]])
def test_bad_prompts_are_refused_before_they_are_sent(path: Path, prompt: Any) -> None:
    with ScriptedEngine(path) as engine, Client(path) as client:
        with pytest.raises(RequestError):
            client.generate(prompt)
        with pytest.raises(RequestError, match="2 sampling parameters for 1 prompts"):
            client.generate([1], [SamplingParams()] * 2)
        assert not engine.requests


# -------------------------------------------------------------------------------------------------------------- Client


def test_a_batch_larger_than_the_engine_keeps_its_order(run: Run[Any], path: Path) -> None:
    """Requests are handed over a few at a time, answered in any order, and given back in theirs."""
    held: list[Asked] = []
    most = 0
    chance = random.Random(3)

    def answer(asked: Asked) -> None:
        nonlocal most
        held.append(asked)
        most = max(most, len(held))
        if len(held) == 8 or len(engine.requests) % 50 == 0:
            chance.shuffle(held)
            while held:
                count_up(held.pop())

    async def work() -> None:
        async with AsyncClient(path) as client:
            outputs = await client.generate([[i] for i in range(50)])
            assert [output.token_ids[0] for output in outputs] == list(range(50))

    with ScriptedEngine(path, answer) as engine:
        with Client(path) as client:
            outputs = client.generate([[i] for i in range(50)])
            assert [output.token_ids[0] for output in outputs] == list(range(50))
        run(work())
        assert most == 8, "twice as many as run at once"


def test_threads_share_one_client(path: Path) -> None:
    """Whoever reads, everybody gets what is his, in order; nobody waits for another's last token."""
    with ScriptedEngine(path) as engine, Client(path) as client:

        def work(i: int) -> bool:
            params = SamplingParams(max_tokens=10 + i % 30)
            expected = [i + k for k in range(params.max_tokens)]
            if i % 5 == 0:
                assert client.stats()["steps"] >= 0
            if i % 3 == 0:
                return list(client.generate([i], params)[0].token_ids) == expected
            return [chunk.token_id for chunk in client.stream([i], params)] == expected

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(400), timeout=60))
        assert len(engine.requests) == 400 and not client._link._requests


def test_a_thread_whose_token_is_there_does_not_wait_for_another(path: Path) -> None:
    """The first thread reads the socket; its own answer comes last, the second one's at once."""
    with ScriptedEngine(path, hold) as engine, Client(path) as client:
        first = client.stream([1])
        found: list[int] = []
        reading = threading.Thread(target=lambda: found.append(next(first).token_id))
        reading.start()
        time.sleep(0.05)
        second = client.stream([2])
        threading.Timer(0.05, lambda: engine.requests[1].tokens([22], "stop")).start()
        engine.beats = False
        assert next(second).token_id == 22 and not found
        engine.requests[0].tokens([11], "stop")
        reading.join(10)
        assert found == [11]


@pytest.mark.parametrize("refused", [False, True])
def test_news_that_comes_before_the_books_waits_for_them(
    path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    """A request is sent before its books are made; another thread may read its answer meanwhile."""

    def answer(asked: Asked) -> None:
        if asked.ids == (2,):
            asked.refuse("overloaded", "no") if refused else asked.tokens([22], "stop")

    with ScriptedEngine(path, answer) as engine, Client(path) as client:
        first = client.stream([1])
        reading = threading.Thread(target=lambda: list(first))
        reading.start()
        wait_until(lambda: client._link._handoff._reader is not None)
        make, seen = client._text.live, threading.Event()
        find = client._link._find

        def look(request_id: int) -> Any:
            seen.set()
            return find(request_id)

        def late(*args: Any) -> Any:
            assert seen.wait(10), "the other thread has the answer by now"
            return make(*args)

        monkeypatch.setattr(client._link, "_find", look)
        monkeypatch.setattr(client._text, "live", late)
        second = client.stream([2])
        if refused:
            with pytest.raises(RequestRefused, match="no"):
                next(second)
        else:
            assert [chunk.token_id for chunk in second] == [22]
        engine.requests[0].tokens([11], "stop")
        reading.join(10)
        assert not client._link._requests and not reading.is_alive()


def test_a_request_without_books_is_taken_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    with ScriptedEngine(path, hold) as engine, Client(path) as client:
        with monkeypatch.context() as patch:
            patch.setattr(client._text, "live", interrupt)
            with pytest.raises(KeyboardInterrupt):
                client.stream([1])
        wait_until(lambda: len(engine.cancelled) == 1)
        engine.answer = count_up
        assert [chunk.token_id for chunk in client.stream([5], SamplingParams(max_tokens=2))] == [5, 6]
        assert not client._link._requests


def test_streams_read_in_turns_and_closed(path: Path) -> None:
    with ScriptedEngine(path) as engine, Client(path) as client:
        streams = [client.stream([10 * i], SamplingParams(max_tokens=5)) for i in range(3)]
        turns = [[next(stream).token_id for stream in streams] for _ in range(5)]
        assert turns == [[k, 10 + k, 20 + k] for k in range(5)]
        engine.answer = hold
        with client.stream([1]) as closed:
            pass
        closed.close()
        assert closed.finish_reason is FinishReason.CANCELLED and list(closed) == []
        client.stream([2])
        gc.collect()
        wait_until(lambda: len(engine.cancelled) >= 2)
        assert set(engine.cancelled) == {engine.requests[-2].record.request_id, engine.requests[-1].record.request_id}
        client.stats()
        assert not client._link._requests


def test_a_dropped_stream_is_cancelled_even_while_the_link_is_locked(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collection may run while this very thread holds the locks: nothing waits then, the next request cleans up."""
    with ScriptedEngine(path, hold) as engine, Client(path) as client:
        stream = client.stream([1])
        with client._link._sending, client._link._state, client._link._handoff._guard:
            del stream
            gc.collect()
        assert not engine.cancelled
        client.stream([2]).close()
        wait_until(lambda: len(engine.cancelled) == 2)


def test_losing_the_engine_and_finding_it_again(path: Path) -> None:
    with ScriptedEngine(path, hold) as engine, Client(path) as client:
        stream = client.stream([1])
        wait_until(lambda: bool(engine.requests))
        engine.requests[0].tokens([7])
        assert next(stream).token_id == 7
        engine.hang_up()
        for _ in range(2):
            with pytest.raises(EngineGone, match="closed"):
                next(stream)
        engine.answer = count_up
        assert client.generate([3])[0].token_ids == (3, 4, 5, 6), "the next request connects anew"
        engine.facts = m.EngineFacts(
            **{**{f: getattr(engine.facts, f) for f in engine.facts.__struct_fields__}, "vocab_size": 7}
        )
        engine.hang_up()
        client._link._read()
        with pytest.raises(EngineGone, match="make a new client"):
            client.generate([3])
        engine.close()
        with pytest.raises(EngineGone, match="no engine listens"):
            client.stats()


@pytest.mark.parametrize("first", ["generate", "stream", "stats"])
def test_an_engine_that_was_started_again_is_found_by_the_first_call(path: Path, first: str) -> None:
    """Nothing ran when the old one went, so nobody has read that it did."""
    with ScriptedEngine(path) as old:
        client = Client(path)
        assert client.stats() == {"steps": 0}
        assert client.generate([[1]])[0].token_ids == (1, 2, 3, 4)
        if first == "stream":
            old.broadcast(m.Goodbye("the engine process has ended as it was told to"))
    with ScriptedEngine(path):
        if first == "generate":
            assert client.generate([[3]])[0].token_ids == (3, 4, 5, 6)
        elif first == "stream":
            assert [chunk.token_id for chunk in client.stream([3])] == [3, 4, 5, 6]
        assert client.stats() == {"steps": 0 if first == "stats" else 1}
        client.close()


@pytest.mark.parametrize("first", ["generate", "stream", "stats"])
def test_asyncio_code_finds_an_engine_that_was_started_again(run: Run[Any], path: Path, first: str) -> None:
    async def work() -> None:
        client = AsyncClient(path)
        with ScriptedEngine(path, hold) as old:
            await client.connect()
            cut_off = client.stream([1])
            wait_until(lambda: bool(old.requests))
        with ScriptedEngine(path):
            if first == "generate":
                assert (await client.generate([[3]]))[0].token_ids == (3, 4, 5, 6)
            elif first == "stream":
                stream, other = client.stream([3]), client.stream([4])
                other.close()
                assert [chunk.token_id async for chunk in other] == []
                assert [chunk.token_id async for chunk in stream] == [3, 4, 5, 6]
            answers = await asyncio.gather(*(client.stats() for _ in range(5)))
            assert answers == [{"steps": 0 if first == "stats" else 1}] * 5
            with pytest.raises(EngineGone, match="crashed or was killed"):
                await cut_off.finish()
        with pytest.raises(EngineGone, match="no engine listens"):
            await client.stats()
        with ScriptedEngine(path, vocab_size=7):
            with pytest.raises(EngineGone, match="make a new client"):
                await client.generate([[3]])
            await client.close()
            with pytest.raises(EngineGone, match="has been closed"):
                await client.stats()
            assert await (await client.connect()).stats() == {"steps": 0}
            await client.close()

    run(work())


def test_time_is_sent_and_its_end_is_told(run: Run[Any], path: Path) -> None:
    def too_late(asked: Asked) -> None:
        if asked.record.timeout_s:
            asked.tokens([5])
            asked.refuse("deadline", "this request was not done within the 2 s that it was given")
        else:
            count_up(asked)

    async def work(client: AsyncClient) -> None:
        async with client:
            with pytest.raises(RequestRefused, match="2 s") as caught:
                await client.generate([[1]], timeout_s=2.0)
            assert caught.value.kind == "deadline"
            with pytest.raises(RequestRefused, match="2 s"):
                await client.stream([1], timeout_s=2.0).finish()
            with pytest.raises(RequestError, match="timeout_s"):
                client.stream([1], timeout_s=0.0)
            assert (await client.generate([[1]]))[0].token_ids == (1, 2, 3, 4)

    with ScriptedEngine(path, too_late) as engine, Client(path) as client:
        stream = client.stream([1], timeout_s=2.0)
        assert next(stream).token_id == 5, "what came in time is given first"
        for _ in range(2):
            with pytest.raises(RequestRefused, match="2 s"):
                next(stream)
        with pytest.raises(RequestRefused, match="2 s") as caught:
            client.generate([[1], [2]], timeout_s=2.0)
        assert caught.value.kind == "deadline"
        for wrong in (0.0, -1.0, float("nan"), float("inf"), 1e9):
            with pytest.raises(RequestError, match="timeout_s"):
                client.generate([[1]], timeout_s=wrong)
        assert client.generate([[1]])[0].token_ids == (1, 2, 3, 4)
        run(work(AsyncClient(path)))
        given = [asked.record.timeout_s for asked in engine.requests]
    assert all(one == 0.0 or 0.0 < one <= 2.0 for one in given) and 0.0 in given and max(given) > 0.0


def test_a_call_that_has_used_up_its_time_leaves_none_and_not_any(monkeypatch: pytest.MonkeyPatch) -> None:
    """0 would mean for ever."""
    wishes = Wishes(None, None, 1.0, 0)
    monkeypatch.setattr("jitgraph.server.client_base.time.perf_counter_ns", lambda: 10**12)
    assert 0.0 < wishes.left_s < 1e-3
    assert Wishes(None, None, None, 0).left_s == 0.0


@pytest.mark.parametrize("name", ["n" * m.MAX_NAME_CHARS, "short", "", "京" * 1000])
def test_any_name_that_is_allowed_is_taken(run: Run[Any], path: Path, name: str) -> None:
    async def work() -> None:
        client = await EngineClient.connect(path, name=name)
        await client.close()

    with ScriptedEngine(path) as engine:
        run(work())
        (seen,) = engine.hellos
    assert seen.startswith(name[:200]) and f"(process {os.getpid()})" in seen and len(seen) <= m.MAX_NAME_CHARS


def test_what_comes_while_nobody_waits_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beats do not pile up behind a client that does nothing, and it notices that the engine is gone."""
    monkeypatch.setattr("jitgraph.idle.LOOK_AGAIN_S", 0.05)
    with ScriptedEngine(path) as engine, Client(path) as client:
        for _ in range(200):
            engine.broadcast(m.Beat(1, 0, 0, 1, 1, 1))
        wait_until(lambda: not client._link._poller.poll(0))
        engine.hang_up()
        wait_until(lambda: client._link._gone is not None)


def test_closing_a_client(path: Path) -> None:
    with ScriptedEngine(path, hold):
        client = Client(path)
        stream, waiting = client.stream([1]), client.stream([2])
        ended: list[object] = []
        thread = threading.Thread(target=lambda: ended.append(list(waiting)))
        thread.start()
        time.sleep(0.05)
        client.close()
        client.close()
        thread.join(10)
        assert ended == [[]], "a thread that waits in the socket wakes up"
        assert list(stream) == [] and stream.finish_reason is FinishReason.CANCELLED
        with pytest.raises(ConfigError, match="has been closed"):
            client.generate([1])


@pytest.mark.parametrize("where", ["waiting", "reading", "sending"])
def test_an_interrupt_loses_no_token_unseen(path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Ctrl-C while waiting changes nothing. In the middle of records it ends every request as cancelled, and the
    client works on."""

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    with ScriptedEngine(path) as engine, Client(path) as client:
        client._link._keeper.stop()  # it might read the tokens before the interrupt
        time.sleep(0.05)
        stream = client.stream([1], SamplingParams(max_tokens=5))
        target = {
            "waiting": (client._link, "_poller", type("Poller", (), {"poll": interrupt})()),
            "reading": (client._link, "_take", interrupt),
            "sending": (client._link, "_flush", interrupt),
        }[where]
        with monkeypatch.context() as patch:
            patch.setattr(*target)
            with pytest.raises(KeyboardInterrupt):
                if where == "sending":
                    with engine._lock:  # it does not read, so not all can be sent at once
                        client.stream([1] * 400_000)
                else:
                    next(stream)
        if where == "waiting":
            assert [chunk.token_id for chunk in stream] == [1, 2, 3, 4, 5]
        else:
            assert list(stream) == [] and stream.finish_reason is FinishReason.CANCELLED
        assert client.generate([9])[0].token_ids == (9, 10, 11, 12)


# ------------------------------------------------------------------------------------------------------------- handoff


def test_the_handoff_serves_everybody_whoever_reads() -> None:
    """Many threads, one source that hands out news in random order; each gets exactly his, and none is left asleep."""
    chance = random.Random(1)
    boxes = [Mailbox() for _ in range(8)]
    left = [200] * len(boxes)
    got = [0] * len(boxes)
    readers: set[int] = set()
    active = 0

    def read() -> None:
        nonlocal active
        active += 1
        assert active == 1, "two threads read"
        readers.add(threading.get_ident())
        if chance.random() < 0.3:
            time.sleep(0)
        choices = [i for i, n in enumerate(left) if n]
        if choices:
            i = chance.choice(choices)
            left[i] -= 1
            got[i] += 1
            handoff.deliver(boxes[i])
        else:
            for box in boxes:
                handoff.deliver(box)
        active -= 1

    handoff = Handoff(read)

    def work(i: int) -> None:
        while got[i] < 200:
            boxes[i].news = False
            if got[i] < 200:
                handoff.wait(boxes[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(boxes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert got == [200] * len(boxes) and len(readers) > 1


def test_a_reader_that_fails_hands_on() -> None:
    box, other = Mailbox(), Mailbox()
    fails = True

    def read() -> None:
        if fails:
            raise ValueError("no")
        handoff.deliver(other)

    handoff = Handoff(read)
    with pytest.raises(ValueError):
        handoff.wait(box)
    fails = False
    handoff.wait(other)
    assert other.news and handoff.read_if_free(lambda: None)
