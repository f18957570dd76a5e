"""What the GPU did beside the samples: clocks, power, heat and what held the clocks back, looked at twice a second.

A thread of the command's own process writes ``raw/device.jsonl`` while cases run. That process measures nothing, so the
looks cost a measured process nothing but the driver's answer. Whoever reads the record joins both by the wall clock.
"""

from __future__ import annotations

import json
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from jitgraph.bench.nvml import Gpu, NvmlError, Reading, load_library

WATCH = "device.jsonl"
INTERVAL_S = 0.5
NOTHING_HOLDS = ("nothing", "idle")
ALONE_GIB = 1.0
"""What a GPU without work has in use at most, for its driver."""
PATIENCE_S = 3.0
"""How long a process of ours may still be seen after its end."""


@dataclass(frozen=True)
class Watched:
    """One look."""

    time_s: float
    reading: Reading


@dataclass(frozen=True)
class Machine:
    """All looks beside the samples of one row; None where there are none, or the GPU does not tell."""

    sm_clock_mhz: float | None = None
    """Mean."""
    power_w: float | None = None
    """Mean."""
    temperature_c: float | None = None
    """Most."""
    memory_used_gib: float | None = None
    """Most in use on the whole device."""
    held_by: str = ""
    """Whatever held the clocks back in any of them."""


NOT_WATCHED = Machine()


@contextmanager
def watching(path: Path, uuid: str | None, load: Callable[[], Any] = load_library) -> Iterator[None]:
    """Looks at a GPU and adds to the file until the block ends; does nothing where there is no GPU to ask."""
    try:
        gpu = None if uuid is None else Gpu(uuid, load)
    except NvmlError:
        gpu = None
    if gpu is None:
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=_look, args=(path, gpu, stop), daemon=True, name="gpu-watch")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        gpu.close()


def _look(path: Path, gpu: Gpu, stop: threading.Event) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            while True:
                line = {"timestamp": time.time(), **gpu.read().to_json()}
                file.write(json.dumps(line) + "\n")
                file.flush()
                if stop.wait(INTERVAL_S):
                    return
    except OSError:
        return  # a full disk: the cases' own lines tell of it


def read_watch(path: Path) -> list[Watched]:
    """All looks of a run in time order; lines that a full disk has torn are left out."""
    if not path.exists():
        return []
    names = {field.name for field in fields(Reading)}
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            told = {name: line.get(name) for name in names}
            found.append(Watched(float(line["timestamp"]), Reading(**told)))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return sorted(found, key=lambda one: one.time_s)


def beside(watched: Sequence[Watched], times_s: Sequence[float], values_ms: Sequence[float]) -> Machine:
    """The looks while samples were taken. ``times_s``: the clock after each; ``values_ms``: how long each took, empty
    where that is unknown. Samples of several processes lie far apart, so each gap of minutes parts the time."""
    if not watched or not times_s:
        return NOT_WATCHED
    clock = [one.time_s for one in watched]
    found: dict[int, Reading] = {}
    for begin, end in _stretches(times_s, (values_ms[0] / 1e3) if values_ms else 0.0):
        first = bisect_left(clock, begin - INTERVAL_S)
        last = bisect_left(clock, end + INTERVAL_S)
        found |= {index: watched[index].reading for index in range(first, last)}
    readings = [found[index] for index in sorted(found)]
    reasons = dict.fromkeys(one.held_by for one in readings if one.held_by and one.held_by not in NOTHING_HOLDS)
    return Machine(
        sm_clock_mhz=_mean([one.sm_clock_mhz for one in readings]),
        power_w=_mean([one.power_w for one in readings]),
        temperature_c=max((one.temperature_c for one in readings if one.temperature_c is not None), default=None),
        memory_used_gib=max((one.memory_used_gib for one in readings if one.memory_used_gib), default=None),
        held_by=", ".join(reasons),
    )


def _stretches(times_s: Sequence[float], first_s: float, gap_s: float = 30.0) -> Iterator[tuple[float, float]]:
    """(begin, end) of the stretches of time in which samples follow each other."""
    ordered = sorted(times_s)
    begin = ordered[0] - first_s
    for earlier, later in pairwise(ordered):
        if later - earlier > gap_s:
            yield begin, earlier
            begin = later
    yield begin, ordered[-1]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def others_on(uuid: str | None, load: Callable[[], Any] = load_library, patience_s: float = PATIENCE_S) -> str:
    """Who else uses a GPU, in words; empty where nobody does, or nothing tells. To be asked while no case runs."""
    try:
        gpu = None if uuid is None else Gpu(uuid, load)
    except NvmlError:
        gpu = None
    if gpu is None:
        return ""
    try:
        deadline = time.monotonic() + patience_s
        while True:
            count, used = gpu.processes(), gpu.read().memory_used_gib or 0.0
            if not count and used <= ALONE_GIB:
                return ""
            if time.monotonic() >= deadline:
                who = f"{count} other process{'es' if count != 1 else ''}" if count else "something else"
                return f"{who}, {used:.1f} GiB in use"
            time.sleep(0.2)
    finally:
        gpu.close()
