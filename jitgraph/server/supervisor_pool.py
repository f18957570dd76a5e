"""Several engines behind one front-end: each is supervised alone, and each request goes to one that is ready.

Event loop's thread. One engine is a pool of one, and is talked to directly; ``routing`` says who of several gets what.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from itertools import count
from typing import Any

from jitgraph.ipc.messages import BEAT_S, Beat, EngineFacts
from jitgraph.server.client import EngineClient, EngineStream
from jitgraph.server.routing import Candidate, choose
from jitgraph.server.supervisor import Supervisor
from jitgraph.server.supervisor_policy import State
from jitgraph.types import SamplingParams

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
    def client(self) -> EngineClient | Routed | None:
        """The engine that is ready, or several of them as one; for one HTTP request. None while there is none."""
        clients = self.clients
        if len(clients) < 2:
            return clients[0] if clients else None
        return Routed(self, self.least_busy(clients))

    def least_busy(self, clients: Sequence[EngineClient]) -> EngineClient:
        """The least busy one; equals take turns."""
        shift = next(self._turn) % len(clients)
        return min([*clients[shift:], *clients[:shift]], key=load_of)

    def route(self, ids: Sequence[int], salt: str) -> EngineClient | None:
        """Whom a prompt goes to; None where no engine is ready."""
        ready = self._ready
        if not ready:
            return None
        engines = [Candidate(one.name, *load_of(client)) for one, client in ready]
        return ready[choose(ids, salt, engines, next(self._turn))][1]

    @property
    def clients(self) -> list[EngineClient]:
        """All engines that are ready."""
        return [client for _, client in self._ready]

    @property
    def _ready(self) -> list[tuple[Supervisor, EngineClient]]:
        """Those that take requests; where all that can be talked to end by themselves, these, which will say so."""
        found = ((one, one.client) for one in self.supervisors if one.state == "ready")
        open_ones = [(one, client) for one, client in found if client is not None and not client.closed.is_set()]
        return [pair for pair in open_ones if not _ending(pair[1])] or open_ones

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


class Routed:
    """Several engines with one model as one: an ``EngineLink`` that finds each prompt its engine."""

    def __init__(self, pool: EnginePool, shown: EngineClient) -> None:
        """``shown``: the engine whose facts, beats and counters are told."""
        self._pool = pool
        self._shown = shown

    @property
    def facts(self) -> EngineFacts:
        """What an engine says of itself and its model."""
        return self._shown.facts

    @property
    def last_beat(self) -> Beat | None:
        """Its latest sign of life."""
        return self._shown.last_beat

    @property
    def last_seen_ns(self) -> int:
        """``perf_counter_ns`` when anything last came from it."""
        return self._shown.last_seen_ns

    @property
    def gone(self) -> str | None:
        """Why the connection to it has ended; None while it has not."""
        return self._shown.gone

    def submit(self, ids: Sequence[int], params: SamplingParams, *, salt: str = "", **more: Any) -> EngineStream:
        """Sends a request to the engine that is best for it. Arguments and errors: see ``EngineClient.submit``."""
        client = self._pool.route(ids, salt) or self._shown
        return client.submit(ids, params, salt=salt, **more)

    async def stats(self) -> dict[str, Any]:
        """Its counters. Raises ``EngineGone``."""
        return await self._shown.stats()


def _ending(client: EngineClient) -> bool:
    """Whether somebody else has told an engine to end."""
    return client.last_beat is not None and client.last_beat.draining


def load_of(client: EngineClient) -> tuple[bool, int]:
    """What to choose an engine by, least first: whether it is silent and so may hang, and the requests that it has
    (what it last said of all its clients, or what this one knows of, if that is more)."""
    beat = client.last_beat
    silent = time.perf_counter_ns() - client.last_seen_ns > SILENT_NS
    return silent, max(client.in_flight, beat.running + beat.waiting if beat is not None else 0)
