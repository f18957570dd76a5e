"""The CUDA side of the shadow capture: pieces beside running graphs, aborts at every point, memory that stays put.

Nothing here waits for the whole device while a capture is open: CUDA refuses that, and the capture would be lost.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from jitgraph.graphs.capture import Capturer
from jitgraph.graphs.captured import CapturedGraph, ShadowCapture
from jitgraph.graphs.capturer import ShadowCapturer
from jitgraph.graphs.helper import HelperThread
from jitgraph.graphs.key import GraphKey, Path, Phase, Sampling
from jitgraph.graphs.store import Store

pytestmark = pytest.mark.gpu

LAYERS = 4
WIDTH = 512
LARGEST = 256
"""Tokens; what a layer allocates at this size comes from the same kind of segment as at all smaller ones."""
PATIENCE_S = 60.0


class Chain:
    """A stand-in for a step: products into static buffers, and one temporary a layer out of the allocator."""

    def __init__(self, device: torch.device, tokens: int) -> None:
        generator = torch.Generator().manual_seed(tokens)
        self.x = torch.randn(tokens, WIDTH, generator=generator).to(device, torch.float16)
        weights = torch.randn(LAYERS, WIDTH, WIDTH, generator=generator) * WIDTH**-0.5
        self.weights = weights.to(device, torch.float16)
        self.hidden = torch.empty(LAYERS, tokens, WIDTH, device=device, dtype=torch.float16)

    def stages(self) -> Iterator[None]:
        """A layer for each ``next``."""
        current = self.x
        for weight, out in zip(self.weights, self.hidden, strict=True):
            torch.mm(current, weight, out=out)
            out.add_(torch.tanh(current))
            current = out
            yield

    def run(self) -> None:
        for _ in self.stages():
            pass


class Bench:
    """An engine's stream, a maker of graphs, and chains that have run once on that stream."""

    def __init__(self, device: torch.device, sizes: tuple[int, ...] = (LARGEST, 48, 17)) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.chains = {tokens: Chain(device, tokens) for tokens in sizes}
        self.stream.wait_stream(torch.cuda.current_stream(device))
        self.expected: dict[int, torch.Tensor] = {}
        for tokens, chain in self.chains.items():
            self.poison(chain)
            with torch.cuda.stream(self.stream):
                chain.run()
                self.expected[tokens] = chain.hidden.clone()
        self.stream.synchronize()
        self.maker = Capturer(device, lambda graph: 4096)
        side = self.maker._stream
        assert side is not None
        self.side = side
        self.largest = self.maker.capture(self.chains[LARGEST].run)  # the pool's and the libraries' share
        self.replay(self.largest)
        self.check(LARGEST)

    def shadow(self, tokens: int) -> ShadowCapture:
        chain = self.chains[tokens]
        return self.maker.shadow(chain.run, chain.stages)

    def poison(self, chain: Chain) -> None:
        with torch.cuda.stream(self.stream):
            chain.hidden.fill_(float("nan"))

    def replay(self, graph: CapturedGraph) -> None:
        with torch.cuda.stream(self.stream):
            graph.replay()

    def check(self, tokens: int) -> None:
        """The chain's buffers hold what its eager run gave, bit for bit."""
        with torch.cuda.stream(self.stream):
            found, wanted = self.chains[tokens].hidden, self.expected[tokens]
            assert torch.equal(found.view(torch.int16), wanted.view(torch.int16)), f"{tokens} tokens: bits differ"

    def check_graph(self, tokens: int, graph: CapturedGraph) -> None:
        self.poison(self.chains[tokens])
        self.replay(graph)
        self.check(tokens)

    def finish(self, capture: ShadowCapture) -> CapturedGraph:
        """What is left of an open capture, at once."""
        while not capture.advance():
            pass
        capture.end()
        return capture.instantiate()

    def capturing(self) -> bool:
        """Whether a capture is open on the side stream."""
        with torch.cuda.stream(self.side):
            return bool(torch.cuda.is_current_stream_capturing())

    def reserved(self) -> int:
        return int(torch.cuda.memory_reserved(self.device))


