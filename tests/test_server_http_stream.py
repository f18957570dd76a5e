"""Streams of events byte by byte, text that splits in odd places, and what becomes of clients who leave."""

from __future__ import annotations

import codecs
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server_fakes import (
    EOS,
    MODEL,
    PATIENCE_S,
    TOKENIZER,
    FakeBackend,
    FakeEngine,
    Site,
    chat,
    complete,
    http_bytes,
    ids_of,
    make_site,
    read_all,
    replace_facts,
    served,
    wait_until,
)
from text_tokenizers import byte_level_backend, llama_backend, write_folder

from jitgraph.server.client_errors import RequestRefused
from jitgraph.server.openai.errors import ApiError
from jitgraph.server.openai.sse import json_bytes
from jitgraph.server.service import Service
from jitgraph.server.settings import ServerSettings
from jitgraph.server.texts import TextSource
from jitgraph.text.detokenize import IncrementalDetokenizer
from jitgraph.text.tokenizer import Tokenizer

TEXT = "Hello there, friend!"
MUCH = ids_of("on and on ") * 300
USAGE = {"stream": True, "stream_options": {"include_usage": True}}


def delta_text(chunks: list[Any], index: int = 0) -> str:
    """The text of one answer of a chat stream."""
    return "".join(
        choice["delta"].get("content") or ""
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["index"] == index
    )


# ------------------------------------------------------------------------------------------------------- the form of it


def test_every_chunk_has_what_strict_clients_ask_for() -> None:
    reply = chat(make_site(), **USAGE)
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.body.endswith(b"data: [DONE]\n\n")
    chunks = reply.chunks
    for chunk in chunks:
        assert list(chunk) == ["id", "object", "created", "model", "system_fingerprint", "choices", "usage"]
        assert chunk["id"] and chunk["model"] == MODEL and chunk["created"] > 0
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    *parts, last = chunks
    assert all(part["usage"] is None and len(part["choices"]) == 1 for part in parts)
    assert last["choices"] == [] and last["usage"]["total_tokens"] > 0
    reasons = [part["choices"][0]["finish_reason"] for part in parts]
    assert reasons == [None] * (len(parts) - 1) + ["stop"]
    assert parts[-1]["choices"][0]["delta"] == {}


def test_usage_is_only_there_when_asked_for() -> None:
    chunks = chat(make_site(), stream=True).chunks
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)
    assert chat(make_site(), stream=True, stream_options={"include_usage": False}).chunks[-1]["choices"]


def test_completion_chunks() -> None:
    chunks = complete(make_site(), max_tokens=64, **USAGE).chunks
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == TEXT
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["choices"] == []
    echoed = complete(make_site(), prompt="Once", echo=True, stream=True, logprobs=0, max_tokens=2).chunks
    assert "".join(chunk["choices"][0]["text"] for chunk in echoed) == "OnceHel"
    tokens = [token for chunk in echoed for token in chunk["choices"][0]["logprobs"]["tokens"]]
    offsets = [offset for chunk in echoed for offset in chunk["choices"][0]["logprobs"]["text_offset"]]
    assert (tokens, offsets) == (["<|begin|>", "O", "n", "ce", "H", "el"], [0, 0, 1, 2, 4, 5])


def test_an_empty_answer_still_has_a_role_and_a_reason() -> None:
    site = make_site()
    site.engine.answer = lambda asked: [EOS]
    first, second = chat(site, stream=True).chunks
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert second["choices"][0]["finish_reason"] == "stop"
    assert chat(site).json["choices"][0]["message"]["content"] == ""
    assert complete(site).json["choices"][0]["text"] == ""


