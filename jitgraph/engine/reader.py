"""Reads the token ring: polls the host memory that a step publishes its tokens in, and never synchronises.

Engine's thread. While it polls, it lends its time to whoever has work for the GPU's shadow, and on the CPU to the
emulated device, which works in no other time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from jitgraph.engine.loops import Loops
from jitgraph.errors import DeviceError
from jitgraph.graphs.buffers import RING_DEPTH
from jitgraph.graphs.emulated import EmulatedDevice
from jitgraph.ops.ring import RING_LOGPROB, RING_TOKEN, RING_TOP_IDS, RING_TOP_LOGPROBS
from jitgraph.types import TokenLogprobs

Words = np.ndarray[Any, np.dtype[np.int64]]
Shadow = Callable[[float], bool]
"""Does a piece of other work that fits before a time (``time.perf_counter`` seconds); whether it did any."""

STALL_SECONDS = 60.0
"""A step that has not published its tokens after this long is taken for lost."""
_SPINS = 4096
"""Looks at the ring between two looks at the device's health."""


class RingReader:
    """The host's end of the token ring."""

    def __init__(
        self, ring: torch.Tensor, loops: Loops, stream: torch.cuda.Stream | None, emulated: EmulatedDevice | None
    ) -> None:
        self._ring: Words = ring.numpy()
        self._loops = loops
        self._stream = stream
        self._emulated = emulated
        self.shadow: Shadow | None = None
        """Work for the time in which the GPU is busy; None where there is none."""
        self.broken = False
        """Work of the emulated device ended half-way: the runner must resynchronise before the next launch."""

    def wait(self, step: int, rows: int, due: float | None = None, called_off: bool = False) -> bool:
        """Waits until a step has published its rows' tokens; the shadow works until ``due``.

        ``called_off``: False as soon as all loops are over and the step was none of theirs; True otherwise.
        """
        record = self._ring[step % RING_DEPTH]
        if not self._poll(record[0], [RING_TOKEN], step, due, called_off):
            return False
        for row in range(1, rows):
            self._poll(record[row], [RING_TOKEN], step)
        return True

    def tokens(self, step: int, rows: int) -> list[int]:
        """The tokens of a step that has been waited for, in row order."""
        ring, at = self._ring, step % RING_DEPTH
        return [ring.item(at, row, RING_TOKEN) & 0xFFFFFFFF for row in range(rows)]

    def token(self, step: int) -> int:
        """``wait`` and ``tokens`` for one row, without a shadow."""
        self.wait(step, 1)
        return self._ring.item(step % RING_DEPTH, 0, RING_TOKEN) & 0xFFFFFFFF

    def look_out(self, step: int, until_s: float) -> bool:
        """Waits until a time (``time.perf_counter``); False as soon as a step's first row has been published."""
        stamp, word = step & 0xFFFFFFFF, self._ring[step % RING_DEPTH, 0]
        while (int(word[RING_TOKEN]) >> 32) & 0xFFFFFFFF != stamp:
            self._pump()
            if time.perf_counter() >= until_s:
                return True
        return False

    def logprobs(self, step: int, row: int, count: int) -> TokenLogprobs:
        """Log-probabilities of a row that has been waited for, with ``count`` alternatives."""
        record = self._ring[step % RING_DEPTH, row]
        columns = [RING_LOGPROB]
        columns += range(RING_TOP_IDS, RING_TOP_IDS + count)
        columns += range(RING_TOP_LOGPROBS, RING_TOP_LOGPROBS + count)
        self._poll(record, columns, step)
        payload = (record & 0xFFFFFFFF).astype(np.uint32)
        values = payload.view(np.float32)
        top = tuple((int(payload[RING_TOP_IDS + i]), float(values[RING_TOP_LOGPROBS + i])) for i in range(count))
        return TokenLogprobs(int(payload[RING_TOKEN]), float(values[RING_LOGPROB]), top)

    def await_loops(self, step: int) -> int:
        """Waits until all loops are over; returns the number of the next step. ``step`` is named if they never are."""
        spins, deadline = 0, 0.0
        while (end := self._loops.over()) is None:
            if not self._pump():
                spins += 1
                if spins % _SPINS == 0:
                    deadline = self._check_alive(deadline, step)
        return end

    def _poll(
        self, words: Words, columns: list[int], step: int, due: float | None = None, called_off: bool = False
    ) -> bool:
        """Spins until each of the words carries the step's number."""
        stamp = step & 0xFFFFFFFF
        spins = 0
        deadline = 0.0
        for column in columns:
            while (int(words[column]) >> 32) & 0xFFFFFFFF != stamp:
                if called_off and (end := self._loops.over()) is not None and end <= step:
                    return False
                if self._pump():
                    continue
                if due is not None and self.shadow is not None and self.shadow(due):
                    continue
                spins += 1
                if spins % _SPINS == 0:
                    deadline = self._check_alive(deadline, step)
        return True

    def _pump(self) -> bool:
        """Lends the emulated device a piece of time; what breaks its work, an interrupt too, is noted and goes on."""
        if self._emulated is None:
            return False
        try:
            return self._emulated.pump()
        except BaseException:
            self.broken = True
            raise

    def _check_alive(self, deadline: float, step: int) -> float:
        """Raises where the device reports an error or has been silent for too long; a query is no synchronisation."""
        if self._stream is not None:
            try:
                self._stream.query()
            except RuntimeError as error:
                raise DeviceError(f"the GPU failed in step {step}: {error}") from error
        now = time.monotonic()
        if deadline and now > deadline:
            raise DeviceError(f"step {step} gave no token within {STALL_SECONDS:.0f} s; the engine must be restarted")
        return deadline or now + STALL_SECONDS
