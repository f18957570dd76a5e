"""What a request will need of the processor's caches, done now and then for nothing while nobody asks. Engine's thread.

Code that has not run for 50 ms takes three to five times as long as code that has just run, even in a thread that never
slept; the kernel's is no exception. So an engine that polls for its next request anyway sends itself one now and then,
through a socket and books of its own: it is read, goes the way of its launch as far as it may, and is answered.
"""

from __future__ import annotations

import logging
import os
import select
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from jitgraph.engine.service_client import Client
from jitgraph.engine.service_figures import Figures
from jitgraph.engine.service_needs import Limits
from jitgraph.engine.service_requests import Requests
from jitgraph.ipc.frames import client_framer, encode, engine_framer
from jitgraph.ipc.messages import FromClient, FromEngine, Message, Submit, pack_ids, pack_params
from jitgraph.ipc.sockets import MAX_UNSENT_BYTES, Connection, socket_pair
from jitgraph.types import FinishReason, Request, SamplingParams, TokenChunk

EVERY_S = 5e-3
"""It takes some 50 us, which a request that comes just then waits: one in a hundred."""
_TOKENS = 100
_LOGGER = logging.getLogger(__name__)


class Practice:
    """One service's. ``rehearse``: the engine's part of a request, but for the launch."""

    def __init__(self, limits: Limits, rehearse: Callable[[], None]) -> None:
        tokens = min(_TOKENS, max(1, (limits.max_model_len or _TOKENS) - 1))
        self._frame = encode(Submit(1, pack_ids(range(tokens)), pack_params(SamplingParams(max_tokens=1))))
        near, far = socket_pair()
        self._near: Connection[FromClient] = Connection(near, engine_framer())
        self._far: Connection[FromEngine] = Connection(far, client_framer())
        self._client = Client(self._near, os.getpid())
        self._engine = _Engine(rehearse)
        self._requests = Requests(self._engine, _Sender(), limits, Figures(), self._failed)
        self._failure = ""
        self._epoll = select.epoll()
        self._epoll.register(near.fileno(), select.EPOLLIN)
        self._again_s = 0.0

    def now_and_then(self, now_s: float) -> None:
        """Sends itself a request and answers it, unless it has just done so."""
        if now_s < self._again_s:
            return
        self._again_s = now_s + EVERY_S
        self._far.send_frame(self._frame)
        for _ in self._epoll.poll(0.0):
            for record in self._near.receive():
                if type(record) is Submit:
                    self._requests.submit(self._client, record)
        self._requests.deliver(self._engine.tokens())
        self._far.discard()

    def _failed(self, error: Exception) -> None:
        """Whoever asks in earnest will hear of it; here it is told once."""
        if self._failure != str(error):
            self._failure = str(error)
            _LOGGER.warning("a request cannot be rehearsed: %s", error)

    def close(self) -> None:
        """Closes its sockets; it is of no use afterwards."""
        self._epoll.close()
        self._near.close()
        self._far.close()


class _Engine:
    """Takes every request, and answers with one token."""

    def __init__(self, rehearse: Callable[[], None]) -> None:
        self.rehearse = rehearse
        self._taken: list[int] = []

    def fire(self, ids: tuple[int, ...], params: SamplingParams, salt: str) -> Any:
        self.rehearse()
        return self

    def book(self, request: Request, shot: Any) -> None:
        self._taken.append(request.request_id)

    def tokens(self) -> list[TokenChunk]:
        taken, self._taken = self._taken, []
        return [TokenChunk(identity, 1, time.perf_counter_ns(), None, FinishReason.LENGTH) for identity in taken]

    def validate(self, request: Request) -> None:
        pass

    def enqueue(self, request: Request) -> None:
        self._taken.append(request.request_id)

    def cancel(self, request_id: int) -> None:
        pass


class _Sender:
    """The hub's part: its own is for clients."""

    most_unsent = MAX_UNSENT_BYTES

    def wake(self) -> None:
        pass

    def send(self, client: Client, record: Message) -> None:
        client.connection.send(record)

    def send_owned(self, client: Client, frames: Sequence[tuple[Hashable, bytes]]) -> None:
        client.connection.send_owned(frames)
