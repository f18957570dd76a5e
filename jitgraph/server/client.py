"""An engine process as asyncio code sees it: requests of token ids in, records of tokens out.

Belongs to one event loop, asyncio's or uvloop's; only ``EngineStream.__del__`` may run elsewhere. Whoever reads the
streams makes the text (``api_client``, the HTTP server).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from socket import socket
from typing import Any

from jitgraph.errors import ConfigError
from jitgraph.ipc.messages import (
    AskStats,
    Beat,
    Cancel,
    Drain,
    EngineFacts,
    Grammar,
    Ready,
    StartPhase,
    Tokens,
)
from jitgraph.ipc.sockets import connect as connect_socket
from jitgraph.server.client_channel import Channel, Inbox
from jitgraph.server.client_errors import EngineGone, RequestRefused
from jitgraph.server.client_records import check_path, nobody_there, submit_frame
from jitgraph.types import SamplingParams

__all__ = ["EngineClient", "EngineGone", "EngineStream", "RequestRefused"]

LOOK_AGAIN_S = 0.02
"""Pause between looks for a socket that is not there yet."""
DRAIN_GRACE_S = 5.0
"""How much longer than a drain's own time an engine process may take to end."""


class EngineStream:
    """One request's records as they come: an async iterator for one task, whose last record has a finish reason.

    Dropping it, or cancelling the task that waits for it, ends the request at the engine. Iterating raises
    ``RequestRefused`` where the engine does not run the request or the reader is much too slow, and ``EngineGone``
    where the connection ends; records that came before are given first.
    """

    def __init__(self, channel: Channel, request_id: int, inbox: Inbox) -> None:
        self.request_id = request_id
        self._channel = channel
        self._inbox = inbox
        self._cancelled = False

    def __aiter__(self) -> EngineStream:
        return self

    async def __anext__(self) -> Tokens:
        inbox = self._inbox
        if inbox.waiter is not None:
            raise RuntimeError("another task waits for this stream: a stream has one reader")
        while not inbox.records:
            if inbox.error is not None:
                raise inbox.error
            if inbox.ended:
                raise StopAsyncIteration
            waiter = inbox.waiter = self._channel.loop.create_future()
            try:
                record: Tokens | None = await waiter
            except asyncio.CancelledError:
                inbox.waiter = None
                self.cancel()
                raise
            if record is not None:
                return record
        return inbox.take()

    def cancel(self) -> None:
        """Ends the request at the engine. What had come may still be read, up to the record that says ``cancelled``.
        May be called more than once, and after the end."""
        if not self._cancelled and not self._inbox.ended:
            self._cancelled = True
            self._channel.tell(Cancel(self.request_id))

    def __del__(self) -> None:
        if not self._inbox.ended:  # a collection may run in any thread
            with suppress(RuntimeError):  # the loop is closed
                self._channel.loop.call_soon_threadsafe(self._channel.drop, self.request_id, self._cancelled)


