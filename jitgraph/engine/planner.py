"""What to launch next: loops for a lone sequence, steps for several, each as far ahead of the host as is good."""

from __future__ import annotations

from collections import deque

from jitgraph.engine.flights import InFlight
from jitgraph.engine.intake import Intake
from jitgraph.engine.runner import Runner
from jitgraph.engine.scheduler import LoopPlan, Plan, Scheduler


class Planner:
    """One engine's. Engine's thread. ``flights`` is the engine's own queue of what has been launched, oldest first."""

    def __init__(self, runner: Runner, scheduler: Scheduler, intake: Intake, flights: deque[InFlight]) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._intake = intake
        self._flights = flights

    def looping_on(self) -> bool:
        """Whether loops are as far ahead of the host as they may be, for the only sequence there is. Then there is
        nothing to plan, which is so for most tokens of a lone stream."""
        flights = self._flights
        if not flights or not flights[0].loop or self._runner.loops.called_off:
            return False
        sequence = flights[0].sequences[0]
        return (len(flights) > 1 or sequence.remaining <= 0) and self._scheduler.alone(sequence)

    def next_plan(self) -> Plan | None:
        """What to launch now, or None: loops go ahead of the host by two, single steps by one where that is free.
        Calls loops off where somebody else wants to run."""
        loops = self._runner.loops
        looping = [flight for flight in self._flights if flight.loop]
        if looping:
            if not self._scheduler.alone(looping[0].sequences[0]):
                loops.call_off()
            return None if loops.called_off or len(looping) > 1 else self._loop_plan()
        depth = 2 if self._runner.can_run_ahead() else 1
        while (sequence := self._scheduler.admit()) is not None:
            sequence.seed = self._intake.seed(sequence.request.params)
        if (plan := self._loop_plan()) is not None:
            return plan
        return self._scheduler.next_plan() if len(self._flights) < depth else None

    def _loop_plan(self) -> LoopPlan | None:
        """The lone sequence's next loop, where it is alone and there is such a loop."""
        sequence = self._scheduler.lone()
        if sequence is None or sequence.request.grammar is not None:  # the host gives each of its steps a mask
            return None
        kind = self._runner.loop_kind(sequence)
        if kind not in self._runner.loops:
            return None
        return self._scheduler.plan_loop(sequence, self._runner.loops.steps(kind))
