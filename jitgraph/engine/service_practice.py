"""What a request will need of the processor's caches, done now and then for nothing while nobody asks. Engine's thread.

Code that has not run for 50 ms takes three to five times as long as code that has just run, even in a thread that never
slept; the kernel's is no exception. So an engine that polls for its next request anyway sends itself one now and then,
through a socket of its own, reads it, goes the way of its launch as far as it may, and answers.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable

from jitgraph.engine.service_reader import RequestReader
from jitgraph.ipc.frames import client_framer, encode, engine_framer
from jitgraph.ipc.messages import FromClient, FromEngine, Submit, Tokens, pack_ids, pack_params
from jitgraph.ipc.sockets import Connection, socket_pair
from jitgraph.types import SamplingParams

EVERY_S = 5e-3
"""It takes some 50 us, which a request that comes just then waits: one in a hundred."""
_TOKENS = 100


class Practice:
    """One service's. ``rehearse``: the engine's part of a request."""

    def __init__(self, reader: RequestReader, rehearse: Callable[[], None]) -> None:
        self._reader = reader
        self._rehearse = rehearse
        self._frame = encode(Submit(1, pack_ids(range(_TOKENS)), pack_params(SamplingParams())))
        near, far = socket_pair()
        self._near: Connection[FromClient] = Connection(near, engine_framer())
        self._far: Connection[FromEngine] = Connection(far, client_framer())
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
                    self._reader.read(1, record)
                    self._rehearse()
        self._near.send_frame(self.answer())
        self._far.discard()

    @staticmethod
    def answer() -> bytes:
        """An answer, to nobody."""
        now_ns = time.perf_counter_ns()
        return encode(Tokens(1, (1,), (now_ns,), (), None, 0, now_ns, now_ns))

    def close(self) -> None:
        """Closes its sockets; it is of no use afterwards."""
        self._epoll.close()
        self._near.close()
        self._far.close()
