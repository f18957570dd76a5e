"""One HTTP request and its response, below Starlette: body in with caps, JSON or a stream of events out.

Event loop's thread. While an answer is generated somebody listens for the client's going away, and a clock watches that
it reads what it is sent: either way the work on it ends at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any, TypeVar

from jitgraph.server.auth import Caller
from jitgraph.server.openai.errors import ApiError
from jitgraph.server.openai.sse import error_event
from jitgraph.server.records import RequestRecord
from jitgraph.server.settings import ServerSettings

T = TypeVar("T")

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies hold back what they are not told to pass on
]
_MUCH_BYTES = 128 * 1024
"""From such a body on, what is in it is read beside the loop."""
_DISCARD_BYTES = 64 * 2**20
_DISCARD_S = 2.0


class ClientGone(Exception):
    """The client has closed the connection, or does not read: nobody wants the answer any more."""


class Exchange:
    """One request and its response. ``record`` is its entry for log and metrics."""

    def __init__(
        self, receive: Receive, send: Send, headers: dict[bytes, bytes], settings: ServerSettings,
        caller: Caller, record: RequestRecord,
    ) -> None:  # fmt: skip
        self._receive = receive
        self._send = send
        self.headers = headers
        self.settings = settings
        self.caller = caller
        self.record = record
        self.status = 0
        """What was sent; 0 while nothing was."""
        self.error: str | None = None
        """The kind of what went wrong, in the middle of a stream too."""
        self.path_params: dict[str, Any] = {}
        self._sending_since: float | None = None
        self._body_read = False
        self._body_bytes = 0
        self._gone = False

    def salt(self, own: str | None) -> str:
        """What keeps cached prompts of this caller apart, and of those who send the same ``own`` salt."""
        return f"{self.caller.salt}:{own}" if own else self.caller.salt

    # ------------------------------------------------------------------------------------------------------------- body

    async def body(self) -> bytes:
        """The whole body, JSON by its type.

        Raises:
            ApiError: 413 too large, 415 not JSON, 408 it does not come.
            ClientGone: the connection was closed before its end.
        """
        kind = self.headers.get(b"content-type", b"").split(b";", 1)[0].strip().lower()
        if kind != b"application/json" and not kind.endswith(b"+json"):
            raise ApiError(415, "the body must be JSON: send Content-Type: application/json", None, "unsupported_media")
        declared = self.headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > self.settings.max_body_bytes:
            raise self._too_large()
        limit_s = self.settings.body_timeout_s
        try:
            return await self._within(limit_s, self._read_body())
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {limit_s:g} s", None, "request_timeout") from None

    async def _within(self, limit_s: float, reading: Awaitable[bytes]) -> bytes:
        """``asyncio.wait_for`` without a task of its own, which before Python 3.12 would cost every request one."""
        task = asyncio.current_task()
        assert task is not None
        late = False

        def end() -> None:
            nonlocal late
            late = True
            task.cancel()

        timer = asyncio.get_running_loop().call_later(limit_s, end)
        try:
            return await reading
        except asyncio.CancelledError:
            if late:
                _uncancel(task)
                raise TimeoutError from None
            raise
        finally:
            timer.cancel()

    def _too_large(self) -> ApiError:
        most = self.settings.max_body_bytes
        return ApiError(413, f"the body is over the limit of {most} bytes: send less", None, "request_too_large")

    async def _read_body(self) -> bytes:
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            size += len(part)
            if size > self.settings.max_body_bytes:
                raise self._too_large()
            parts.append(part)
            if not message.get("more_body", False):
                self._body_read, self._body_bytes = True, size
                return b"".join(parts)

    async def beside_the_loop(self, work: Callable[[], T]) -> T:
        """The result of work on what the request holds; in a thread where that is much, so that nobody waits for it."""
        return await asyncio.to_thread(work) if self._body_bytes > _MUCH_BYTES else work()

    # --------------------------------------------------------------------------------------------------------- response

    async def send_json(self, body: bytes, status: int = 200, headers: Headers = ()) -> None:
        """Answers with JSON."""
        await self.send_body(body, b"application/json", status, headers)

    async def send_body(self, body: bytes, kind: bytes, status: int = 200, headers: Headers = ()) -> None:
        """Answers with a body of any kind."""
        self.status = status
        await self._start(status, [(b"content-type", kind), (b"content-length", b"%d" % len(body)), *headers])
        await self._emit({"type": "http.response.body", "body": body})

    async def send_error(self, error: ApiError) -> None:
        """Answers with an error; as an event that ends the stream where one has begun."""
        self.error = error.name
        if self.status:
            await self.send_event(error_event(error), last=True)
        else:
            headers = error.headers
            if not self._body_read:
                if error.status != 408:
                    await discard_body(self._receive)
                headers.append((b"connection", b"close"))
            await self.send_json(error.encode(), error.status, headers)

    async def send_event(self, event: bytes, last: bool = False) -> None:
        """Sends events of a stream; the first call begins it."""
        if not self.status:
            self.status = 200
            await self._start(200, _STREAM_HEADERS)
        await self._emit({"type": "http.response.body", "body": event, "more_body": not last})

    async def _start(self, status: int, headers: Headers) -> None:
        await self._emit({"type": "http.response.start", "status": status, "headers": list(headers)})

    async def _emit(self, message: dict[str, Any]) -> None:
        self._sending_since = asyncio.get_running_loop().time()
        await self._send(message)
        self._sending_since = None

    # --------------------------------------------------------------------------------------------- the client goes away

    async def while_connected(self, work: Awaitable[None]) -> None:
        """Awaits the work; ends it as soon as the client has gone, or has not read for long.

        Raises:
            ClientGone: it was ended.
        """
        task = asyncio.current_task()
        assert task is not None
        listener = asyncio.ensure_future(self._listen(task))
        clock = _Clock(self, task)
        try:
            await work
        except asyncio.CancelledError:
            if self._gone:
                _uncancel(task)
                raise ClientGone from None
            raise
        finally:
            clock.stop()
            listener.cancel()

    async def _listen(self, task: asyncio.Task[Any]) -> None:
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.leave(task)
                return

    def leave(self, task: asyncio.Task[Any]) -> None:
        """Notes that the client is gone and ends the work on its request."""
        if not self._gone:
            self._gone = True
            task.cancel()

    @property
    def stuck_s(self) -> float:
        """For how long the client has left unread what it was sent."""
        since = self._sending_since
        return 0.0 if since is None else asyncio.get_running_loop().time() - since


async def discard_body(receive: Receive) -> None:
    """Reads what a client still sends, up to a limit: where a connection is closed with unread bytes, the client's
    system may throw the answer away."""
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(_discard(receive), _DISCARD_S)


async def _discard(receive: Receive) -> None:
    size = 0
    while size < _DISCARD_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return
        size += len(message.get("body", b""))


def _uncancel(task: asyncio.Task[Any]) -> None:
    """A cancellation that was ours has been dealt with; Python keeps count of them from 3.11 on."""
    uncancel = getattr(task, "uncancel", None)
    if uncancel is not None:
        uncancel()


class _Clock:
    """Looks now and then whether the client reads; costs a token nothing."""

    def __init__(self, exchange: Exchange, task: asyncio.Task[Any]) -> None:
        self._exchange = exchange
        self._task = task
        self._every_s = exchange.settings.send_timeout_s / 4
        self._loop = asyncio.get_running_loop()
        self._handle = self._loop.call_later(self._every_s, self._look)

    def _look(self) -> None:
        if self._exchange.stuck_s > self._exchange.settings.send_timeout_s:
            self._exchange.leave(self._task)
        else:
            self._handle = self._loop.call_later(self._every_s, self._look)

    def stop(self) -> None:
        """Looks no more."""
        self._handle.cancel()
