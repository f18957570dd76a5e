"""Several engines behind one front-end: each is supervised alone, requests go to the least busy one that is ready.

Event loop's thread. One engine is a pool of one.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from itertools import count

from jitgraph.ipc.messages import BEAT_S
from jitgraph.server.client import EngineClient
from jitgraph.server.supervisor import Supervisor
from jitgraph.server.supervisor_policy import State

SILENT_NS = int(4e9 * BEAT_S)
"""An engine that has said nothing for so long gets requests only where all are so."""
_BEST_FIRST: tuple[State, ...] = ("ready", "restarting", "starting", "draining", "stopped", "failed")
"""The state of a pool is the most hopeful one of its engines."""


class EnginePool:
    """The backend of the HTTP server."""

    def __init__(self, supervisors: Sequence[Supervisor]) -> None:
        self.supervisors = tuple(supervisors)
        self._turn = count()

    @property
    def client(self) -> EngineClient | None:
        """The connection to the least busy engine that is ready, for one request; equals take turns. None while there
        is none."""
        clients = self.clients
        if len(clients) < 2:
            return clients[0] if clients else None
        shift = next(self._turn) % len(clients)
        return min(clients[shift:] + clients[:shift], key=load_of)

    @property
    def clients(self) -> list[EngineClient]:
        """All engines that are ready."""
        found = (one.client for one in self.supervisors if one.state == "ready")
        return [client for client in found if client is not None and not client.closed.is_set()]

    @property
    def state(self) -> State:
        """``ready`` while any engine is; otherwise the most hopeful state of one."""
        states = {one.state for one in self.supervisors}
        return next(state for state in _BEST_FIRST if state in states)

    @property
    def retry_after_s(self) -> float:
        """When the first engine may take requests again."""
        state = self.state
        return min(one.retry_after_s for one in self.supervisors if one.state == state)

    @property
    def connected(self) -> list[EngineClient]:
        """All engines that can be talked to, those that end included."""
        return [client for one in self.supervisors if (client := one.client) is not None]

    @property
    def in_flight(self) -> int:
        """Requests of this process that have not ended."""
        return sum(client.in_flight for client in self.connected)

    def busy(self) -> bool:
        """Whether anybody waits for a token."""
        return self.in_flight > 0

    @property
    def restarts(self) -> int:
        """How often an engine had to be replaced."""
        return sum(one.restarts for one in self.supervisors)

    @property
    def endings(self) -> Counter[str]:
        """How often engines ended unasked, by kind."""
        return sum((one.endings for one in self.supervisors), Counter())

    @property
    def failures(self) -> list[str]:
        """Why engines were given up."""
        return [one.failure for one in self.supervisors if one.failure is not None]

    def start(self) -> None:
        """Starts all engines; returns at once."""
        for one in self.supervisors:
            one.start()

    async def ready(self) -> bool:
        """Waits until every engine is ready or given up; whether any is ready."""
        return any(await asyncio.gather(*(one.ready() for one in self.supervisors)))

    async def over(self) -> None:
        """Waits until no engine is left."""
        await asyncio.gather(*(one.over() for one in self.supervisors))

    async def drain(self, timeout_s: float) -> None:
        """No new requests; the running ones have ``timeout_s`` to finish. Returns when all engines have ended."""
        await asyncio.gather(*(one.drain(timeout_s) for one in self.supervisors))

    async def stop(self) -> None:
        """Ends all engines at once."""
        await asyncio.gather(*(one.stop() for one in self.supervisors))


def load_of(client: EngineClient) -> tuple[bool, int]:
    """What to choose an engine by, least first: whether it is silent and so may hang, and the requests that it has
    (what it last said of all its clients, or what this one knows of, if that is more)."""
    beat = client.last_beat
    silent = time.perf_counter_ns() - client.last_seen_ns > SILENT_NS
    return silent, max(client.in_flight, beat.running + beat.waiting if beat is not None else 0)
