"""A load run: streams that take requests in the order of their arrival, progress, and what stays of it on disk.

One event loop in the calling thread. Each stream takes the next request, waits for its arrival and sends it. So at most
``concurrency`` requests are under way, and one that arrives while all streams are busy waits here: its queue delay.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from jitgraph.bench.load.client import Target, base_url, make_client, open_connections, send
from jitgraph.bench.load.figures import figures
from jitgraph.bench.load.limits import Limit
from jitgraph.bench.load.plan import MOST_STREAMS, Ask, Plan, asks, warmup_ask
from jitgraph.bench.load.records import ERROR, RECORDS, SUMMARY, Record, Writer, write_summary
from jitgraph.bench.load.show import progress_line, show_figures
from jitgraph.errors import ConfigError
from jitgraph.version import VERSION

PROGRESS_S = 2.0


@dataclass(frozen=True)
class LoadOptions:
    """What a load run does."""

    url: str
    plan: Plan
    output: Path
    concurrency: int = 1
    limits: tuple[Limit, ...] = ()
    model: str | None = None
    """None is the first that the server names."""
    chat: bool = False
    key: str | None = None
    warmup: int = 2
    """Requests of each stream before the run; they are not recorded."""
    max_seconds: float | None = None
    """No request is begun after this time."""
    timeout_s: float = 600.0
    running_count: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.concurrency <= MOST_STREAMS:
            raise ConfigError(f"--concurrency must be from 1 to {MOST_STREAMS}")
        if self.warmup < 0:
            raise ConfigError("--warmup must not be below 0")
        if not self.timeout_s > 0 or (self.max_seconds is not None and not self.max_seconds > 0):
            raise ConfigError("--timeout and --max-seconds must be over 0")


@dataclass
class Progress:
    """What has happened so far."""

    records: list[Record] = field(default_factory=list)
    running: int = 0
    interrupted: bool = False
    broken_off: int = 0
    """Requests that an interrupt found under way; they have no record."""


def run_load(options: LoadOptions, console: Console) -> int:
    """Runs the plan, writes records and summary, shows the figures.

    Returns 0, 1 where not one request went as planned, 130 after Ctrl-C.

    Raises:
        ConfigError: the server does not answer, or a request of the warm-up failed.
        OutputError: the folder cannot be written.
    """
    url = base_url(options.url)
    with Writer(options.output) as writer:
        progress, model = asyncio.run(_run(options, url, writer, console))
    found = figures(progress.records, options.limits)
    write_summary(options.output, {**_about(options, url, model, progress), **found})
    show_figures(console, found)
    console.print(f"{options.output / RECORDS} has each request, {options.output / SUMMARY} the figures", markup=False)
    if progress.interrupted:
        return 130
    return 0 if any(record.outcome != ERROR for record in progress.records) else 1


async def _run(options: LoadOptions, url: str, writer: Writer, console: Console) -> tuple[Progress, str]:
    progress = Progress()
    async with make_client(options.concurrency, options.key) as client:
        first = await open_connections(client, url, options.concurrency)
        model = first if options.model is None else options.model
        target = Target(url, model, options.chat, options.timeout_s, options.running_count)
        warmups = [_warm_up(client, target, options, stream) for stream in range(options.concurrency)]
        await asyncio.gather(*warmups)
        begun_ns = time.perf_counter_ns()
        plan = asks(options.plan)
        streams = [
            asyncio.create_task(_stream(client, target, options, plan, begun_ns, progress, writer))
            for _ in range(options.concurrency)
        ]
        reporter = asyncio.create_task(_report(options, begun_ns, progress, console))
        with _interrupts(streams, progress):
            results = await asyncio.gather(*streams, return_exceptions=True)
        reporter.cancel()
        for result in results:
            if isinstance(result, Exception):
                raise result
    return progress, model


async def _warm_up(client: httpx.AsyncClient, target: Target, options: LoadOptions, stream: int) -> None:
    for turn in range(options.warmup):
        ask = warmup_ask(options.plan, turn * options.concurrency + stream)
        record = await send(client, target, ask, time.perf_counter_ns())
        if record.outcome == ERROR:
            raise ConfigError(f"the warm-up failed ({record.error}: {record.message}): mend it, or give --warmup 0")


async def _stream(
    client: httpx.AsyncClient,
    target: Target,
    options: LoadOptions,
    plan: Iterator[Ask],
    begun_ns: int,
    progress: Progress,
    writer: Writer,
) -> None:
    """Takes requests until there are none, or time is up."""
    for ask in plan:
        if progress.interrupted:  # a cancellation may be lost where an answer ends in the same moment
            return
        due_s = 0.0 if ask.due_s is None else ask.due_s
        wait_s = due_s - (time.perf_counter_ns() - begun_ns) / 1e9
        end_s = options.max_seconds
        if end_s is not None and max(due_s, (time.perf_counter_ns() - begun_ns) / 1e9) >= end_s:
            return
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        progress.running += 1
        try:
            record = await send(client, target, ask, begun_ns)
        finally:
            progress.running -= 1
        writer.add(record)
        progress.records.append(record)


@contextlib.contextmanager
def _interrupts(streams: list[asyncio.Task[None]], progress: Progress) -> Iterator[None]:
    """Ctrl-C ends the streams; what was measured stays. Elsewhere than in a main thread, nothing changes."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if not progress.interrupted:
            progress.interrupted, progress.broken_off = True, progress.running
            for stream in streams:
                stream.cancel()

    try:
        loop.add_signal_handler(signal.SIGINT, stop)
    except (NotImplementedError, RuntimeError, ValueError):
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


async def _report(options: LoadOptions, begun_ns: int, progress: Progress, console: Console) -> None:
    while True:
        await asyncio.sleep(PROGRESS_S)
        seconds = (time.perf_counter_ns() - begun_ns) / 1e9
        line = progress_line(seconds, options.plan.requests, progress.running, progress.records)
        console.print(line, markup=False, highlight=False)


def _about(options: LoadOptions, url: str, model: str, progress: Progress) -> dict[str, Any]:
    plan = options.plan
    asked = {**asdict(plan), "prompt": repr(plan.prompt), "output": repr(plan.output)}
    asked["pairs"] = len(plan.pairs)
    return {
        "jitgraph": VERSION,
        "url": url,
        "model": model,
        "interface": "chat" if options.chat else "completions",
        "plan": asked,
        "concurrency": options.concurrency,
        "warmup_per_stream": options.warmup,
        "interrupted": progress.interrupted,
        "broken_off": progress.broken_off,
    }
