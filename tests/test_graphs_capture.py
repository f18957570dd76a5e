"""The order of calls that the CUDA capture makes, on a fake ``torch.cuda``. ``test_gpu_capture`` has the real one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from jitgraph.graphs.capture import Capturer, GraphPool
from jitgraph.graphs.captured import ShadowCapture

STAGES = 3


class CaptureError(RuntimeError):
    """What torch raises."""


@dataclass
class FakeCuda:
    """The few calls, and what they leave open. ``old``: a torch that does not tidy up after a failing end."""

    old: bool = False
    fails: set[str] = field(default_factory=set)
    current: list[str] = field(default_factory=lambda: ["default"])
    open: FakeGraph | None = None
    routed: set[int] = field(default_factory=set)
    users: dict[int, int] = field(default_factory=dict)
    graphs: list[FakeGraph] = field(default_factory=list)
    recorded: list[str] = field(default_factory=list)
    pools: int = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        @contextlib.contextmanager
        def stream(stream: FakeStream) -> Iterator[None]:
            self.current.append(stream.name)
            try:
                yield
            finally:
                self.current.pop()

        def pool_handle() -> int:
            self.pools += 1
            return self.pools

        def end_allocate(device: int, pool: int) -> None:
            if pool not in self.routed:
                raise CaptureError("not currently recording")
            self.routed.discard(pool)

        monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream("side"))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda keep_graph: FakeGraph(self, keep_graph))
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", pool_handle)
        monkeypatch.setattr(torch, "zeros", lambda *shape, **_: torch.ones(*shape))
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_allocate, raising=False)

    def at(self, point: str) -> None:
        if point in self.fails:
            raise CaptureError(point)


@dataclass
class FakeStream:
    name: str
    device: str = "cpu"
    device_index: int = 0


class FakeGraph:
    """``torch.cuda.CUDAGraph`` with the allocator's rules: a pool must not be routed twice, and dies with its last
    user."""

    def __init__(self, cuda: FakeCuda, keep_graph: bool) -> None:
        assert keep_graph
        self.cuda, self.pool, self.state, self.resets = cuda, None, "new", 0
        cuda.graphs.append(self)

    def capture_begin(self, pool: int, capture_error_mode: str) -> None:
        cuda = self.cuda
        assert capture_error_mode == "relaxed" and cuda.current[-1] == "side" and cuda.open is None
        if cuda.users.get(pool) == 0:
            raise CaptureError("use_count > 0")
        if pool in cuda.routed:
            raise CaptureError("already recording")
        cuda.users[pool] = cuda.users.get(pool, 0) + 1
        cuda.routed.add(pool)
        self.pool = pool
        cuda.at("begin")
        cuda.open = self
        self.state = "open"

    def capture_end(self) -> None:
        cuda = self.cuda
        assert cuda.current[-1] == "side"
        failed = cuda.open is not self or "end" in cuda.fails
        cuda.open = None
        if failed and cuda.old:
            raise CaptureError("end")
        if self.pool not in cuda.routed:
            raise CaptureError("not currently recording")
        cuda.routed.discard(self.pool)
        if failed:
            raise CaptureError("end")
        self.state = "ended"

    def instantiate(self) -> None:
        assert self.state == "ended"
        self.cuda.at("instantiate")

    def raw_cuda_graph(self) -> int:
        assert self.state == "ended"
        return 4711

    def replay(self) -> None:
        assert self.state == "ended"

    def reset(self) -> None:
        self.resets += 1
        if self.state == "ended":
            self.cuda.users[self.pool] -= 1
        self.state = "reset"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


class Recorder:
    """Stages that note what stream they were recorded on."""

    def __init__(self, cuda: FakeCuda, fails_at: int | None = None) -> None:
        self.cuda, self.fails_at, self.closed = cuda, fails_at, False

    def stages(self) -> Iterator[None]:
        try:
            for stage in range(STAGES):
                if stage == self.fails_at:
                    raise ValueError(f"stage {stage}")
                self.cuda.recorded.append(self.cuda.current[-1])
                yield
        finally:
            self.closed = True

    def run(self) -> None:
        for _ in self.stages():
            pass


def maker_on(cuda: FakeCuda) -> Capturer:
    maker = Capturer(torch.device("cuda", 0), lambda graph: 99)
    cuda.graphs.clear()  # the anchor is not the tests' business
    return maker


def whole(capture: ShadowCapture) -> Any:
    capture.begin()
    while not capture.advance():
        pass
    capture.end()
    return capture.instantiate()


def test_the_pieces_of_a_capture(cuda: FakeCuda) -> None:
    maker, recorder = maker_on(cuda), Recorder(cuda)
    capture = maker.shadow(recorder.run, recorder.stages)
    assert cuda.recorded == [], "nothing runs before it begins"
    capture.begin()
    assert cuda.open is cuda.graphs[0] and cuda.current == ["default"], "the caller's stream stays current"
    assert [capture.advance() for _ in range(STAGES + 1)] == [False] * STAGES + [True]
    assert cuda.recorded == ["side"] * STAGES
    capture.end()
    assert cuda.open is None and cuda.routed == set()
    graph = capture.instantiate()
    assert (graph.raw, graph.nbytes, graph.emulated) == (4711, 99, False)
    capture.abort()
    assert cuda.graphs[0].resets == 0, "the graph is no longer the capture's"
    graph.replay()
    graph.destroy()
    assert cuda.graphs[0].resets == 1


def test_the_pool_outlives_its_graphs(cuda: FakeCuda) -> None:
    maker = maker_on(cuda)
    for _ in range(3):
        recorder = Recorder(cuda)
        whole(maker.shadow(recorder.run, recorder.stages)).destroy()
    assert maker.capture(Recorder(cuda).run).raw == 4711
    assert cuda.pools == 1 and cuda.users == {1: 2} and maker.captures == 1


@pytest.mark.parametrize("stages", range(STAGES + 2))
@pytest.mark.parametrize("ended", [False, True])
def test_an_abort_closes_and_frees(cuda: FakeCuda, stages: int, ended: bool) -> None:
    maker, recorder = maker_on(cuda), Recorder(cuda)
    capture = maker.shadow(recorder.run, recorder.stages)
    capture.begin()
    for _ in range(stages):
        capture.advance()
    if ended:
        capture.end()
    capture.abort()
    capture.abort()
    assert cuda.open is None and cuda.routed == set() and cuda.users == {1: 1} and cuda.current == ["default"]
    assert cuda.graphs[0].resets == 1 and recorder.closed == (stages > 0)
    assert whole(maker.shadow(recorder.run, recorder.stages)).raw == 4711 and cuda.pools == 1


def test_an_abort_before_the_beginning_does_nothing(cuda: FakeCuda) -> None:
    recorder = Recorder(cuda)
    maker_on(cuda).shadow(recorder.run, recorder.stages).abort()
    assert cuda.graphs[0].resets == 0 and cuda.open is None


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("point", ["begin", "stage", "end", "instantiate"])
def test_whatever_fails_later_captures_work(cuda: FakeCuda, old: bool, point: str) -> None:
    """Where an old torch leaves its allocators routing, the pool is given up and the graph kept alive."""
    cuda.old = old
    maker = maker_on(cuda)
    recorder = Recorder(cuda, fails_at=1 if point == "stage" else None)
    cuda.fails = {point}
    capture = maker.shadow(recorder.run, recorder.stages)
    with pytest.raises((CaptureError, ValueError)):
        whole(capture)
    cuda.fails = set()
    capture.abort()
    assert cuda.open is None and cuda.routed == set()
    good = Recorder(cuda)
    graphs = [whole(maker.shadow(good.run, good.stages)) for _ in range(2)]
    for graph in graphs:
        graph.destroy()
    assert whole(maker.shadow(good.run, good.stages)).raw == 4711
    given_up = old and point in ("begin", "end")
    assert cuda.pools == 1 + given_up
    pool = maker._pool
    assert isinstance(pool, GraphPool) and (cuda.graphs[0] in pool._kept) == given_up
    assert cuda.current == ["default"]


def test_a_blocking_capture_that_fails_is_aborted(cuda: FakeCuda) -> None:
    maker = maker_on(cuda)
    with pytest.raises(ValueError, match="stage 1"):
        maker.capture(Recorder(cuda, fails_at=1).run)
    assert cuda.open is None and cuda.routed == set() and maker.captures == 0
    assert maker.capture(Recorder(cuda).run).raw == 4711


def test_an_abort_never_raises(cuda: FakeCuda) -> None:
    """Not even if nothing works any more, or the stages raise on their way out."""
    cuda.old = True
    maker = maker_on(cuda)

    def stages() -> Iterator[None]:
        try:
            yield
        finally:
            raise ValueError("on the way out")

    capture = maker.shadow(lambda: None, stages)
    capture.begin()
    capture.advance()
    cuda.fails = {"end", "begin"}
    capture.abort()
    assert cuda.open is None
    recorder = Recorder(cuda)
    for _ in range(3):
        hopeless = maker.shadow(recorder.run, recorder.stages)
        with pytest.raises(CaptureError):
            hopeless.begin()
        hopeless.abort()
    cuda.fails = set()
    for _ in range(3):
        whole(maker.shadow(recorder.run, recorder.stages)).destroy()
