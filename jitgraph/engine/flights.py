"""What has been launched and not been read to its end."""

from __future__ import annotations

from dataclasses import dataclass

from jitgraph.engine.scheduler import DecodePlan, LoopPlan, Plan, Sequence
from jitgraph.graphs.key import GraphKey


@dataclass
class InFlight:
    """A launch whose tokens have not all been read."""

    plan: Plan
    key: GraphKey
    first: int
    """Number of its first step, which its record in the ring carries."""
    count: int = 1
    """Steps it runs at most; more than one in a loop."""
    read: int = 0
    """Steps whose tokens have been read."""

    @property
    def step(self) -> int:
        """Number of the step to be read next."""
        return self.first + self.read

    @property
    def loop(self) -> bool:
        """Whether the device repeats the step by itself."""
        return isinstance(self.plan, LoopPlan)

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """Whose tokens its records hold, in row order; none for a chunk that does not end its prompt."""
        if isinstance(self.plan, DecodePlan):
            return self.plan.sequences
        return (self.plan.sequence,) * (1 if isinstance(self.plan, LoopPlan) else self.plan.emit)
