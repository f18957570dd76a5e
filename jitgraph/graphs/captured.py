"""What a captured graph and a capture in the making are, and their emulation on the CPU.

Whatever keeps, replays or makes graphs knows these two protocols alone. The emulated graph re-runs a callable on its
static buffers: same interface, same order of events, no claim about speed; it says so wherever a number shows.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Protocol


class CapturedGraph(Protocol):
    """Something that repeats exactly the work it was captured from. It decides nothing."""

    emulated: bool
    nbytes: int
    """Device memory it holds: measured or estimated by the ``bytes_of`` of its ``Capturer``."""

    @property
    def raw(self) -> int | None:
        """The ``CUgraph`` handle, to be embedded in another graph; None where emulated."""

    def replay(self) -> None:
        """Enqueues the work on the current stream; takes no arguments, returns before it is done."""

    def destroy(self) -> None:
        """Gives back what the graph holds. Its last replay must be done; nothing may replay it again."""


class ShadowCapture(Protocol):
    """One graph in the making: ``begin``, ``advance`` until it says True, ``end``, ``instantiate``.

    Any of these may raise; then, or at any other point before ``instantiate`` has returned, ``abort`` takes back what
    was begun.
    """

    def begin(self) -> None:
        """Opens the capture. Only one may be open at a time."""

    def advance(self) -> bool:
        """Records one stage; True where there are no more."""

    def end(self) -> None:
        """Closes the capture."""

    def instantiate(self) -> CapturedGraph:
        """The graph, ready to replay. May be called on another thread."""

    def abort(self) -> None:
        """Closes what is open and drops what was recorded. Never raises; once the graph was made, does nothing."""


BytesOf = Callable[[CapturedGraph], int]


class Progress(enum.Enum):
    """How far a capture has come."""

    NEW = enum.auto()
    OPEN = enum.auto()
    ENDED = enum.auto()
    OVER = enum.auto()
    """The graph was handed over, or the capture aborted."""


# ------------------------------------------------------------------------------------------------------------- emulated

EMULATED_STAGES = 3


class EmulatedGraph:
    """Re-runs a callable: the CPU's stand-in for a CUDA graph, labelled as such wherever a number shows."""

    emulated = True
    raw = None

    def __init__(self, work: Callable[[], None]) -> None:
        self._work: Callable[[], None] | None = work
        self.nbytes = 0

    def replay(self) -> None:
        """Runs the callable now."""
        assert self._work is not None, "the graph was destroyed"
        self._work()

    def destroy(self) -> None:
        """Forgets the callable."""
        self._work = None


class EmulatedCapture:
    """A capture that records nothing, in as many pieces as it takes to interleave it with other work."""

    def __init__(self, work: Callable[[], None], bytes_of: BytesOf | None = None) -> None:
        self._work = work
        self._bytes_of = bytes_of
        self._left = EMULATED_STAGES
        self._progress = Progress.NEW

    def begin(self) -> None:
        """Begins."""
        assert self._progress is Progress.NEW
        self._progress = Progress.OPEN

    def advance(self) -> bool:
        """Counts one stage."""
        assert self._progress is Progress.OPEN
        self._left -= 1
        return self._left < 0

    def end(self) -> None:
        """Ends."""
        assert self._progress is Progress.OPEN
        self._progress = Progress.ENDED

    def instantiate(self) -> EmulatedGraph:
        """The emulated graph."""
        assert self._progress is Progress.ENDED
        graph = EmulatedGraph(self._work)
        graph.nbytes = 0 if self._bytes_of is None else self._bytes_of(graph)
        self._progress = Progress.OVER
        return graph

    def abort(self) -> None:
        """Drops it."""
        self._progress = Progress.OVER