def test_several_answers_in_one_stream() -> None:
    site = make_site()
    site.engine.pause_s = 0.001
    texts = iter(["one", "two words", "three more words"])
    site.engine.answer = lambda asked: [*ids_of(next(texts)), EOS]
    chunks = chat(site, n=3, **USAGE).chunks
    assert [delta_text(chunks, i) for i in range(3)] == ["one", "two words", "three more words"]
    for index in range(3):
        mine = [chunk["choices"][0] for chunk in chunks[:-1] if chunk["choices"][0]["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert [one["finish_reason"] for one in mine] == [None] * (len(mine) - 1) + ["stop"]
    assert chunks[-1]["usage"]["completion_tokens"] == 3 + sum(
        len(ids_of(t)) for t in ("one", "two words", "three more words")
    )


def test_log_probabilities_of_a_stream_lose_no_token() -> None:
    site = make_site()
    site.engine.answer = lambda asked: [*ids_of("a 🙂 b 漢字"), EOS]
    whole = chat(site, logprobs=True, top_logprobs=1).json["choices"][0]["logprobs"]["content"]
    chunks = chat(site, logprobs=True, top_logprobs=1, stream=True).chunks
    parts = [one for chunk in chunks for one in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert parts == whole and len(whole) == len(ids_of("a 🙂 b 漢字")) + 1


def test_one_event_is_one_line_for_every_client() -> None:
    text = "a\u2028b\u2029c\x85d\ne\rf\x0bg\x1ch"
    assert json.loads(json_bytes(text)) == text
    assert len(json_bytes(text).decode().splitlines()) == 1
    assert json_bytes("漢字 🙂") == '"漢字 🙂"'.encode()


# ------------------------------------------------------------------------------------------------------------ the start


def lines_of(connection: socket.socket) -> Any:
    """Lines of a response as they arrive, and when."""
    buffer = b""
    while part := connection.recv(65536):
        buffer += part
        while b"\n" in buffer:
            line, _, buffer = buffer.partition(b"\n")
            yield time.monotonic(), line.rstrip(b"\r")


def test_nothing_is_sent_before_the_first_token() -> None:
    """Otherwise the first event says nothing about the time to the first token, and a refusal could not be a 429."""
    engine = FakeEngine()
    engine.pause_s = 0.05
    with served(engine) as site, site.connect() as connection:
        began = time.monotonic()
        connection.sendall(
            http_bytes("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "stream": True})
        )
        arrived = [(when, line) for when, line in lines_of_until(connection, b"data: [DONE]")]
    assert arrived[0][1] == b"HTTP/1.1 200 OK"
    data = [(when, line) for when, line in arrived if line.startswith(b"data: ")]
    assert arrived[0][0] - began >= engine.pause_s
    assert b'"role":"assistant"' in data[0][1] and b'"content":"H"' in data[1][1]


def lines_of_until(connection: socket.socket, last: bytes) -> Any:
    """``lines_of`` up to a line."""
    for when, line in lines_of(connection):
        yield when, line
        if line == last:
            return


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        ("request", 400, "invalid_value"),
        ("capacity", 400, "capacity_exceeded"),
        ("overloaded", 429, "rate_limit_exceeded"),
        ("draining", 503, "engine_unavailable"),
        ("deadline", 422, "deadline_exceeded"),
        ("internal", 500, "engine_error"),
    ],
)
@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"stream": True, "n": 3}])
def test_what_the_engine_refuses_has_a_status_of_its_own(kind: str, status: int, code: str, fields: Any) -> None:
    site = make_site()
    site.engine.refuse = RequestRefused(kind, "min_p is wrong for this engine", 2.5)
    reply = chat(site, **fields)
    assert (reply.status, reply.error["code"]) == (status, code)
    assert reply.headers.get("retry-after") == ("3" if status in (429, 503) else None)
    assert site.records[-1].status == status and site.records[-1].error_kind == code
    assert reply.error["param"] == ("min_p" if status == 400 else None)


@pytest.mark.parametrize("fields", [{}, {"n": 2}])
def test_an_engine_that_ends_in_mid_stream_is_an_event(fields: Any) -> None:
    site = make_site()
    site.engine.die_after = 2
    reply = chat(site, stream=True, **fields)
    assert reply.status == 200
    *chunks, error = reply.events  # no [DONE]: it did not end well
    assert all("choices" in chunk for chunk in chunks)
    assert sorted(error) == ["error"] and sorted(error["error"]) == ["code", "message", "param", "type"]
    assert error["error"]["code"] == "engine_lost"
    assert site.records[-1].error_kind == "engine_lost"
    assert site.records[-1].sequences[0].finish_reason is None
    whole = chat(site)
    assert (whole.status, whole.error["code"], whole.headers["retry-after"]) == (503, "engine_lost", "7")
    site.engine.gone = "the connection has ended"
    assert chat(site).status == 503


