"""The engine process: loads a model, serves it at a socket, and ends in good order. Its main thread does everything but
the handshakes before ready.

Exit codes: 0, told to end (SIGTERM, ``Drain``); 1, the engine failed; 2, settings that cannot work (``JitgraphError``,
printed by the command line); 130, SIGINT. The process dies by SIGALRM where it was told to end at once and hangs.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from jitgraph.config import EngineConfig
from jitgraph.engine.service import Service, ServiceOptions
from jitgraph.engine.service_hub import Hub
from jitgraph.engine.service_lobby import Lobby
from jitgraph.errors import CapacityError, JitgraphError, RequestError
from jitgraph.ipc.listener import Listener
from jitgraph.ipc.messages import Ready
from jitgraph.types import Request, SamplingParams

if TYPE_CHECKING:
    from jitgraph.engine.engine import Engine
    from jitgraph.engine.opening import OpenedEngine

Progress = Callable[[str, int, int], None]

PR_SET_PDEATHSIG = 1
WARM_UP = "warm up"
"""The phase of the start in which each size is run once."""
AT_ONCE_S = 3
"""A process that was told to end at once is killed after so long."""
FAILED = 1
INTERRUPTED = 130
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerOptions:
    """What an engine process serves, and where."""

    model: str
    socket: Path
    weights: str = "checkpoint"
    seed: int = 0
    config: EngineConfig = field(default_factory=EngineConfig)
    service: ServiceOptions = field(default_factory=ServiceOptions)
    shutdown_timeout_s: float = 30.0
    """What SIGTERM leaves the running requests."""
    parent: int | None = None
    """End when this process, the parent, does; None outlives it."""


class _Ended(BaseException):
    """Told to end while the model was being loaded."""


class Worker:
    """One engine process, from its start to its exit code."""

    def __init__(
        self,
        options: WorkerOptions,
        reporter: Callable[[], AbstractContextManager[Progress]] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """``reporter`` shows progress from when it is entered until ready; ``say`` gets a line when it is."""
        self._options = options
        self._reporter = reporter or (lambda: nullcontext(lambda phase, done, total: None))
        self._say = say
        self._service: Service | None = None
        self._listener: Listener | None = None
        self._lobby: Lobby | None = None
        self._used_mib: Callable[[], float] = float
        self._warming_since_s: float | None = None
        self._longest_s = 0.0
        """The longest that the engine took for one size while it warmed up."""
        self._exit_code = 0
        self._asked = 0
        self._loading = self._at_once = False

    def run(self) -> int:
        """Serves until told to end; the exit code. Takes over the process: signals, garbage collection.

        Raises:
            JitgraphError: the engine cannot be built, or the socket cannot be listened at.
        """
        if self._options.parent is not None:
            die_with(self._options.parent)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self._listener = Listener(self._options.socket)
        hub = Hub(self._listener)
        hub.wake_on_signals()
        try:
            return self._serve(hub)
        except _Ended:
            hub.close("the engine process was told to end before it was ready")
            return self._exit_code
        except JitgraphError as error:
            hub.close(f"the engine cannot be started: {error}")
            raise
        except Exception as error:
            _LOGGER.exception("the engine process fails")
            hub.close(f"the engine process failed: {type(error).__name__}: {error}")
            return FAILED
        finally:
            self._listener.remove()

    def _serve(self, hub: Hub) -> int:
        lobby = self._lobby = Lobby(hub, lambda: self._used_mib(), lambda _: os.kill(os.getpid(), signal.SIGTERM))
        lobby.open()
        try:
            self._loading = True
            with self._reporter() as tell:
                opened, ready = self._load(process_age_s(), self._both(tell))
        finally:
            self._loading = False
            lobby.close()
        collector = IdleCollector()
        self._service = service = self._make_service(opened, ready, hub, collector)
        if self._asked:
            raise _Ended
        collector.freeze()
        service.figures.watch.start()  # pauses count from here on
        for notice in opened.engine.notices:
            self._say(notice)
        self._say(f"{opened.name} is ready after {sum(ready.phases_s.values()):.1f} s, at {self._options.socket}")
        fatal = service.run()
        if fatal is not None:
            return FAILED
        if not self._at_once:
            opened.engine.close()
        return self._exit_code

    def _load(self, started_s: float, progress: Progress) -> tuple[OpenedEngine, Ready]:
        """The engine, and the account of its start. Everything that is slow to import is imported here."""
        progress("import", 0, 1)
        from jitgraph.engine.memory import used_bytes
        from jitgraph.engine.opening import open_engine
        from jitgraph.model.device import resolve_device

        options = self._options
        imported_s = process_age_s()
        device = resolve_device(options.config.device)
        self._used_mib = lambda: used_bytes(device) / 2**20
        opened = open_engine(
            options.model,
            config=options.config,
            weights=options.weights,
            seed=options.seed,
            progress=progress,
        )
        loaded_s = process_age_s()
        progress("grammars", 0, 1)
        with suppress(RequestError):  # there can be none with this model; who asks for one is told why
            opened.engine.constraints.compiler.load()
        grammars_s = process_age_s() - loaded_s
        phases = {"start": started_s, "import": imported_s - started_s}
        phases |= {name: ms / 1e3 for name, ms in opened.phases_ms.items()}
        phases["grammars"] = grammars_s
        if opened.engine.emulated:
            progress(WARM_UP, 0, 1)
            phases[WARM_UP] = self._longest_s = largest_step_s(opened.engine)
        while opened.engine.work_while_idle():  # the first request finds everything prepared
            pass
        phases["finish"] = process_age_s() - sum(phases.values())
        return opened, Ready(opened.facts(), phases, opened.phases_mib)

    def _make_service(self, opened: OpenedEngine, ready: Ready, hub: Hub, collector: IdleCollector) -> Service:
        from jitgraph.engine.report import Report

        engine = opened.engine
        how = replace(self._options.service, longest_s=self._longest_s)
        return Service(engine, Report(engine), hub, ready, how, collector, engine.constraints.compiler)

    def _both(self, tell: Progress) -> Progress:
        """Progress for clients and for whoever started the process."""
        lobby = self._lobby
        assert lobby is not None

        def progress(phase: str, done: int, total: int) -> None:
            self._look_at_warm_up(phase)
            lobby.progress(phase, done, total)
            tell(phase, done, total)

        return progress

    def _look_at_warm_up(self, phase: str) -> None:
        """Each size is run once then, with a word after each: how long a step may take is known before the first."""
        now_s = time.monotonic()
        if phase == WARM_UP and self._warming_since_s is not None:
            self._longest_s = max(self._longest_s, now_s - self._warming_since_s)
        self._warming_since_s = now_s if phase == WARM_UP else None

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        """The first SIGTERM drains; anything more ends at once. Main thread, between two bytecodes of anything."""
        self._asked += 1
        if number == signal.SIGINT:
            self._exit_code = INTERRUPTED
        service = self._service
        self._at_once = self._asked > 1 or number == signal.SIGINT or service is None
        if self._at_once:
            if self._listener is not None:
                self._listener.remove()
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(AT_ONCE_S)
        if service is not None:
            service.drain(0.0 if self._at_once else self._options.shutdown_timeout_s)
        elif self._loading:
            raise _Ended


class IdleCollector:
    """Python's garbage collector, off but for the moments in which nobody waits, or the GPU is at work anyway."""

    def freeze(self) -> None:
        """The start is over: what lives now stays, and no collection looks at it again."""
        gc.collect()
        gc.freeze()
        gc.disable()

    def collect(self) -> None:
        """Collects what has come since: little, so it takes little."""
        gc.collect()

    def collect_young(self) -> None:
        """Collects of that what is young, which is less."""
        gc.collect(1)


def largest_step_s(engine: Engine) -> float:
    """Runs the largest step once, for nothing, where the start does not: how many seconds that took. Before the first
    request; nothing of it is kept or counted."""
    tokens = min(engine.sizing.chunk_tokens, engine.sizing.max_model_len - 1)
    begun_s = time.monotonic()
    with suppress(CapacityError):  # a cache too small for it: nothing so large will ever run
        engine.submit(Request(0, (0,) * tokens, SamplingParams(max_tokens=1, ignore_eos=True)))
        while engine.busy:
            engine.step()
    engine.scheduler.reset()
    engine.reset_counters()
    return time.monotonic() - begun_s


def die_with(parent: int) -> None:
    """Has the kernel kill this process when its parent ends, whatever either is doing then. ``parent`` is the parent's
    process id: where it has ended already, this process ends at once."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "the parent-death signal cannot be set")
    if os.getppid() != parent:
        sys.exit(FAILED)


def process_age_s() -> float:
    """Seconds since this process was started, to a hundredth."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # after the boot; field 22 of proc(5)
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started_s)
