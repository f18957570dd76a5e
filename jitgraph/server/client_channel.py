"""One asyncio connection to an engine process: bytes in, each request's records to its own inbox.

Runs on one event loop (asyncio's or uvloop's). A record goes from the loop's read callback straight to the future its
reader waits on; there is no task in between. While an answer is awaited the loop polls, where there are cores for it,
because to be woken takes longer than most of what it does (``polling.py``). Always holds: an inbox keeps a bounded
number of records for a reader that does not come, and never holds up another; a connection that ends tells every inbox.
"""

from __future__ import annotations

import asyncio
import select
import time
from collections import deque
from collections.abc import Callable
from typing import Any, cast

from jitgraph.errors import JitgraphError
from jitgraph.ipc.frames import ProtocolError, client_framer, encode
from jitgraph.ipc.messages import (
    Beat,
    Cancel,
    FromEngine,
    Goodbye,
    Message,
    Ready,
    Refused,
    StartPhase,
    Stats,
    Tokens,
    Welcome,
)
from jitgraph.ipc.sockets import MAX_UNSENT_BYTES
from jitgraph.polling import FOR_AN_ANSWER_S, polling_s
from jitgraph.server.client_errors import EngineGone, RequestRefused, refusal
from jitgraph.server.client_records import CLOSED, check_tokens, hello, loss, welcomed

MAX_UNREAD = 2**17
"""Tokens (and alternatives to them) that may wait for the reader of one request before it is ended."""


def _weight(record: Tokens) -> int:
    weight = len(record.token_ids)
    for one in record.logprobs:
        weight += len(one.top)
    return weight + sum(1 + len(one.top) for one in record.prompt_logprobs or () if one is not None)


