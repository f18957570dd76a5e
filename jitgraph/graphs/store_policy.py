"""Who comes next and who must go: the store's choices as small functions. Pure, no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic

from jitgraph.graphs.demand import COLD
from jitgraph.graphs.key import GraphKey
from jitgraph.graphs.store_records import G, State

NEVER = float("inf")


@dataclass(slots=True)
class Entry(Generic[G]):
    """All that the store knows of one key."""

    key: GraphKey
    pinned: bool
    state: State = State.MISSING
    graph: G | None = None
    nbytes: int = 0
    """Held by the graph, or reserved for its capture."""
    measured: int | None = None
    """Bytes of its last graph."""
    heat: float = COLD
    rank: float = NEVER
    """Place in the pre-capture list."""
    listed: bool = False
    """On the pre-capture list and not captured yet."""
    first: bool = False
    """Broken off by something more urgent: goes before all others."""
    used: int = 0
    """When it was last used or made, in moments of the store; 0 where only a list asked for it."""
    ticket: int = -1
    """The last step that replays its graph; -1 where none does."""
    failures: int = 0
    """Captures that failed since the last one that did not."""
    retry_at: float = -NEVER
    evicted: bool = False
    """Whether it ever was."""


class Budget:
    """Graphs and bytes held, against their limits. A retiring graph holds its memory until it is destroyed."""

    def __init__(self, max_graphs: int, max_bytes: int | None) -> None:
        self.max_graphs = max_graphs
        self.max_bytes = max_bytes
        self.live_graphs = self.live_bytes = 0
        """Ready or being captured."""
        self.dying_graphs = self.dying_bytes = 0
        """Retiring."""
        self.most_graphs = self.most_bytes = 0
        """The most that was ever held at once."""

    @property
    def graphs(self) -> int:
        """Graphs that count against the limit."""
        return self.live_graphs + self.dying_graphs

    @property
    def nbytes(self) -> int:
        """Bytes that count against the limit."""
        return self.live_bytes + self.dying_bytes

    def live(self, graphs: int, nbytes: int) -> None:
        """Adds to what is ready or being captured."""
        self.live_graphs += graphs
        self.live_bytes += nbytes
        self._mark()

    def dying(self, graphs: int, nbytes: int) -> None:
        """Adds to what is retiring."""
        self.dying_graphs += graphs
        self.dying_bytes += nbytes
        self._mark()

    def _mark(self) -> None:
        self.most_graphs = max(self.most_graphs, self.graphs)
        self.most_bytes = max(self.most_bytes, self.nbytes)

    def has_room(self, nbytes: int) -> bool:
        """Whether one more graph fits now."""
        return self._within(self.graphs + 1, self.nbytes + nbytes)

    def can_grow(self, nbytes: int) -> bool:
        """Whether a graph may hold ``nbytes`` more than were reserved for it."""
        return nbytes <= 0 or self._within(self.graphs, self.nbytes + nbytes)

    def will_have_room(self, nbytes: int, without: Iterable[Entry[G]] = ()) -> bool:
        """Whether one more graph fits once all that retires is gone, and those ``without`` as well."""
        going = [entry.nbytes for entry in without]
        return self._within(self.live_graphs - len(going) + 1, self.live_bytes - sum(going) + nbytes)

    def _within(self, graphs: int, nbytes: int) -> bool:
        return graphs <= self.max_graphs and (self.max_bytes is None or nbytes <= self.max_bytes)


def in_turn(queued: Iterable[Entry[G]]) -> list[Entry[G]]:
    """Broken-off captures, pinned keys, the pre-capture list in its order, then by demand."""
    return sorted(queued, key=lambda e: (not e.first, not e.pinned, e.rank if e.listed else NEVER, -e.heat))


def coldest_first(ready: Iterable[Entry[G]], completed: int) -> list[Entry[G]]:
    """Those that may be evicted, least recently used first: neither pinned nor in a step after ``completed``.

    Of those that nobody has used, the last of the pre-capture list goes first.
    """
    idle = [e for e in ready if not e.pinned and e.ticket <= completed]
    return sorted(idle, key=lambda e: (e.used, -e.rank))


def displaced_by(
    entry: Entry[G], needed: int, victims: Iterable[Entry[G]], budget: Budget, margin: float
) -> list[Entry[G]]:
    """As many of ``victims``, in their order, as must go for ``entry``.

    None at all where that is not enough, or where one of them is in as much demand (give or take the ``margin``).
    """
    chosen: list[Entry[G]] = []
    for victim in victims:
        if not entry.pinned and entry.heat <= victim.heat + margin:
            return []
        chosen.append(victim)
        if budget.will_have_room(needed, chosen):
            return chosen
    return []
