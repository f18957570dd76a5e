"""Keeps one engine process alive: starts it, watches it, replaces it when it crashed or hangs, and ends it.

Runs in the front-end process's event loop, as one task for each engine. Whoever serves requests asks for ``client`` and
``state`` anew each time and keeps neither.
"""

from __future__ import annotations

import asyncio
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from jitgraph.errors import JitgraphError
from jitgraph.ipc.messages import StartPhase
from jitgraph.lines import LineWriter
from jitgraph.server.client import EngineClient
from jitgraph.server.spawn import EngineProcess, spawn_engine
from jitgraph.server.supervisor_policy import (
    Ending,
    Limits,
    Pulse,
    RestartBudget,
    State,
    Watch,
    exit_of,
    retry_after_s,
)
from jitgraph.server.supervisor_report import Progress, StartReport
from jitgraph.server.supervisor_waiting import Waiting, set_from_thread

_LAST_WORD_S = 0.5
"""From the end of the connection to the end of the process, where one follows from the other."""
_NO_TIMEOUT_S = 7 * 24 * 3600.0
"""The supervisor has a better measure of a start than its whole length."""
_KILLED_S = 10.0
"""For how long a killed process is waited for: one that a driver holds may take for ever."""


class _EndedEarly(Exception):
    """Before it was ready."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending.reason)
        self.ending = ending


class Supervisor:
    """One engine and its successors, at one socket."""

    def __init__(
        self,
        command: Sequence[str],
        socket_path: Path,
        *,
        name: str = "engine",
        limits: Limits | None = None,
        say: Callable[[str], None] | None = None,
        threads: int | None = None,
        connect: Callable[..., Awaitable[EngineClient]] = EngineClient.connect,
    ) -> None:
        """``command`` runs an engine process when ``--socket PATH`` is added to it. ``say`` gets a line about each
        event and, from another thread, each line the engine prints; it must not wait. By default they go to standard
        error. ``threads``: see ``EngineProcess``."""
        self._command = list(command)
        self._path = socket_path
        self.name = name
        self.limits = limits or Limits()
        self._say = LineWriter() if say is None else say
        self._threads = threads
        self._connect = connect
        self._budget = RestartBudget(self.limits.restarts, self.limits.window_s)
        self._losses = RestartBudget(self.limits.restarts, self.limits.window_s)
        self._state: State = "starting"
        self._client: EngineClient | None = None
        self._process: EngineProcess | None = None
        self._task: asyncio.Task[None] | None = None
        self._ready, self._over = asyncio.Event(), asyncio.Event()
        self._begun_s = 0.0
        self._news = 0
        self.last_start: StartReport | None = None
        self.endings: Counter[str] = Counter()
        """How often an engine ended unasked, by kind (``Ending.kind``)."""
        self.failure: str | None = None
        """Why nothing is tried any more."""

    # ---------------------------------------------------------------------------------------------- for those who serve

    @property
    def client(self) -> EngineClient | None:
        """The connection to the engine that is ready now; None while there is none."""
        return self._client

    @property
    def state(self) -> State:
        """See ``State``."""
        return self._state

    @property
    def retry_after_s(self) -> float:
        """In how many seconds a request that is refused now may be taken."""
        last = self.last_start.wall_s if self.last_start is not None else None
        return retry_after_s(self._state, last, self._now() - self._begun_s if self._begun_s else 0.0)

    @property
    def restarts(self) -> int:
        """How often an engine had to be replaced."""
        return self.endings.total() - (1 if self._state == "failed" else 0)

    @property
    def pid(self) -> int | None:
        """The engine's process; None while there is none."""
        process = self._process
        return process.pid if process is not None and process.alive else None

    # ------------------------------------------------------------------------------------------------------------- life

    def start(self) -> None:
        """Begins to keep an engine alive; returns at once."""
        if self._task is None:
            self._begun_s = self._now()
            self._task = asyncio.get_running_loop().create_task(self._run(), name=f"supervise {self.name}")

    async def ready(self) -> bool:
        """Waits until the engine is ready; False where it never will be."""
        async with Waiting(self._ready, self._over) as waiting:
            await waiting.first(None)
        return self._ready.is_set()

    async def over(self) -> None:
        """Waits until the state is ``stopped`` or ``failed``; the process has ended by then."""
        await self._over.wait()

    async def drain(self, timeout_s: float) -> None:
        """No new requests; the running ones have ``timeout_s`` to finish. Returns when the engine has ended, which it
        has no later than ``grace_s`` after that."""
        if self._over.is_set():
            return
        self._state = "draining"
        client = self._client
        if client is not None:
            deadline_s = self._now() + timeout_s + self.limits.grace_s
            with suppress(Exception):  # it ends meanwhile: as good
                await asyncio.wait_for(client.drain(timeout_s), deadline_s - self._now())
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._over.wait(), deadline_s - self._now())
        await self.stop()

    async def stop(self) -> None:
        """Ends the engine at once. Returns when it has ended; may be called more than once."""
        if self._task is None:
            self._state = "stopped"
            self._over.set()
        if self._over.is_set():
            return
        self._state = "draining"
        if self._process is not None:
            self._process.kill()
        assert self._task is not None
        self._task.cancel()
        await self._over.wait()
        if self._process is not None:
            await asyncio.to_thread(self._process.wait, _KILLED_S)

    async def _run(self) -> None:
        try:
            while True:
                ending = await self._live()
                if self._state == "draining":
                    return
                self.endings[ending.kind] += 1
                if ending.hopeless or not self._budget.take(self._now()):
                    return self._fail(ending)
                self._state = "restarting"
                self._tell("is started again")
        except asyncio.CancelledError:
            pass  # stop(); nobody awaits the task
        except Exception as error:
            self._say(traceback.format_exc())
            self._fail(Ending("start", str(error), hopeless=True))
        finally:
            self._path.unlink(missing_ok=True)
            if self._state != "failed":
                self._state = "stopped"
            self._over.set()

    def _fail(self, ending: Ending) -> None:
        self._state = "failed"
        why = "" if ending.hopeless else f" after {self.limits.restarts} restarts in {self.limits.window_s:g} s"
        self.failure = f"{self.name} is given up{why}: {ending.reason}"

    async def _live(self) -> Ending:
        """One engine process, from its start to its end."""
        self._path.unlink(missing_ok=True)
        self._begun_s = self._now()
        try:
            process = spawn_engine(
                self._command, self._path, lambda line: self._say(f"{self.name}: {line}"), self._threads
            )
        except JitgraphError as error:
            return self._told(Ending("start", str(error), hopeless=True))
        self._process = process
        exited = asyncio.Event()
        process.on_end(partial(set_from_thread, asyncio.get_running_loop(), exited))
        client: EngineClient | None = None
        reason, hangs = "the server is ending", False
        try:
            client = await self._get_ready(process, exited)
            self._serve(client)
            ending = await self._watch(client, process, exited)
            while ending.kind == "lost" and (again := await self._connect_again(process, ending)) is not None:
                client = again
                ending = await self._watch(client, process, exited)
            self._told(ending)
            reason, hangs = f"the engine {ending.reason}", ending.kind == "hang"
            return ending
        except _EndedEarly as early:
            return self._told(early.ending)
        finally:
            self._client = None
            self._ready.clear()
            if self._state == "ready":
                self._state = "restarting"
            if client is not None:  # its streams hear of the end before the process is waited for
                await client.close(reason)
            await self._end(process, exited, process.interrupt if hangs else process.terminate)

    def _told(self, ending: Ending) -> Ending:
        """Says why an engine ends, before anything is done about it; nothing where that was asked for."""
        if self._state != "draining":
            self._tell(ending.reason)
        return ending

    # ------------------------------------------------------------------------------------------------------------ start

    async def _get_ready(self, process: EngineProcess, exited: asyncio.Event) -> EngineClient:
        """Waits for the process to be ready.

        Raises:
            _EndedEarly: it ended, or was silent for too long, or does not speak the protocol.
        """
        connecting = asyncio.ensure_future(self._connect(self._path, partial(self._hear, Progress()), _NO_TIMEOUT_S))
        pulse = Pulse(self._now(), self.limits.tick_s)
        try:
            async with Waiting(exited) as waiting:
                while True:
                    await waiting.first(self.limits.tick_s, connecting)
                    if exited.is_set():
                        raise _EndedEarly(exit_of(process.returncode, process.tail, before_ready=True))
                    if connecting.done():
                        error = connecting.exception()
                        if error is None:
                            return connecting.result()
                        await waiting.first(_LAST_WORD_S)
                        if exited.is_set():
                            raise _EndedEarly(exit_of(process.returncode, process.tail, before_ready=True))
                        raise _EndedEarly(Ending("start", f"cannot be talked to: {error}")) from error
                    if pulse.look(self._now(), self._news) > self.limits.start_silence_s:
                        silence = f"has said nothing for {self.limits.start_silence_s:g} s while it started"
                        raise _EndedEarly(Ending("hang", silence))
        except BaseException:
            await _drop(connecting)
            raise

    def _hear(self, progress: Progress, news: StartPhase) -> None:
        self._news += 1
        line = progress.line(news)
        if line is not None:
            self._tell(line)

    def _serve(self, client: EngineClient) -> None:
        """The engine is ready: requests may come."""
        self.last_start = StartReport.of(client.ready, self._now() - self._begun_s)
        self._client = client
        self._state = "ready"
        self._ready.set()
        for line in self.last_start.lines():
            self._tell(line)
        self._tell(f"ready in {self.last_start.wall_s:.2f} s (process {client.facts.pid})")

    async def _connect_again(self, process: EngineProcess, ending: Ending) -> EngineClient | None:
        """A new connection to an engine that lives on although the last one has ended; None where it must be replaced:
        it cannot be reached, or the connection has ended too often."""
        self._client = None
        self._ready.clear()
        if self._state == "draining" or not process.alive or not self._losses.take(self._now()):
            return None
        self._state = "restarting"
        try:
            client = await self._connect(self._path, None, self.limits.hang_s, appear_s=0.0)
        except JitgraphError:
            return None
        if client.facts.pid != process.pid:
            await client.close()
            return None
        self._tell(f"{ending.reason}; it lives, and is connected again")
        self._client, self._state = client, "ready"
        self._ready.set()
        return client

    # ------------------------------------------------------------------------------------------------------ watch, end

    async def _watch(self, client: EngineClient, process: EngineProcess, exited: asyncio.Event) -> Ending:
        """Returns when the engine must be replaced, or has ended as it was asked to."""
        watch = Watch(self._now(), self.limits)
        async with Waiting(exited, client.closed) as waiting:
            while not exited.is_set() and not client.closed.is_set():
                hang = watch.hang(self._now(), client.last_seen_ns, client.last_beat)
                if hang is not None:
                    return Ending("hang", hang)
                await waiting.first(self.limits.tick_s)
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(exited.wait(), _LAST_WORD_S)
        if exited.is_set():
            return exit_of(process.returncode, process.tail)
        return Ending("lost", f"has lost the connection: {client.gone}")

    async def _end(self, process: EngineProcess, exited: asyncio.Event, first: Callable[[], None]) -> None:
        """Ends the process, if it has not ended: asks, then kills. ``first``: how it is asked; one that only seemed to
        hang can then still tell its other clients that it ends."""
        for ask, patience_s in ((first, self.limits.grace_s), (process.kill, _KILLED_S)):
            if exited.is_set():
                return
            ask()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(exited.wait(), patience_s)
        if not exited.is_set():
            self._tell(f"process {process.pid} does not end although it was killed: look for it by hand")

    def _tell(self, text: str) -> None:
        self._say(f"{self.name}: {text}")

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


async def _drop(connecting: asyncio.Future[EngineClient]) -> None:
    """Ends an attempt to connect, and what came of it."""
    connecting.cancel()
    with suppress(BaseException):
        client = await connecting
        await client.close()
