"""What the tests of the engine process share: a client that does nothing by itself, an engine that counts, a service
in a thread.

The counting engine keeps its books as the real one does: slots, a queue, pages that come back. Token *i* of an answer
is the sum of the prompt plus *i*, modulo the vocabulary.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jitgraph.engine.service import Service, ServiceOptions
from jitgraph.engine.service_hub import Hub
from jitgraph.errors import CapacityError, RequestError
from jitgraph.ipc.frames import client_framer, encode
from jitgraph.ipc.listener import Listener
from jitgraph.ipc.messages import (
    PROTOCOL,
    AskStats,
    Beat,
    EngineFacts,
    FromEngine,
    Hello,
    Message,
    Ready,
    Refused,
    Stats,
    Submit,
    Tokens,
    pack_ids,
    pack_params,
)
from jitgraph.ipc.sockets import connect
from jitgraph.types import FinishReason, Request, SamplingParams, TokenChunk

PATIENCE_S = 60.0
"""Nothing that a test waits for takes nearly so long, unless it never comes."""
VOCABULARY = 1000
FACTS = EngineFacts(
    1, "counting", None, VOCABULARY, 512, 2, (), SamplingParams(), "cpu", "float32", "jg-0", emulated=True
)
M = TypeVar("M", bound=Message)


class Talk:
    """A blocking client. ``read`` takes one record, ``until`` passes over what a test does not ask about."""

    def __init__(self, path: Path, hello: bool = True) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                self.socket = connect(path, PATIENCE_S)
                break
            except (FileNotFoundError, ConnectionRefusedError):
                assert time.monotonic() < deadline, "nobody listens"
                time.sleep(0.01)
        self._framer = client_framer()
        self._records: deque[FromEngine] = deque()
        self._tokens: dict[int, list[int]] = {}
        self._ends: dict[int, str] = {}
        if hello:
            self.say(Hello(PROTOCOL, "test"))

    def say(self, *records: Message) -> None:
        self.socket.sendall(b"".join(encode(record) for record in records))

    def read(self) -> FromEngine:
        """The next record.

        Raises:
            EOFError: the engine has closed the connection.
        """
        while not self._records:
            try:
                data = self.socket.recv(2**16)
            except ConnectionResetError:
                data = b""
            if not data:
                raise EOFError
            self._records.extend(self._framer.feed(data))
        return self._records.popleft()

    def until(self, kind: type[M]) -> M:
        """The next record of a kind."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            record = self.read()
            if isinstance(record, kind):
                return record
        raise AssertionError(f"no {kind.__name__} comes")

    def ready(self) -> Ready:
        return self.until(Ready)

    def submit(self, request_id: int, ids: list[int], **params: Any) -> None:
        self.say(submission(request_id, ids, **params))

    def answer(self, request_id: int) -> tuple[list[int], str]:
        """All tokens of a request, and why it ended; refusals as ``refused`` and the kind. What comes of others
        meanwhile is kept."""
        deadline = time.monotonic() + PATIENCE_S
        while request_id not in self._ends:
            assert time.monotonic() < deadline, f"request {request_id} has no end"
            record = self.read()
            if isinstance(record, Refused):
                self._ends[record.request_id] = f"refused {record.kind}"
            elif isinstance(record, Tokens):
                self._tokens.setdefault(record.request_id, []).extend(record.token_ids)
                if record.finish_reason is not None:
                    self._ends[record.request_id] = record.finish_reason
        return self._tokens.pop(request_id, []), self._ends.pop(request_id)

    def stats(self) -> dict[str, Any]:
        self.say(AskStats())
        return self.until(Stats).values

    def settled(self) -> Beat:
        """The first sign of life that says that nothing runs and nothing waits."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            beat = self.until(Beat)
            if beat.running + beat.waiting == 0:
                return beat
        raise AssertionError("the engine never comes to rest")

    def closed(self) -> list[FromEngine]:
        """Everything up to the end of the connection."""
        records = []
        deadline = time.monotonic() + PATIENCE_S
        with contextlib.suppress(EOFError):
            while time.monotonic() < deadline:
                records.append(self.read())
            raise AssertionError("the connection is never closed")
        return records

    def close(self) -> None:
        self.socket.close()


def submission(request_id: int, ids: list[int], timeout_s: float = 0.0, **params: Any) -> Submit:
    return Submit(request_id, pack_ids(ids), pack_params(SamplingParams(**params)), timeout_s=timeout_s)


def counted(ids: list[int], tokens: int) -> list[int]:
    """What the counting engine answers."""
    return [(sum(ids) + i) % VOCABULARY for i in range(tokens)]


class Load(NamedTuple):
    running: int
    waiting: int
    free_pages: int
    total_pages: int
    steps: int


@dataclass
class Counting:
    """An engine without a model: two streams, one page a request, and a gate that holds its steps back."""

    express: bool = True
    waiting: deque[Request] = field(default_factory=deque)
    running: dict[int, tuple[Request, int]] = field(default_factory=dict)
    pages: int = 2
    steps: int = 0
    fired: list[int] = field(default_factory=list)
    booked: list[int] = field(default_factory=list)
    validated: list[Request] = field(default_factory=list)
    errors: deque[BaseException] = field(default_factory=deque)
    """Raised by the next steps, which end every request, as a launch that fails does."""
    idle_errors: deque[BaseException] = field(default_factory=deque)
    armed: bool = False
    capturing: bool = False
    pieces: int = 0
    rehearsed: int = 0
    news: list[TokenChunk] = field(default_factory=list)
    foresees: bool = False
    """Whether it gives the first and the last token of a lone request ahead of their books."""
    foreseen: int = 0
    fails_after_last: bool = False
    """Whether the step after such a last token fails."""
    told: bool = False
    gate: threading.Semaphore | None = None
    """Where there is one, each step takes one."""

    def validate(self, request: Request) -> None:
        self.validated.append(request)
        if not request.prompt_token_ids:
            raise RequestError("the prompt is empty: give at least one token")
        if max(request.prompt_token_ids) >= VOCABULARY:
            raise RequestError("not in the vocabulary")
        if request.params.max_tokens > 400:
            raise CapacityError("too long for the cache")

    def fire(self, ids: tuple[int, ...], params: SamplingParams, salt: str) -> Any:
        assert not self.running or not self.armed
        if not self.express or not self.armed or not ids or max(ids) >= VOCABULARY or params.max_tokens > 400:
            return None
        self.armed = False
        self.fired.append(sum(ids))
        return object()

    def rehearse(self) -> None:
        self.rehearsed += 1

    def book(self, request: Request, shot: Any) -> None:
        self.booked.append(request.request_id)
        self.enqueue(request)
        self.launch()

    def enqueue(self, request: Request) -> None:
        assert request.request_id not in self.running
        self.armed = False
        self.waiting.append(request)

    def launch(self) -> None:
        while self.waiting and self.pages:
            request = self.waiting.popleft()
            self.pages -= 1
            self.running[request.request_id] = (request, 0)

    def cancel(self, request_id: int) -> None:
        if self.running.pop(request_id, None) is not None:
            self.pages += 1
        self.waiting = deque(one for one in self.waiting if one.request_id != request_id)

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting or self.news)

    @property
    def idle_work(self) -> bool:
        return not self.busy and (not self.armed or self.capturing)

    def work_while_idle(self) -> bool:
        self.pieces += 1
        if self.idle_errors:
            raise self.idle_errors.popleft()
        self.capturing, self.armed = False, True
        return False

    def early_token(self, rehearse: Any = None) -> list[TokenChunk] | None:
        if not self.foresees or self.told or self.news or self.errors or self.waiting or len(self.running) != 1:
            return None
        [(identity, (request, made))] = self.running.items()
        last = made + 1 == request.params.max_tokens
        if made and not last:
            return None
        self.foreseen += 1
        self.told = True
        if last and self.fails_after_last:
            self.fails_after_last = False
            self.errors.append(RuntimeError("no books"))
        token = (sum(request.prompt_token_ids) + made) % VOCABULARY
        reason = FinishReason.LENGTH if last else None
        return [TokenChunk(identity, token, time.perf_counter_ns(), finish_reason=reason)]

    def step(self) -> list[TokenChunk]:
        if self.news:
            news, self.news = self.news, []
            return news
        if self.gate is not None and not self.gate.acquire(timeout=0.01):
            return []
        if self.errors:
            for identity in [*self.running, *(one.request_id for one in self.waiting)]:
                self.cancel(identity)
                self.news.append(TokenChunk(identity, None, 0, finish_reason=FinishReason.CANCELLED))
            self.told = False
            raise self.errors.popleft()
        self.launch()
        self.steps += 1
        chunks = []
        for identity, (request, made) in list(self.running.items()):
            token = (sum(request.prompt_token_ids) + made) % VOCABULARY
            last = made + 1 == request.params.max_tokens
            chunks.append(
                TokenChunk(identity, token, time.perf_counter_ns(), finish_reason=FinishReason.LENGTH if last else None)
            )
            if last:
                self.cancel(identity)
            else:
                self.running[identity] = (request, made + 1)
        told, self.told = self.told, False
        return [] if told else chunks

    def load(self) -> Load:
        return Load(len(self.running), len(self.waiting), self.pages, 2, self.steps)

    def begun(self) -> set[int]:
        return set(self.running)

    def counters(self) -> dict[str, Any]:
        return {"steps": self.steps}


class Served:
    """A service over an engine, in a thread of its own."""

    def __init__(
        self,
        path: Path,
        engine: Any,
        report: Any,
        facts: EngineFacts,
        most_unsent: int | None,
        grammars: Any,
        **options: Any,
    ) -> None:
        self.path = path
        self.engine = engine
        self.tidied = self.tidied_young = 0
        unsent = {} if most_unsent is None else {"most_unsent": most_unsent}
        self.hub = Hub(Listener(path), **unsent)
        ready = Ready(facts, {"load": 1.0}, {"load": 2.0})
        self.service = Service(engine, report, self.hub, ready, ServiceOptions(**options), self, grammars)
        self.result: str | None = "still running"
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        self._talks: list[Talk] = []

    def _run(self) -> None:
        self.result = self.service.run()

    def collect(self) -> None:
        self.tidied += 1

    def collect_young(self) -> None:
        self.tidied_young += 1

    def talk(self, ready: bool = True) -> Talk:
        """A client; one that has heard that the engine is ready."""
        talk = Talk(self.path)
        self._talks.append(talk)
        if ready:
            talk.ready()
        return talk

    def ended(self) -> str | None:
        """Waits for the end; why it failed."""
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive(), "the service does not end"
        return self.result

    def stop(self) -> None:
        self.service.drain(0.0)
        self.ended()
        for talk in self._talks:
            talk.close()


@contextlib.contextmanager
def serving(
    folder: Path,
    engine: Any = None,
    report: Any = None,
    facts: EngineFacts = FACTS,
    most_unsent: int | None = None,
    grammars: Any = None,
    **options: Any,
) -> Iterator[Served]:
    """A service for the length of a test; nothing may be left of it."""
    folder.chmod(0o700)
    engine = Counting() if engine is None else engine
    served = Served(folder / "engine.sock", engine, report or engine, facts, most_unsent, grammars, **options)
    try:
        yield served
    finally:
        served.stop()
    assert not served.path.exists(), "the socket's file is left"
    if isinstance(engine, Counting):
        assert engine.pages == 2 and not engine.running and not engine.waiting, "a request is left"


def wait_for(condition: Any, what: str) -> None:
    """Waits for something that another thread does."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(1e-3)


def small_buffers(talk: Talk) -> None:
    """Lets little wait inside the kernel, so that a test of a slow reader needs few bytes."""
    talk.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
