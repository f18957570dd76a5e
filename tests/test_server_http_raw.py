"""The HTTP server against what is no proper request: raw sockets, caps, keys, routes. And its outward state."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import Any

import pytest
from server_fakes import (
    MODEL,
    TOKENIZER,
    FakeEngine,
    Reply,
    Served,
    Site,
    ask,
    call,
    chat,
    complete,
    http_bytes,
    ids_of,
    make_site,
    read_all,
    run,
    served,
    wait_until,
)
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from jitgraph import __version__
from jitgraph.errors import ConfigError
from jitgraph.ipc.messages import PROTOCOL, Beat
from jitgraph.server.auth import Keys
from jitgraph.server.openapi import description
from jitgraph.server.settings import ServerSettings

CHAT = "/v1/chat/completions"
GOOD = {"messages": [{"role": "user", "content": "x"}]}


@pytest.fixture(scope="module")
def site() -> Any:
    with served(max_body_bytes=100_000, max_header_bytes=8192, head_timeout_s=0.5, body_timeout_s=0.5) as found:
        yield found


def exchange(site: Served, data: bytes) -> Reply:
    """What the server answers to these bytes, up to the end of the connection."""
    with site.connect() as connection:
        connection.sendall(data)
        return parsed(read_all(connection))


def parsed(data: bytes) -> Reply:
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return Reply(int(first.split()[1]), headers, body)


CLOSE = "Connection: close"

# --------------------------------------------------------------------------------------------------- what is no request

NO_HTTP = [
    b"GARBAGE\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64,  # a client that speaks TLS
    b"\x00" * 100,
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n",
    b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/models HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    b"POST /v1/models HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nBad Header: y\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
]


@pytest.mark.parametrize("data", NO_HTTP)
def test_what_is_no_http_gets_an_error_and_harms_nobody(site: Served, data: bytes) -> None:
    reply = exchange(site, data)
    assert 400 <= reply.status < 500, reply
    assert reply.error["type"] == "invalid_request_error"
    assert site.post(CHAT, GOOD).status_code == 200


def test_heads_that_never_end_are_cut_off(site: Served) -> None:
    with site.connect() as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Long: ")
        sent = 0
        try:
            while sent < 2**22:
                sent += connection.send(b"a" * 4096)
        except OSError:
            pass
        assert sent < 2**22
    reply = exchange(site, http_bytes("/v1/models", b"", "X-Long: " + "a" * 9000, method="GET"))
    assert (reply.status, reply.error["code"]) == (431, "head_too_large")
    many = [f"X-{i}: y" for i in range(101)]
    assert exchange(site, http_bytes("/v1/models", b"", *many, method="GET")).status == 431


def chunked(path: str, document: Any, *headers: str, rest: bytes = b"\r\n") -> bytes:
    """A request whose body is one chunk; ``rest`` stands behind the last, empty one."""
    body = json.dumps(document).encode()
    kind = ("Host: x", "Content-Type: application/json", "Transfer-Encoding: chunked")
    head = "\r\n".join([f"POST {path} HTTP/1.1", *kind, *headers, "", ""]).encode()
    return head + b"%x\r\n%s\r\n0\r\n" % (len(body), body) + rest


def test_trailers_are_no_headers() -> None:
    """Neither a key nor a name comes from behind the body, and the next request finds nothing of it."""
    trailers = b"Authorization: Bearer secret\r\nX-Request-Id: late\r\nExpect: 100-continue\r\n\r\n"
    follower = http_bytes("/v1/models", b"", CLOSE, method="GET")
    with served(api_keys=("secret",)) as closed:
        reply = exchange(closed, chunked(CHAT, GOOD, rest=trailers))
        assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
    with served() as open_to_all:
        with open_to_all.connect() as connection:
            connection.sendall(chunked(CHAT, GOOD, rest=trailers) + follower)
            data = read_all(connection)
        assert data.count(b"HTTP/1.1 200 OK") == 2 and b"late" not in data and b"100 Continue" not in data
        assert len(open_to_all.site.records) == 2
        many = b"".join(b"X-%d: y\r\n" % i for i in range(150)) + b"\r\n"
        assert exchange(open_to_all, chunked(CHAT, GOOD, CLOSE, rest=many)).status == 200


ENDLESS = {
    "trailers": (chunked(CHAT, GOOD, rest=b""), b"X-Trailer: " + b"a" * 4000 + b"\r\n"),
    "a trailer": (chunked(CHAT, GOOD, rest=b"X-Trailer: "), b"a" * 4096),
    "a chunk's extension": (chunked(CHAT, GOOD, rest=b"")[:-3] + b"5;x=", b"a" * 4096),
    "trailers where no body is read": (chunked("/v1/nothing", GOOD, rest=b""), b"X-Trailer: " + b"a" * 4000 + b"\r\n"),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_what_is_beside_the_body_is_capped_too(site: Served, what: str) -> None:
    begin, more = ENDLESS[what]
    with site.connect() as connection:
        connection.sendall(begin)
        sent, data = 0, b""
        with contextlib.suppress(OSError):  # what was sent and not read resets the connection
            while sent < 2**24:
                sent += connection.send(more)
        with contextlib.suppress(OSError):
            data = read_all(connection)
        assert sent < 2**24, "the server goes on reading"
        assert data == b"" or parsed(data).status in (404, 431)
    assert site.post(CHAT, GOOD).status_code == 200


def test_the_cap_beside_the_body_answers_with_an_error(site: Served) -> None:
    """The cap is looked at before a read, so a client that sends one byte more and waits gets its answer."""
    with site.connect() as connection:
        for part in (chunked(CHAT, GOOD, rest=b"X-Trailer: "), b"a" * 10_000, b"a"):
            connection.sendall(part)
            time.sleep(0.05)  # so that each is a read of its own
        reply = parsed(read_all(connection))
    assert (reply.status, reply.error["code"]) == (431, "head_too_large")
    assert reply.headers["connection"] == "close"


def test_small_chunks_with_small_extensions_are_a_body(site: Served) -> None:
    body = json.dumps({**GOOD, "user": "x" * 20_000}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n{CLOSE}"
    chunks = b"".join(b"1;a=bc\r\n%c\r\n" % byte for byte in body)  # 10 bytes beside each byte of it
    assert exchange(site, head.encode() + b"\r\n\r\n" + chunks + b"0\r\n\r\n").status == 200


def test_an_error_never_falls_into_another_answer() -> None:
    engine = FakeEngine()
    engine.endless = lambda asked: ids_of("word ")
    engine.pause_s = 0.01
    with served(engine) as busy, busy.connect() as connection:
        connection.sendall(http_bytes(CHAT, {**GOOD, "stream": True, "max_tokens": 400}))
        wait_until(lambda: engine.asked and engine.asked[0].sent > 3)
        connection.sendall(b"GARBAGE\r\n\r\n")  # where the next request should begin
        data = read_all(connection)
        assert data.count(b"HTTP/1.1") == 1 and b"invalid_http" not in data
        wait_until(engine.asked[0].cancelled.is_set)


def test_heads_and_bodies_that_do_not_arrive_are_given_up(site: Served) -> None:
    reply = exchange(site, b"GET /v1/models HTTP/1.1\r\nHost:")
    assert (reply.status, reply.error["code"]) == (408, "request_timeout")
    with site.connect() as connection:
        assert read_all(connection) == b""  # connected and said nothing
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n"
    reply = exchange(site, head.encode() + b"{")
    assert (reply.status, reply.error["code"]) == (408, "request_timeout")
    with site.connect() as connection:
        connection.sendall(head.encode() + b"{")  # and leaves
    assert site.post(CHAT, GOOD).status_code == 200


def test_bodies_over_the_cap(site: Served) -> None:
    big = json.dumps({"messages": [{"role": "user", "content": "x" * 200_000}]}).encode()
    reply = exchange(site, http_bytes(CHAT, big, CLOSE))
    assert (reply.status, reply.error["code"]) == (413, "request_too_large")
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = b"".join(b"%x\r\n%s\r\n" % (1000, b"x" * 1000) for _ in range(200)) + b"0\r\n\r\n"
    assert exchange(site, head.encode() + chunks).status == 413
    huge = b"x" * (8 * 2**20)  # the answer must get through although the client is still sending
    assert site.post(CHAT, {"messages": huge.decode()}).status_code == 413
    assert site.site.engine.asked == [] or all(len(asked.ids) < 100 for asked in site.site.engine.asked)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b"{'a': 1}",
        b'{"messages": NaN}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b"[" * 90_000,
        b'{"messages":' * 8_000,
        b'{"messages":[{"role":"user","content":"x"}],"metadata":' + b'{"a":' * 9_000,
        b'{"messages":[{"role":"user","content":"x"}],"response_format":' + b"[" * 50_000,
        b'{"messages":[{"role":"user","content":"x"}],"temperature":' + b"9" * 5000 + b"}",
        b'{"messages":[{"role":"user","content":"x"}],"seed":1e400}',
        b'{"messages":[{"role":"user","content":"x"}]}{}',
        b'\xef\xbb\xbf{"messages":[]}',
    ],
)
def test_bodies_that_are_no_request(site: Served, body: bytes) -> None:
    reply = exchange(site, http_bytes(CHAT, body, CLOSE))
    assert reply.status == 400, reply
    assert reply.error["type"] == "invalid_request_error"


def test_the_body_must_be_declared_as_json(site: Served) -> None:
    """A page of another site can send forms and plain text to this machine, but not JSON."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        reply = ask(site.site, CHAT, GOOD, content_type=kind)
        assert (reply.status, reply.error["code"]) == (415, "unsupported_media")
    assert ask(site.site, CHAT, GOOD, content_type="application/json; charset=utf-8").status == 200