@pytest.fixture
def bench(device: torch.device) -> Iterator[Bench]:
    made = Bench(device)
    yield made
    assert not made.capturing(), "a capture was left open"
    made.stream.synchronize()
    made.largest.destroy()


# ----------------------------------------------------------------------------------------------------------- in pieces


def test_a_capture_advances_while_another_graph_runs(bench: Bench) -> None:
    """Piece by piece beside replays, instantiated on the helper thread meanwhile: the bits of the eager run; and while
    it is being captured nothing of it is executed."""
    helper = HelperThread()
    chain = bench.chains[48]
    bench.poison(chain)
    capture = bench.shadow(48)
    capture.begin()
    for layer in range(LAYERS + 1):
        bench.replay(bench.largest)
        done = torch.cuda.Event()
        done.record(bench.stream)
        assert capture.advance() == (layer == LAYERS)
        assert bench.capturing()
        with torch.cuda.stream(bench.stream):
            assert not torch.cuda.is_current_stream_capturing(), "the engine's stream is not part of it"
        while not done.query():
            pass
    with torch.cuda.stream(bench.stream):
        assert bool(chain.hidden.isnan().all()), "capturing has executed something"
    bench.check(LARGEST)
    capture.end()
    assert not bench.capturing()
    future = helper.submit(capture.instantiate)
    while not future.done():
        bench.replay(bench.largest)
        bench.stream.synchronize()
    graph = future.result()
    for _ in range(3):
        bench.check_graph(48, graph)
    assert not graph.emulated and graph.nbytes == 4096 and graph.raw
    helper.submit(graph.destroy).result(timeout=PATIENCE_S)
    helper.close()
    with pytest.raises(RuntimeError):
        graph.replay()


def test_several_threads_may_advance_a_capture_in_turn(bench: Bench) -> None:
    """Begun on one thread, continued on another, ended on a third: each has run products before the capture opens, so
    that its library handle exists."""

    def warm_up() -> None:
        with torch.cuda.device(bench.device), torch.cuda.stream(bench.stream):
            bench.chains[17].run()
        bench.stream.synchronize()

    threads = [HelperThread(), HelperThread()]
    for thread in threads:
        thread.submit(warm_up).result(timeout=PATIENCE_S)
    capture = bench.shadow(48)
    capture.begin()
    assert not threads[0].submit(capture.advance).result(timeout=PATIENCE_S)
    assert not capture.advance()
    graph = threads[1].submit(lambda: bench.finish(capture)).result(timeout=PATIENCE_S)
    assert not bench.capturing()
    bench.check_graph(48, graph)
    bench.stream.synchronize()
    graph.destroy()
    for thread in threads:
        thread.close()


def test_graphs_replay_in_any_order_and_share_their_temporaries(bench: Bench) -> None:
    graphs: dict[int, CapturedGraph] = {LARGEST: bench.largest}
    for tokens in (48, 17):
        capture = bench.shadow(tokens)
        capture.begin()
        graphs[tokens] = bench.finish(capture)
    chooser = random.Random(0)
    for _ in range(30):
        tokens = chooser.choice(sorted(graphs))
        bench.check_graph(tokens, graphs[tokens])
    bench.stream.synchronize()
    for tokens in (48, 17):
        graphs[tokens].destroy()


# -------------------------------------------------------------------------------------------------------------- aborts


@pytest.mark.parametrize(
    ("stages", "end"), [(n, False) for n in range(LAYERS + 2)] + [(n, True) for n in range(1, LAYERS + 2)]
)
def test_an_abort_at_any_point_leaves_nothing(bench: Bench, stages: int, end: bool) -> None:
    """After ``stages`` stages, ended or not: the stream is free, no memory is kept, and the next capture is good."""
    reserved = bench.reserved()
    capture = bench.shadow(48)
    capture.begin()
    for _ in range(stages):
        capture.advance()
    if end:
        capture.end()
    capture.abort()
    assert not bench.capturing() and bench.reserved() == reserved
    capture.abort()
    again = bench.shadow(48)
    again.begin()
    graph = bench.finish(again)
    assert bench.reserved() == reserved
    bench.check_graph(48, graph)
    bench.stream.synchronize()
    graph.destroy()


