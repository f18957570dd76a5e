"""The decode loop: when it runs another step, in which order it runs, how it ends.

The loops over ``LoopBench`` are emulated on the CPU and real on a GPU: the same expectations hold the two together.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from loop_cases import LoopBench

from jitgraph.graphs.emulated import EmulatedDevice, loop_work
from jitgraph.graphs.loop import LoopControl
from jitgraph.graphs.loop_source import CANCEL, LEFT

# ------------------------------------------------------------------------------------------------------ the condition


@pytest.mark.parametrize("steps", range(1, 5))
def test_a_loop_ends_at_the_first_reason(steps: int) -> None:
    """Every small case: finished after f steps and cancelled after c, of which 0 is before the loop."""
    for finished, cancelled in itertools.product(range(6), repeat=2):
        log: list[str] = []

        def may_go_on(log: list[str] = log, last: int = min(finished, cancelled)) -> bool:
            return log.count("body") < last

        pieces = list(
            loop_work(
                steps,
                may_go_on,
                enter=lambda log=log: log.append("enter"),
                body=lambda log=log: log.append("body"),
                leave=lambda log=log: log.append("leave"),
            )
        )
        ran = min(steps, finished, cancelled)
        assert log == ["enter"] + ["body"] * ran + ["leave"]
        assert len(pieces) == 1 + ran, (
            "one piece for entering and one for each step; leaving is the last, which ends it"
        )


def test_the_condition_is_asked_after_entering_and_after_each_step() -> None:
    """So what ``enter`` receives counts, and what a step did counts before the next one."""
    log: list[str] = []

    def may_go_on() -> bool:
        log.append("ask")
        return True

    work = loop_work(2, may_go_on, lambda: log.append("enter"), lambda: log.append("body"), lambda: log.append("leave"))
    assert not log, "nothing happens at the launch"
    list(work)
    assert log == ["enter", "ask", "body", "ask", "body", "ask", "leave"]


# ---------------------------------------------------------------------------------------- loops, emulated or on a GPU


@pytest.fixture
def bench(device: torch.device) -> LoopBench:
    return LoopBench(device)


@pytest.mark.parametrize(
    ("steps", "length", "max_length", "ran"),
    [(4, 10, 100, 4), (4, 10, 14, 4), (4, 10, 13, 3), (4, 10, 11, 1), (1, 10, 100, 1), (4, 10, 10, 0)],
    ids=["budget", "both at once", "finished inside", "finished by the first", "budget of one", "finished before"],
)
def test_one_loop(bench: LoopBench, steps: int, length: int, max_length: int, ran: int) -> None:
    bench.start_slot(1, length, max_length)
    bench.loop(steps).launch()
    bench.finish()
    assert bench.length(1) == length + ran
    assert int(bench.counter) == 1 + ran
    assert [bench.token(1 + i) for i in range(ran)] == [length + 1 + i for i in range(ran)]
    assert bench.control.left == (1, 1 + ran)


def test_a_loop_of_the_dummy_slot_runs_no_step(bench: LoopBench) -> None:
    bench.loop(4).launch()
    bench.finish()
    assert bench.control.left == (1, 1)


def test_a_cancelled_loop_runs_no_step_until_it_is_cleared(bench: LoopBench) -> None:
    bench.start_slot(0, 5, 100)
    loop = bench.loop(3)
    bench.control.cancel()
    assert bench.control.cancelled
    loop.launch()
    bench.finish()
    assert (bench.length(0), bench.control.left) == (5, (1, 1))
    bench.control.clear()
    assert not bench.control.cancelled
    loop.launch()
    bench.finish()
    assert (bench.length(0), bench.control.left) == (8, (2, 4))


def test_queued_loops_go_on_where_the_one_before_ended(bench: LoopBench) -> None:
    """The third finds the sequence finished by the second and runs no step."""
    bench.start_slot(0, 5, 11)
    loop = bench.loop(4)
    for _ in range(3):
        loop.launch()
    bench.finish()
    assert [bench.token(1 + i) for i in range(6)] == [6, 7, 8, 9, 10, 11]
    assert bench.control.left == (3, 7)


def test_two_loops_share_what_the_device_remembers(bench: LoopBench) -> None:
    """As the greedy and the sampling loop of an engine do."""
    bench.start_slot(0, 5, 100)
    short, long = bench.loop(2), bench.loop(3)
    short.launch()
    long.launch()
    short.launch()
    bench.finish()
    assert (bench.length(0), bench.control.left) == (12, (3, 8))


def test_a_loop_takes_its_inputs_when_it_starts(bench: LoopBench) -> None:
    """``enter`` runs with the loop: another slot needs no other graph."""
    loop = bench.loop(2)
    for slot in (0, 1):
        bench.start_slot(slot, 20 * slot, 100)
        loop.launch()
        bench.finish()
    assert (bench.length(0), bench.length(1)) == (2, 22)


def test_ordinary_steps_keep_their_place(bench: LoopBench) -> None:
    """A step launched behind a loop runs after it, and before the loop behind it."""
    bench.start_slot(0, 5, 100)
    loop = bench.loop(2)
    bench.ordinary_step()  # still the dummy's: the inbox is received by loops alone
    loop.launch()
    bench.ordinary_step()
    loop.launch()
    bench.finish()
    assert [bench.token(2 + i) for i in range(5)] == [6, 7, 8, 9, 10]
    assert bench.control.left == (2, 7)


def test_a_destroyed_loop_cannot_be_launched(bench: LoopBench) -> None:
    """And what was launched before has run."""
    bench.start_slot(0, 5, 100)
    loop = bench.loop(2)
    loop.launch()
    loop.destroy()
    loop.destroy()
    with pytest.raises(AssertionError, match="destroyed"):
        loop.launch()
    assert (bench.length(0), bench.control.left) == (7, (1, 3))


# -------------------------------------------------------------------------------------------------- the emulated device


def test_the_emulated_device_works_only_when_pumped() -> None:
    bench = LoopBench(torch.device("cpu"))
    bench.start_slot(0, 5, 7)
    bench.loop(4).launch()
    seen = []
    while bench.queue.pump():
        seen.append((bench.length(0), bench.control.left[0]))
    assert seen == [(5, 0), (6, 0), (7, 0), (7, 1)], "enter, two steps, leave; the end shows after the last token"
    assert not bench.queue.busy


@pytest.mark.parametrize("pumps", [1, 2, 3])
def test_cancelling_ends_an_emulated_loop_after_the_step_in_progress(pumps: int) -> None:
    """After ``enter`` the first step is decided already, as on a GPU."""
    bench = LoopBench(torch.device("cpu"))
    bench.start_slot(0, 5, 100)
    bench.loop(50).launch()
    for _ in range(pumps):
        bench.queue.pump()
    bench.control.cancel()
    bench.queue.drain()
    assert (bench.length(0), bench.control.left) == (5 + pumps, (1, 1 + pumps))


def test_steps_run_at_once_where_nothing_is_queued() -> None:
    device, log = EmulatedDevice(), []
    device.submit_step(lambda: log.append("first"))
    assert log == ["first"] and not device.pump()
    device.submit(iter(()))
    device.submit_step(lambda: log.append("second"))
    assert log == ["first"] and device.busy
    device.drain()
    assert log == ["first", "second"] and not device.busy


def test_failed_work_is_given_up_and_the_rest_stays() -> None:
    device, log = EmulatedDevice(), []

    def broken() -> None:
        raise RuntimeError("broken step")

    device.submit(iter(()))
    device.submit_step(broken)
    device.submit_step(lambda: log.append("behind"))
    with pytest.raises(RuntimeError, match="broken step"):
        device.drain()
    device.drain()
    assert log == ["behind"]


# ---------------------------------------------------------------------------------------------------------- the control


def test_left_counts_on_past_32_bits() -> None:
    """The word holds the lower halves; the host knows the upper ones from before, also after a step back."""
    control = LoopControl(torch.device("cpu"))
    assert control.left == (0, 0)
    for loops, counter in [
        (1, 7),
        (2**31 - 1, 2**31 - 1),
        (2**32 - 2, 2**32 - 2),
        (2**32 + 1, 2**32),
        (2**32 + 2, 2**32 - 9),
    ]:
        word = (loops & 0xFFFFFFFF) << 32 | counter & 0xFFFFFFFF
        control.words[LEFT] = word - 2**64 if word >= 2**63 else word
        assert control.left == (loops, counter)


def test_an_emulated_end_past_32_bits_is_read_back() -> None:
    bench = LoopBench(torch.device("cpu"))
    bench.control.state[0] = 2**31
    bench.counter.fill_(2**32 - 1)
    bench.start_slot(0, 0, 100)
    bench.loop(3).launch()
    bench.finish()
    word = int(bench.control.words[LEFT])
    assert (word >> 32 & 0xFFFFFFFF, word & 0xFFFFFFFF) == (2**31 + 1, 2)


def test_cancelling_writes_the_word_the_kernels_read() -> None:
    control = LoopControl(torch.device("cpu"))
    control.cancel()
    assert control.words.nonzero().tolist() == [[CANCEL]]
