"""A fake engine for the tests of the HTTP server, the server in a thread of its own, and calls without a network."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import openai

from jitgraph.ipc.messages import Beat, EngineFacts, Grammar, Tokens, WireLogprobs
from jitgraph.server.app import create_app
from jitgraph.server.client_errors import EngineGone, RequestRefused
from jitgraph.server.listen import make_server
from jitgraph.server.records import RequestRecord
from jitgraph.server.settings import ServerSettings
from jitgraph.text.tokenizer import Tokenizer, bundled_tokenizer_folder
from jitgraph.types import SamplingParams

TOKENIZER = Tokenizer.from_folder(bundled_tokenizer_folder())
EOS = TOKENIZER.eos_id
assert EOS is not None
VOCABULARY = 2048
MODEL = "org/fake-model"
PATIENCE_S = 20.0
"""How long a test waits for what must happen; only a defect makes it wait so long."""


def ids_of(text: str) -> list[int]:
    """Token ids of a text, without BOS."""
    return TOKENIZER.encode(text, add_special_tokens=False)


@dataclass
class Asked:
    """One request as the fake engine got it."""

    ids: tuple[int, ...]
    params: SamplingParams
    salt: str
    prompt_logprobs: int | None
    grammar: Grammar | None
    timeout_s: float
    cancelled: threading.Event = field(default_factory=threading.Event)
    sent: int = 0


class FakeStream:
    """The records of one request."""

    def __init__(self, engine: FakeEngine, asked: Asked, answer: list[int]) -> None:
        self._engine = engine
        self._asked = asked
        self._answer = answer
        self._ended = False
        self._tokens = 0
        self._wake = asyncio.Event()

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> Tokens:
        if self._ended:
            raise StopAsyncIteration
        engine = self._engine
        if engine.refuse is not None:
            self._ended = True
            raise engine.refuse
        if engine.pause_s:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._wake.wait(), engine.pause_s)
        if self._asked.cancelled.is_set():
            self._ended = True
            return Tokens(1, (), (), finish_reason="cancelled")
        if engine.die_after is not None and self._tokens >= engine.die_after:
            self._ended = True
            raise EngineGone("the engine process has closed the connection")
        if engine.withdraw_after is not None and self._tokens >= engine.withdraw_after:
            self._ended = True
            return Tokens(1, (), (), finish_reason=engine.withdraw_as)
        return self._news()

    def _news(self) -> Tokens:
        begin = self._tokens
        endless = self._engine.endless(self._asked)
        ids = endless or self._answer[begin : begin + self._engine.burst]
        self._tokens += len(ids)
        self._asked.sent = self._tokens
        first = begin == 0
        reason = None
        if self._tokens >= len(self._answer) and not endless:
            self._ended = True
            stopped = not self._asked.params.ignore_eos and ids[-1] in self._engine.facts.eos_token_ids
            stopped |= ids[-1] in self._asked.params.stop_token_ids
            reason = "stop" if stopped else "length"
        now = time.perf_counter_ns()
        count = self._asked.params.logprobs
        wanted = self._asked.prompt_logprobs
        return Tokens(
            1,
            tuple(ids),
            (now,) * len(ids),
            () if count is None else tuple(logprobs_of(i, count) for i in ids),
            reason,
            self._engine.cached_tokens if first else 0,
            now if first else 0,
            now if first else 0,
            (None, *(logprobs_of(i, wanted) for i in self._asked.ids[1:])) if first and wanted is not None else None,
        )

    def cancel(self) -> None:
        self._asked.cancelled.set()
        self._wake.set()


def logprobs_of(token_id: int, count: int) -> WireLogprobs:
    """What the fake engine reports: the token itself at -0.5, the ids after it less and less likely."""
    top = tuple(((token_id + i) % VOCABULARY, -0.5 - i) for i in range(count))
    return WireLogprobs(token_id, -0.5, top)


class FakeEngine:
    """An engine link that answers every prompt with the same text, token by token."""

    def __init__(self, text: str = "Hello there, friend!", **facts: Any) -> None:
        self.answer: Callable[[Asked], Sequence[int]] = lambda asked: [*ids_of(text), EOS]
        self.facts = replace_facts(**facts)
        self.last_beat: Beat | None = None
        self.frozen = False
        self.gone: str | None = None
        self.asked: list[Asked] = []
        self.pause_s = 0.0
        self.burst = 1
        self.endless: Callable[[Asked], list[int]] = lambda asked: []
        """Where not empty: each record of such a request has these ids, and it never ends."""
        self.cached_tokens = 0
        self.refuse: RequestRefused | None = None
        self.die_after: int | None = None
        self.withdraw_after: int | None = None
        self.withdraw_as = "cancelled"
        self._seen_ns = time.perf_counter_ns()

    @property
    def last_seen_ns(self) -> int:
        if not self.frozen:
            self._seen_ns = time.perf_counter_ns()
        return self._seen_ns

    def submit(
        self,
        ids: Sequence[int],
        params: SamplingParams,
        *,
        salt: str = "",
        prompt_logprobs: int | None = None,
        grammar: Grammar | None = None,
        timeout_s: float = 0.0,
    ) -> FakeStream:
        if self.gone is not None:
            raise EngineGone(self.gone)
        # What the engine itself would refuse must not come so far.
        assert ids, "an empty prompt"
        assert all(type(i) is int and 0 <= i < self.facts.vocab_size for i in ids), "ids out of the vocabulary"
        limit = self.facts.max_model_len
        assert limit is None or len(ids) + params.max_tokens <= limit, "over the context"
        assert params.stop == (), "stop strings mean nothing to an engine"
        asked = Asked(tuple(ids), params, salt, prompt_logprobs, grammar, timeout_s)
        self.asked.append(asked)
        answer = list(self.answer(asked))
        if params.ignore_eos:
            answer = [i for i in answer if i not in self.facts.eos_token_ids]
            answer = (answer * params.max_tokens)[: params.max_tokens]
        return FakeStream(self, asked, answer[: params.max_tokens])

    async def stats(self) -> dict[str, Any]:
        return {}


def replace_facts(**given: Any) -> EngineFacts:
    """Facts of a small model."""
    facts: dict[str, Any] = {
        "pid": 1,
        "model": MODEL,
        "folder": None,
        "vocab_size": VOCABULARY,
        "max_model_len": 512,
        "max_streams": 8,
        "eos_token_ids": (EOS,),
        "default_params": SamplingParams(),
        "device": "cpu",
        "dtype": "float32",
        "fingerprint": "fp_0123456789",
        "emulated": True,
    }
    return EngineFacts(**{**facts, **given})


@dataclass
class FakeBackend:
    """Whoever runs the engine."""

    client: FakeEngine | None
    state: str = "ready"
    retry_after_s: float = 7.0


@dataclass
class Site:
    """A server and what it noted."""

    engine: FakeEngine
    backend: FakeBackend
    settings: ServerSettings
    records: list[RequestRecord]
    app: Any


def make_site(
    engine: FakeEngine | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    load: Callable[[EngineFacts], Tokenizer] | None = None,
    routes: Any = (),
    **settings: Any,
) -> Site:
    """The application over a fake engine."""
    engine = engine or FakeEngine()
    records: list[RequestRecord] = []
    given = ServerSettings(**{"on_request_done": records.append, **settings})
    backend = FakeBackend(engine)
    load = load if tokenizer is None else (lambda _: tokenizer)
    return Site(engine, backend, given, records, create_app(backend, given, load_tokenizer=load, routes=routes))


# ------------------------------------------------------------------------------------------------- without a network


@dataclass
class Reply:
    """A whole response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error, with its four keys and nothing else."""
        document = self.json
        assert list(document) == ["error"], document
        error = document["error"]
        assert sorted(error) == ["code", "message", "param", "type"], error
        assert isinstance(error["message"], str) and error["message"]
        assert isinstance(error["type"], str) and error["type"]
        return error

    @property
    def events(self) -> list[Any]:
        """The data of a stream's events; ``"[DONE]"`` as it is."""
        assert self.headers["content-type"].startswith("text/event-stream"), self.headers
        assert self.body.endswith(b"\n\n")
        found = []
        for event in self.body.decode().split("\n\n")[:-1]:
            assert event.startswith("data: ") and "\n" not in event, event
            data = event.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
        return found

    @property
    def chunks(self) -> list[Any]:
        """The chunks of a stream that ended well."""
        assert self.status == 200, self.body
        *chunks, done = self.events
        assert done == "[DONE]"
        return chunks


