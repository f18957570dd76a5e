"""The one place that decides how a step runs: exact graph, padded graph, or eagerly; each with a counted reason.

Pure, no torch: it asks the store which graphs are ready, not what a graph is. Asked on the engine's thread before each
step. It never waits: what a prompt would have liked to have is left with the store as a wish.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jitgraph.graphs.key import GraphKey, Phase, smallest_at_least
from jitgraph.graphs.key import Path as Path  # part of every decision
from jitgraph.graphs.store import Store
from jitgraph.graphs.store_records import Absence


class Reason(str, enum.Enum):
    """Why."""

    __hash__ = str.__hash__

    CAPTURED = "a graph of this very size is ready"
    NEVER_CAPTURED = "this size was never captured"
    CAPTURE_PENDING = "this size is waiting to be captured"
    EVICTED = "the graph of this size was evicted"
    CAPTURE_FAILED = "capturing this size failed lately"
    OVER_LARGEST = "larger than the largest bucket"
    GRAPHS_OFF = "graphs are switched off"
    NOT_CAPTURABLE = "the model's own code cannot be captured"
    LONE_STREAM = "one stream alone is decoding"
    SCORED = "log-probabilities of the prompt were asked for"


REASON_OF = {
    Absence.NEVER: Reason.NEVER_CAPTURED,
    Absence.PENDING: Reason.CAPTURE_PENDING,
    Absence.EVICTED: Reason.EVICTED,
    Absence.FAILED: Reason.CAPTURE_FAILED,
}


@dataclass(frozen=True)
class Decision:
    """What the dispatcher chose. ``key`` has the size to run at: padding included unless eager."""

    path: Path
    key: GraphKey
    reason: Reason
    """Why there was no better path: why the exact graph is missing, unless it is there."""


_LOOPED = (Phase.DECODE, Path.LOOP)


class Dispatcher:
    """Chooses among the store's ready graphs and counts its choices.

    ``buckets``, ascending: the prompt sizes that serve every smaller length. One that is missing is asked for again as
    soon as a prompt has to run eagerly for want of it; nothing larger than the last is asked for.
    """

    def __init__(self, graphs_enabled: bool, store: Store[Any], buckets: Sequence[int] = ()) -> None:
        self._enabled = graphs_enabled
        self._why_off = Reason.GRAPHS_OFF
        self._store = store
        self._buckets = tuple(buckets)
        self._paths: Counter[tuple[Phase, Path]] = Counter()
        self._reasons: Counter[Reason] = Counter()
        self.eager_reasons: Counter[Reason] = Counter()
        """Part of ``reasons``: those of eager steps."""
        self.looped = 0
        """Decode steps inside a device-side loop, which nobody had to decide about. A plain number, because each token
        of a stream is counted."""

    @property
    def paths(self) -> Counter[tuple[Phase, Path]]:
        """Steps by how they ran."""
        return self._paths + Counter({_LOOPED: self.looped})

    @property
    def reasons(self) -> Counter[Reason]:
        """Steps by why they ran so."""
        return self._reasons + Counter({Reason.LONE_STREAM: self.looped})

    def give_up(self) -> None:
        """Every step runs eagerly from here on: nothing of this model can be captured."""
        self._enabled, self._why_off = False, Reason.NOT_CAPTURABLE

    def decide(self, wanted: GraphKey) -> Decision:
        """``choose``, counted at once."""
        decision = self.choose(wanted)
        self.note(wanted, decision)
        return decision

    def note(self, wanted: GraphKey, decision: Decision) -> None:
        """Counts a choice and leaves its wishes with the store; can wait until the step has been launched."""
        self._paths[wanted.phase, decision.path] += 1
        self._reasons[decision.reason] += 1
        if decision.path is Path.EAGER:
            self.eager_reasons[decision.reason] += 1
        if self._enabled and wanted.phase is Phase.PREFILL and decision.reason is not Reason.SCORED:
            self._store.served(decision.path)
            self._wish(wanted, decision)

    def choose(self, wanted: GraphKey) -> Decision:
        """How to run a step of ``wanted``'s size. Never fails: what has no graph runs eagerly."""
        if not self._enabled:
            return Decision(Path.EAGER, wanted, self._why_off)
        store = self._store
        if store.lookup(wanted) is not None:
            return Decision(Path.EXACT, wanted, Reason.CAPTURED)
        reason = Reason.OVER_LARGEST if self._over_largest(wanted) else REASON_OF[store.absence(wanted)]
        size = smallest_at_least(wanted.tokens, store.ready_sizes(wanted.phase, wanted.sampling))
        if size is None:
            return Decision(Path.EAGER, wanted, reason)
        return Decision(Path.PADDED, GraphKey(wanted.phase, size, wanted.sampling), reason)

    def _wish(self, wanted: GraphKey, decision: Decision) -> None:
        """Leaves with the store what would have served this prompt better."""
        if decision.path is Path.EXACT or self._over_largest(wanted):
            return
        self._store.want(wanted)
        bucket = smallest_at_least(wanted.tokens, self._buckets)
        if decision.path is Path.EAGER and bucket not in (None, wanted.tokens):
            self._store.want(GraphKey(wanted.phase, bucket, wanted.sampling))

    def _over_largest(self, wanted: GraphKey) -> bool:
        return wanted.phase is Phase.PREFILL and bool(self._buckets) and wanted.tokens > self._buckets[-1]

    def reset(self) -> None:
        """Sets the counters to zero."""
        self._paths.clear()
        self._reasons.clear()
        self.eager_reasons.clear()
        self.looped = 0