class Inbox:
    """Records of one request that its reader has not taken yet."""

    __slots__ = ("ended", "error", "records", "unread", "waiter")

    def __init__(self) -> None:
        self.records: deque[Tokens] = deque()
        self.waiter: asyncio.Future[Tokens | None] | None = None
        self.ended = False
        """Nothing more will come."""
        self.error: JitgraphError | None = None
        """What the reader gets once it has taken everything."""
        self.unread = 0

    def put(self, record: Tokens) -> bool:
        """To the reader that waits, or on the pile; False where the pile is too high."""
        waiter = self.waiter
        if waiter is not None and not waiter.done():
            self.waiter = None
            waiter.set_result(record)
            return True
        self.unread += _weight(record)
        self.records.append(record)
        return self.unread <= MAX_UNREAD or self.ended

    def take(self) -> Tokens:
        """The oldest record on the pile."""
        record = self.records.popleft()
        self.unread -= _weight(record)
        return record

    def end(self, error: JitgraphError) -> None:
        """Nothing more comes, and this is why."""
        self.ended, self.error = True, error
        waiter, self.waiter = self.waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class Channel(asyncio.Protocol):
    """The protocol object of a connection. ``EngineClient`` is its only user."""

    def __init__(self, name: str, on_start: Callable[[StartPhase], None] | None, silence_s: float | None) -> None:
        self.loop = asyncio.get_running_loop()
        self.ready: Ready | None = None
        self.started: asyncio.Future[None] = self.loop.create_future()
        """Done once the engine is ready, or with the reason why it never will be."""
        self.inboxes: dict[int, Inbox] = {}
        self.answers: deque[asyncio.Future[dict[str, Any]]] = deque()
        """Who waits for ``Stats``, in the order in which they asked."""
        self.last_beat: Beat | None = None
        self.last_seen_ns = time.perf_counter_ns()
        self.gone: str | None = None
        self.closed = asyncio.Event()
        self._name = name
        self._on_start = on_start
        self._silence_s = silence_s
        self._framer = client_framer()
        self._welcome: Ready | None = None
        """What the greeting of an engine that was ready said; ``Ready`` says more and follows, or else a beat."""
        self._transport: asyncio.Transport | None = None
        self._polling_ns = 0
        """For how long after the last news the loop is kept awake."""
        self._awake = False
        self._asked_ns = 0

    # ------------------------------------------------------------------------------------------- called by the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Says hello."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(hello(self._name))

    def data_received(self, data: bytes) -> None:
        """Cuts the bytes into records and gives each to whom it belongs."""
        self.last_seen_ns = time.perf_counter_ns()
        try:
            for record in self._framer.feed(data):
                if type(record) is Tokens:
                    self._tokens(record)
                else:
                    self._other(record)
        except ProtocolError as error:
            self.fail(loss(error))
        except Exception as error:  # the greeting went wrong, or the listener of the start raised
            if not self.started.done():
                self.started.set_exception(error)
            self.fail(str(error))
        if self.inboxes:
            self._stay_awake()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end of it."""
        self.fail(CLOSED)

    # -------------------------------------------------------------------------------------------------------- records

    def _tokens(self, record: Tokens) -> None:
        check_tokens(record)
        request_id = record.request_id
        inbox = self.inboxes.get(request_id)
        if inbox is None:
            return  # nobody reads it any more
        if record.finish_reason is not None:
            inbox.ended = True
            del self.inboxes[request_id]
        if not inbox.put(record):
            self.drop(request_id)
            inbox.end(RequestRefused("overloaded", f"over {MAX_UNREAD} tokens were left unread: read the stream"))

    def _other(self, record: FromEngine) -> None:
        if isinstance(record, Beat):
            self.last_beat = record
            if self._welcome is not None:
                self._start(self._welcome)
        elif isinstance(record, Refused):
            inbox = self.inboxes.pop(record.request_id, None)
            if inbox is not None:
                inbox.end(refusal(record))
        elif isinstance(record, Stats):
            if self.answers:
                asked = self.answers.popleft()
                if not asked.done():
                    asked.set_result(record.values)
        elif isinstance(record, Goodbye):
            self.fail(record.reason)
        elif isinstance(record, StartPhase):
            if self._on_start is not None:
                self._on_start(record)
        elif isinstance(record, Welcome):
            self._welcome = welcomed(record)
        elif isinstance(record, Ready):
            self._start(record)

    def _start(self, ready: Ready) -> None:
        self.ready, self._welcome = ready, None
        self._polling_ns = int(polling_s(None, ready.facts.device, FOR_AN_ANSWER_S) * 1e9)
        if not self.started.done():
            self.started.set_result(None)
            if self._silence_s is not None:
                self._watch()

    def _watch(self) -> None:
        """Gives up an engine that has been silent for too long; it beats while it lives."""
        assert self._silence_s is not None
        if self.gone is not None:
            return
        silent_s = (time.perf_counter_ns() - self.last_seen_ns) / 1e9
        if silent_s > self._silence_s:
            self.fail(f"the engine process hangs: nothing came from it for {silent_s:.0f} s")
        else:
            self.loop.call_later(self._silence_s / 4, self._watch)

    # --------------------------------------------------------------------------------------------------------- polling

    def _stay_awake(self) -> None:
        if self._polling_ns and not self._awake:
            self._awake = True
            self.loop.call_soon(self._poll)

    def _poll(self) -> None:
        """A callback that is due at once keeps the loop from sleeping."""
        since_ns = time.perf_counter_ns() - max(self.last_seen_ns, self._asked_ns)
        if self.inboxes and since_ns < self._polling_ns:
            self.loop.call_soon(self._poll)
        else:
            self._awake = False

    # ------------------------------------------------------------------------------------------- called by the client

    def expect(self, request_id: int) -> Inbox:
        """Where the records of a request that has just been sent will come in."""
        self._asked_ns = time.perf_counter_ns()
        self._stay_awake()
        inbox = self.inboxes[request_id] = Inbox()
        return inbox

    @property
    def hung_up(self) -> bool:
        """Whether the other side has closed its end, as far as the kernel knows."""
        if self.gone is not None or self._transport is None:
            return True
        poller = select.poll()
        poller.register(self._transport.get_extra_info("socket").fileno(), 0)
        return bool(poller.poll(0))

    def check(self) -> None:
        """A connection that can be used.

        Raises:
            EngineGone: it has ended.
        """
        if self.gone is not None:
            raise EngineGone(self.gone)

    def write(self, frame: bytes) -> None:
        """Sends a frame, at once where the socket takes it.

        Raises:
            EngineGone: the connection has ended.
            RequestRefused: the engine leaves too much unread.
        """
        self.check()
        assert self._transport is not None
        if self._transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            raise RequestRefused("overloaded", "the engine process does not read what it is sent: try again later", 1.0)
        self._transport.write(frame)

    def tell(self, message: Message) -> None:
        """Sends a small record; of no use, and nothing, where the connection has ended."""
        if self.gone is None and self._transport is not None:
            self._transport.write(encode(message))

    def drop(self, request_id: int, cancelled: bool = False) -> None:
        """Ends a request whose reader has gone, unless it is ``cancelled`` already; what still comes of it is thrown
        away."""
        if self.inboxes.pop(request_id, None) is not None and not cancelled:
            self.tell(Cancel(request_id))

    def fail(self, reason: str) -> None:
        """Ends the connection and tells everybody who waits. Only the first reason counts."""
        if self.gone is not None:
            return
        self.gone = reason
        if self._transport is not None:
            self._transport.abort()
        if not self.started.done():
            self.started.set_exception(EngineGone(reason))
        inboxes = list(self.inboxes.values())
        self.inboxes.clear()
        for inbox in inboxes:
            inbox.end(EngineGone(reason))
        for asked in self.answers:
            if not asked.done():
                asked.set_exception(EngineGone(reason))
        self.answers.clear()
        self.closed.set()
