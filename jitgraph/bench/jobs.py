"""What crosses between the command and its worker processes: a job goes in as JSON, events come back as JSON lines.

No torch: both sides import it, whichever interpreter they run under.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

from jitgraph.bench.plan import Plan
from jitgraph.bench.records import BlockKey

COMPLETE = "complete"
INTERRUPTED = "interrupted"
TIME_LIMIT = "time limit"
GATE_FAILED = "gate failed"
FAILED = "failed"
NO_GATE = "no gate"
HUNG = "hung"
"""It was ended because it did not end in its time."""
DISK_FULL = "disk full"
DAMAGED = "damaged record"
"""Its samples cannot be read."""
RUNNING = "running"
"""Left in a case's facts only by a run that was killed."""
CUT_SHORT = (INTERRUPTED, TIME_LIMIT, RUNNING, HUNG, DISK_FULL)
"""States with some rows measured and others missing."""
BROKEN = (GATE_FAILED, FAILED, NO_GATE, HUNG, DISK_FULL)
"""States that make the command fail."""


@dataclass(frozen=True)
class Job:
    """One worker process's task."""

    kind: str
    """``prepare``, ``gate``, ``ceiling``, ``case`` or ``start``."""
    folder: str
    plan: Plan | None = None
    case: str = ""
    prompts: Mapping[int, list[int]] = field(default_factory=dict)
    reference: Mapping[str, Any] | None = None
    """``gate.references_to_json``; None runs the case ungated."""
    options: Mapping[str, Any] = field(default_factory=dict)
    deadline_s: float | None = None
    """Wall clock after which the worker begins no further row."""
    limit_s: float | None = None
    """Seconds after which a process that has not ended is ended."""
    url: str = ""
    """Of the server that the case is."""
    restart: int | None = None
    """Which process of its case it is, where there are several; None begins the case's record anew."""
    measured: tuple[BlockKey, ...] = ()
    """Rows that are there already."""
    takes_turns: bool = False
    """Whether it waits for a line on stdin before each of its turns."""
    device_uuid: str | None = None
    """Of the GPU, as its driver names it."""
    empty_caches: str = ""
    """A folder for all caches of compiled code; empty leaves them where they are."""
    started_s: float = field(default_factory=time.time)

    def to_json(self) -> str:
        """One JSON text."""
        rows = [key.to_json() for key in self.measured]
        return json.dumps({**vars(self), "plan": self.plan and self.plan.to_json(), "measured": rows}, default=dict)

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Back from ``to_json``."""
        record = json.loads(text)
        record["plan"] = Plan.from_json(record["plan"]) if record["plan"] else None
        record["prompts"] = {int(length): ids for length, ids in record["prompts"].items()}
        record["measured"] = tuple(BlockKey(**key) for key in record["measured"])
        return cls(**record)

    @property
    def the_plan(self) -> Plan:
        """The plan of a job that has one."""
        assert self.plan is not None, f"a {self.kind} job needs a plan"
        return self.plan


class Events:
    """The worker's side of the pipe: progress now and then, facts when known, one outcome at the end."""

    MIN_INTERVAL_S = 0.2

    def __init__(self, pipe: TextIO) -> None:
        self._pipe = pipe
        self._last_s = 0.0

    def progress(self, done: int, total: int) -> None:
        """How far the job is; sent at most every ``MIN_INTERVAL_S``, and at the end."""
        now = time.monotonic()
        if done >= total or now - self._last_s >= self.MIN_INTERVAL_S:
            self._last_s = now
            self._send({"event": "progress", "done": done, "total": total})

    def facts(self, facts: Mapping[str, Any]) -> None:
        """What is known about the case; later facts add to earlier ones."""
        self._send({"event": "facts", "facts": dict(facts)})

    def turn(self) -> None:
        """It waits for its turn; whatever it did before is done."""
        self._send({"event": "turn"})

    def outcome(self, status: str, reason: str = "", value: Any = None) -> None:
        """How the job ended."""
        self._send({"event": "outcome", "status": status, "reason": reason, "value": value})

    def _send(self, event: Mapping[str, Any]) -> None:
        self._pipe.write(json.dumps(event) + "\n")
        self._pipe.flush()