def test_an_engine_that_ends_while_the_server_does_is_not_promised_again() -> None:
    engine = FakeEngine()
    engine.die_after = 2
    site = make_site(engine)
    for state, promised in (("ready", True), ("restarting", True), ("draining", False), ("stopped", False)):
        site.backend.state = "ready"
        end = engine.answer

        def leave(asked: Any, state: str = state, end: Any = end) -> Any:
            site.backend.state = state
            return end(asked)

        engine.answer = leave
        reply = complete(site)
        assert (reply.status, reply.error["code"]) == (503, "engine_lost")
        assert ("it is being restarted" in reply.error["message"]) is promised
        engine.answer = end


def test_after_a_crash_the_first_start_says_when_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one has not begun yet, so there is nothing else to go by."""
    backend = FakeBackend(FakeEngine(), retry_after_s=0.0)
    service = Service(backend, ServerSettings(), TextSource(ServerSettings()))
    assert service.lost().retry_after_s == 0.0  # another engine is there
    service.start_s = 6.0
    backend.client = None
    now_s = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    assert service.lost().retry_after_s == 6.0
    now_s += 2.0
    assert service.lost().retry_after_s == 4.0  # all its requests tell of one crash
    with pytest.raises(ApiError) as caught:
        service.link()
    assert caught.value.retry_after_s == 4.0
    now_s += 60.0
    backend.retry_after_s = 1.5
    with pytest.raises(ApiError) as later:
        service.link()
    assert later.value.retry_after_s == 1.5


def test_a_request_that_the_engine_withdraws_is_an_error() -> None:
    site = make_site()
    site.engine.withdraw_after = 2
    assert chat(site, stream=True).events[-1]["error"]["code"] == "request_cancelled"
    assert chat(site).status == 503
    site.engine.withdraw_after = 0
    assert chat(site, stream=True).status == 503


@pytest.mark.parametrize("n", [1, 2])
def test_a_grammar_that_cannot_be_followed_any_further_is_said_to_be_it(n: int) -> None:
    site = make_site()
    site.engine.withdraw_after, site.engine.withdraw_as = 2, "failed"
    fields = {"response_format": {"type": "json_object"}, "n": n}
    for reply in (chat(site, **fields), complete(site, **fields)):
        assert (reply.status, reply.error["type"], reply.error["code"]) == (500, "server_error", "grammar_failed")
        assert "schema or grammar" in reply.error["message"]
        assert "retry-after" not in reply.headers  # the same again would fail again
    *chunks, last = chat(site, stream=True, **fields).events
    assert any(chunk["choices"][0]["delta"].get("content") for chunk in chunks)
    assert (list(last), last["error"]["code"]) == (["error"], "grammar_failed")
    assert sorted(last["error"]) == ["code", "message", "param", "type"]
    assert complete(site, stream=True, **fields).events[-1] == last
    assert [record.error_kind for record in site.records] == ["grammar_failed"] * 4
    assert "failed" in [sequence.finish_reason for sequence in site.records[-1].sequences]


# -------------------------------------------------------------------------------------------------------- clients leave


def long_answer(engine: FakeEngine) -> FakeEngine:
    """An engine that goes on for long."""
    engine.facts = replace_facts(max_model_len=100_000)
    engine.answer = lambda asked: ids_of("on and on ") * 5000
    engine.pause_s = 0.005
    return engine


@pytest.mark.parametrize("fields", [{"stream": True}, {}, {"stream": True, "n": 3}])
def test_a_client_that_leaves_cancels_at_the_engine(fields: Any) -> None:
    engine = long_answer(FakeEngine())
    with served(engine) as site:
        connection = site.connect()
        document = {"messages": [{"role": "user", "content": "x"}], **fields}
        connection.sendall(http_bytes("/v1/chat/completions", document))
        wait_until(lambda: engine.asked and all(asked.sent > 2 for asked in engine.asked))
        connection.close()
        wait_until(lambda: all(asked.cancelled.is_set() for asked in engine.asked))
        sent = [asked.sent for asked in engine.asked]
        assert max(sent) < 5000
        wait_until(lambda: site.site.records)
        record = site.site.records[-1]
        assert {sequence.finish_reason for sequence in record.sequences} == {"cancelled"}
        assert record.status == (200 if fields else 499)
        assert len(engine.asked) == fields.get("n", 1)


def test_a_client_that_leaves_while_the_engine_is_silent() -> None:
    engine = FakeEngine()
    engine.pause_s = PATIENCE_S
    with served(engine) as site:
        connection = site.connect()
        connection.sendall(http_bytes("/v1/completions", {"prompt": "x", "stream": True}))
        wait_until(lambda: engine.asked)
        connection.close()
        wait_until(lambda: engine.asked[0].cancelled.is_set())
        wait_until(lambda: site.site.records)
        assert site.site.records[-1].status == 499


def test_a_client_that_does_not_read_is_given_up() -> None:
    engine = FakeEngine(max_model_len=2**30)
    engine.endless = lambda asked: MUCH
    with served(engine, send_timeout_s=0.2) as site:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", site.port))
        connection.sendall(http_bytes("/v1/completions", {"prompt": "x", "stream": True, "max_tokens": 10**7}))
        wait_until(lambda: engine.asked and engine.asked[0].cancelled.is_set())
        wait_until(lambda: site.site.records)
        assert site.site.records[-1].sequences[0].finish_reason == "cancelled"
        connection.close()


def test_what_a_client_does_not_read_of_several_answers_stays_with_their_streams() -> None:
    """The engine's client counts it there, and ends what is far too much; nothing in between piles up."""
    engine = FakeEngine(max_model_len=2**30)
    engine.endless = lambda asked: MUCH
    engine.pause_s = 1e-4
    with served(engine) as site:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", site.port))
        connection.sendall(http_bytes("/v1/completions", {"prompt": "x", "n": 2, "stream": True, "max_tokens": 10**7}))
        wait_until(lambda: len(engine.asked) == 2 and all(asked.sent for asked in engine.asked))

        def stands_still() -> bool:
            sent = [asked.sent for asked in engine.asked]
            time.sleep(0.25)
            return sent == [asked.sent for asked in engine.asked]

        wait_until(stands_still)
        assert not any(asked.cancelled.is_set() for asked in engine.asked)
        connection.close()
        wait_until(lambda: all(asked.cancelled.is_set() for asked in engine.asked))


