"""The engine's device-side loops: which kinds there are, how many are under way, and how they are called off.

Engine's thread. Loops run one after another on the engine's stream; ``graphs/loop.py`` says what one is.
"""

from __future__ import annotations

from collections import Counter

from jitgraph.graphs.key import Sampling
from jitgraph.graphs.loop_control import DeviceLoop, LoopControl, LoopReason


class Loops:
    """The loops of one engine, by their sampling; none where ``reasons`` says why."""

    def __init__(self) -> None:
        self._loops: dict[Sampling, DeviceLoop] = {}
        self._control: LoopControl | None = None
        self._launched = 0
        self.called_off = False
        """The device has been told to end its loops; ordinary steps wait for ``over``."""
        self.reasons: Counter[LoopReason] = Counter()
        """Why a kind of loop could not be built, counted."""

    def add(self, kind: Sampling, loop: DeviceLoop, control: LoopControl) -> None:
        """One more kind; all share one control."""
        self._loops[kind] = loop
        self._control = control

    def __contains__(self, kind: Sampling) -> bool:
        return kind in self._loops

    def steps(self, kind: Sampling) -> int:
        """Steps of one launch at most."""
        return self._loops[kind].steps

    @property
    def launched(self) -> int:
        """Loops launched since the start."""
        return self._launched

    def launch(self, kind: Sampling) -> None:
        """Enqueues one loop; its inputs are in the inbox."""
        self._loops[kind].launch()
        self._launched += 1

    def call_off(self) -> None:
        """Ends the running loop after the step in progress; those queued behind it run no step."""
        if not self.called_off and self._control is not None:
            self.called_off = True
            self._control.cancel()

    def over(self) -> int | None:
        """Once all loops have ended, the number of the next step; None before."""
        assert self._control is not None
        ended, counter = self._control.left
        return counter if ended == self._launched else None

    def clear(self) -> None:
        """Lets loops run again, all of them being over."""
        if self._control is not None:
            self._control.clear()
        self.called_off = False

    def forget(self) -> None:
        """Counts anew from what the device says: after a failure a loop may never have told its end."""
        if self._control is not None:
            self._launched = self._control.left[0]

    def destroy(self) -> None:
        """Frees all loops, once their launches have ended."""
        for loop in self._loops.values():
            loop.destroy()
        self._loops.clear()
