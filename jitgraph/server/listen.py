"""Runs the application under uvicorn, with caps on what uvicorn itself takes before the application is asked.

Event loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from jitgraph.server.openai.errors import ApiError
from jitgraph.server.settings import ServerSettings

BACKLOG = 1024
KEEP_ALIVE_S = 75
_LOOK_S = 0.05
_LAST_S = 2
"""What answers may still take to end once their connections are cut off: they need a turn of the loop."""


class CappedProtocol(HttpToolsProtocol):
    """A connection whose request line, headers and whatever else is no body are of limited size, and whose heads come
    within a limited time.

    Trailers are read past: what comes after the body has no say in who asks, or for what.
    """

    def __init__(self, *args: Any, caps: ServerSettings, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._caps = caps
        self._unspoken = 0
        """Bytes since the last whole head, part of a body or end of a request: of a head, of trailers, of what stands
        beside the size of a chunk. The parser keeps some of it, and says nothing of the rest."""
        self._in_head = True
        self._body: list[bytes] = []
        """Parts of a body that one read has brought so far."""
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Starts the clock of the first head."""
        super().connection_made(transport)
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops it."""
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Counts what is no body, to within one read of the cap; the gate looks exactly at heads."""
        if self._unspoken > self._caps.max_header_bytes:
            most = self._caps.max_header_bytes
            self._refuse(ApiError(431, f"the headers are over the limit of {most} bytes", None, "head_too_large"))
            return
        self._unspoken += len(data)
        if self._in_head and self._head_timer is None:
            self._start_clock()
        super().data_received(data)
        self._hand_over_body()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._in_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer, which is none."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A head is whole."""
        self._in_head, self._unspoken = False, 0
        self._stop_clock()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of the body. It is handed over with the rest of its read: the smallest chunks are six bytes each, and
        what is done for each of them others have to wait for."""
        self._unspoken = 0
        self._body.append(body)

    def on_message_complete(self) -> None:
        """The next byte belongs to another head."""
        self._hand_over_body()
        super().on_message_complete()
        self._in_head, self._unspoken = True, 0

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets an error in the same form as all others."""
        self._refuse(ApiError(400, "this is no valid HTTP request", None, "invalid_http"))

    def _hand_over_body(self) -> None:
        if self._body:
            parts, self._body = self._body, []
            super().on_body(b"".join(parts))

    def _start_clock(self) -> None:
        self._head_timer = self.loop.call_later(self._caps.head_timeout_s, self._late)

    def _stop_clock(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _late(self) -> None:
        self._head_timer = None
        if self._in_head and self._unspoken == 0:
            self.transport.close()  # connected and said nothing
        elif self._in_head and not self.transport.is_closing():
            limit = self._caps.head_timeout_s
            self._refuse(ApiError(408, f"the request did not arrive within {limit:g} s", None, "request_timeout"))

    def _refuse(self, error: ApiError) -> None:
        """Ends the connection, with an answer where none is on its way that it would fall into."""
        if self._may_answer():
            body = error.encode()
            reason = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}[
                error.status
            ]
            head = (
                b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head % (error.status, reason, len(body)) + body)
        if self.cycle is not None:
            self.cycle.disconnected = True
        self.transport.close()

    def _may_answer(self) -> bool:
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            return True
        return not (self._in_head or self.pipeline or cycle.response_started)


class HttpServer(uvicorn.Server):
    """Leaves signals to its process, and ends without a word on standard error, however sudden its end is.

    Connections that are open after ``grace_s``, or when ``force_exit`` is set, are cut off: who answers on them sees
    the client gone. uvicorn alone would cancel the answers and the application, with a traceback for each.
    """

    def __init__(self, config: uvicorn.Config, grace_s: float | None) -> None:
        super().__init__(config)
        self._grace_s = grace_s

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield

    async def shutdown(self, sockets: Any = None) -> None:
        """Ends connections and the application; uvicorn calls it once ``should_exit`` is set."""
        cutting = asyncio.ensure_future(self._cut_off())
        await super().shutdown(sockets)
        if not self.force_exit:
            cutting.cancel()
            return
        await cutting
        until_s = time.monotonic() + _LAST_S
        while self.server_state.tasks and time.monotonic() < until_s:
            await asyncio.sleep(_LOOK_S)
        await self.lifespan.shutdown()

    async def _cut_off(self) -> None:
        begun_s = time.monotonic()
        while not self.force_exit and (self._grace_s is None or time.monotonic() - begun_s < self._grace_s):
            await asyncio.sleep(_LOOK_S)
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()


def make_server(
    app: Any, settings: ServerSettings, host: str, port: int, *, grace_s: float | None = None, **more: Any
) -> HttpServer:
    """A server that is not running yet: ``await server.serve(sockets=...)`` runs it. Signals, drain and exit belong to
    whoever calls.

    Args:
        grace_s: what open connections have once ``should_exit`` is set; None waits for them.
        more: for ``uvicorn.Config``.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=functools.partial(CappedProtocol, caps=settings),  # type: ignore[arg-type] # called like the class
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_S,
        **more,
    )
    return HttpServer(config, grace_s)
