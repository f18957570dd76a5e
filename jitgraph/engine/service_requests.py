"""The requests of all clients inside one engine process: checked, handed over, answered, withdrawn. No torch.

Engine's thread. Always holds: a request stands in three books (here, in its client's and in the engine's) or in none.
"""

from __future__ import annotations

import heapq
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from jitgraph.engine.service_figures import Figures
from jitgraph.engine.service_hub import Client, Hub
from jitgraph.engine.service_reader import RequestReader
from jitgraph.errors import CapacityError, RequestError
from jitgraph.ipc.frames import ProtocolError, encode
from jitgraph.ipc.messages import Refused, Submit, Tokens, WireLogprobs
from jitgraph.types import FinishReason, Grammar, Request, SamplingParams, TokenChunk, TokenLogprobs

_CANCELLED = FinishReason.CANCELLED.value
_MOST_ENDED = 256
"""So many requests that have ended may stand among the deadlines before they are sorted out."""
_LOGGER = logging.getLogger(__name__)


class RequestEngine(Protocol):
    """What requests need of an engine; ``Engine`` has it."""

    def fire(self, ids: tuple[int, ...], params: SamplingParams, salt: str) -> Any: ...

    def rehearse(self) -> None: ...

    def book(self, request: Request, shot: Any) -> None: ...

    def validate(self, request: Request) -> None: ...

    def enqueue(self, request: Request) -> None: ...

    def cancel(self, request_id: int) -> None: ...


class Compiling(Protocol):
    """A grammar on its way; ``grammar.Compilation`` is one."""

    @property
    def done(self) -> bool: ...

    def result(self) -> object: ...


class Grammars(Protocol):
    """Who compiles grammars; ``grammar.GrammarCompiler`` does."""

    def start(self, grammar: Grammar, on_done: Callable[[], None]) -> Compiling: ...


@dataclass(frozen=True)
class Limits:
    """How much is accepted."""

    max_streams: int
    max_queued: int
    """Requests that wait besides those that run; one more is refused as ``overloaded``."""
    max_model_len: int | None
    """Tokens of prompt and output together; None where there is no end."""


@dataclass(eq=False)
class Live:
    """A request on its way."""

    __slots__ = ("client", "identity", "launched_ns", "received_ns", "request_id", "told")
    client: Client
    request_id: int
    """The client's name for it."""
    identity: int
    """The engine's."""
    received_ns: int
    launched_ns: int
    """0 until its first step has been launched."""
    told: bool
    """Whether its client has had its first token."""