class Loop:
    """An event loop in a thread, for many calls."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE_S)


_LOOP: list[Loop] = []


def run(work: Any) -> Any:
    """Runs a coroutine on a loop that all tests of the process share."""
    if not _LOOP:
        _LOOP.append(Loop())
    return _LOOP[0].run(work)


async def call(app: Any, method: str, path: str, body: bytes = b"", headers: Sequence[tuple[str, str]] = ()) -> Reply:
    """One request, straight into the application."""
    sent: list[Any] = []
    parts = [{"type": "http.request", "body": body, "more_body": False}]
    answered = asyncio.Event()

    async def receive() -> Any:
        if parts:
            return parts.pop(0)
        await answered.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
        "state": {},
    }
    await app(scope, receive, send)
    answered.set()
    start = sent[0]
    assert start["type"] == "http.response.start"
    assert not sent[-1].get("more_body", False), "the response has no end"
    fields = {name.decode(): value.decode() for name, value in start["headers"]}
    return Reply(start["status"], fields, b"".join(part.get("body", b"") for part in sent[1:]))


def ask(site: Site, path: str, document: Any = None, **headers: str) -> Reply:
    """A POST of JSON, or a GET where there is no document."""
    given = [(name.replace("_", "-"), value) for name, value in headers.items()]
    if document is None:
        return run(call(site.app, "GET", path, b"", given))
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    if not any(name.lower() == "content-type" for name, _ in given):
        given.append(("content-type", "application/json"))
    return run(call(site.app, "POST", path, body, given))


def chat(site: Site, content: Any = "Hi", **fields: Any) -> Reply:
    """A chat request of one message."""
    return ask(site, "/v1/chat/completions", {"messages": [{"role": "user", "content": content}], **fields})


def complete(site: Site, prompt: Any = "Once", **fields: Any) -> Reply:
    """A plain completion."""
    return ask(site, "/v1/completions", {"prompt": prompt, **fields})


# ---------------------------------------------------------------------------------------------------- over a network


class Served:
    """A site under uvicorn, on a port of the loopback interface."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.server = make_server(site.app, site.settings, "127.0.0.1", self.port, grace_s=1.0)
        self.server.config.setup_event_loop = lambda: None  # type: ignore[method-assign]
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        asyncio.run(self.server.serve(sockets=[self._socket]))

    def __enter__(self) -> Served:
        self._thread.start()
        wait_until(lambda: self.server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def openai(self, **more: Any) -> openai.OpenAI:
        """The real client of OpenAI's interface."""
        return openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "any", "max_retries": 0, **more})

    def async_openai(self, **more: Any) -> openai.AsyncOpenAI:
        """Its other half."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", **{"api_key": "any", "max_retries": 0, **more})

    def connect(self) -> socket.socket:
        """A plain connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)

    def post(self, path: str, document: Any, **more: Any) -> httpx.Response:
        """A POST of JSON."""
        return httpx.post(f"{self.url}{path}", json=document, timeout=PATIENCE_S, **more)


@contextlib.contextmanager
def served(engine: FakeEngine | None = None, **more: Any) -> Iterator[Served]:
    """A running server over a fake engine."""
    with Served(make_site(engine, **more)) as found:
        yield found


def wait_until(true: Callable[[], Any]) -> None:
    """Waits until something is so, and fails where it never is."""
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


def http_bytes(path: str, document: Any, *headers: str, method: str = "POST") -> bytes:
    """A request as bytes."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    head = [f"{method} {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*head, *headers, "", ""]).encode() + body


def read_all(connection: socket.socket) -> bytes:
    """Everything up to the end of the connection."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def with_params(engine: FakeEngine, **params: Any) -> FakeEngine:
    """The engine with other default parameters."""
    engine.facts = replace_facts(default_params=replace(SamplingParams(), **params))
    return engine
