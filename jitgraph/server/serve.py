"""The front-end process of ``jitgraph serve``: the HTTP server, the engines behind it, signals, and a clean end.

This is a process's entry, so it may do what a library must not: it handles signals and takes over the garbage
collector. Main thread, one event loop. It never imports torch.

Exit codes: 0 after a drain (SIGTERM, SIGINT or SIGHUP once), 1 when all engines are given up, 128 plus the signal where
a second one ended it at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from socket import socket

import uvloop

from jitgraph.lines import LineHandler, LineWriter
from jitgraph.server.address import bound_socket, check_address, is_loopback, url_of
from jitgraph.server.app import create_app
from jitgraph.server.idle_gc import IdleCollector
from jitgraph.server.listen import make_server
from jitgraph.server.metrics import DEFAULT_PREFIX, ServerMetrics
from jitgraph.server.page import page_routes
from jitgraph.server.records import RequestRecord
from jitgraph.server.request_log import RequestLog
from jitgraph.server.runtime_folder import RuntimeFolder
from jitgraph.server.settings import ServerSettings
from jitgraph.server.spawn import threads_for
from jitgraph.server.supervisor import Supervisor
from jitgraph.server.supervisor_policy import Limits
from jitgraph.server.supervisor_pool import EnginePool

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
HTTP_GRACE_S = 5
"""What connections may still take to be read to their end once all answers are complete."""
LAST_WORDS_S = 1.0
"""How long the end may wait for whoever reads standard error."""
_SWITCH_S = 0.0005
"""For how long a thread that tokenises or renders keeps the interpreter once the event loop wants it: a token must not
wait for Python's usual 5 ms."""