def test_requests_one_after_the_other_on_one_connection(site: Served) -> None:
    with site.connect() as connection:
        both = http_bytes(CHAT, GOOD) + http_bytes("/v1/models", b"", CLOSE, method="GET")
        connection.sendall(both)
        data = read_all(connection)
    assert data.count(b"HTTP/1.1 200 OK") == 2
    assert data.index(b"chat.completion") < data.index(b'"object":"list"')


# ---------------------------------------------------------------------------------------------------------- routes, ids


def test_routes_and_methods_that_do_not_exist() -> None:
    plain = make_site()
    for path in ("/", "/v1", "/v1/models/", "/v1/embeddings", "/docs", "/V1/models", "//v1/models", "/v1/../health"):
        reply = ask(plain, path)
        assert (reply.status, reply.error["code"]) in ((404, None), (404, "model_not_found")), path
    for method, path in (("GET", CHAT), ("POST", "/v1/models"), ("DELETE", "/v1/models"), ("PUT", "/health")):
        reply = run(call(plain.app, method, path))
        assert reply.status == 405 and reply.error["type"] == "invalid_request_error"
        assert reply.headers["allow"]
    assert run(call(plain.app, "OPTIONS", CHAT)).status == 405
    assert {record.route for record in plain.records} == {"other", "/v1/models/{id}"}


