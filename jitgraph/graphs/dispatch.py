"""The one place that decides how a step runs: exact graph, padded graph, or eagerly; each with a counted reason.

Pure, no torch: it knows which keys are captured, not what a graph is. Asked on the engine's thread before each step.
"""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass

from jitgraph.graphs.key import GraphKey, Phase, Sampling, smallest_at_least


class Path(str, enum.Enum):
    """How a step runs."""

    EXACT = "exact"
    PADDED = "padded"
    EAGER = "eager"


class Reason(str, enum.Enum):
    """Why."""

    CAPTURED = "a graph of this very size is there"
    NEXT_SIZE = "padded to the next captured size"
    NOT_CAPTURED = "no captured graph is large enough"
    GRAPHS_OFF = "graphs are switched off"


@dataclass(frozen=True)
class Decision:
    """What the dispatcher chose. ``key`` has the size to run at: padding included unless eager."""

    path: Path
    key: GraphKey
    reason: Reason


class Dispatcher:
    """Chooses among the captured keys and counts its choices."""

    def __init__(self, graphs_enabled: bool) -> None:
        self._enabled = graphs_enabled
        self._sizes: dict[tuple[Phase, Sampling], list[int]] = {}
        self.paths: Counter[tuple[Phase, Path]] = Counter()
        self.reasons: Counter[Reason] = Counter()

    def add(self, key: GraphKey) -> None:
        """A graph for ``key`` is ready."""
        sizes = self._sizes.setdefault((key.phase, key.sampling), [])
        if key.tokens not in sizes:
            sizes.append(key.tokens)
            sizes.sort()

    def decide(self, wanted: GraphKey) -> Decision:
        """How to run a step of ``wanted``'s size. Never fails: what has no graph runs eagerly."""
        decision = self._choose(wanted)
        self.paths[wanted.phase, decision.path] += 1
        self.reasons[decision.reason] += 1
        return decision

    def _choose(self, wanted: GraphKey) -> Decision:
        if not self._enabled:
            return Decision(Path.EAGER, wanted, Reason.GRAPHS_OFF)
        size = smallest_at_least(wanted.tokens, self._sizes.get((wanted.phase, wanted.sampling), ()))
        if size is None:
            return Decision(Path.EAGER, wanted, Reason.NOT_CAPTURED)
        if size == wanted.tokens:
            return Decision(Path.EXACT, wanted, Reason.CAPTURED)
        return Decision(Path.PADDED, GraphKey(wanted.phase, size, wanted.sampling), Reason.NEXT_SIZE)

    def reset(self) -> None:
        """Sets the counters to zero."""
        self.paths.clear()
        self.reasons.clear()