class EngineClient:
    """A connection to an engine process that is ready, for many requests at once. Made by ``connect``."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._last_id = 0

    @classmethod
    async def connect(
        cls,
        path: Path,
        on_start: Callable[[StartPhase], None] | None = None,
        timeout_s: float = 600.0,
        *,
        appear_s: float | None = None,
        silence_s: float | None = None,
        name: str = "client",
    ) -> EngineClient:
        """Connects, and returns once the engine is ready.

        Args:
            path: its socket.
            on_start: hears how the start proceeds.
            timeout_s: longest time up to ready, in seconds.
            appear_s: how long to wait for somebody to listen at all; None is ``timeout_s``.
            silence_s: gives up a ready engine that has been silent for so long; None leaves that to the caller.
            name: who is calling, for the engine's log.

        Raises:
            EngineGone: nobody listens, the engine ended before it was ready, or time ran out.
            ConfigError: the socket is not one of this user's engines, or the engine speaks another protocol.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        appear = deadline if appear_s is None else min(deadline, loop.time() + appear_s)
        connected = await _find(path, appear)
        channel = Channel(name, on_start, silence_s)
        try:
            await loop.create_unix_connection(lambda: channel, sock=connected)
        except BaseException:
            connected.close()
            raise
        try:
            await asyncio.wait_for(channel.started, max(0.0, deadline - loop.time()))
        except asyncio.TimeoutError:
            channel.fail(f"the engine process was not ready after {timeout_s:g} s")
            raise EngineGone(f"the engine process was not ready after {timeout_s:g} s") from None
        except BaseException:
            channel.fail("the client has given up")
            raise
        return cls(channel)

    @property
    def facts(self) -> EngineFacts:
        """What the engine says about itself and its model."""
        return self.ready.facts

    @property
    def ready(self) -> Ready:
        """How long the start took, by phase; without phases where the engine was ready before."""
        assert self._channel.ready is not None
        return self._channel.ready

    @property
    def last_beat(self) -> Beat | None:
        """The engine's last sign of life."""
        return self._channel.last_beat

    @property
    def last_seen_ns(self) -> int:
        """``time.perf_counter_ns`` when anything last came from the engine."""
        return self._channel.last_seen_ns

    @property
    def in_flight(self) -> int:
        """Requests of this client that have not ended."""
        return len(self._channel.inboxes)

    @property
    def closed(self) -> asyncio.Event:
        """Set once the connection has ended."""
        return self._channel.closed

    @property
    def hung_up(self) -> bool:
        """Whether the engine's end is closed; ``closed`` is set as soon as the event loop has seen to it."""
        return self._channel.hung_up

    @property
    def gone(self) -> str | None:
        """Why the connection has ended; None while it has not."""
        return self._channel.gone

    def submit(
        self,
        ids: Sequence[int],
        params: SamplingParams,
        *,
        salt: str = "",
        prompt_logprobs: int | None = None,
        grammar: Grammar | None = None,
        timeout_s: float = 0.0,
    ) -> EngineStream:
        """Sends a request. Stop strings in ``params`` mean nothing to the engine: its client looks for them.
        ``timeout_s``: seconds from its arrival after which the engine ends it; 0 never.

        Raises:
            RequestError: ids that cannot be sent. What else is wrong with a request comes out of the stream.
            RequestRefused: the engine leaves too much unread.
            EngineGone: the connection has ended.
        """
        self._last_id = request_id = self._last_id + 1
        self._channel.write(submit_frame(request_id, ids, params, salt, prompt_logprobs, grammar, timeout_s))
        inbox = self._channel.expect(request_id)
        return EngineStream(self._channel, request_id, inbox)

    async def stats(self) -> dict[str, Any]:
        """The engine's counters.

        Raises:
            EngineGone: the connection has ended.
        """
        self._channel.check()
        answer: asyncio.Future[dict[str, Any]] = self._channel.loop.create_future()
        self._channel.answers.append(answer)
        self._channel.tell(AskStats())
        return await answer

    async def drain(self, timeout_s: float) -> None:
        """Asks the engine process to take no more requests of anybody and to end once the running ones are done, or
        after ``timeout_s``; returns when it has.

        Raises:
            asyncio.TimeoutError: it has not.
        """
        self._channel.tell(Drain(timeout_s))
        await asyncio.wait_for(self.closed.wait(), timeout_s + DRAIN_GRACE_S)

    async def close(self, reason: str = "this client has been closed") -> None:
        """Ends the connection; the engine ends the requests that still run, and their streams say ``reason``. May be
        called more than once."""
        self._channel.fail(reason)


async def _find(path: Path, deadline: float) -> socket:
    """A socket connected to the engine at ``path``, non-blocking; waits until somebody listens."""
    loop = asyncio.get_running_loop()
    check_path(path)
    while True:
        try:
            return connect_socket(path, 0.0)
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
            if loop.time() >= deadline:
                raise EngineGone(nobody_there(path)) from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be connected to: {error.strerror}") from None
        await asyncio.sleep(LOOK_AGAIN_S)
