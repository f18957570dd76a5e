"""The device-side loop on the CPU: a queue that works only while the host looks, so that one engine logic serves both.

Engine's thread. On a GPU the stream runs on while the host does something else; here the host lends its own time,
one piece of work for each ``pump``. Order is the stream's: whatever is submitted runs after all that was submitted
before. Emulated, and labelled so wherever a number shows: it says nothing about speed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import torch

from jitgraph.graphs.loop_control import LOOP_STEPS, LoopControl
from jitgraph.graphs.loop_source import ENDED, LEFT
from jitgraph.ops.slots import FINISHED, SlotTable

_LOW = 0xFFFFFFFF


class EmulatedDevice:
    """A stream whose work is Python: iterators, each ``next`` of which is one piece."""

    def __init__(self) -> None:
        self._queue: deque[Iterator[None]] = deque()

    @property
    def busy(self) -> bool:
        """Whether submitted work is not done yet."""
        return bool(self._queue)

    def submit(self, work: Iterator[None]) -> None:
        """Queues work; none of it is done before a ``pump``."""
        self._queue.append(work)

    def submit_step(self, step: Callable[[], None]) -> None:
        """Queues one ordinary step behind what is there; where nothing is, the step runs now."""
        if self._queue:
            self._queue.append(_once(step))
        else:
            step()

    def pump(self) -> bool:
        """Does the next piece of the oldest work; False where there is none.

        An error in it comes out here. The work it broke is given up, what was queued behind stays.
        """
        if not self._queue:
            return False
        try:
            next(self._queue[0])
        except StopIteration:
            self._queue.popleft()
        except BaseException:
            self._queue.popleft()
            raise
        return True

    def drain(self) -> None:
        """Does all submitted work, as waiting for a stream does."""
        while self.pump():
            pass


def _once(step: Callable[[], None]) -> Iterator[None]:
    step()
    yield from ()


def loop_work(
    steps: int,
    may_go_on: Callable[[], bool],
    enter: Callable[[], None],
    body: Callable[[], None],
    leave: Callable[[], None],
) -> Iterator[None]:
    """The graph of ``loop.py`` as work for an ``EmulatedDevice``: the meaning of ``loop_source``'s kernels.

    Pieces: enter and arm; then each body with its tick, at most ``steps`` of them and only while ``may_go_on()``; then
    leave.
    """
    enter()
    budget = steps
    condition = may_go_on()
    yield
    while condition:
        body()
        budget -= 1
        condition = may_go_on() and budget > 0
        yield
    leave()


class EmulatedLoop:
    """A ``DeviceLoop`` on the CPU. ``enter`` and ``body`` are what the captured graphs would replay.

    The arguments are those of ``loop.build_cuda_loop``, with callables for its graphs; all tensors are on the CPU.
    """

    def __init__(
        self,
        enter: Callable[[], None],
        body: Callable[[], None],
        row_slot: torch.Tensor,
        slots: SlotTable,
        counter: torch.Tensor,
        control: LoopControl,
        device: EmulatedDevice,
        steps: int = LOOP_STEPS,
    ) -> None:
        assert steps >= 1
        self.steps = steps
        self._enter = enter
        self._body = body
        self._row_slot = row_slot
        self._slots = slots
        self._counter = counter
        self._control = control
        self._device: EmulatedDevice | None = device

    def launch(self) -> None:
        """Queues the loop; it runs as the device is pumped."""
        assert self._device is not None, "the loop has been destroyed"
        self._device.submit(loop_work(self.steps, self._may_go_on, self._enter, self._body, self._leave))

    def destroy(self) -> None:
        """Gives the loop up, after all that is queued."""
        if self._device is not None:
            self._device.drain()
            self._device = None

    def _may_go_on(self) -> bool:
        finished = self._slots.words[int(self._row_slot[0]), FINISHED]
        return int(finished) == 0 and not self._control.cancelled

    def _leave(self) -> None:
        state = self._control.state
        state[ENDED] += 1
        word = (int(state[ENDED]) & _LOW) << 32 | int(self._counter) & _LOW
        self._control.words[LEFT] = word - 2**64 if word >= 2**63 else word
