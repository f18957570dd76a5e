"""What a start of an engine took, phase by phase, as people read it. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from jitgraph.ipc.messages import Ready, StartPhase

HANDOVER = "process and connection"
"""What the engine cannot see: from its order to the start of its clock, and from its last word to the reader."""
PROGRESS_EVERY_S = 5.0
"""Pause between two lines about the same phase."""


@dataclass(frozen=True)
class StartReport:
    """One start of an engine process, until it is ready."""

    phases_s: dict[str, float]
    """Seconds by phase; their sum is ``wall_s``."""
    phases_mib: dict[str, float]
    """Device memory by phase, in MiB."""
    wall_s: float

    @classmethod
    def of(cls, ready: Ready, wall_s: float) -> StartReport:
        """The engine's own account, and what is missing from it to the wall time."""
        phases = dict(ready.phases_s)
        phases[HANDOVER] = wall_s - sum(phases.values())
        return cls(phases, dict(ready.phases_mib), wall_s)

    def lines(self) -> list[str]:
        """One line a phase, longest names in line, and the sum."""
        width = max(len(name) for name in (*self.phases_s, "sum"))
        rows = [(name, seconds, self.phases_mib.get(name, 0.0)) for name, seconds in self.phases_s.items()]
        rows.append(("sum", self.wall_s, sum(self.phases_mib.values())))
        return [f"{name:<{width}}  {seconds:8.2f} s  {mib:9.1f} MiB" for name, seconds, mib in rows]


class Progress:
    """Turns the flood of ``StartPhase`` records into a line now and then."""

    def __init__(self) -> None:
        self._phase = ""
        self._told_s = 0.0

    def line(self, news: StartPhase) -> str | None:
        """What is worth a line: a new phase, and a long one every few seconds."""
        new = news.phase != self._phase
        if not new and news.seconds - self._told_s < PROGRESS_EVERY_S:
            return None
        self._phase, self._told_s = news.phase, news.seconds
        share = f" {news.done} of {news.total}" if news.total > 1 else ""
        spent = "" if new else f", {news.seconds:.0f} s so far"
        return f"{news.phase}{share}{spent}"