def test_request_ids() -> None:
    plain = make_site()
    assert ask(plain, "/v1/models", x_request_id="abc-1.2:3_4").headers["x-request-id"] == "abc-1.2:3_4"
    made = ask(plain, "/v1/models").headers["x-request-id"]
    assert len(made) == 32 and ask(plain, "/v1/models").headers["x-request-id"] != made
    for bad in ("a" * 129, "a b", "é", 'a"b', ""):
        reply = ask(plain, "/v1/models", x_request_id=bad)
        assert reply.headers["x-request-id"] != bad and len(reply.headers["x-request-id"]) == 32
    reply = chat(plain)
    assert reply.headers["x-request-id"] not in reply.json["id"]  # a client's id is never used as a key
    assert plain.records[-1].request_id == reply.headers["x-request-id"]
    assert ask(plain, "/nothing").headers["x-request-id"]


def test_a_defect_is_a_500_that_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    broken = make_site()
    broken.engine.answer = lambda asked: 1 / 0  # type: ignore[arg-type,return-value]
    reply = chat(broken)
    assert (reply.status, reply.error["code"]) == (500, "internal_error")
    assert "division" not in reply.body.decode() and "ZeroDivisionError" in caplog.text
    assert broken.records[-1].status == 500 and broken.records[-1].error_kind == "internal_error"