def test_a_slow_reader_holds_up_nobody_else() -> None:
    engine = FakeEngine(max_model_len=2**30)
    engine.endless = lambda asked: MUCH if len(asked.ids) == 1 else []
    with served(engine) as site:
        slow = site.connect()
        slow.sendall(http_bytes("/v1/completions", {"prompt": [5], "stream": True, "max_tokens": 10**7}))
        wait_until(lambda: engine.asked and engine.asked[0].sent > 500)
        answer = site.post("/v1/completions", {"prompt": [5] * 8, "max_tokens": 99}).json()
        assert answer["choices"][0]["text"] == TEXT
        slow.close()
        wait_until(lambda: engine.asked[0].cancelled.is_set())


def test_many_clients_that_leave_leave_nothing_running() -> None:
    engine = long_answer(FakeEngine())
    with served(engine) as site:

        def one(number: int) -> None:
            with site.connect() as connection:
                connection.sendall(http_bytes("/v1/completions", {"prompt": [5], "stream": True, "max_tokens": 9999}))
                if number % 2:
                    connection.recv(1000)

        threads = [threading.Thread(target=one, args=(i,)) for i in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_until(lambda: len(site.site.records) == 40)
        assert all(asked.cancelled.is_set() for asked in engine.asked)


def test_leaving_after_the_end_is_no_cancellation() -> None:
    with served() as site:
        with site.connect() as connection:
            connection.sendall(
                http_bytes("/v1/completions", {"prompt": "x", "stream": True, "max_tokens": 64}, "Connection: close")
            )
            assert read_all(connection).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        wait_until(lambda: site.site.records)
        assert site.site.records[-1].sequences[0].finish_reason == "stop"
        assert not site.site.engine.asked[0].cancelled.is_set()


# ----------------------------------------------------------------------------------------------------------------- text


def _of_backend(tmp: Path, backend: Any) -> Tokenizer:
    write_folder(tmp, backend)
    return Tokenizer.from_folder(tmp)


@pytest.fixture(scope="module", params=["byte-level", "byte-fallback"])
def odd(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A site whose tokenizer cuts characters into bytes."""
    backend = byte_level_backend() if request.param == "byte-level" else llama_backend()
    tokenizer = _of_backend(tmp_path_factory.mktemp("tokenizer"), backend)
    eos = tokenizer._backend.token_to_id("</s>")
    vocabulary = tokenizer.vocab_size + 3  # ids without an entry can be chosen too
    engine = FakeEngine(eos_token_ids=(eos,), vocab_size=vocabulary, max_model_len=None)
    site = make_site(engine, tokenizer=tokenizer)
    site.tokenizer = tokenizer  # type: ignore[attr-defined]
    return site


PIECES = st.sampled_from(["a", "b", " ", "the", "é", "你", "🙂", "👩🏽‍🚀", "🇩🇪", "\n", "好漢", "ab", "\ufffd"])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_streamed_text_is_the_whole_text(odd: Site, data: st.DataObject) -> None:
    tokenizer: Tokenizer = odd.tokenizer  # type: ignore[attr-defined]
    text = "".join(data.draw(st.lists(PIECES, min_size=1, max_size=12)))
    ids = tokenizer.encode(text, add_special_tokens=False)
    if data.draw(st.booleans()):
        ids = ids[: data.draw(st.integers(1, len(ids)))]  # may end inside a character
    if data.draw(st.booleans()):
        ids = [*ids, *data.draw(st.lists(st.integers(0, odd.engine.facts.vocab_size - 1), max_size=4))]
    stops = data.draw(st.lists(st.lists(PIECES, min_size=1, max_size=3).map("".join), max_size=3))
    prompt = data.draw(st.lists(st.integers(3, 200), min_size=1, max_size=4))
    odd.engine.answer = lambda asked: ids
    odd.engine.burst = data.draw(st.integers(1, 3))
    fields = {"prompt": prompt, "max_tokens": len(ids), "stop": stops or None}
    whole = complete(odd, **fields).json
    chunks = complete(odd, stream=True, **fields).chunks
    expected = IncrementalDetokenizer(tokenizer, prompt, tuple(stops))
    for token_id in ids:
        expected.push(token_id)
    expected.finish()
    assert whole["choices"][0]["text"] == expected.text
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected.text
    stopped = expected.stopped or ids[-1] in odd.engine.facts.eos_token_ids
    assert whole["choices"][0]["finish_reason"] == ("stop" if stopped else "length")
    assert all(stop not in expected.text for stop in stops)
    assert not any("\ud800" <= char <= "\udfff" for char in expected.text)


def test_the_prompts_last_half_character_is_not_shown(odd: Site) -> None:
    tokenizer: Tokenizer = odd.tokenizer  # type: ignore[attr-defined]
    smile = tokenizer.encode("🥳", add_special_tokens=False)
    assert len(smile) >= 2
    odd.engine.burst = 1
    odd.engine.answer = lambda asked: smile[-1:]
    reply = complete(odd, prompt=smile[:-1], max_tokens=1)
    assert reply.json["choices"][0]["text"] == "🥳"  # completed by the answer: new text
    odd.engine.answer = lambda asked: [tokenizer._backend.token_to_id("a")]
    assert complete(odd, prompt=smile[:-1], max_tokens=1).json["choices"][0]["text"] == "a"


def test_emoji_split_in_every_way_and_utf8_in_the_stream() -> None:
    site = make_site()
    for text in ("🙂", "👩🏽‍🚀", "漢字かな", "Grüße", "🇩🇪🇫🇷"):
        site.engine.answer = lambda asked, text=text: [*ids_of(text), EOS]
        for burst in (1, 2, 3):
            site.engine.burst = burst
            reply = chat(site, stream=True)
            codecs.decode(reply.body, "utf-8", "strict")
            assert delta_text(reply.chunks) == text
    half = ids_of("ok 🙂")[:-1]
    site.engine.answer = lambda asked: half
    assert delta_text(chat(site, stream=True).chunks) == "ok \ufffd"
    assert TOKENIZER.decode(half) == "ok \ufffd"
