"""Serves the engine's socket while the engine is being loaded: handshakes and progress. No torch.

A thread of its own owns the hub from ``open`` to ``close``; afterwards it is the caller's. The loading thread only
leaves its latest progress here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable

from jitgraph.engine.service_client import Client
from jitgraph.engine.service_hub import Hub
from jitgraph.ipc.frames import ProtocolError
from jitgraph.ipc.messages import AskStats, Drain, EngineFacts, FromClient, Hello, Refused, StartPhase, Stats, Submit

NEWS_S = 0.05
"""Least time between two records about the same phase."""
LOOK_S = 1.0
"""Longest time between two looks at what has to be done now and then."""
RETRY_AFTER_S = 1.0
"""When to try again a request that came too early."""


class Lobby:
    """One engine's time before ready."""

    def __init__(self, hub: Hub, used_mib: Callable[[], float], on_drain: Callable[[float], None]) -> None:
        """``used_mib``: device memory in use, asked by the loading thread. ``on_drain(timeout_s)``: a client wants the
        process to end; called in the lobby's thread."""
        self._hub = hub
        self._used_mib = used_mib
        self._on_drain = on_drain
        self._open = True
        self._phase = ""
        self._begun_s = self._begun_mib = self._told_s = 0.0
        self._news: StartPhase | None = None
        self._told: StartPhase | None = None
        self._thread = threading.Thread(target=self._run, name="jitgraph-lobby", daemon=True)

    def open(self) -> None:
        """Begins to serve."""
        self._hub.handler = self
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; the hub is the caller's then."""
        self._open = False
        self._hub.wake()
        self._thread.join()

    def progress(self, phase: str, done: int, total: int) -> None:
        """How far the start is. Loading thread; cheap, and never waits for a client."""
        now = time.perf_counter()
        if phase != self._phase:
            self._phase, self._begun_s, self._begun_mib = phase, now, self._used_mib()
        elif now - self._told_s < NEWS_S and done < total:
            return
        self._told_s = now
        self._news = StartPhase(phase, done, total, now - self._begun_s, self._used_mib() - self._begun_mib)
        self._hub.wake()

    # --------------------------------------------------------------------------------------------------- lobby's thread

    def _run(self) -> None:
        while self._open:
            self._hub.look(LOOK_S)
            self._hub.tick()
            news = self._news
            if news is not None and news is not self._told:
                self._told = news
                self._hub.broadcast(news)

    @property
    def facts(self) -> EngineFacts | None:
        """Nobody knows them yet."""
        return None

    def joined(self, client: Client) -> None:
        """Tells a client that comes in the middle where the start is."""
        if self._told is not None:
            self._hub.send(client, self._told)

    def hear(self, client: Client, record: FromClient) -> None:
        """Nothing can be done yet, and the client is told so."""
        if isinstance(record, Submit):
            refusal = "the engine is still getting ready: wait for its Ready record, or try again later"
            self._hub.send(client, Refused(record.request_id, "overloaded", refusal, RETRY_AFTER_S))
        elif isinstance(record, AskStats):
            self._hub.send(client, Stats({}))
        elif isinstance(record, Drain):
            self._on_drain(record.timeout_s)
        elif isinstance(record, Hello):
            raise ProtocolError("Hello comes once")

    def behind(self, client: Client, owner: Hashable) -> None:
        """Nobody has any news here."""

    def left(self, client: Client) -> None:
        """It has nothing running."""
