"""What a decode step costs the host: how much it launches, and its time beside the wait for tokens.

Runs on the main thread of a case's process, after everything else there: the profiler that counts launches slows down
whatever comes later in the same process.

- *Launches* are calls that start work on the device: kernels (as the profiler sees them on the host, those of PyTorch
  and its libraries included) and graphs (from the engine's own counters: a replay, or a device-side loop). Those of a
  request for one token are subtracted, so that what is left belongs to the decode steps.
- *Host time* is the time inside the engine's ``step`` and ``launch`` outside the loop that polls for tokens; likewise.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

from jitgraph.bench.ablation import HOST_US, LAUNCHES

PROFILED_STEPS = 16
FIRST_TOKENS = 5
"""Requests for one token that what is subtracted is the median of."""
HOST_TOKENS = 128
"""Tokens over which the host's time is averaged: two device-side loops."""
KERNEL_CALL = re.compile(r"cu(da)?Launch\w*Kernel\w*")
"""``cudaLaunchKernel``, ``cudaLaunchKernelExC``, ``cuLaunchKernelEx`` and the like."""
COPY_CALL = re.compile(r"cu(da)?Mem(cpy|set)\w*")


@dataclass
class StepTimes:
    """Nanoseconds since the clock began."""

    inside: int = 0
    """In ``Engine.step`` and ``Engine.launch``, one within the other counted once."""
    waiting: int = 0
    """Of that, polling for tokens."""
    depth: int = 0


@contextmanager
def step_clock(llm: Any) -> Iterator[StepTimes]:
    """Times the engine of an ``LLM`` inside the block; what the clock itself takes counts as host time."""
    engine, reader, now = llm._engine, llm._engine.runner.reader, time.perf_counter_ns
    times = StepTimes()

    def timed(entry: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            begin = now()
            times.depth += 1
            try:
                return entry()
            finally:
                times.depth -= 1
                if not times.depth:
                    times.inside += now() - begin

        return run

    def timed_wait(wait: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            begin = now()
            try:
                return wait(*args, **kwargs)
            finally:
                times.waiting += now() - begin

        return run

    vars(engine).update(step=timed(engine.step), launch=timed(engine.launch))
    vars(reader)["wait"] = timed_wait(reader.wait)
    try:
        yield times
    finally:
        del vars(engine)["step"], vars(engine)["launch"], vars(reader)["wait"]


@dataclass(frozen=True)
class HostTime:
    """Microseconds of the host for each token after the first, the wait for tokens left out."""

    step_us: float
    """In the engine: scheduling, launching, reading, recording."""
    client_us: float
    """All of it, from one token in the caller's hands to the next: text and the caller's loop as well."""
    tokens: int


def host_time(llm: Any, prompt: Sequence[int], tokens: int) -> HostTime:
    """Decodes ``tokens`` tokens after the first, greedily. What a request for the first alone takes is subtracted: it
    is not left out, because loops are launched before the first token is read."""
    first = [_request_host_ns(llm, prompt, 1) for _ in range(FIRST_TOKENS)]
    whole = _request_host_ns(llm, prompt, tokens + 1)
    step, client = (all_of_it - median(one[i] for one in first) for i, all_of_it in enumerate(whole))
    return HostTime(step / tokens / 1e3, client / tokens / 1e3, tokens)


def _request_host_ns(llm: Any, prompt: Sequence[int], tokens: int) -> tuple[int, int]:
    """Nanoseconds of the host for one request, the wait for tokens left out: in the engine, and all of it."""
    with step_clock(llm) as times:
        begin = time.perf_counter_ns()
        seen = sum(1 for _ in llm.stream(list(prompt), _greedy(tokens)))
        wall = time.perf_counter_ns() - begin
    assert seen == tokens, f"asked for {tokens} tokens, got {seen}"
    return times.inside - times.waiting, wall - times.waiting


def host_calls(work: Callable[[], object]) -> Counter[str]:
    """Runs ``work`` under the profiler; the calls that start kernels or copies, by name. CUDA only."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
    calls: Counter[str] = Counter()
    for event in profiler.key_averages():
        if KERNEL_CALL.fullmatch(event.key) or COPY_CALL.fullmatch(event.key):
            calls[event.key] += event.count
    return calls


def calls_per_step(request: Callable[[int], object], steps: int = PROFILED_STEPS) -> dict[str, float]:
    """Kernel launches and copies in a decode step: those of a request for ``steps + 1`` tokens less those of one for a
    single token. ``request(tokens)`` serves the same prompt each time. CUDA only."""
    request(1)
    request(steps + 1)
    first, calls = host_calls(lambda: request(1)), host_calls(lambda: request(steps + 1))
    calls.subtract(first)
    kernels, copies = (
        sum(n for name, n in calls.items() if which.fullmatch(name)) for which in (KERNEL_CALL, COPY_CALL)
    )
    return {"kernels_per_step": kernels / steps, "copies_per_step": copies / steps}


def graphs_per_step(llm: Any, request: Callable[[int], object], steps: int) -> float:
    """Graphs launched in a decode step, a device-side loop counting as one launch; from the engine's counters."""
    request(1)
    begin = _graph_launches(llm)
    request(1)
    middle = _graph_launches(llm)
    request(steps + 1)
    return ((_graph_launches(llm) - middle) - (middle - begin)) / steps


def _graph_launches(llm: Any) -> int:
    """Graphs launched by steps so far. A piecewise graph tells how many it consists of."""
    stats, store = llm.stats(), llm._engine.store
    each = max((getattr(store.lookup(key), "launches", 1) for key in store.ready_keys), default=1)
    paths: Mapping[str, int] = stats["paths"]
    return each * (paths.get("exact", 0) + paths.get("padded", 0)) + int(stats["loops"])


def launch_figures(llm: Any, prompt: Sequence[int], cuda: bool) -> dict[str, float]:
    """Launches of one ``LLM``'s decode steps. Where the device loops by itself the profiler stays out: a loop launches
    nothing else, and a whole number of loops is run."""
    from jitgraph.graphs.loop_control import LOOP_STEPS

    def request(tokens: int) -> None:
        for _ in llm.stream(list(prompt), _greedy(tokens)):
            pass

    looping = bool(llm.describe()["device_loop"])
    found = {"graphs_per_step": graphs_per_step(llm, request, 2 * LOOP_STEPS if looping else PROFILED_STEPS)}
    found |= {"kernels_per_step": 0.0, "copies_per_step": 0.0} if looping or not cuda else calls_per_step(request)
    return {**found, LAUNCHES: found["graphs_per_step"] + found["kernels_per_step"]}


def engine_attribution(llm: Any, prompt: Sequence[int], cuda: bool) -> dict[str, float]:
    """Host time and launches of one ``LLM``'s decode steps, in this order."""
    host = host_time(llm, prompt, HOST_TOKENS)
    return {HOST_US: host.step_us, "host_us_per_step_with_text": host.client_us, **launch_figures(llm, prompt, cuda)}


def _greedy(tokens: int) -> Any:
    from jitgraph.types import SamplingParams

    return SamplingParams(max_tokens=tokens, ignore_eos=True)