class _EngineFailed(Exception):
    """The engine raised something that is not the request's fault."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class Requests:
    """The books of one engine process."""

    def __init__(
        self,
        engine: RequestEngine,
        hub: Hub,
        limits: Limits,
        figures: Figures,
        on_error: Callable[[Exception], None],
        grammars: Grammars | None = None,
    ) -> None:
        """``on_error`` hears of an engine that failed over a request. ``grammars``: who compiles them beside the token
        path; None lets ``validate`` do it, which waits."""
        self._engine = engine
        self._hub = hub
        self._limits = limits
        self._figures = figures
        self._on_error = on_error
        self._grammars = grammars
        self._compiling: list[tuple[Live, Request, Compiling]] = []
        self._reader = RequestReader(limits.max_model_len)
        self._live: dict[int, Live] = {}
        self._deadlines: list[tuple[float, int, float]] = []
        """A heap: ``time.monotonic`` at which a request must be done, its identity, and the seconds it was given; ended
        ones may still be among them."""
        self._next_identity = 1
        self._most = limits.max_streams + limits.max_queued
        self.unlaunched: deque[Live] = deque()
        """Those whose first step has not been launched, oldest first; ended ones may still be among them."""
        self.closed_because = ""
        """Why no request is taken any more; empty while they are."""

    @property
    def compiling(self) -> bool:
        """Whether any request waits for its grammar."""
        return bool(self._compiling)

    def __len__(self) -> int:
        return len(self._live)

    # -------------------------------------------------------------------------------------------------------- incoming

    def submit(self, client: Client, record: Submit) -> None:
        """Hands a request to the engine, by the shortest way where it is idle, or refuses it."""
        received_ns = time.perf_counter_ns()
        request_id = record.request_id
        if request_id in client.requests:
            return self._refuse(client, request_id, "request", f"request id {request_id} is in use: choose another")
        if self.closed_because:
            return self._refuse(client, request_id, "draining", self.closed_because)
        if len(self._live) >= self._most:
            return self._overloaded(client, request_id)
        identity = self._next_identity
        self._next_identity += 1
        live = Live(client, request_id, identity, received_ns, 0, False)
        self._guarded(live, lambda: self._take(live, self._reader.read(identity, record)))
        if record.timeout_s and identity in self._live:
            self._limit(identity, record.timeout_s)

    def _limit(self, identity: int, timeout_s: float) -> None:
        """Notes when a request must be done."""
        deadlines = self._deadlines
        if len(deadlines) > _MOST_ENDED + 2 * len(self._live):
            deadlines[:] = [one for one in deadlines if one[1] in self._live]
            heapq.heapify(deadlines)
        heapq.heappush(deadlines, (time.monotonic() + timeout_s, identity, timeout_s))

    @property
    def next_deadline_s(self) -> float:
        """``time.monotonic`` at which ``expire`` may have something to do; infinite where nothing has a limit."""
        return self._deadlines[0][0] if self._deadlines else math.inf

    def expire(self, now_s: float) -> None:
        """Ends the requests whose time is over, those that wait and those that run; their pages are free at once."""
        while self._deadlines and self._deadlines[0][0] <= now_s:
            _, identity, timeout_s = heapq.heappop(self._deadlines)
            live = self._live.get(identity)
            if live is None:
                continue
            self._withdraw(live)
            how = "it was answered in part" if live.told else "it had not come to its first token"
            self._refuse(
                live.client,
                live.request_id,
                "deadline",
                f"this request was not done within the {timeout_s:g} s that it was given: {how}",
            )

    def _guarded(self, live: Live, take: Callable[[], None]) -> None:
        """Does what brings a request into the engine, and refuses it where that fails."""
        client, request_id = live.client, live.request_id
        try:
            take()
            return
        except CapacityError as error:
            kind, message, failure = "capacity", str(error), None
        except RequestError as error:
            kind, message, failure = "request", str(error), None
        except _EngineFailed as failed:
            kind, message, failure = "internal", f"the engine failed over this request: {failed}", failed.error
        except Exception:  # the engine knows nothing of it yet
            _LOGGER.exception("a request of %s could not be read", client.name)
            kind, message, failure = "internal", "this request could not be read", None
        self._forget(live)
        self._refuse(client, request_id, kind, message)
        if failure is not None:
            self._on_error(failure)

    def _take(self, live: Live, request: Request) -> None:
        """By the shortest way, or the ordinary one, or into the line of those that wait for their grammar."""
        if request.plain and not self._live and self._fire(live, request):
            return
        if request.grammar is not None and self._grammars is not None:
            compilation = self._grammars.start(request.grammar, self._hub.wake)
            if not compilation.done:
                self._add(live)
                self._compiling.append((live, request, compilation))
                return
            compilation.result()
        self._engine.validate(request)
        self._enqueue(live, request)

    def look_at_grammars(self) -> None:
        """Hands over the requests whose grammar has been compiled meanwhile."""
        waiting, self._compiling = self._compiling, []
        for live, request, compilation in waiting:
            if live.identity not in self._live:
                continue
            if compilation.done:
                self._guarded(live, partial(self._hand_over, live, request, compilation))
            else:
                self._compiling.append((live, request, compilation))

    def _hand_over(self, live: Live, request: Request, compilation: Compiling) -> None:
        compilation.result()  # says why there is none
        self._engine.validate(request)
        self._enqueue(live, request)

    def _fire(self, live: Live, request: Request) -> bool:
        """Launches a request that finds nobody else here, if there is a short way for it now."""
        engine = self._engine
        try:
            shot = engine.fire(request.prompt_token_ids, request.params, request.salt)
            if shot is None:
                return False
            live.launched_ns = time.perf_counter_ns()  # the GPU works from here on
            self._add(live)
            engine.book(request, shot)
        except Exception as error:
            raise _EngineFailed(error) from error
        self._figures.begun(live.received_ns, live.launched_ns)
        return True

    def _enqueue(self, live: Live, request: Request) -> None:
        try:
            self._engine.enqueue(request)
        except Exception as error:
            raise _EngineFailed(error) from error
        self._add(live)
        self.unlaunched.append(live)

    def _add(self, live: Live) -> None:
        self._live[live.identity] = live
        live.client.requests[live.request_id] = live.identity

    def _overloaded(self, client: Client, request_id: int) -> None:
        waiting = len(self._live) - self._limits.max_streams
        self._refuse(
            client,
            request_id,
            "overloaded",
            f"{waiting} requests wait already, as many as may: try again later",
            self._figures.retry_after_s(waiting, self._limits.max_streams),
        )

    def _refuse(self, client: Client, request_id: int, kind: str, message: str, retry_after_s: float = 0.0) -> None:
        self._figures.outcomes[f"refused_{kind}"] += 1
        self._hub.send(client, Refused(request_id, kind, message, retry_after_s))

    def cancel(self, client: Client, request_id: int) -> None:
        """Withdraws a request; unknown ids are ignored."""
        identity = client.requests.get(request_id)
        if identity is not None:
            self._withdraw(self._live[identity])
            self._figures.outcomes[_CANCELLED] += 1
            self._hub.send(client, Tokens(request_id, (), (), finish_reason=_CANCELLED))

    def left(self, client: Client) -> None:
        """A client is gone: its requests go as well, at once."""
        for identity in list(client.requests.values()):
            self._withdraw(self._live[identity])
            self._figures.outcomes["abandoned"] += 1

    def end_all(self, kind: str, message: str) -> None:
        """Ends every request for a reason of the engine's."""
        for live in list(self._live.values()):
            self._withdraw(live)
            self._refuse(live.client, live.request_id, kind, message)

    def _withdraw(self, live: Live) -> None:
        self._forget(live)
        self._engine.cancel(live.identity)

    def _forget(self, live: Live) -> None:
        self._live.pop(live.identity, None)
        requests = live.client.requests
        if requests.get(live.request_id) == live.identity:
            del requests[live.request_id]

    # -------------------------------------------------------------------------------------------------------- outgoing

    def note_launched(self, begun: set[int]) -> None:
        """Steps were launched; ``begun``: the running requests that have had one."""
        now = time.perf_counter_ns()
        waiting = self.unlaunched
        for _ in range(len(waiting)):
            live = waiting.popleft()
            if live.identity in begun:
                live.launched_ns = now
                self._figures.begun(live.received_ns, now)
            elif live.identity in self._live:
                waiting.append(live)

    def deliver(self, chunks: Sequence[TokenChunk], failure: Exception | None = None) -> None:
        """Sends each client its news. ``failure``: why the engine has ended requests, where it did."""
        frames: dict[Client, bytes] = {}
        for chunk in chunks:
            live = self._live.get(chunk.request_id)
            if live is None:
                continue  # withdrawn meanwhile
            if chunk.token_id is None and failure is not None:
                self._forget(live)
                self._refuse(live.client, live.request_id, "internal", f"the engine had to end this: {failure}")
                continue
            frame = self._frame(live, chunk)
            if frame is None:
                continue
            frames[live.client] = frames[live.client] + frame if live.client in frames else frame
        for client, frame in frames.items():
            self._hub.send_frame(client, frame)

    def _frame(self, live: Live, chunk: TokenChunk) -> bytes | None:
        """A chunk as its client reads it; None where no frame holds it, and the client has been told."""
        reason = chunk.finish_reason
        record = _news(live, chunk)
        live.told = True
        try:
            frame = encode(record)
        except ProtocolError as error:
            self._withdraw(live)
            self._refuse(live.client, live.request_id, "request", f"{error}: ask for less in one request")
            return None
        if reason is not None:
            self._forget(live)
            self._figures.ended(reason.value, (time.perf_counter_ns() - live.received_ns) / 1e9)
        return frame


def _news(live: Live, chunk: TokenChunk) -> Tokens:
    token, reason, logprobs = chunk.token_id, chunk.finish_reason, chunk.logprobs
    value = None if reason is None else reason.value
    if token is None:
        return Tokens(live.request_id, (), (), finish_reason=value)
    wire = () if logprobs is None else (_wire(logprobs),)
    if live.told:
        return Tokens(live.request_id, (token,), (chunk.time_ns,), wire, value)
    prompt = chunk.prompt_logprobs
    return Tokens(
        live.request_id,
        (token,),
        (chunk.time_ns,),
        wire,
        value,
        chunk.cached_tokens,
        live.received_ns,
        live.launched_ns,
        None if prompt is None else tuple(None if one is None else _wire(one) for one in prompt),
    )


def _wire(logprobs: TokenLogprobs) -> WireLogprobs:
    return WireLogprobs(logprobs.token_id, logprobs.logprob, logprobs.top)
