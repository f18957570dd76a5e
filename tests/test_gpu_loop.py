"""The decode loop on a GPU: what it does while the host does something else.

The tests of ``test_graphs_loop.py`` that hold for emulated loops hold for real ones too; they run on both. A loop of
``ENDLESS`` steps stands for one that still runs: it ends only because something ends it.
"""

from __future__ import annotations

import threading

import pytest
import torch
from loop_cases import ENDLESS, LoopBench, wait_until

from jitgraph.graphs.loop import DeviceLoop
from jitgraph.graphs.loop_source import ARM, LEAVE, TICK, loop_source
from jitgraph.jit.nvrtc import compile_source

pytestmark = pytest.mark.gpu


@pytest.fixture
def bench(device: torch.device) -> LoopBench:
    return LoopBench(device)


def running(bench: LoopBench) -> bool:
    """Whether work that was launched is not done."""
    assert bench.stream is not None
    return not bench.stream.query()


def start_endless(bench: LoopBench) -> DeviceLoop:
    """A loop that has been seen to run and goes on until it is cancelled."""
    bench.start_slot(0, 0, 2 * ENDLESS)
    loop = bench.loop(ENDLESS)
    loop.launch()
    wait_until(lambda: bench.newest() >= 1000, "a thousand steps")
    return loop


@pytest.mark.parametrize("arch", [80, 90])
def test_the_kernels_compile(arch: int) -> None:
    cubin = compile_source(loop_source(), "decode_loop", arch)
    assert cubin[:4] == b"\x7fELF"
    assert all(name.encode() in cubin for name in (ARM, TICK, LEAVE))


def test_tokens_come_while_the_loop_runs_and_cancelling_ends_it(bench: LoopBench) -> None:
    start_endless(bench)
    assert running(bench) and bench.control.left == (0, 0)
    bench.control.cancel()
    wait_until(lambda: bench.control.left[0] == 1, "the end")
    bench.finish()
    steps = bench.length(0)
    assert 1000 <= steps < ENDLESS
    assert bench.control.left == (1, 1 + steps) and int(bench.counter) == 1 + steps
    assert bench.newest() == steps and bench.token(steps) == steps, "no step came after the end"


def test_launching_behind_a_running_loop_does_not_wait(bench: LoopBench) -> None:
    """Neither another launch of the same loop, nor another loop, nor an ordinary step; and they keep their order."""
    other = bench.loop(4)
    loop = start_endless(bench)
    loop.launch()
    other.launch()
    bench.ordinary_step()
    assert running(bench) and bench.control.left == (0, 0), "the first loop runs on"
    bench.control.cancel()
    bench.finish()
    steps = bench.length(0)
    assert bench.control.left == (3, steps), "the loops behind it ran no step, the ordinary one came last"
    assert int(bench.counter) == 1 + steps and bench.token(steps) == steps
    bench.control.clear()
    other.launch()
    bench.finish()
    assert bench.length(0) == steps + 4 and bench.control.left == (4, steps + 5)


def test_every_token_is_read_while_loops_queue_up(bench: LoopBench) -> None:
    """The engine's way: the next loop is launched when the first token of the one before is there."""
    bench.start_slot(1, 100, 100 + 40 * 16)
    loop = bench.loop(16)
    loop.launch()
    step = 0
    for launched in range(1, 41):
        if launched < 40:
            loop.launch()
        for _ in range(16):
            step += 1
            assert bench.token(step) == 100 + step
    wait_until(lambda: bench.control.left[0] == 40, "the last end")
    assert bench.control.left == (40, 1 + step)


def test_an_end_is_never_seen_before_its_tokens(bench: LoopBench) -> None:
    """Whenever the host sees a new end, the counter is that end's and every record before it is in the ring."""
    bench.start_slot(0, 0, 2 * ENDLESS)
    loop = bench.loop(3)
    for launched in range(1, 301):
        loop.launch()
        wait_until(lambda launched=launched: bench.control.left[0] == launched, "an end")
        assert bench.control.left == (launched, 1 + 3 * launched)
        assert bench.newest() == 3 * launched


class LibraryBench(LoopBench):
    """Its step also multiplies a vector by a matrix that shifts it, and copies the product back."""

    def __init__(self, device: torch.device) -> None:
        self.shift = torch.eye(256, dtype=torch.float16, device=device).roll(1, 0)
        self.vector = torch.zeros(256, 1, dtype=torch.float16, device=device)
        self.product = torch.empty_like(self.vector)
        super().__init__(device)

    def body(self) -> None:
        torch.mm(self.shift, self.vector, out=self.product)
        self.vector.copy_(self.product)
        torch.mm(self.shift, self.vector, out=self.product)
        super().body()


def test_a_body_may_hold_products_and_copies(device: torch.device) -> None:
    bench = LibraryBench(device)
    start = torch.arange(256, dtype=torch.float16, device=device)[:, None]
    bench.vector.copy_(start)
    bench.start_slot(0, 0, 1000)
    bench.loop(50).launch()
    bench.finish()
    assert torch.equal(bench.vector, start.roll(50, 0)) and torch.equal(bench.product, start.roll(51, 0))


def test_any_thread_may_launch(bench: LoopBench) -> None:
    bench.start_slot(0, 0, 1000)
    loop = bench.loop(5)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            loop.launch()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    bench.finish()
    assert not errors and bench.length(0) == 5


def test_launches_leak_nothing(bench: LoopBench) -> None:
    bench.start_slot(0, 0, 2 * ENDLESS)
    loop = bench.loop(2)
    free = 0
    for launch in range(1200):
        if launch == 200:
            bench.finish()
            free = torch.cuda.mem_get_info(bench.device)[0]
        loop.launch()
    bench.finish()
    assert free - torch.cuda.mem_get_info(bench.device)[0] < 2**20
    assert bench.control.left == (1200, 1 + 2400)


def test_loops_that_are_destroyed_leak_nothing(bench: LoopBench) -> None:
    """The driver keeps some memory of graphs that are gone for those to come, so growth counts after a while only."""
    bench.start_slot(0, 0, 2 * ENDLESS)
    free = 0
    for cycle in range(400):
        if cycle == 100:
            free = torch.cuda.mem_get_info(bench.device)[0]
        loop = bench.loop(2)
        loop.launch()
        loop.destroy()
    assert free - torch.cuda.mem_get_info(bench.device)[0] < 4 * 2**20
    assert bench.control.left == (400, 1 + 800)
