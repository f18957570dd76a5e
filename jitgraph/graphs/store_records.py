"""What the store tells about itself: states, reasons, events, counters. Plain values, no torch."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from jitgraph.graphs.key import GraphKey, Path

G = TypeVar("G")


class State(str, enum.Enum):
    """Where a key is on its way."""

    MISSING = "missing"
    QUEUED = "queued"
    CAPTURING = "capturing"
    READY = "ready"
    RETIRING = "retiring"
    """Evicted; its memory is not free yet."""


class Absence(str, enum.Enum):
    """Why a key has no graph to replay."""

    NEVER = "never captured"
    PENDING = "capture pending"
    EVICTED = "evicted"
    FAILED = "capture failed lately"


class EventKind(str, enum.Enum):
    """What happened."""

    QUEUED = "queued"
    BEGUN = "capture begun"
    READY = "ready"
    EVICTED = "evicted"
    DESTROYED = "destroyed"
    FAILED = "failed"
    ABANDONED = "abandoned"
    THRASHING = "thrashing"
    CALM = "calm again"


@dataclass(frozen=True)
class Event:
    """One line of the store's log."""

    kind: EventKind
    key: GraphKey | None
    """None where the store as a whole is meant."""
    time: float
    """The latest ``now`` that the store has been told."""
    ticket: int
    """The latest step that replayed a graph."""
    nbytes: int = 0
    """Of the graph; reserved for it while it is being captured."""
    detail: str = ""


@dataclass
class StoreCounters:
    """Everything counted since the store was made."""

    served: Counter[Path] = field(default_factory=Counter)
    """Prompt steps by rung: exact, padded, eager."""
    captures: int = 0
    recaptures: int = 0
    """Captures of keys that had been evicted before; part of ``captures``."""
    evictions: int = 0
    destroyed: int = 0
    abandoned: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """Captures that failed and graphs that could not be destroyed, by reason."""
    thrash_alarms: int = 0

    @property
    def requests(self) -> int:
        """Prompt steps served: the store's measure of time for demand and thrash."""
        return sum(self.served.values())


@dataclass(eq=False)
class Retired(Generic[G]):
    """A graph on its way out: whoever is handed it destroys it, once, and reports back."""

    key: GraphKey
    graph: G
    nbytes: int
    ticket: int
    """The last step that replayed it; -1 where none did."""
