"""The engine process's loop: clients in, steps, tokens out, and idle work between. No torch.

One thread owns engine and sockets. It looks at the sockets between any two steps and any two pieces of idle work, and
waits in the poller when there is neither, so a request that finds the engine idle is launched by the thread that reads
it, before anything else is looked at. It never waits for a client.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from jitgraph.engine.service_client import Client
from jitgraph.engine.service_figures import Figures
from jitgraph.engine.service_hub import Hub
from jitgraph.engine.service_live import Live
from jitgraph.engine.service_needs import Grammars, Limits, RequestEngine
from jitgraph.engine.service_practice import Practice
from jitgraph.engine.service_requests import Requests
from jitgraph.engine.service_vigil import Vigil
from jitgraph.errors import CompileError, DeviceError
from jitgraph.ipc.frames import ProtocolError, encode
from jitgraph.ipc.messages import (
    BEAT_S,
    AskStats,
    Beat,
    Cancel,
    Drain,
    EngineFacts,
    FromClient,
    Ready,
    Stats,
    Submit,
)
from jitgraph.polling import BETWEEN_REQUESTS_S, polling_s
from jitgraph.types import TokenChunk

QUIET_S = 2e-3
"""How long it must have been quiet before graphs are captured: the next request often comes at once."""
TIDY_S = 0.1
"""How long it must have been quiet before garbage is collected."""
YOUNG_EVERY_S = 10.0
"""Where it is never quiet: time between two collections of what is young."""
YOUNG_SHARE = 2000
"""They take at most one part in so many of the time."""
IDLE_AGAIN_S = 5.0
"""Idle work that failed is tried again after so long."""
MOST_FAILURES = 3
"""Failures of the engine in a row, without a token between them, after which the process gives up."""
_BEAT_EVERY_S = 0.8 * BEAT_S

_LOGGER = logging.getLogger(__name__)


class Load(Protocol):
    """How busy an engine is."""

    @property
    def running(self) -> int: ...

    @property
    def waiting(self) -> int: ...

    @property
    def free_pages(self) -> int: ...

    @property
    def total_pages(self) -> int: ...

    @property
    def steps(self) -> int: ...


class EngineReport(Protocol):
    """An engine's figures; ``report.Report`` has them."""

    def load(self) -> Load: ...

    def begun(self) -> set[int]: ...

    def counters(self) -> dict[str, Any]: ...


class ServedEngine(RequestEngine, Protocol):
    """What the loop needs of an engine; ``Engine`` has it."""

    @property
    def busy(self) -> bool: ...

    @property
    def idle_work(self) -> bool: ...

    @property
    def capturing(self) -> bool: ...

    def launch(self) -> None: ...

    def rehearse(self) -> None: ...

    def early_token(self, rehearse: Callable[[], None] | None = None) -> list[TokenChunk] | None: ...

    def step(self) -> list[TokenChunk]: ...

    def work_while_idle(self) -> bool: ...


class Collector(Protocol):
    """Who collects garbage; ``worker.IdleCollector`` does."""

    def collect(self) -> None: ...

    def collect_young(self) -> None: ...


@dataclass(frozen=True)
class ServiceOptions:
    """How a service behaves."""

    max_queued: int = 64
    """Requests that may wait besides those that run."""
    spin_s: float | None = None
    """For how long after the last request the thread polls without sleeping: a quicker answer for a busy core. None
    leaves it to the device and the number of cores."""
    longest_s: float = 0.0
    """The longest step before ready, in seconds: what ``Beat.longest_s`` begins with."""