def test_an_abort_before_the_beginning_and_after_the_end_does_nothing(bench: Bench) -> None:
    never = bench.shadow(48)
    never.abort()
    capture = bench.shadow(48)
    capture.begin()
    graph = bench.finish(capture)
    capture.abort()
    bench.check_graph(48, graph)
    bench.stream.synchronize()
    graph.destroy()


def raise_in_stage() -> None:
    raise ValueError("a planted fault")


def invalidate() -> None:
    """Waiting for a stream that is being captured is an error that invalidates the capture."""
    torch.cuda.current_stream().synchronize()


@pytest.mark.parametrize("fault", [raise_in_stage, invalidate])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_stage_that_fails_spoils_no_later_capture(bench: Bench, fault: Callable[[], None], layer: int) -> None:
    def stages() -> Iterator[None]:
        for index, _ in enumerate(bench.chains[48].stages()):
            if index == layer:
                fault()
            yield

    for _ in range(3):
        capture = bench.maker.shadow(bench.chains[48].run, stages)
        capture.begin()
        with pytest.raises((ValueError, RuntimeError)):
            bench.finish(capture)
        capture.abort()
        assert not bench.capturing()
    good = bench.shadow(48)
    good.begin()
    graph = bench.finish(good)
    bench.check_graph(48, graph)
    bench.check_graph(LARGEST, bench.largest)
    with torch.cuda.stream(bench.stream):
        torch.rand(8, device=bench.device)  # the random number generator is not left in the middle of a capture
        torch.empty(8, device="cpu", pin_memory=True)
    bench.stream.synchronize()
    graph.destroy()


def test_a_blocking_capture_that_fails_leaves_the_stream_free(bench: Bench) -> None:
    def work() -> None:
        bench.chains[48].run()
        raise_in_stage()

    reserved = bench.reserved()
    with pytest.raises(ValueError, match="planted"):
        bench.maker.capture(work)
    assert not bench.capturing() and bench.reserved() == reserved
    graph = bench.maker.capture(bench.chains[48].run)
    bench.check_graph(48, graph)
    bench.stream.synchronize()
    graph.destroy()


# -------------------------------------------------------------------------------------------------------------- memory


def test_fifty_captures_and_evictions_leave_memory_as_it_was(bench: Bench) -> None:
    """Each graph is destroyed on the helper thread while the next capture is open; at times none is left at all."""
    helper = HelperThread()
    reserved = bench.reserved()
    bench.stream.synchronize()
    bench.largest.destroy()  # from here on nothing but the anchor keeps the pool in use
    previous: CapturedGraph | None = None
    for cycle in range(50):
        tokens = (48, 17)[cycle % 2]
        capture = bench.shadow(tokens)
        capture.begin()
        capture.advance()
        gone = None if previous is None else helper.submit(previous.destroy)
        while not capture.advance():
            pass
        capture.end()
        graph = helper.submit(capture.instantiate).result(timeout=PATIENCE_S)
        if gone is not None:
            gone.result(timeout=PATIENCE_S)
        bench.replay(graph)
        bench.stream.synchronize()
        assert bench.reserved() == reserved, f"cycle {cycle}"
        previous = graph
        if cycle % 10 == 9:
            previous.destroy()
            previous = None
    assert previous is None
    helper.close()
    bench.largest = bench.maker.capture(bench.chains[LARGEST].run)
    assert bench.reserved() == reserved
    bench.check_graph(LARGEST, bench.largest)


# -------------------------------------------------------------------------------------------------- store and capturer


def prompt(tokens: int) -> GraphKey:
    return GraphKey(Phase.PREFILL, tokens, Sampling.FULL)


