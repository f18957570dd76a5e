"""The smallest decode step, and loops over it: on a GPU real ones over a kernel, on the CPU emulated ones.

The step appends to the slot that ``row_slot`` names, as ``advance`` does: LENGTH grows by 1, FINISHED is set once it
reaches MAX_LENGTH, and the ring gets the new length stamped with the number of the step. Where the GPU can, the kernel
is launched ahead of the end of the one before it (PDL), as the kernels of a model are. A second kernel stands in for
the receive op: it takes the slot over from pinned memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl

from jitgraph.graphs.emulated import EmulatedDevice, EmulatedLoop
from jitgraph.graphs.loop import DeviceLoop, LoopControl, build_cuda_loop
from jitgraph.jit.kernel import kernel
from jitgraph.jit.target import target_arch
from jitgraph.ops import slots as columns
from jitgraph.ops.slots import SlotTable

RING_DEPTH = 128
ENDLESS = 1_000_000
"""Steps that take a GPU many seconds: a loop of so many ends before only if something ends it."""
PATIENCE_SECONDS = 60.0
"""After which a test that waits for the device gives up."""

_LENGTH = tl.constexpr(columns.LENGTH)
_MAX_LENGTH = tl.constexpr(columns.MAX_LENGTH)
_FINISHED = tl.constexpr(columns.FINISHED)


@kernel
def receive_kernel(inbox, row_slot):
    tl.store(row_slot, tl.load(inbox))


@kernel
def step_kernel(
    row_slot, slots, counter, ring, SLOT_STRIDE: tl.constexpr, DEPTH: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()
    words = slots + tl.load(row_slot) * SLOT_STRIDE
    step = tl.load(counter)
    length = tl.load(words + _LENGTH) + 1
    ended = length >= tl.load(words + _MAX_LENGTH)
    tl.store(words + _LENGTH, length)
    tl.store(words + _FINISHED, ended.to(tl.int32))
    tl.store(counter, step + 1)
    tl.store(ring + step % DEPTH, (step << 32) | length.to(tl.int64))


class LoopBench:
    """The state of two slots (and the dummy), the step over it, and what a loop needs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cuda = device.type == "cuda"
        self.pdl = target_arch() >= 90
        self.slots = SlotTable.allocate(2, 4, device)
        self.row_slot = torch.full((1,), self.slots.dummy, dtype=torch.int32, device=device)
        self.counter = torch.ones(1, dtype=torch.int64, device=device)
        self.inbox = torch.full((1,), self.slots.dummy, dtype=torch.int32, pin_memory=cuda)
        self.ring = torch.zeros(RING_DEPTH, dtype=torch.int64, pin_memory=cuda)
        self.control = LoopControl(device)
        self.queue = EmulatedDevice()
        self.stream = torch.cuda.Stream(device) if cuda else None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(device))
            self.on_stream(self.enter)  # compiles and loads the kernels, at the dummy's cost
            self.on_stream(self.body)
            self.enter_graph, self.body_graph = self._captured(self.enter), self._captured(self.body)
            self.counter.fill_(1)
            torch.cuda.synchronize(device)
            self.ring.zero_()

    def enter(self) -> None:
        if self.stream is None:
            self.row_slot.copy_(self.inbox)
        else:
            receive_kernel[(1,)](self.inbox, self.row_slot)

    def body(self) -> None:
        if self.stream is None:
            step, words = int(self.counter), self.slots.words[int(self.row_slot)]
            words[columns.LENGTH] += 1
            words[columns.FINISHED] = int(words[columns.LENGTH] >= words[columns.MAX_LENGTH])
            self.ring[step % RING_DEPTH] = step % 2**31 << 32 | int(words[columns.LENGTH])
            self.counter += 1
            return
        step_kernel[(1,)](
            self.row_slot,
            self.slots.words,
            self.counter,
            self.ring,
            SLOT_STRIDE=self.slots.stride,
            DEPTH=RING_DEPTH,
            PDL=self.pdl,
            **({"launch_pdl": True} if self.pdl else {}),
        )

    def loop(self, steps: int) -> DeviceLoop:
        """A loop over the step, whose slot is the one in ``inbox`` when it starts."""
        state = (self.row_slot, self.slots, self.counter, self.control)
        if self.stream is None:
            return EmulatedLoop(self.enter, self.body, *state, self.queue, steps)
        graphs = (self.enter_graph, self.body_graph)
        captured = (graph.raw_cuda_graph() for graph in graphs)
        return build_cuda_loop(*captured, *state, self.stream, self.device, steps, keep=graphs)

    def start_slot(self, slot: int, length: int, max_length: int) -> None:
        """Puts a sequence into a slot; its steps end at ``max_length``. Nothing may be running."""
        row = self.slots.words[slot]
        row[columns.LENGTH] = length
        row[columns.MAX_LENGTH] = max_length
        row[columns.FINISHED] = int(length >= max_length)
        self.inbox[0] = slot
        if self.stream is not None:
            torch.cuda.synchronize(self.device)

    def ordinary_step(self) -> None:
        """Launches one step from the host, behind all that has been launched."""
        if self.stream is None:
            self.queue.submit_step(self.body)
        else:
            self.on_stream(self.body)

    def finish(self) -> None:
        """Waits for all that has been launched."""
        self.queue.drain()
        if self.stream is not None:
            self.stream.synchronize()

    def length(self, slot: int) -> int:
        return int(self.slots.words[slot, columns.LENGTH])

    def token(self, step: int) -> int:
        """The payload of a step's record, as soon as it is there."""
        wait_until(lambda: int(self.ring[step % RING_DEPTH]) >> 32 == step, f"step {step}")
        return int(self.ring[step % RING_DEPTH]) & 0xFFFFFFFF

    def newest(self) -> int:
        """The highest step in the ring."""
        return int(self.ring.max()) >> 32

    def on_stream(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self.stream):
            work()

    def _captured(self, work: Callable[[], None]) -> Any:
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph, stream=self.stream):
            work()
        return graph


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Polls host memory.

    Raises:
        AssertionError: ``what`` has not come for a very long time.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {PATIENCE_SECONDS:.0f} s"
