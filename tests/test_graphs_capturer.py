"""The shadow capture with everything around it faked: faults at every point, any order of events, no timing."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jitgraph.graphs.capture import Capturer, capture_callable
from jitgraph.graphs.captured import CapturedGraph
from jitgraph.graphs.capturer import ShadowCapturer
from jitgraph.graphs.dispatch import Dispatcher
from jitgraph.graphs.helper import HelperThread
from jitgraph.graphs.key import GraphKey, Path, Phase, Sampling
from jitgraph.graphs.pieces import FIRST_GUESS_S, PEAK_HALF_LIFE_S, RECENT_PIECES, Expected
from jitgraph.graphs.store import Store
from jitgraph.graphs.store_records import EventKind, State

T = TypeVar("T")
STAGES = 3
WARM_UP_PIECES = 2
CAPTURE_POINTS = ("make", "begin", *(f"stage {i}" for i in range(STAGES)), "end", "instantiate")
WARM_UP_POINTS = ("warm up make", *(f"warm up {i}" for i in range(WARM_UP_PIECES)))


def prompt(tokens: int) -> GraphKey:
    return GraphKey(Phase.PREFILL, tokens, Sampling.FULL)


class Fault(RuntimeError):
    """A planted failure."""


# ------------------------------------------------------------------------------------------------------------ the world


@dataclass
class World:
    """A device that notices everything forbidden, and fails wherever it is told to."""

    faults: set[str] = field(default_factory=set)
    error: type[BaseException] = Fault
    now: float = 0.0
    cost: dict[str, float] = field(default_factory=dict)
    cold: set[GraphKey] = field(default_factory=set)
    running: bool = False
    """Whether a step is in flight."""
    open: FakeCapture | None = None
    captures: list[FakeCapture] = field(default_factory=list)
    warm_ups: list[Generator[None, None, None]] = field(default_factory=list)
    graphs: list[FakeGraph] = field(default_factory=list)
    visited: list[str] = field(default_factory=list)

    def at(self, point: str) -> None:
        """Work of some kind: it takes its time, and fails where a fault was planted."""
        self.visited.append(point)
        self.now += self.cost.get(point.rstrip("0123456789 "), 0.0)
        if point in self.faults:
            raise self.error(point)

    def clock(self) -> float:
        return self.now

    def is_warm(self, key: GraphKey) -> bool:
        return key not in self.cold

    def warm_up(self, key: GraphKey) -> Iterator[None]:
        self.at("warm up make")
        self.warm_ups.append(self._warm_up(key))
        return self.warm_ups[-1]

    def _warm_up(self, key: GraphKey) -> Generator[None, None, None]:
        for piece in range(WARM_UP_PIECES):
            assert not self.running, "warmed up beside a running step"
            self.at(f"warm up {piece}")
            yield
        self.cold.discard(key)

    def make(self, key: GraphKey) -> FakeCapture:
        self.at("make")
        return FakeCapture(self, key)

    def check_nothing_left(self) -> None:
        """What must hold once everything is closed."""
        assert self.open is None
        assert all(capture.state == "over" for capture in self.captures)
        assert all(graph.destroyed == 1 for graph in self.graphs), "each graph is destroyed once"
        assert all(pieces.gi_frame is None for pieces in self.warm_ups), "each warm-up has ended"


class FakeCapture:
    """A capture that insists on the order of its calls."""

    def __init__(self, world: World, key: GraphKey) -> None:
        self.world, self.key, self.state, self.stage = world, key, "new", 0
        world.captures.append(self)

    def begin(self) -> None:
        assert self.state == "new" and self.world.open is None, "two captures open"
        assert self.key not in self.world.cold, "captured what has never run"
        self.world.open, self.state = self, "open"  # a failing begin may leave it half open
        self.world.at("begin")

    def advance(self) -> bool:
        assert self.state == "open"
        if self.stage == STAGES:
            return True
        self.world.at(f"stage {self.stage}")
        self.stage += 1
        return False

    def end(self) -> None:
        assert self.state == "open" and self.stage == STAGES
        self.world.at("end")
        self.world.open, self.state = None, "ended"

    def instantiate(self) -> FakeGraph:
        assert self.state == "ended"
        self.world.at("instantiate")
        self.state = "over"
        graph = FakeGraph(self.world, self.key)
        self.world.graphs.append(graph)
        return graph

    def abort(self) -> None:
        if self.state == "open":
            self.world.open = None
        self.state = "over"


class FakeGraph:
    """A graph that counts its destructions."""

    emulated = True
    raw = None

    def __init__(self, world: World, key: GraphKey) -> None:
        self.world, self.key, self.nbytes, self.destroyed, self.running = world, key, 1, 0, False

    def replay(self) -> None:
        assert not self.destroyed

    def destroy(self) -> None:
        assert not self.running, "destroyed while a step replays it"
        self.destroyed += 1
        self.world.at("destroy")


class ManualHelper:
    """A helper thread whose jobs run when the test says so."""

    def __init__(self) -> None:
        self.jobs: list[Callable[[], None]] = []
        self.refuses = False
        self.closed = False

    def submit(self, job: Callable[[], T]) -> Future[T]:
        assert not self.closed
        if self.refuses:
            raise RuntimeError("can't start new thread")
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)

        self.jobs.append(run)
        return future

    def step(self) -> bool:
        if not self.jobs:
            return False
        self.jobs.pop(0)()
        return True

    def close(self) -> None:
        while self.step():
            pass
        self.closed = True


class Rig:
    """A capturer in a fake world."""

    def __init__(self, world: World | None = None, **limits: int) -> None:
        self.world = World() if world is None else world
        self.helper = ManualHelper()
        self.store: Store[CapturedGraph] = Store(**limits)  # type: ignore[arg-type]
        self.capturer = ShadowCapturer(
            self.store, self.world.make, self.world.is_warm, self.world.warm_up, self.world.clock, self.helper
        )

    def settle(self, idle: bool = True) -> None:
        """Lets everything run that can, the helper included."""
        for _ in range(1000):
            if not self.capturer.advance(idle=idle) and not self.helper.step():
                break
        else:
            raise AssertionError("it never comes to rest")

    def close(self) -> None:
        self.capturer.close()
        self.world.check_nothing_left()
        assert self.store.budget.graphs == self.store.budget.nbytes == 0 and self.store.ready_keys == ()
        self.store.want(prompt(1))
        assert not self.capturer.pending and not self.capturer.advance(idle=True)
        self.capturer.interrupt()


# ------------------------------------------------------------------------------------------------------------ good days


def test_captures_the_list_piece_by_piece() -> None:
    rig = Rig()
    rig.store.precapture([prompt(2), prompt(1)])
    assert rig.capturer.pending
    pieces = 0
    while rig.capturer.advance() or rig.helper.step():
        pieces += 1
    one = ["make", "begin", *(f"stage {i}" for i in range(STAGES)), "end", "instantiate"]
    assert sorted(rig.world.visited) == sorted(one * 2)
    assert [capture.key for capture in rig.world.captures] == [prompt(2), prompt(1)]
    assert set(rig.store.ready_keys) == {prompt(1), prompt(2)} and not rig.capturer.pending
    assert pieces >= 2 * (1 + STAGES + 1 + 1 + 1 + 1), "begin, stages, their end, end, instantiate, collect"
    rig.close()


def test_the_next_capture_opens_while_the_last_one_is_instantiated() -> None:
    rig = Rig()
    rig.store.precapture([prompt(1), prompt(2)])
    while rig.capturer.advance():
        pass
    assert len(rig.helper.jobs) == 2 and rig.store.ready_keys == () and rig.world.visited.count("end") == 2
    assert rig.capturer.pending
    rig.settle()
    assert len(rig.store.ready_keys) == 2
    rig.close()


def test_evicts_destroys_then_captures() -> None:
    rig = Rig(max_graphs=1)
    rig.store.want(prompt(1))
    rig.settle()
    for _ in range(3):
        rig.store.want(prompt(2))
    rig.settle()
    assert rig.store.ready_keys == (prompt(2),) and rig.world.graphs[0].destroyed == 1
    kinds = [event.kind for event in rig.store.events if event.key == prompt(1)]
    assert kinds == [
        EventKind.QUEUED,
        EventKind.BEGUN,
        EventKind.READY,
        EventKind.EVICTED,
        EventKind.DESTROYED,
    ]
    rig.close()


def test_an_open_capture_stays_open_through_requests() -> None:
    rig = Rig()
    rig.store.want(prompt(1))
    assert rig.capturer.advance() and rig.capturer.advance()
    first = rig.world.open
    rig.capturer.interrupt()
    rig.world.running = True
    assert rig.world.open is first is not None
    rig.settle(idle=False)
    assert rig.store.ready_keys == (prompt(1),) and len(rig.world.captures) == 1
    rig.close()


def test_abandoning_closes_the_capture_and_its_key_comes_first() -> None:
    rig = Rig()
    rig.store.precapture([prompt(1)])
    rig.capturer.advance()
    rig.store.precapture([prompt(2), prompt(1)])
    rig.capturer.abandon()
    assert rig.world.open is None and rig.store.counters.abandoned == 1 and rig.store.budget.graphs == 0
    rig.settle()
    assert [capture.key.tokens for capture in rig.world.captures] == [1, 1, 2]
    rig.close()


# ----------------------------------------------------------------------------------------------------------- warming up


def test_what_never_ran_is_warmed_up_when_idle_and_only_then() -> None:
    rig = Rig(World(cold={prompt(1)}))
    rig.store.want(prompt(1))
    rig.store.want(prompt(2))
    rig.store.want(prompt(1))
    rig.world.running = True
    rig.settle(idle=False)
    assert rig.store.ready_keys == (prompt(2),), "1 is wanted more, but was never run"
    assert rig.capturer.pending
    rig.world.running = False
    rig.settle()
    assert set(rig.store.ready_keys) == {prompt(1), prompt(2)} and not rig.capturer.pending
    rig.close()


@pytest.mark.parametrize("break_off", ["interrupt", "busy advance"])
def test_a_warm_up_is_broken_off_and_begun_anew(break_off: str) -> None:
    rig = Rig(World(cold={prompt(1)}))
    rig.store.want(prompt(1))
    assert rig.capturer.advance(idle=True) and rig.capturer.advance(idle=True)
    if break_off == "interrupt":
        rig.capturer.interrupt()
    else:
        assert not rig.capturer.advance(idle=False)
    rig.world.running = True
    rig.settle(idle=False)
    assert rig.world.captures == [] and rig.store.state(prompt(1)) is State.QUEUED
    assert rig.store.counters.abandoned == 1
    rig.world.running = False
    rig.store.want(prompt(2))
    rig.store.want(prompt(2))
    rig.settle()
    warm_ups = [point for point in rig.world.visited if point.startswith("warm up")]
    assert warm_ups == ["warm up make", "warm up 0", *WARM_UP_POINTS]
    assert rig.store.ready_keys == (prompt(1), prompt(2)), "it went before what is wanted more"
    rig.close()


def test_a_key_that_was_warmed_up_is_captured_beside_running_steps() -> None:
    rig = Rig(World(cold={prompt(1)}))
    rig.store.want(prompt(1))
    rig.settle(idle=False)  # the store has been asked for warm keys and has none
    for _ in range(1 + WARM_UP_PIECES + 1):
        assert rig.capturer.advance(idle=True)
    assert rig.world.cold == set() and rig.world.captures == []
    rig.world.running = True
    rig.settle(idle=False)
    assert rig.store.ready_keys == (prompt(1),)
    rig.close()


def test_a_key_that_denies_being_warm_is_warmed_up_once() -> None:
    rig = Rig()
    rig.capturer = ShadowCapturer(
        rig.store, rig.world.make, lambda key: False, rig.world.warm_up, rig.world.clock, rig.helper
    )
    rig.store.want(prompt(1))
    rig.settle()
    assert rig.world.visited.count("warm up make") == 1 and rig.store.ready_keys == (prompt(1),)
    rig.close()


# ------------------------------------------------------------------------------------------------------------ deadlines


def test_a_piece_begins_only_if_it_fits() -> None:
    world = World(cost={"begin": 3e-3, "stage": 1e-3, "end": 2e-3, "make": 0.0})
    rig = Rig(world)
    rig.store.precapture([prompt(1), prompt(2)])
    assert not rig.capturer.advance(deadline=FIRST_GUESS_S * 0.9), "nothing measured yet: the guess must fit"
    assert world.visited == []
    rig.settle(idle=False)  # both captures, which measures every kind of piece
    rig.store.want(prompt(3))
    for piece, cost in (("begin", 3e-3), *[("stage", 1e-3)] * STAGES):
        before = len(world.visited)
        assert not rig.capturer.advance(deadline=world.now + 0.99 * cost), piece
        assert len(world.visited) == before
        assert rig.capturer.advance(deadline=world.now + cost * 1.01), piece
        assert world.visited[-1].startswith(piece)
    rig.close()


def test_expected_durations_are_recent_maxima_and_fade() -> None:
    expected = Expected(0.0)
    assert expected.duration(0.0) == FIRST_GUESS_S
    expected.add(50e-6, 0.0)
    assert expected.duration(0.0) == 50e-6, "the first one takes the place of the guess"
    expected.add(80e-6, 0.0)
    expected.add(60e-6, 0.0)
    assert expected.duration(0.0) == 80e-6
    expected.add(50e-3, 0.0)
    assert expected.duration(PEAK_HALF_LIFE_S) == pytest.approx(25e-3)
    for _ in range(RECENT_PIECES):
        expected.add(70e-6, 0.0)
    assert expected.duration(0.0) == 50e-3, "one pause is remembered for a while"
    assert expected.duration(20 * PEAK_HALF_LIFE_S) == 70e-6, "but not for ever"


def test_a_long_pause_does_not_keep_pieces_out_for_good() -> None:
    rig = Rig(World(cost={"begin": 1.0}))
    rig.store.want(prompt(1))
    rig.settle(idle=False)
    rig.world.cost.clear()
    rig.store.want(prompt(2))
    waits = 0
    while not rig.capturer.advance(deadline=rig.world.now + 2e-3):
        rig.world.now += 1.0
        waits += 1
        assert waits < 100, "stalled"
    assert waits > 5
    rig.close()


# --------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("point", CAPTURE_POINTS + WARM_UP_POINTS)
def test_a_fault_at_any_point_leaves_nothing_and_is_retried(point: str) -> None:
    rig = Rig(World(faults={point}, cold={prompt(5)} if point in WARM_UP_POINTS else set()))
    rig.store.want(prompt(5))
    rig.settle()
    assert rig.world.open is None and rig.store.budget.graphs == rig.store.budget.nbytes == 0
    assert all(capture.state in ("new", "over") for capture in rig.world.captures)
    assert rig.world.graphs == [] and not rig.capturer.pending
    ((reason, count),) = rig.store.counters.failures.items()
    kind = "begin" if point == "make" else "warm up" if point in WARM_UP_POINTS else point.rstrip("0123456789 ")
    assert (reason, count) == (f"{kind}: Fault", 1)
    assert [event.detail for event in rig.store.events if event.kind is EventKind.FAILED] == [f"{reason}: {point}"]

    rig.world.now += 0.9
    rig.settle()
    assert rig.store.counters.failures[reason] == 1, "not before its time"
    rig.world.now += 0.2
    assert rig.capturer.pending
    rig.settle()
    assert rig.store.counters.failures[reason] == 2
    rig.world.faults.clear()
    rig.world.now += 2.1
    rig.settle()
    assert rig.store.ready_keys == (prompt(5),)
    if "make" in point:
        rig.world.captures = [capture for capture in rig.world.captures if capture.state != "new"]
    rig.close()


@pytest.mark.parametrize("point", CAPTURE_POINTS)
def test_a_fault_concerns_its_own_key_alone(point: str) -> None:
    rig = Rig(World(faults={point}))
    rig.store.precapture([prompt(1), prompt(2)])
    while not rig.store.counters.failures:
        assert rig.capturer.advance(idle=True) or rig.helper.step()
    rig.world.faults.clear()
    rig.settle()
    assert len(rig.store.ready_keys) == 1
    rig.world.now += 2
    rig.settle()
    assert set(rig.store.ready_keys) == {prompt(1), prompt(2)}
    rig.close()


@pytest.mark.parametrize("point", [p for p in CAPTURE_POINTS if p != "instantiate"] + list(WARM_UP_POINTS))
def test_an_interrupt_from_outside_passes_through_and_leaves_nothing(point: str) -> None:
    cold = {prompt(5)} if point in WARM_UP_POINTS else set()
    rig = Rig(World(faults={point}, cold=cold, error=KeyboardInterrupt))
    rig.store.want(prompt(5))
    with pytest.raises(KeyboardInterrupt):
        rig.settle()
    assert rig.world.open is None and rig.store.budget.graphs == 0
    rig.world.faults.clear()
    rig.world.now += 2
    rig.settle()
    assert rig.store.ready_keys == (prompt(5),)
    rig.close()


def test_a_graph_that_cannot_be_destroyed_is_counted_and_not_tried_again() -> None:
    rig = Rig(World(faults={"destroy"}), max_graphs=1)
    rig.store.want(prompt(1))
    rig.settle()
    for _ in range(3):
        rig.store.want(prompt(2))
    rig.settle()
    assert rig.store.ready_keys == (prompt(2),)
    assert rig.store.counters.failures == {"destroy: Fault": 1} and rig.store.counters.destroyed == 1
    rig.close()
    assert rig.store.counters.failures == {"destroy: Fault": 2}


def test_without_a_helper_thread_captures_wait_and_graphs_are_still_destroyed() -> None:
    rig = Rig(max_graphs=1)
    rig.store.want(prompt(1))
    rig.settle()
    rig.helper.refuses = True
    for _ in range(3):
        rig.store.want(prompt(2))
    rig.settle()
    assert rig.world.graphs[0].destroyed == 1, "at once, by the engine's thread"
    assert rig.store.counters.failures == {"end: RuntimeError": 1} and rig.store.budget.graphs == 0
    rig.helper.refuses = False
    rig.world.now += 2
    rig.settle()
    assert rig.store.ready_keys == (prompt(2),)
    rig.close()


def test_a_fault_in_asking_for_warmth_does_not_reach_the_engine() -> None:
    rig = Rig()

    def is_warm(key: GraphKey) -> bool:
        raise Fault(str(key))

    rig.capturer = ShadowCapturer(rig.store, rig.world.make, is_warm, rig.world.warm_up, rig.world.clock, rig.helper)
    rig.store.want(prompt(1))
    assert not rig.capturer.advance()
    assert rig.store.counters.failures == {"begin: Fault": 1} and rig.store.budget.graphs == 0
    rig.close()


# ---------------------------------------------------------------------------------------------------------------- close


@pytest.mark.parametrize("pieces", range(20))
def test_closing_at_any_moment_leaves_nothing(pieces: int) -> None:
    """After any number of pieces of a run that warms up, captures, evicts and destroys; helper jobs done or not."""
    for helped in (False, True):
        rig = Rig(World(cold={prompt(1)}), max_graphs=1)
        rig.store.want(prompt(1))
        for turn in range(pieces):
            done = rig.capturer.advance(idle=True)
            if helped or not done:
                rig.helper.step()
            if rig.store.ready_keys == (prompt(1),) and turn:
                for _ in range(3):
                    rig.store.want(prompt(2))
        rig.close()
        rig.close()


def test_closing_waits_for_the_real_thread() -> None:
    """Graphs that are being instantiated when ``close`` comes are taken over and destroyed."""
    rig = Rig()
    release = threading.Event()
    helper = HelperThread()
    helper.submit(release.wait)
    rig.capturer = ShadowCapturer(
        rig.store, rig.world.make, rig.world.is_warm, rig.world.warm_up, rig.world.clock, helper
    )
    rig.store.want(prompt(1))
    while rig.capturer.advance(idle=True):
        pass
    assert rig.world.visited[-1] == "end" and rig.world.graphs == []
    threading.Timer(0.05, release.set).start()
    rig.close()
    assert len(rig.world.graphs) == 1


# --------------------------------------------------------------------------------------------------------------- helper


def test_the_helper_thread_works_in_order_and_hands_errors_back() -> None:
    names_before = {thread.name for thread in threading.enumerate()}
    helper = HelperThread("test-graphs")
    assert {thread.name for thread in threading.enumerate()} == names_before, "no thread before the first job"
    order: list[int] = []

    def fail() -> None:
        raise SystemExit(3)

    first = helper.submit(lambda: order.append(1) or threading.current_thread())
    failing = helper.submit(fail)
    second = helper.submit(lambda: order.append(2))
    thread = first.result(timeout=30)
    assert thread.name == "test-graphs" and thread.daemon and thread is not threading.current_thread()
    assert isinstance(failing.exception(timeout=30), SystemExit) and second.result(timeout=30) is None
    assert order == [1, 2]
    last = helper.submit(lambda: 7)
    helper.close()
    helper.close()
    assert last.result(timeout=0) == 7 and not thread.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        helper.submit(lambda: 1)


# ------------------------------------------------------------------------------------------------------------- emulated


def test_an_emulated_capture_runs_nothing_and_its_graph_runs_the_work() -> None:
    cell = torch.zeros(1)
    sizes: list[CapturedGraph] = []

    def bytes_of(graph: CapturedGraph) -> int:
        sizes.append(graph)
        return 123

    def stages() -> Iterator[None]:
        raise AssertionError("the emulation has nothing to record")
        yield

    def work() -> None:
        cell.add_(1)

    maker = Capturer(torch.device("cpu"), bytes_of)
    capture = maker.shadow(work, stages)
    capture.begin()
    turns = next(turn for turn in itertools.count(1) if capture.advance())
    assert turns > 1, "in pieces"
    capture.end()
    graph = capture.instantiate()
    assert cell.item() == 0 and graph.emulated and graph.raw is None
    assert graph.nbytes == 123 and sizes == [graph]
    graph.replay()
    graph.replay()
    assert cell.item() == 2
    graph.destroy()
    with pytest.raises(AssertionError, match="destroyed"):
        graph.replay()


def test_blocking_captures_and_callables() -> None:
    cell = torch.zeros(1)
    maker = Capturer(torch.device("cpu"))

    def add() -> None:
        cell.add_(1)

    for graph in (maker.capture(add), capture_callable(add, torch.device("cpu"))):
        before = cell.item()
        graph.replay()
        assert cell.item() == before + 1 and graph.nbytes == 0
    assert maker.captures == 1


# --------------------------------------------------------------------------------------------------------- random lives

SIZES = st.integers(1, 7)
POINTS = st.sampled_from(CAPTURE_POINTS + WARM_UP_POINTS + ("destroy",))


class Life(RuleBasedStateMachine):
    """An engine that serves, waits and idles in any order, on a device that fails at any point."""

    @initialize(graphs=st.integers(1, 4), cold=st.sets(SIZES, max_size=4), listed=st.lists(SIZES, max_size=4))
    def build(self, graphs: int, cold: set[int], listed: list[int]) -> None:
        self.rig = Rig(
            World(cold={prompt(size) for size in cold}, cost={"stage": 1e-4, "begin": 2e-4}), max_graphs=graphs
        )
        self.world, self.store, self.capturer = self.rig.world, self.rig.store, self.rig.capturer
        self.dispatcher = Dispatcher(True, self.store)
        self.store.precapture([prompt(size) for size in dict.fromkeys(listed)])
        self.flights: list[tuple[int, FakeGraph | None]] = []
        self.ticket = 0

    @rule(size=SIZES)
    def request(self, size: int) -> None:
        """Launches a step. Nothing of the capturer's may make it wait or fail."""
        self.capturer.interrupt()
        decision = self.dispatcher.decide(prompt(size))
        graph = self.store.lookup(decision.key)
        assert (graph is None) == (decision.path is Path.EAGER)
        self.ticket += 1
        self.world.running = True
        if isinstance(graph, FakeGraph):
            graph.replay()
            graph.running = True
            self.store.use(decision.key, self.ticket)
        self.flights.append((self.ticket, graph if isinstance(graph, FakeGraph) else None))

    @precondition(lambda self: self.flights)
    @rule()
    def complete(self) -> None:
        ticket, graph = self.flights.pop(0)
        if graph is not None:
            graph.running = any(other is graph for _, other in self.flights)
        self.store.completed(ticket)
        self.world.running = bool(self.flights)

    @rule(slack=st.one_of(st.none(), st.floats(0, 3e-3)))
    def wait_for_a_token(self, slack: float | None) -> None:
        self.capturer.advance(None if slack is None else self.world.now + slack)

    @precondition(lambda self: not self.flights)
    @rule(pieces=st.integers(1, 6))
    def idle(self, pieces: int) -> None:
        for _ in range(pieces):
            self.capturer.advance(idle=True)

    @rule()
    def help(self) -> None:
        self.rig.helper.step()

    @rule()
    def abandon(self) -> None:
        self.capturer.abandon()
        assert self.world.open is None

    @rule(faults=st.sets(POINTS, max_size=2))
    def break_or_mend(self, faults: set[str]) -> None:
        self.world.faults = faults

    @rule(seconds=st.sampled_from([0.1, 1.0, 10.0]))
    def pass_time(self, seconds: float) -> None:
        self.world.now += seconds

    @invariant()
    def nothing_leaks(self) -> None:
        if not hasattr(self, "rig"):
            return
        budget = self.store.budget
        assert budget.graphs <= budget.max_graphs
        assert sum(not graph.destroyed for graph in self.world.graphs) <= budget.graphs
        opened = [capture for capture in self.world.captures if capture.state == "open"]
        assert opened == ([] if self.world.open is None else [self.world.open]) and len(opened) <= 1
        for key in self.store.ready_keys:
            graph = self.store.lookup(key)
            assert isinstance(graph, FakeGraph) and not graph.destroyed

    def teardown(self) -> None:
        if not hasattr(self, "rig"):
            return
        while self.flights:
            self.complete()
        self.world.faults.clear()
        self.check_nothing_stalls()
        self.rig.close()
        counts = Counter(event.kind for event in self.store.events)
        assert counts[EventKind.DESTROYED] == len(self.world.graphs) == self.store.counters.captures

    def check_nothing_stalls(self) -> None:
        """Given time and no faults, whatever can have a graph gets it."""
        for _ in range(3):
            self.world.now += 1000.0
            self.rig.settle()
        assert not self.capturer.pending
        wanted = [size for size in range(1, 8) if self.store.state(prompt(size)) is not State.MISSING]
        ready = self.store.ready_keys
        assert len(ready) == min(len(wanted), self.store.budget.max_graphs)
        heat_of_ready = min((self.store.demand(key) for key in ready), default=0.0)
        waiting = [prompt(size) for size in wanted if prompt(size) not in ready]
        if not self.store.thrash.over and ready and waiting:
            assert max(map(self.store.demand, waiting)) <= max(map(self.store.demand, ready)) + heat_of_ready


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