def test_hooks_cannot_harm_a_request() -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("the hook")

    assert chat(make_site(on_request_done=fail)).status == 200


def test_requests_beyond_the_most_open_ones_are_turned_away() -> None:
    engine = FakeEngine()
    engine.pause_s = 0.2
    with served(engine, max_open_requests=2) as busy:
        connections = [busy.connect() for _ in range(2)]
        for connection in connections:
            connection.sendall(http_bytes(CHAT, GOOD, CLOSE))
        wait_until(lambda: len(engine.asked) == 2)
        reply = busy.post(CHAT, GOOD)
        assert reply.status_code == 429 and reply.headers["retry-after"] == "1"
        assert reply.json()["error"]["code"] == "rate_limit_exceeded"
        assert busy.post("/tokenize", {"prompt": "x"}).status_code == 429
        engine.pause_s = 0.0
        assert [parsed(read_all(connection)).status for connection in connections] == [200, 200]  # none lost
        assert busy.post(CHAT, GOOD).status_code == 200


# -------------------------------------------------------------------------------------------------------------- the key

PATHS = ["/v1/models", "/v1/models/x", "/version", "/openapi.json", "/metrics", "/", "/nothing", "/page"]


def test_every_route_but_health_and_ready_wants_the_key() -> None:
    async def scrape(_: str) -> tuple[bytes, str]:
        return b"x 1\n", "text/plain"

    async def page(_: Any) -> PlainTextResponse:
        return PlainTextResponse("page")

    closed = make_site(api_keys=("secret", "other"), routes=[Route("/page", page)], scrape=scrape)
    for path in PATHS:
        reply = ask(closed, path)
        assert (reply.status, reply.error["code"]) == (401, "invalid_api_key"), path
        assert reply.headers["www-authenticate"] == "Bearer"
        assert ask(closed, path, authorization="Bearer secret").status != 401
    for path in (CHAT, "/v1/completions", "/tokenize", "/detokenize"):
        assert ask(closed, path, GOOD).status == 401
    for path in ("/health", "/ready"):
        assert ask(closed, path).status == 200
    for wrong in ("secret", "Basic secret", "Bearer", "Bearer ", "Bearer secre", "Bearer secrets", "Bearer \xe9"):
        assert ask(closed, "/v1/models", authorization=wrong).status == 401
    assert ask(closed, "/v1/models", authorization="bearer other").status == 200
    assert closed.records[-1].client == "key-2"
    assert "secret" not in repr(closed.settings)
    assert ask(closed, "/page", authorization="Bearer secret").body == b"page"


def test_keys_are_compared_in_constant_time_whichever_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    keys = Keys(["a", "bb", "ccc"])
    for given in (b"Bearer a", b"Bearer ccc", b"Basic eDpiYg=="):
        keys.caller(given)
    assert len(compared) == 9  # every key each time
    assert {len(side) for pair in compared for side in pair} == {32}  # and never by its own length


def test_settings_are_checked() -> None:
    for wrong in ({"api_keys": ("",)}, {"served_names": ("",)}, {"max_n": 0}, {"silence_s": -1.0}):
        with pytest.raises(ConfigError):
            ServerSettings(**wrong)


# ----------------------------------------------------------------------------------------------- state and small routes


def test_health_and_readiness_by_state() -> None:
    plain = make_site(silence_s=0.2)
    expected = {
        "ready": (200, 200),
        "starting": (200, 503),
        "draining": (200, 503),
        "restarting": (503, 503),
        "stopped": (503, 503),
        "failed": (503, 503),
    }
    for state, statuses in expected.items():
        plain.backend.state = state
        plain.backend.client = plain.engine if state in ("ready", "draining") else None
        for path, status in zip(("/health", "/ready"), statuses, strict=True):
            reply = ask(plain, path)
            assert reply.status == status, (state, path)
            if status == 503:
                assert reply.error["type"] == "service_unavailable_error" and reply.headers["retry-after"] == "7"
        assert chat(plain).status == (200 if state == "ready" else 503)
    assert not [record for record in plain.records if record.route in ("/health", "/ready")]