class Engine:
    """The least that serves: a step for each request, the capturer in its shadow."""

    def __init__(self, bench: Bench, max_graphs: int, warm: set[int]) -> None:
        self.bench = bench
        self.warm = warm
        self.store: Store[CapturedGraph] = Store(max_graphs)
        self.capturer = ShadowCapturer(
            self.store, lambda key: bench.shadow(key.tokens), lambda key: key.tokens in warm, self.warm_up
        )
        self.ticket = 0

    def warm_up(self, key: GraphKey) -> Iterator[None]:
        stages = self.bench.chains[key.tokens].stages()
        while True:
            with torch.cuda.stream(self.bench.stream):
                if next(stages, self) is self:
                    break
            yield
        self.warm.add(key.tokens)

    def serve(self, tokens: int) -> Path:
        """One step, checked bit for bit; captures advance while it runs."""
        bench, chain = self.bench, self.bench.chains[tokens]
        self.capturer.interrupt()
        bench.poison(chain)
        graph = self.store.lookup(prompt(tokens))
        path = Path.EAGER if graph is None else Path.EXACT
        self.store.served(path)
        self.ticket += 1
        if graph is None:
            self.store.want(prompt(tokens))
            with torch.cuda.stream(bench.stream):
                chain.run()
            self.warm.add(tokens)
        else:
            bench.replay(graph)
            self.store.use(prompt(tokens), self.ticket)
        done = torch.cuda.Event()
        done.record(bench.stream)
        while not done.query():
            self.capturer.advance()
        self.store.completed(self.ticket)
        bench.check(tokens)
        return path

    def rest(self) -> None:
        """Idle until there is nothing left to do."""
        deadline = time.monotonic() + PATIENCE_S
        while self.capturer.pending:
            if not self.capturer.advance(idle=True):
                time.sleep(1e-4)
            assert time.monotonic() < deadline, "it never comes to rest"


def test_serving_while_graphs_come_and_go(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four lengths, room for two: every answer has the eager bits, whatever is captured or evicted meanwhile."""
    monkeypatch.setattr("jitgraph.graphs.demand.HALF_LIFE_REQUESTS", 4)  # what was wanted is soon forgotten
    bench = Bench(device, (LARGEST, 100, 48, 17))
    reserved = bench.reserved()
    engine = Engine(bench, max_graphs=2, warm={LARGEST})
    chooser = random.Random(1)
    paths = []
    for phase in ((LARGEST, 100), (48, 17), (100, 48), (17, LARGEST)):
        for turn in range(40):
            paths.append(engine.serve(chooser.choice(phase)))
            if turn % 8 == 7:
                engine.rest()
    counters = engine.store.counters
    assert not counters.failures, counters.failures
    assert paths.count(Path.EXACT) > paths.count(Path.EAGER) > 0
    assert counters.captures >= 6 and counters.evictions >= 4
    assert engine.store.budget.most_graphs <= 2
    engine.store.want(prompt(100))
    engine.capturer.advance()
    bench.stream.synchronize()
    engine.capturer.close()
    assert not bench.capturing() and engine.store.budget.graphs == 0
    torch.cuda.synchronize(device)
    assert bench.reserved() == reserved
    bench.largest.destroy()


def test_what_never_ran_is_warmed_up_and_then_captured(device: torch.device) -> None:
    bench = Bench(device)
    engine = Engine(bench, max_graphs=3, warm={LARGEST})
    engine.store.precapture([prompt(48), prompt(17)])
    for _ in range(20):
        engine.serve(LARGEST)
    assert prompt(48) not in engine.store.ready_keys, "not beside running steps"
    engine.rest()
    assert {prompt(48), prompt(17)} <= set(engine.store.ready_keys)
    for tokens in (48, 17, LARGEST):
        assert engine.serve(tokens) is Path.EXACT
    bench.stream.synchronize()
    engine.capturer.close()
    assert not bench.capturing()
    bench.largest.destroy()
