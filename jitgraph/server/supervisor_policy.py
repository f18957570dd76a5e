"""What the supervisor decides by: its limits, its budget of restarts, and how a hang is told from a pause. Pure: times
are given.
"""

from __future__ import annotations

import signal
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jitgraph.errors import ConfigError
from jitgraph.ipc.messages import BEAT_S, Beat

State = Literal["starting", "ready", "restarting", "draining", "stopped", "failed"]
"""``starting`` until ready for the first time; ``restarting`` from the end of an engine until the next is ready;
``draining`` once no new requests are taken; ``stopped`` after that; ``failed`` when nothing will be tried any more."""
USAGE_ERROR = 2
"""Exit status of a command whose settings cannot work: trying again would not help."""
NOT_FOUND = 127
"""Exit status where there is no such command: nor would it then."""
PATIENCE = 4.0
"""A step may take so many times as long as the longest before it."""
MOST_PATIENCE = 60.0
"""But never longer than so many times the limit of its own."""
_UNKNOWN_START_S = 10.0


class Ending(NamedTuple):
    """How an engine's life ended."""

    kind: str
    """``exit``, ``hang``, ``lost`` (the connection alone) or ``start`` (it could not be talked to)."""
    reason: str
    hopeless: bool = False
    """Another try would end the same way."""


@dataclass(frozen=True)
class Limits:
    """When an engine counts as hung, and how often it may be replaced. Times in seconds.

    Raises:
        ConfigError: a limit that is not above zero, or a budget below zero.
    """

    hang_s: float = 10.0
    """Longest silence of a ready engine, and longest standstill of a busy one; a standstill may be longer where the
    engine's own steps are (``patience_s``)."""
    start_silence_s: float = 600.0
    """Longest silence while it starts: a large file may be read, or downloaded, without a word."""
    grace_s: float = 2.0
    """From the request to end to the signal that no process outlives."""
    restarts: int = 3
    """Restarts within ``window_s``; one more and the supervisor gives up."""
    window_s: float = 600.0
    tick_s: float = 0.1
    """How often it is looked at."""

    def __post_init__(self) -> None:
        for name in ("hang_s", "start_silence_s", "grace_s", "window_s", "tick_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above zero, not {getattr(self, name)}")
        if self.restarts < 0:
            raise ConfigError(f"restarts must be 0 or more, not {self.restarts}")


class RestartBudget:
    """At most so many restarts in any window of time."""

    def __init__(self, restarts: int, window_s: float) -> None:
        self._restarts = restarts
        self._window_s = window_s
        self._times: deque[float] = deque()

    def take(self, now_s: float) -> bool:
        """Takes one restart from the budget; False where none is left."""
        while self._times and now_s - self._times[0] >= self._window_s:
            self._times.popleft()
        if len(self._times) >= self._restarts:
            return False
        self._times.append(now_s)
        return True


class Pulse:
    """For how long a sign of life has not changed, counted only while the watcher itself ran: a host that was
    suspended, or a watcher that was stopped, proves nothing about the watched."""

    def __init__(self, now_s: float, tick_s: float) -> None:
        self._at = now_s
        self._most_s = 5 * tick_s
        self._sign: Any = None
        self._still_s = 0.0

    def look(self, now_s: float, sign: Any) -> float:
        """Seconds for which ``sign`` has been the same."""
        passed = min(max(now_s - self._at, 0.0), self._most_s)
        self._at = now_s
        if sign != self._sign:
            self._sign, self._still_s = sign, 0.0
        else:
            self._still_s += passed
        return self._still_s

    def rest(self, now_s: float) -> None:
        """There is nothing to look for now; the count begins anew."""
        self._at, self._sign, self._still_s = now_s, None, 0.0


def patience_s(limit_s: float, beat: Beat | None) -> float:
    """How long an engine may make no step: ``limit_s``, or longer where its steps have been long before, which for a
    large model on a CPU they are from the start."""
    usual_s = 0.0 if beat is None else beat.longest_s
    return min(max(limit_s, PATIENCE * usual_s), MOST_PATIENCE * limit_s)


class Watch:
    """Tells from what comes of a ready engine whether it hangs."""

    def __init__(self, now_s: float, limits: Limits) -> None:
        self._limit_s = limits.hang_s
        self._silence = Pulse(now_s, limits.tick_s)
        self._standstill = Pulse(0.0, BEAT_S)
        self._beat: Beat | None = None

    def hang(self, now_s: float, last_seen_ns: int, beat: Beat | None) -> str | None:
        """Why it must be replaced; None while it need not. To be asked every ``tick_s``."""
        if self._silence.look(now_s, last_seen_ns) > self._limit_s:
            return f"hangs: it has said nothing for {self._limit_s:g} s"
        if beat is None or beat is self._beat:
            return None
        self._beat = beat
        at_s = beat.now_ns / 1e9  # its own clock: what it did not live through does not count
        limit_s = patience_s(self._limit_s, beat)
        if beat.away_s > limit_s:
            return f"hangs: its main thread has been at one thing for {limit_s:g} s"
        if beat.running + beat.waiting == 0:
            self._standstill.rest(at_s)
        elif self._standstill.look(at_s, beat.steps) > limit_s:
            return f"hangs: it has requests and has made no step for {limit_s:g} s"
        return None


def exit_of(status: int | None, printed: str, before_ready: bool = False) -> Ending:
    """The ending of a process: what its exit status and the last line that it printed say."""
    status = status or 0
    what = f"ended with status {status}"
    if status < 0:
        known = {number.value: number.name for number in signal.Signals}
        what = f"was killed by {known.get(-status, f'signal {-status}')}"
    last = printed.rpartition("\n")[2]
    said = f"; its last words: {last}" if last else ""
    return Ending("exit", what + said, hopeless=before_ready and status in (USAGE_ERROR, NOT_FOUND))


def retry_after_s(state: State, last_start_s: float | None, elapsed_s: float) -> float:
    """When it is worth while to ask again: once a start that takes as long as the last one would be over.

    0 where requests are taken now, at least 1 otherwise.
    """
    if state == "ready":
        return 0.0
    usual = _UNKNOWN_START_S if last_start_s is None else last_start_s
    under_way = state in ("starting", "restarting")
    return max(1.0, usual - elapsed_s) if under_way else max(1.0, usual)