def test_an_engine_that_hangs_or_died_fails_health() -> None:
    plain = make_site(silence_s=0.2)
    assert ask(plain, "/health").json == {"status": "ready"}
    plain.engine.frozen = True
    time.sleep(0.25)
    for path in ("/health", "/ready"):
        assert (ask(plain, path).status, ask(plain, path).error["code"]) == (503, "engine_silent")
    plain.engine.frozen = False
    assert ask(plain, "/health").status == 200
    plain.engine.gone = "the engine process has closed the connection"
    assert ask(plain, "/health").status == 503 and ask(plain, "/ready").status == 503


def test_a_long_step_is_no_illness_unless_it_is_much_too_long() -> None:
    plain = make_site(silence_s=0.2)
    for away_s, longest_s, status in ((0.1, 0.0, 200), (0.3, 0.0, 503), (0.3, 0.1, 200), (0.5, 0.1, 503)):
        plain.engine.last_beat = Beat(1, 1, 0, 9, 9, 7, away_s, longest_s)
        assert [ask(plain, path).status for path in ("/health", "/ready")] == [status, status]


def test_an_engine_that_was_told_to_end_is_healthy_and_not_ready() -> None:
    plain = make_site()
    plain.engine.last_beat = Beat(1, 1, 0, 9, 9, 7, draining=True)
    assert ask(plain, "/health").status == 200
    ready = ask(plain, "/ready")
    assert ready.status == 503 and "is ending" in ready.error["message"] and ready.headers["retry-after"] == "7"


def test_a_checkpoint_whose_tokenizer_cannot_be_used() -> None:
    broken = make_site(FakeEngine(folder="/nowhere"))
    for reply in (ask(broken, "/ready"), chat(broken)):
        assert (reply.status, reply.error["code"]) == (500, "checkpoint_error")


def test_small_routes() -> None:
    async def scrape(accept: str) -> tuple[bytes, str]:
        return f"x{{accept={accept!r}}} 1\n".encode(), "text/plain; version=0.0.4"

    plain = make_site(scrape=scrape, served_names=("first", "second"))
    assert ask(plain, "/version").json == {"version": __version__, "protocol": PROTOCOL}
    reply = ask(plain, "/metrics", accept="text/plain")
    assert (reply.body, reply.headers["content-type"]) == (b"x{accept='text/plain'} 1\n", "text/plain; version=0.0.4")
    assert ask(make_site(), "/metrics").status == 404
    assert [model["id"] for model in ask(plain, "/v1/models").json["data"]] == ["first", "second"]
    assert ask(plain, "/v1/models/second").json["max_model_len"] == 512
    assert ask(plain, f"/v1/models/{MODEL}").error["code"] == "model_not_found"
    assert chat(plain, model="second").json["model"] == "first"
    assert chat(plain, model=MODEL).status == 404


def test_the_description_covers_every_route_and_field() -> None:
    async def scrape(_: str) -> tuple[bytes, str]:
        return b"", "text/plain"

    plain = make_site(scrape=scrape)
    document = ask(plain, "/openapi.json").json
    assert document == json.loads(json.dumps(description()))
    served_paths = {route.path.replace(":path", "") for route in plain.app.routes}
    assert set(document["paths"]) == served_paths
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "max_completion_tokens", "top_k", "tools", "response_format"} <= set(fields)
    assert document["components"]["schemas"]["ChatRequest"]["additionalProperties"] is False
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation["responses"]["200"] and (path in ("/health", "/ready") or "401" in operation["responses"])
            assert method == ("post" if "requestBody" in operation else "get")


