"""What is read beside the samples, between timed calls: host memory, energy, events of the runtime.

Used on the main thread of a case's process. No torch: a case of another environment is measured with the same ones.
"""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jitgraph.bench.nvml import Gpu, NvmlError, load_library

PROC = Path("/proc")


def nothing() -> None:
    """The reading of an instrument that is not there."""


class Instruments:
    """The readings of one process."""

    def __init__(
        self, counters: Callable[[], Mapping[str, int]], energy_j: Callable[[], float | None] = nothing
    ) -> None:
        """``counters``: captures and evictions so far, by the names of ``records.EVENTS``. ``energy_j``: joules that
        the device has taken so far, None where nothing tells."""
        self._counters = counters
        self.energy_j = energy_j
        self._collections = 0

    def counts(self) -> Counter[str]:
        """Everything that is an event, so far; Python's collections in this process among them."""
        return Counter({**self._counters(), "collection": self._collections})

    def watch(self) -> None:
        """Begins to count collections, once."""
        if self._collected not in gc.callbacks:
            gc.callbacks.append(self._collected)

    def _collected(self, phase: str, info: Mapping[str, Any]) -> None:
        if phase == "stop":
            self._collections += 1

    def host_memory_gib(self) -> float | None:
        """Most resident memory of this process and those below it, each at its own peak; None where nothing tells."""
        peaks = [peak for pid in _tree(os.getpid()) if (peak := _peak_bytes(pid)) is not None]
        return sum(peaks) / 2**30 if peaks else None


def energy_meter(uuid: str | None, load: Callable[[], Any] = load_library) -> Callable[[], float | None]:
    """Joules that a GPU has taken since its driver was loaded, at each call; None where none is named or none tells."""
    if uuid is None:
        return nothing
    try:
        gpu = Gpu(uuid, load)
    except NvmlError:
        return nothing
    return gpu.energy_j


def _tree(root: int) -> list[int]:
    """A process and all below it."""
    found, new = [root], [root]
    while new:
        new = [child for pid in new for child in _children(pid)]
        found += new
    return found


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in (PROC / str(pid) / "task").glob("*/children"):
        try:
            found += [int(word) for word in task.read_text(encoding="ascii").split()]
        except (OSError, ValueError):
            continue  # it has ended meanwhile
    return found


def _peak_bytes(pid: int) -> int | None:
    try:
        lines = (PROC / str(pid) / "status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    words = [line.split() for line in lines if line.startswith("VmHWM:")]
    return int(words[0][1]) * 1024 if words else None