class Service:
    """One engine and its clients, from ready to the end."""

    def __init__(
        self,
        engine: ServedEngine,
        report: EngineReport,
        hub: Hub,
        ready: Ready,
        options: ServiceOptions | None = None,
        collector: Collector | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        """``collector`` is asked when it has been quiet for a while after requests. ``grammars``: see ``Requests``. The
        hub is this thread's from now on."""
        options = options or ServiceOptions()
        facts = ready.facts
        self.figures = Figures()
        self._engine = engine
        self._report = report
        self._hub = hub
        self._ready = ready
        self._spin_s = polling_s(options.spin_s, facts.device, BETWEEN_REQUESTS_S)
        self._collector = collector
        self._young_at_s = math.inf if collector is None else time.monotonic() + YOUNG_EVERY_S
        limits = Limits(facts.max_streams, options.max_queued, facts.max_model_len)
        self._requests = Requests(engine, hub, limits, self.figures, self._failed, grammars)
        self._practice = Practice(limits, engine.rehearse)
        self._end_at_s: float | None = None
        self._fatal: str | None = None
        self._failure: Exception | None = None
        self._failures_in_a_row = 0
        self._beat_at_s = self._idle_again_s = 0.0
        self._longest_s = options.longest_s
        self._last_beat: Beat | None = None
        self._here_s = time.monotonic()
        """When the loop was last at its beginning."""
        self._active_s = time.monotonic()
        self._untidy = False
        hub.handler = self

    # ------------------------------------------------------------------------------------------------------------- loop

    def run(self) -> str | None:
        """Serves until the end, and says goodbye to all; returns why the engine failed, None where it was told to
        end."""
        vigil = self._vigil = Vigil(self._beat_beside)
        self._hub.broadcast(self._ready)
        self._here_s = time.monotonic()
        while not self._over():
            if self._engine.busy:
                self._hub.look(0.0)
                self._step()
            else:
                self._idle()
            if self._requests.held_up:
                self._requests.look_at_held_up()
            now_s = time.monotonic()
            if (away_s := now_s - self._here_s) > self._longest_s:
                self._longest_s = away_s
            self._here_s = now_s
            if now_s >= self._requests.next_deadline_s:
                self._requests.expire(now_s)
            if now_s >= self._beat_at_s:
                self._beat()
        vigil.close()
        if self._fatal is None:
            self._requests.end_all("draining", "the engine process ended before this request was done")
        self._hub.close(self._fatal or "the engine process has ended as it was told to")
        self._practice.close()
        return self._fatal

    def _over(self) -> bool:
        if self._fatal is not None:
            return True
        return self._end_at_s is not None and (not self._requests or time.monotonic() >= self._end_at_s)

    def drain(self, timeout_s: float) -> None:
        """No more requests; ends once the running ones are done, or after ``timeout_s``. A second call can only bring
        the end nearer. May be called by a signal's handler."""
        self._requests.closed_because = "the engine process is ending: try again later"
        end_at_s = time.monotonic() + timeout_s
        self._end_at_s = end_at_s if self._end_at_s is None else min(end_at_s, self._end_at_s)
        self._beat_at_s = 0.0  # clients hear of it at once
        self._hub.wake()

    @property
    def draining(self) -> bool:
        """Whether the end has been asked for."""
        return self._end_at_s is not None

    def _step(self) -> None:
        engine, requests = self._engine, self._requests
        try:
            if self._here_s >= self._young_at_s:
                engine.launch()
                self._collect_young()
            if requests.unlaunched:
                engine.launch()
                requests.note_launched(self._report.begun())
            if (early := engine.early_token(self._rehearse if self._spin_s else None)) is not None:
                requests.deliver(early)  # its books can wait
            chunks = engine.step()
        except Exception as error:
            self._failed(error)
            return
        failure, self._failure = self._failure, None
        if chunks or early:
            requests.deliver(chunks, failure)
            self._active_s, self._untidy = time.monotonic(), True
            if failure is None:
                self._failures_in_a_row = 0

    def _collect_young(self) -> None:
        """It has not been quiet for long, and garbage must not pile up: a little of it now, while the GPU is at work on
        what has been launched and the last token is out."""
        assert self._collector is not None
        begun_s = time.monotonic()
        self._collector.collect_young()
        took_s = time.monotonic() - begun_s
        self._young_at_s = begun_s + max(YOUNG_EVERY_S, YOUNG_SHARE * took_s)

    def _failed(self, error: Exception, idle: bool = False) -> None:
        """The engine raised something. Mostly it has ended all requests and can go on; the next step tells which."""
        self.figures.failures[type(error).__name__] += 1
        self._failures_in_a_row += not idle
        self._failure = error
        _LOGGER.error("the engine failed", exc_info=error)
        lost = isinstance(error, DeviceError) and not isinstance(error, CompileError)
        if lost or self._failures_in_a_row > MOST_FAILURES:
            self._fatal = f"the engine failed: {error}"

    # ------------------------------------------------------------------------------------------------------------- idle

    def _idle(self) -> None:
        """Nothing runs: a piece of idle work, or waiting for a client."""
        now = time.monotonic()
        quiet_s, wait_s = now - self._active_s, self._beat_at_s - now
        if now >= self._idle_again_s and self._engine.idle_work:
            if quiet_s >= QUIET_S or not self._engine.capturing:
                self._hub.look(0.0)
                if not self._engine.busy:
                    self._idle_piece()
                return
            wait_s = min(wait_s, QUIET_S - quiet_s)
        elif self._untidy and self._collector is not None:
            if quiet_s >= TIDY_S:
                self._untidy = False
                self._collector.collect()
                self._young_at_s = time.monotonic() + YOUNG_EVERY_S
                return
            wait_s = min(wait_s, TIDY_S - quiet_s)
        if self._end_at_s is not None:
            wait_s = min(wait_s, self._end_at_s - now)
        if self._requests:  # it waits for its grammar, or for room
            wait_s = min(wait_s, self._requests.next_deadline_s - now)
        if quiet_s < self._spin_s:
            self._practice.now_and_then(now)
            wait_s = 0.0
        self._hub.look(max(0.0, wait_s))

    def _idle_piece(self) -> None:
        try:
            self._engine.work_while_idle()
        except Exception as error:
            self._idle_again_s = time.monotonic() + IDLE_AGAIN_S
            self._failed(error, idle=True)

    def _beat(self) -> None:
        self._beat_at_s = time.monotonic() + _BEAT_EVERY_S
        self._vigil.put_off()
        self._last_beat = self._pulse()
        self._hub.broadcast(self._last_beat)
        self._hub.tick()

    def _pulse(self) -> Beat:
        load = self._report.load()
        now_ns, longest_s, draining = time.perf_counter_ns(), self._longest_s, self.draining
        pages = (load.free_pages, load.total_pages)
        return Beat(now_ns, load.running, load.waiting, *pages, load.steps, 0.0, longest_s, draining)

    def _beat_beside(self) -> None:
        """The loop is at one thing for long: says so in its place. The vigil's thread."""
        last = self._last_beat
        if last is not None:
            away_s = time.monotonic() - self._here_s
            now_ns = time.perf_counter_ns()
            self._hub.broadcast_beside(msgspec.structs.replace(last, now_ns=now_ns, away_s=away_s))

    # ---------------------------------------------------------------------------------------------------------- clients

    @property
    def facts(self) -> EngineFacts | None:
        """For clients that come now."""
        return self._ready.facts

    def joined(self, client: Client) -> None:
        """Tells a new client that it may begin."""
        self._hub.send(client, self._ready)
        self._hub.send(client, self._pulse())

    def hear(self, client: Client, record: FromClient) -> None:
        """What a client says."""
        if type(record) is Submit:
            self._requests.submit(client, record)
            self._active_s, self._untidy = time.monotonic(), True
            if self._spin_s and not self._requests.unlaunched:
                self._rehearse()
        elif type(record) is Cancel:
            self._requests.cancel(client, record.request_id)
        elif type(record) is AskStats:
            self._hub.send(client, Stats({**self._report.counters(), **self.figures.values()}))
        elif type(record) is Drain:
            if not 0.0 <= record.timeout_s < math.inf:
                raise ProtocolError(f"a drain's timeout must be a number of seconds from 0 up, not {record.timeout_s}")
            self.drain(record.timeout_s)
        else:
            raise ProtocolError("Hello comes once")

    def _rehearse(self) -> None:
        """The GPU is at work: there is time to go the way that a first token will go, here and in the client, which
        rehearses its own part with a beat."""
        self._requests.rehearse(encode(self._pulse()))

    def behind(self, client: Client, owner: Hashable) -> None:
        """A client leaves too much unread, most of it of one request's."""
        assert isinstance(owner, Live)
        self._requests.behind(owner)

    def left(self, client: Client) -> None:
        """A client is gone, and its requests with it."""
        self._requests.left(client)
