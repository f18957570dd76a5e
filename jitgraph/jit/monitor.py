"""Counts kernel compilations, so that an engine can prove that none happens after it is ready.

Owned by the process; any thread may record. A record is one specialisation made ready in this process: the disk cache
makes it faster, not free, so a cache hit counts too.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(frozen=True)
class CompileRecord:
    """One specialisation of one kernel, made ready once."""

    kernel: str
    """Qualified name of the kernel body."""
    arch: int
    """Compute capability, 80 for sm_80."""
    signature: str
    """Argument types and constants, readable."""
    ms: float
    """Host milliseconds it took."""
    cached: bool = False
    """Read from the disk cache rather than compiled."""


@dataclass(frozen=True)
class CompileTotals:
    """How many specialisations were made ready, and their host milliseconds together."""

    count: int
    ms: float
    cached: int
    """Those of ``count`` that were read from the disk cache."""


class CompileMonitor:
    """A list of compile records that only grows."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._records: list[CompileRecord] = []

    def record(self, entry: CompileRecord) -> None:
        """Adds one compilation."""
        with self._lock:
            self._records.append(entry)

    @property
    def count(self) -> int:
        """Compilations so far: keep it, and hand it to ``since`` later."""
        return len(self._records)

    def since(self, mark: int = 0) -> tuple[CompileRecord, ...]:
        """The compilations after the first ``mark``, in order."""
        with self._lock:
            return tuple(self._records[mark:])

    def totals(self, mark: int = 0) -> CompileTotals:
        """Count and milliseconds of the compilations after the first ``mark``."""
        entries = self.since(mark)
        cached = sum(entry.cached for entry in entries)
        return CompileTotals(count=len(entries), ms=sum(entry.ms for entry in entries), cached=cached)


MONITOR = CompileMonitor()
"""The process's monitor, used by every ``kernel`` that names no other: kernels are decorated at import, before any
engine exists, so there is one object to hang their counts on."""