@dataclass(frozen=True)
class ServeOptions:
    """What to serve, where and to whom."""

    model: str
    """What the user calls it."""
    commands: tuple[tuple[str, ...], ...]
    """One engine process each; ``--socket PATH`` is added."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes any free one."""
    allow_public: bool = False
    """Listen where other machines reach it although no key is wanted."""
    settings: ServerSettings = field(default_factory=ServerSettings)
    shutdown_timeout_s: float = 30.0
    """What a drain leaves the running requests."""
    limits: Limits = field(default_factory=Limits)
    metrics_prefix: str = DEFAULT_PREFIX
    request_log: str | None = "-"
    """File of one JSON line for each request; ``-`` is standard error, None writes none."""

    @property
    def label(self) -> str:
        """The model in metrics: by the first name that clients know, as dashboards expect."""
        return self.settings.served_names[0] if self.settings.served_names else self.model

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names under which it may be asked: where only this machine reaches it, its own and those that were given."""
        given = self.settings.allowed_hosts
        return (self.host, *given) if given or is_loopback(self.host) else ()


def serve(options: ServeOptions) -> int:
    """Serves until told to end; the exit code. Whoever should read standard error and does not holds up nothing: lines
    are dropped then, and the end comes all the same.

    Raises:
        ConfigError: the address may not or cannot be used, or the settings contradict each other.
        OutputError: the request log cannot be written.
    """
    sys.setswitchinterval(_SWITCH_S)
    check_address(options.host, options.settings.api_keys, options.allow_public)
    say = LineWriter()
    handler = LineHandler(say)
    log = RequestLog(options.request_log) if options.request_log is not None else None
    metrics = ServerMetrics(options.label, options.metrics_prefix, lambda: log.dropped if log is not None else 0)
    logging.getLogger().addHandler(handler)
    try:
        with bound_socket(options.host, options.port) as listener, RuntimeFolder() as folder:
            front = FrontEnd(options, folder.path, listener, metrics, log, say)
            return uvloop.run(front.run())
    finally:
        logging.getLogger().removeHandler(handler)
        if log is not None:
            log.close()
        say.flush(LAST_WORDS_S)


class FrontEnd:
    """One front-end process, from its start to its exit code."""

    def __init__(
        self,
        options: ServeOptions,
        folder: Path,
        listener: socket,
        metrics: ServerMetrics,
        log: RequestLog | None,
        say: Callable[[str], None],
    ) -> None:
        self._options = options
        self._listener = listener
        self._say = say
        self._begun_s = time.monotonic()
        self._pool = EnginePool(supervisors(options.commands, folder, options.limits, say))
        self._collector = IdleCollector(self._pool.busy, metrics.gc_pause)

        def done(record: RequestRecord) -> None:
            metrics.observe(record)
            if log is not None:
                log(record)

        async def scrape(_: str = "") -> tuple[bytes, str]:
            return await metrics.scrape(self._pool.connected, self._pool.restarts)

        settings = replace(options.settings, on_request_done=done, scrape=scrape, allowed_hosts=options.hosts)
        more = {"log_level": "warning", "proxy_headers": False}
        app = create_app(self._pool, settings, routes=page_routes(self._pool, settings))
        self._http = make_server(app, settings, options.host, options.port, grace_s=HTTP_GRACE_S, **more)
        self._signals = 0
        self._exit_code = 0
        self._ending: list[asyncio.Task[None]] = []

    async def run(self) -> int:
        """Serves until the end; the exit code."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        url = url_of(self._listener)
        self._say(f"jitgraph: listening at {url}, process {os.getpid()}; {self._options.model} is being started")
        self._pool.start()
        serving = asyncio.create_task(self._http.serve(sockets=[self._listener]))
        beside = [asyncio.create_task(task) for task in (self._announce(url), self._collector.run())]
        over = asyncio.create_task(self._pool.over())
        try:
            await asyncio.wait((serving, over), return_when=asyncio.FIRST_COMPLETED)
        finally:
            await self._pool.stop()
            self._http.should_exit = True
            for task in (*beside, over):
                task.cancel()
            await asyncio.gather(serving, *beside, over, *self._ending, return_exceptions=True)
        return self._verdict(serving)

    def _verdict(self, serving: asyncio.Task[None]) -> int:
        for failure in self._pool.failures:
            self._say(f"jitgraph: {failure}")
        error = serving.exception()
        if error is not None:
            self._say(f"jitgraph: the HTTP server failed: {error}")
        if self._exit_code == 0 and (error is not None or self._pool.state == "failed"):
            return 1
        return self._exit_code

    async def _announce(self, url: str) -> None:
        """The line that people and scripts wait for; then the start is over."""
        if not await self._pool.ready():
            return
        self._collector.freeze()
        count = len(self._pool.supervisors)
        engines = f", {count} engines" if count > 1 else ""
        took_s = time.monotonic() - self._begun_s
        self._say(f"jitgraph: ready at {url} after {took_s:.2f} s ({self._options.model}{engines})")

    def _on_signal(self, number: signal.Signals) -> None:
        """The first drains, the second ends at once."""
        self._signals += 1
        if self._signals == 1:
            left_s = self._options.shutdown_timeout_s
            busy = self._pool.in_flight
            self._say(
                f"jitgraph: {number.name}: no new requests; the {busy} that run have {left_s:g} s (again: end at once)"
            )
            self._ending.append(asyncio.create_task(self._pool.drain(left_s)))
            return
        self._exit_code = 128 + number
        self._http.force_exit = self._http.should_exit = True
        self._ending.append(asyncio.create_task(self._pool.stop()))


def supervisors(
    commands: Sequence[Sequence[str]], folder: Path, limits: Limits, say: Callable[[str], None]
) -> list[Supervisor]:
    """One for each engine's command; names and sockets are numbered where there are several, and the cores are divided
    among them."""
    threads = threads_for(len(os.sched_getaffinity(0)), len(commands))
    names = ["engine"] if len(commands) == 1 else [f"engine {n}" for n in range(len(commands))]
    return [
        Supervisor(command, folder / f"engine-{n}.sock", name=name, limits=limits, say=say, threads=threads)
        for n, (command, name) in enumerate(zip(commands, names, strict=True))
    ]
