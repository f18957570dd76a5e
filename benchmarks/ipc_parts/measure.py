"""What the way between two processes adds: with a model, and with nothing at all at its other end.

Main thread; garbage collection is held still by the caller. Samples are in microseconds.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import uvloop

from ipc_parts.echo import Echo
from jitgraph import AsyncClient, Client, SamplingParams
from jitgraph.server.client_text import ModelText
from jitgraph.server.runtime_folder import RuntimeFolder
from jitgraph.server.spawn import spawn_engine
from jitgraph.types import Request

ECHO = Path(__file__).with_name("echo.py")
PAUSE_S = 0.05
WARMUP = 50
ECHO_TOKENS = 32
ECHO_TOKEN_US = 1000.0
"""Time between two tokens of the model-free engine: about what a small model takes."""

Samples = dict[str, list[float]]
Stream = Callable[[Sequence[int], SamplingParams], Any]


@contextmanager
def echo_engine(spin_us: float) -> Iterator[Path]:
    """A model-free engine process."""
    with RuntimeFolder() as folder:
        socket = folder.path / "echo.sock"
        options = ["--token-us", str(ECHO_TOKEN_US), "--spin-us", str(spin_us)]
        process = spawn_engine([sys.executable, str(ECHO), *options], socket)
        try:
            yield socket
        finally:
            process.end()


def greedy(tokens: int) -> SamplingParams:
    """So many tokens, whatever they are."""
    return SamplingParams(max_tokens=tokens, ignore_eos=True)


def first_us(stream: Stream, prompt: Sequence[int]) -> float:
    """From the hand-over of the ids to the first token in the caller's hands."""
    params = greedy(1)
    begin = time.perf_counter_ns()
    tokens = stream(prompt, params)
    next(tokens)
    took = time.perf_counter_ns() - begin
    with suppress(StopIteration):
        next(tokens)
        raise AssertionError("a request for one token gave more")
    return took / 1e3


def decode_us(stream: Stream, prompt: Sequence[int], tokens: int) -> tuple[list[float], list[float]]:
    """The gaps between tokens in the caller's hands, and how long each was on its way from the engine's."""
    times, delays = list[int](), list[float]()
    for chunk in stream(prompt, greedy(tokens)):
        now = time.perf_counter_ns()
        times.append(now)
        delays.append((now - chunk.time_ns) / 1e3)
    assert len(times) == tokens, f"asked for {tokens} tokens, got {len(times)}"
    return [(b - a) / 1e3 for a, b in pairwise(times)], delays[1:]


def inside(text: ModelText) -> Stream:
    """The same requests to the same engine without a model, in this process: what is left without the channel."""
    echo, number = Echo(int(ECHO_TOKEN_US * 1e3)), itertools.count(1)

    def stream(prompt: Sequence[int], params: SamplingParams) -> Iterator[Any]:
        live = text.live(Request(next(number), text.encode(prompt), params), time.perf_counter_ns())
        echo.book(live.request, echo.fire(live.request.prompt_token_ids, params))
        live.make_text()
        while live.finish_reason is None:
            for chunk in echo.step():
                live.take(chunk)
            yield live.pending.popleft()

    return stream


def channel(
    requests: int, paused: int, decodes: int, prompt_tokens: int, spin_us: float, client_spin_us: float
) -> Samples:
    """The channel alone: nothing is computed at its other end. A blocking client, then one on uvloop."""
    prompt = list(range(prompt_tokens))
    found: Samples = {}
    with echo_engine(spin_us) as socket:
        with Client(socket, spin_s=client_spin_us / 1e6) as client:
            for _ in range(WARMUP):
                first_us(client.stream, prompt)
            here = inside(client._text)
            for name in ("here_ttft", "sync_ttft", "here_ttft_paused", "sync_ttft_paused"):
                found[name] = []
            for _ in range(requests):
                found["here_ttft"].append(first_us(here, prompt))
                found["sync_ttft"].append(first_us(client.stream, prompt))
            for _ in range(paused):
                for name, stream in (("here", here), ("sync", client.stream)):
                    time.sleep(PAUSE_S)
                    found[f"{name}_ttft_paused"].append(first_us(stream, prompt))
            found["sync_gap"], found["sync_delay"] = [], []
            for _ in range(decodes):
                gaps, delays = decode_us(client.stream, prompt, ECHO_TOKENS)
                found["sync_gap"] += [gap - ECHO_TOKEN_US for gap in gaps]
                found["sync_delay"] += delays
        loop = uvloop.new_event_loop()
        try:
            found |= loop.run_until_complete(_channel_async(socket, requests, paused, decodes, prompt))
        finally:
            loop.close()
    return found


async def _channel_async(socket: Path, requests: int, paused: int, decodes: int, prompt: list[int]) -> Samples:
    found: Samples = {"async_ttft": [], "async_ttft_paused": [], "async_gap": [], "async_delay": []}
    async with AsyncClient(socket) as client:

        async def first() -> float:
            begin = time.perf_counter_ns()
            tokens = client.stream(prompt, greedy(1))
            await tokens.__anext__()
            return (time.perf_counter_ns() - begin) / 1e3

        for _ in range(WARMUP):
            await first()
        found["async_ttft"] = [await first() for _ in range(requests)]
        for _ in range(paused):
            await asyncio.sleep(PAUSE_S)
            found["async_ttft_paused"].append(await first())
        for _ in range(decodes):
            times, delays = list[int](), list[float]()
            async for chunk in client.stream(prompt, greedy(ECHO_TOKENS)):
                times.append(time.perf_counter_ns())
                delays.append((times[-1] - chunk.time_ns) / 1e3)
            found["async_gap"] += [(b - a) / 1e3 - ECHO_TOKEN_US for a, b in pairwise(times)]
            found["async_delay"] += delays[1:]
    return found


def engines(here: Any, apart: Any, prompts: Sequence[list[int]], requests: int, decodes: int, tokens: int) -> Samples:
    """The same prompts to an engine in this process and to one in a process of its own, by turns, with a pause before
    each request. The idle one of the two does nothing meanwhile."""
    found: Samples = {f"{name}_{what}": [] for name in ("here", "apart") for what in ("ttft", "itl")}
    found["apart_delay"] = []
    both = [("here", here), ("apart", apart)]
    for prompt in prompts:
        for _, llm in both:
            for _ in range(3):
                first_us(llm.stream, prompt)
            decode_us(llm.stream, prompt, tokens)
    for i in range(requests):
        prompt = prompts[i % len(prompts)]
        for name, llm in both if i % 2 else both[::-1]:
            time.sleep(PAUSE_S)
            found[f"{name}_ttft"].append(first_us(llm.stream, prompt))
    for i in range(decodes):
        prompt = prompts[i % len(prompts)]
        for name, llm in both if i % 2 else both[::-1]:
            time.sleep(PAUSE_S)
            gaps, delays = decode_us(llm.stream, prompt, tokens)
            found[f"{name}_itl"] += gaps
            if name == "apart":
                found["apart_delay"] += delays
    return found
