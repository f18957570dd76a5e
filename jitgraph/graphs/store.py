"""The rolling store: which graphs exist, which come next and which must go. Pure policy over any kind of graph.

Engine's thread alone; no torch, no threads, no clock (times are passed in). A key goes MISSING, QUEUED, CAPTURING,
READY, RETIRING and is MISSING again. What always holds:

- Graphs being captured, ready and retiring count against both limits: a retiring graph still holds its memory. So a
  capture waits until there is room; a request never does.
- A pinned graph, or one whose last replay may still run, is not evicted. An evicted graph is handed out once, to be
  destroyed.
- A capture that fails leaves the accounting as it was; its key waits, ever longer, and is tried again.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Generic

from jitgraph.graphs.demand import COLD, Thrash, demand, heated
from jitgraph.graphs.key import GraphKey, Path, Phase, Sampling
from jitgraph.graphs.store_policy import NEVER, Budget, Entry, coldest_first, displaced_by, in_turn
from jitgraph.graphs.store_records import Absence, Event, EventKind, G, Retired, State, StoreCounters

MAX_GRAPHS = 50
FIRST_BACKOFF_S = 1.0
LONGEST_BACKOFF_S = 300.0
LOGGED_EVENTS = 4096
OVER_BUDGET = "over the byte budget"


def is_decode(key: GraphKey) -> bool:
    """The keys that are pinned unless the caller says otherwise: every token needs them."""
    return key.phase is Phase.DECODE


class Store(Generic[G]):
    """Graphs by key, under a limit of graphs and one of bytes (None: no limit); ``budget`` tells what is held.

    ``estimated_bytes`` is reserved for a capture until a larger graph has been measured. Back-offs are in the units of
    the times passed in.
    """

    def __init__(
        self,
        max_graphs: int = MAX_GRAPHS,
        max_bytes: int | None = None,
        pinned: Callable[[GraphKey], bool] = is_decode,
        estimated_bytes: int = 0,
        first_backoff: float = FIRST_BACKOFF_S,
        longest_backoff: float = LONGEST_BACKOFF_S,
    ) -> None:
        self.budget = Budget(max_graphs, max_bytes)
        self.counters = StoreCounters()
        self.events: deque[Event] = deque(maxlen=LOGGED_EVENTS)
        self.thrash = Thrash()
        self._pinned = pinned
        self._estimate = estimated_bytes
        self._backoffs = (first_backoff, longest_backoff)
        self._entries: dict[GraphKey, Entry[G]] = {}
        self._queued: dict[GraphKey, Entry[G]] = {}
        self._ready: dict[GraphKey, G] = {}
        self.generation = 0
        """Changes whenever a graph becomes ready or is evicted."""
        self._sizes: dict[tuple[Phase, Sampling], list[int]] = {}
        self._retired: list[Retired[G]] = []
        self._leaving: list[Retired[G]] = []
        self._requests = 0
        self._moment = 0
        self._ticket = -1
        self._completed = -1
        self._last_evictable = -1  # the latest step that replays a graph that is not pinned
        self._now = 0.0
        self._changes = 0
        self._quiet: dict[Callable[[GraphKey], bool] | None, tuple[int, float]] = {}

    # ------------------------------------------------------------------------------------------- the path of a request

    def lookup(self, key: GraphKey) -> G | None:
        """The graph of ``key``, where one is ready."""
        return self._ready.get(key)

    def ready_sizes(self, phase: Phase, sampling: Sampling) -> Sequence[int]:
        """Token counts with a ready graph, ascending."""
        return self._sizes.get((phase, sampling), ())

    def absence(self, key: GraphKey) -> Absence:
        """Why ``key`` has no ready graph."""
        entry = self._entries.get(key)
        if entry is None:
            return Absence.NEVER
        if entry.state in (State.QUEUED, State.CAPTURING):
            return Absence.FAILED if entry.failures else Absence.PENDING
        return Absence.EVICTED if entry.evicted else Absence.NEVER

    def served(self, path: Path) -> None:
        """One prompt step was placed: the store's time moves on by one request."""
        self.counters.served[path] += 1
        self._requests += 1
        if self.thrash.update(self._requests):
            self.counters.thrash_alarms += self.thrash.over
            kind = EventKind.THRASHING if self.thrash.over else EventKind.CALM
            self._log(kind, None, detail=f"{self.thrash.rate} recaptures per 1,000 requests")

    def want(self, key: GraphKey) -> None:
        """A request would have used this graph: more demand for it, and a place in the queue if it has none."""
        entry = self._entry(key)
        entry.heat = heated(entry.heat, self._requests)
        self._changes += 1
        if entry.state is State.MISSING:
            self._queue(entry)

    def use(self, key: GraphKey, ticket: int) -> None:
        """Step number ``ticket`` replays the graph. Tickets grow; a key that is not ready is ignored."""
        entry = self._entries.get(key)
        if entry is None or entry.state is not State.READY:
            return
        entry.ticket = self._ticket = ticket
        if not entry.pinned:
            self._moment += 1
            self._changes += 1
            entry.used = self._moment
            entry.heat = heated(entry.heat, self._requests)
            self._last_evictable = ticket

    def completed(self, ticket: int) -> None:
        """Every step up to ``ticket`` is done."""
        self._changes += self._completed < self._last_evictable  # one more may go now; steps of decoding change nothing
        self._completed = max(self._completed, ticket)

    # --------------------------------------------------------------------------------------------- what to capture next

    def precapture(self, keys: Iterable[GraphKey]) -> None:
        """Asks for ``keys``, most useful first. They take what room is free; only demand displaces others."""
        self._changes += 1
        for rank, key in enumerate(keys):
            entry = self._entry(key)
            entry.rank = rank
            if entry.state is State.MISSING:
                entry.listed = True
                self._queue(entry)

    def worth_asking(self, now: float, eligible: Callable[[GraphKey], bool] | None = None) -> bool:
        """Whether ``next_key`` could say something new since it last had nothing. Cheap."""
        if not self._queued:
            return False
        changes, retry_at = self._quiet.get(eligible, (-1, 0.0))
        return changes != self._changes or now >= retry_at

    def next_key(self, now: float, eligible: Callable[[GraphKey], bool] | None = None) -> GraphKey | None:
        """The key to capture now (among the ``eligible``), for which there is room.

        Where others must go first, they are evicted here, and the key is named by a later call, once they are
        destroyed. Order: captures that were broken off, pinned keys, the pre-capture list, then by demand.
        """
        self._now = now
        waiting = [e for e in self._queued.values() if eligible is None or eligible(e.key)]
        victims: list[Entry[G]] | None = None
        for entry in in_turn(e for e in waiting if e.retry_at <= now):
            needed = self._needed(entry)
            if self.budget.has_room(needed):
                return entry.key
            if self.budget.will_have_room(needed):
                break  # what is retiring makes the room
            if victims is None:
                victims = coldest_first((self._entries[key] for key in self._ready), self._completed)
            if displaced := displaced_by(entry, needed, victims, self.budget, self.thrash.margin):
                for victim in displaced:
                    self._evict(victim)
                return None
        self._quiet[eligible] = self._changes, min((e.retry_at for e in waiting if e.retry_at > now), default=NEVER)
        return None

    def _needed(self, entry: Entry[G]) -> int:
        return self._estimate if entry.measured is None else entry.measured

    def _evict(self, entry: Entry[G]) -> None:
        entry.evicted = True
        self.counters.evictions += 1
        self._log(EventKind.EVICTED, entry.key, entry.nbytes)
        self._retire(entry)

    def _retire(self, entry: Entry[G]) -> None:
        assert entry.graph is not None
        self._ready.pop(entry.key)
        self.generation += 1
        sizes = self._sizes[entry.key.phase, entry.key.sampling]
        del sizes[bisect_left(sizes, entry.key.tokens)]
        self.budget.live(-1, -entry.nbytes)
        self._bury(entry.key, entry.graph, entry.nbytes, entry.ticket)
        entry.state, entry.graph, entry.nbytes, entry.ticket = State.MISSING, None, 0, -1

    def _bury(self, key: GraphKey, graph: G, nbytes: int, ticket: int) -> None:
        self._retired.append(Retired(key, graph, nbytes, ticket))
        self.budget.dying(1, nbytes)

    # ------------------------------------------------------------------------------------------------------- captures

    def begin(self, key: GraphKey) -> bool:
        """A capture of ``key`` begins. False, with nothing changed, where there is no room or it is under way or done.

        ``next_key`` names keys with room; before ready, any key may be begun.
        """
        entry = self._entry(key)
        if entry.state not in (State.MISSING, State.QUEUED) or not self.budget.has_room(self._needed(entry)):
            return False
        self._queued.pop(key, None)
        entry.state, entry.nbytes, entry.first = State.CAPTURING, self._needed(entry), False
        self.budget.live(1, entry.nbytes)
        self._log(EventKind.BEGUN, key, entry.nbytes)
        return True

    def finish(self, key: GraphKey, graph: G, nbytes: int, now: float | None = None) -> bool:
        """The capture gave ``graph``; the store owns it from here on.

        False where it holds more bytes than were reserved and goes over the budget: it retires at once, and the key is
        treated as failed, its true size known.
        """
        entry = self._capturing(key)
        self._now = self._now if now is None else now
        self._estimate = max(self._estimate, nbytes)
        entry.measured = nbytes
        self.counters.captures += 1
        if entry.evicted:
            self.counters.recaptures += 1
            self.thrash.add(self._requests)
        if not self.budget.can_grow(nbytes - entry.nbytes):
            self.fail(key, OVER_BUDGET, self._now)
            self._bury(key, graph, nbytes, -1)
            return False
        self.budget.live(0, nbytes - entry.nbytes)
        self._moment += 1
        entry.used = 0 if entry.heat == COLD else self._moment
        entry.state, entry.graph, entry.nbytes, entry.listed, entry.failures = State.READY, graph, nbytes, False, 0
        self._ready[key] = graph
        self.generation += 1
        insort(self._sizes.setdefault((key.phase, key.sampling), []), key.tokens)
        self._log(EventKind.READY, key, nbytes)
        return True

    def fail(self, key: GraphKey, reason: str, now: float, detail: str = "") -> None:
        """The capture of ``key``, or what comes before it, failed: it waits 1 s, then twice as long each time."""
        entry = self._entries.get(key)
        if entry is None or entry.state not in (State.QUEUED, State.CAPTURING):
            return
        self._now = now
        first, longest = self._backoffs
        entry.retry_at = now + min(first * 2.0 ** min(entry.failures, 64), longest)
        entry.failures += 1
        entry.first = False
        self.counters.failures[reason] += 1
        self._log(EventKind.FAILED, key, detail=f"{reason}: {detail}" if detail else reason)
        self._requeue(entry)

    def abandon(self, key: GraphKey) -> None:
        """The capture of ``key``, or what comes before it, was broken off by something more urgent: it is next."""
        entry = self._entries.get(key)
        if entry is None or entry.state not in (State.QUEUED, State.CAPTURING):
            return
        entry.first = True
        self.counters.abandoned += 1
        self._log(EventKind.ABANDONED, key)
        self._requeue(entry)

    def _capturing(self, key: GraphKey) -> Entry[G]:
        entry = self._entries[key]
        assert entry.state is State.CAPTURING, f"{key} is {entry.state.value}, not being captured"
        return entry

    def _requeue(self, entry: Entry[G]) -> None:
        if entry.state is State.CAPTURING:
            self.budget.live(-1, -entry.nbytes)
        entry.state = State.QUEUED
        self._queued[entry.key] = entry

    def _queue(self, entry: Entry[G]) -> None:
        entry.state = State.QUEUED
        self._queued[entry.key] = entry
        self._log(EventKind.QUEUED, entry.key)

    # ------------------------------------------------------------------------------------------------------ retirement

    def destroyable(self) -> list[Retired[G]]:
        """Retired graphs whose last replay is done, each handed out once: destroy them and say so."""
        ready = [r for r in self._retired if r.ticket <= self._completed]
        self._retired = [r for r in self._retired if r.ticket > self._completed]
        self._leaving += ready
        return ready

    def destroyed(self, retired: Retired[G], error: str = "") -> None:
        """A handed-out graph is gone (or could not be destroyed: ``error``), and with it its claim to room."""
        self._leaving.remove(retired)
        self.budget.dying(-1, -retired.nbytes)
        self.counters.destroyed += 1
        if error:
            self.counters.failures[error] += 1
        self._log(EventKind.DESTROYED, retired.key, retired.nbytes, error)

    def close(self) -> list[Retired[G]]:
        """Retires everything, pinned or not, empties the queue and hands out all that is to be destroyed.

        No step may be running any more, and no capture under way.
        """
        assert all(e.state is not State.CAPTURING for e in self._entries.values()), "a capture is under way"
        for key in list(self._ready):
            self._retire(self._entries[key])
        for entry in self._queued.values():
            entry.state = State.MISSING
        self._queued.clear()
        self._completed = max(self._completed, self._ticket)
        return self.destroyable()

    # ---------------------------------------------------------------------------------------------------------- report

    def state(self, key: GraphKey) -> State:
        """Where ``key`` is on its way."""
        entry = self._entries.get(key)
        if entry is not None and entry.state is not State.MISSING:
            return entry.state
        retiring = any(r.key == key for r in self._retired + self._leaving)
        return State.RETIRING if retiring else State.MISSING

    def states(self) -> dict[GraphKey, State]:
        """Every key that is not missing, with where it is on its way."""
        found = {r.key: State.RETIRING for r in self._retired + self._leaving}
        found |= {key: entry.state for key, entry in self._entries.items() if entry.state is not State.MISSING}
        return found

    @property
    def ready_keys(self) -> tuple[GraphKey, ...]:
        """Keys with a graph to replay."""
        return tuple(self._ready)

    @property
    def holds_graphs(self) -> bool:
        """Whether there is any graph to replay."""
        return bool(self._ready)

    @property
    def retiring(self) -> bool:
        """Whether ``destroyable`` has something to hand out now."""
        return any(r.ticket <= self._completed for r in self._retired)

    def demand(self, key: GraphKey) -> float:
        """Askings for ``key``, each faded by its age in requests."""
        entry = self._entries.get(key)
        return 0.0 if entry is None else demand(entry.heat, self._requests)

    def _entry(self, key: GraphKey) -> Entry[G]:
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = Entry(key, self._pinned(key))
        return entry

    def _log(self, kind: EventKind, key: GraphKey | None, nbytes: int = 0, detail: str = "") -> None:
        self._changes += 1  # whatever is worth a line may change what comes next
        self.events.append(Event(kind, key, self._now, self._ticket, nbytes, detail))