def test_tokenize_and_detokenize(site: Served) -> None:
    plain = site.site
    reply = ask(plain, "/tokenize", {"prompt": "Hello 🙂", "return_token_strs": True}).json
    assert reply["tokens"] == TOKENIZER.encode("Hello 🙂")
    assert (reply["count"], reply["max_model_len"]) == (len(reply["tokens"]), 512)
    assert reply["token_strs"][0] == "<|begin|>"
    assert ask(plain, "/detokenize", {"tokens": reply["tokens"]}).json == {"prompt": "<|begin|>Hello 🙂"}
    skipped = ask(plain, "/detokenize", {"tokens": reply["tokens"], "skip_special_tokens": True}).json
    assert skipped == {"prompt": "Hello 🙂"}
    bare = ask(plain, "/tokenize", {"prompt": "Hello", "add_special_tokens": False, "model": MODEL}).json["tokens"]
    assert bare == TOKENIZER.encode("Hello", add_special_tokens=False)
    messages = [{"role": "user", "content": "Hi"}]
    of_chat = ask(plain, "/tokenize", {"messages": messages}).json["tokens"]
    chat(plain, "Hi")
    assert tuple(of_chat) == plain.engine.asked[-1].ids  # the same that chat would send
    assert ask(plain, "/tokenize", {"messages": messages, "add_generation_prompt": False}).json["count"] < len(of_chat)
    for wrong, param in (
        ({}, "prompt"),
        ({"prompt": "x", "messages": messages}, "prompt"),
        ({"messages": []}, "messages"),
    ):
        assert ask(plain, "/tokenize", wrong).error["param"] == param
    for ids in ([-1], [2048], [10**12]):
        assert ask(plain, "/detokenize", {"tokens": ids}).error["param"] == "tokens"
    assert ask(plain, "/detokenize", {"tokens": []}).json == {"prompt": ""}
    long = ask(plain, "/detokenize", {"tokens": [300] * 9_000}).json["prompt"]
    assert long == TOKENIZER.decode([300] * 9_000) != ""
    capped = make_site(max_detokenize_ids=3)
    assert ask(capped, "/detokenize", {"tokens": [5] * 4}).error["param"] == "tokens"


def test_a_websocket_is_turned_away(site: Served) -> None:
    upgrade = ["Upgrade: websocket", "Sec-WebSocket-Key: x", "Sec-WebSocket-Version: 13", "Connection: Upgrade"]
    with site.connect() as connection:
        connection.sendall(http_bytes("/v1/models", b"", *upgrade, method="GET"))
        connection.shutdown(socket.SHUT_WR)
        assert b" 101 " not in read_all(connection)
    assert site.post(CHAT, GOOD).status_code == 200


def test_one_record_for_each_request() -> None:
    plain: Site = make_site()
    chat(plain, stream=True, n=2, model=MODEL)
    [record] = plain.records
    assert (record.route, record.model, record.client, record.status) == (CHAT, MODEL, "anonymous", 200)
    assert record.streamed and record.error_kind is None and len(record.sequences) == 2
    for sequence in record.sequences:
        assert (sequence.finish_reason, sequence.completion_tokens) == ("stop", 10)
        assert sequence.prompt_tokens == len(plain.engine.asked[0].ids)
        assert record.received_ns <= sequence.submitted_ns <= sequence.first_token_ns <= sequence.last_token_ns
    assert record.finished_ns >= record.sequences[-1].last_token_ns
    chat(plain, model="other")
    assert (plain.records[-1].status, plain.records[-1].error_kind) == (404, "model_not_found")


def test_the_log_names_the_model_that_answered_where_the_request_names_none() -> None:
    plain = make_site()
    for found in (plain, make_site(served_names=("short", "long"))):
        chat(found)
        complete(found, stream=True)
        ask(found, "/tokenize", {"prompt": "x"})
        ask(found, CHAT, b"{")  # refused before its model is known
        found.backend.client = None
        chat(found)
        name = (found.settings.served_names or (MODEL,))[0]
        assert [record.as_document()["model"] for record in found.records] == [name] * 5
        assert [record.status for record in found.records] == [200, 200, 200, 400, 503]
    ask(plain, "/version")
    assert plain.records[-1].as_document()["model"] is None
    chat(plain, model="other")
    assert plain.records[-1].as_document()["model"] == "other"
