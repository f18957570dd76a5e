"""What has been launched and not been read to its end."""

from __future__ import annotations

import time

from jitgraph.engine.scheduler import DecodePlan, LoopPlan, Plan, Sequence
from jitgraph.graphs.key import GraphKey


class InFlight:
    """A launch whose tokens have not all been read."""

    __slots__ = ("begun_s", "count", "first", "key", "loop", "plan", "read", "sequences", "steady", "told")

    def __init__(self, plan: Plan, key: GraphKey, first: int, count: int = 1) -> None:
        self.plan = plan
        self.key = key
        self.first = first
        """Number of its first step, which its record in the ring carries."""
        self.count = count
        """Steps it runs at most; more than one in a loop."""
        self.read = 0
        """Steps whose tokens have been read."""
        self.begun_s = time.perf_counter()
        """About when it was launched."""
        self.loop = isinstance(plan, LoopPlan)
        """Whether the device repeats the step by itself."""
        self.steady = False
        """Whether its further tokens need nothing but being read (``steady.py``)."""
        self.told = False
        """Whether the token to be read next has been handed out ahead of the books (``Steady.early``)."""
        self.sequences = _sequences(plan)
        """Whose tokens its records hold, in row order; none for a chunk that does not end its prompt."""

    @property
    def step(self) -> int:
        """Number of the step to be read next."""
        return self.first + self.read


def _sequences(plan: Plan) -> tuple[Sequence, ...]:
    if isinstance(plan, DecodePlan):
        return plan.sequences
    return (plan.sequence,) * (1 if isinstance(plan, LoopPlan) else plan.emit)
