"""The host's side of a device-side loop: what a loop is to its launcher, how it is called off, how its end is seen.

``loop.py`` builds loops on CUDA and says what holds of them; ``emulated.py`` plays them on the CPU. Both end here.
"""

from __future__ import annotations

import enum
from typing import Any, Protocol

import numpy as np
import torch

from jitgraph.graphs.loop_source import CANCEL, CONTROL_WORDS, LEFT, STATE_WORDS

LOOP_STEPS = 64
"""Steps of one launch at most: short enough that a host blocked by it waits for a fraction of a second."""

_LOW = 0xFFFFFFFF


class LoopReason(str, enum.Enum):
    """Why there is no device-side loop; decoding then launches each step from the host."""

    SWITCHED_OFF = "device loops are switched off"
    STEPS_OUTSIDE_GRAPHS = "a step is not one graph under these settings"
    EMULATED = "graphs are emulated on this device"
    NO_BINDINGS = "cuda-bindings is not installed"
    NO_CONDITIONALS = "conditional graph nodes need the driver of CUDA 12.4 and bindings to match"
    NVRTC_FAILED = "NVRTC could not compile the loop's kernels"
    REFUSED = "the driver refused the loop's graph"


class LoopUnavailable(Exception):
    """A loop that cannot be built here, with the ``reason`` to count and the details as its message."""

    def __init__(self, reason: LoopReason, details: str = "") -> None:
        super().__init__(f"{reason.value}: {details}" if details else reason.value)
        self.reason = reason


class DeviceLoop(Protocol):
    """A loop that is ready to launch."""

    steps: int
    """Steps that one launch runs at most."""

    def launch(self) -> None:
        """Enqueues the loop on the engine's stream and returns at once."""

    def destroy(self) -> None:
        """Gives the loop up, once its launches have run to their end. Calling it twice does no harm."""


class LoopControl:
    """The words through which host and device speak about loops; one for all loops of an engine.

    The engine's thread owns it; ``cancel`` may come from any thread.
    """

    def __init__(self, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self.words = torch.zeros(CONTROL_WORDS, dtype=torch.int64, pin_memory=pinned)
        """int64 ``[CONTROL_WORDS]`` in host memory that the device sees."""
        self.state = torch.zeros(STATE_WORDS, dtype=torch.int64, device=device)
        """int64 ``[STATE_WORDS]``: what the device remembers from kernel to kernel."""
        if pinned:  # the engine's stream must not overtake the zeros
            torch.cuda.current_stream(device).synchronize()
        self._view: np.ndarray[Any, np.dtype[np.int64]] = self.words.numpy()
        self._loops = 0
        self._counter = 0

    def cancel(self) -> None:
        """Ends the running loop after the step in progress; queued loops run no step. Holds until ``clear``."""
        self._view[CANCEL] = 1

    def clear(self) -> None:
        """Lets loops run again. Only once those that were cancelled have ended, or they may not notice."""
        self._view[CANCEL] = 0

    @property
    def cancelled(self) -> bool:
        """Whether ``cancel`` holds."""
        return bool(self._view[CANCEL])

    @property
    def left(self) -> tuple[int, int]:
        """Loops that have ended so far, and the counter when the last one did: the number of the next step.

        Both from one read of one word. All records of that loop's steps are in the ring by then. (0, 0) before the
        first end.
        """
        word = int(self._view[LEFT])
        self._loops = _nearest(word >> 32, self._loops)
        self._counter = _nearest(word, self._counter)
        return self._loops, self._counter


def _nearest(low: int, last: int) -> int:
    """The number next to ``last`` whose lower 32 bits are those of ``low``."""
    ahead = (low - last) & _LOW
    return last + (ahead if ahead < 2**31 else ahead - 2**32)
