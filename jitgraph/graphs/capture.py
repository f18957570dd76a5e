"""Captures launches and replays them: the only file that uses ``CUDAGraph``.

A capture is made in pieces (``ShadowCapture``), so that it can be advanced in the shadow of a busy GPU. It records on a
stream of its own, which never executes anything: a step there would write the shared arena beside a running one. What
is captured has run before on the engine's own stream, so that no module is loaded and no library settles on the way.
All but ``instantiate`` and ``destroy`` belong to the engine's thread; these two may run on another and release the GIL.

While a capture is open, nothing may synchronise or empty caches device-wide (``torch.cuda.synchronize()``,
``torch.cuda.empty_cache()``): CUDA refuses it and the capture is lost. Streams and events may be waited for.

On the CPU graphs are emulated (``captured``).
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from jitgraph.graphs.captured import BytesOf, EmulatedCapture, EmulatedGraph, Progress, ShadowCapture
from jitgraph.graphs.captured import CapturedGraph as CapturedGraph  # what everything here makes
from jitgraph.jit.driver import graph_launcher, upload_graph

_EXHAUSTED = object()


class CudaGraph:
    """A CUDA graph, instantiated. The graph it was instantiated from is kept: loops embed it, and torch offers no way
    to drop it alone."""

    emulated = False

    def __init__(self, graph: torch.cuda.CUDAGraph, device: torch.device) -> None:
        self._graph = graph
        self._device = device
        self._launch: Callable[[], None] = graph.replay
        self.nbytes = 0

    def bind(self, queue: torch.cuda.Stream, uploads: torch.cuda.Stream) -> None:
        """Replays go to ``queue`` from now on, whatever stream is current. The graph is uploaded on ``uploads``, which
        nothing else uses."""
        handle = getattr(self._graph, "raw_cuda_graph_exec", None)
        launcher = None
        if handle is not None:
            launcher = graph_launcher(handle(), queue.cuda_stream, queue.device_index)
            upload_graph(handle(), uploads.cuda_stream, queue.device_index)
        self._launch = launcher or partial(_replay_on, queue, self._graph)

    @property
    def raw(self) -> int:
        """The ``CUgraph`` handle; it lives until ``destroy``."""
        return int(self._graph.raw_cuda_graph())

    def replay(self) -> None:
        """Launches the graph, on the stream it is bound to or else on the current one."""
        self._launch()

    def destroy(self) -> None:
        """Frees the graph and its claim on the pool; what it holds there is for the others to use."""
        with torch.cuda.device(self._device):
            self._graph.reset()


def _replay_on(queue: torch.cuda.Stream, graph: torch.cuda.CUDAGraph) -> None:
    with torch.cuda.stream(queue):
        graph.replay()


class GraphPool:
    """Where captures on one stream allocate what libraries want while they are recorded.

    All graphs share it, because one runs at a time. The allocator refuses a pool that has lost its last graph, so an
    *anchor*, a graph of one node that is never replayed, keeps it in use.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        with torch.inference_mode():
            self._word = torch.zeros(1, dtype=torch.int32, device=stream.device)
        self._handle: Any = None
        self._kept: list[torch.cuda.CUDAGraph] = []  # anchors, and graphs whose capture could not be ended
        self.handle()

    def handle(self) -> Any:
        """What ``capture_begin`` takes; made anew where the last one was given up."""
        if self._handle is None:
            handle = torch.cuda.graph_pool_handle()
            anchor = torch.cuda.CUDAGraph(keep_graph=True)
            self._kept.append(anchor)
            with torch.inference_mode(), torch.cuda.stream(self._stream):
                anchor.capture_begin(pool=handle, capture_error_mode="relaxed")
                try:
                    self._word.zero_()
                finally:
                    anchor.capture_end()
            self._handle = handle
        return self._handle

    def mend(self, graph: torch.cuda.CUDAGraph) -> None:
        """After ``capture_end`` has raised: makes sure that later captures work.

        Older versions of torch (2.11 is one) then leave the allocators routing that capture to the pool: they refuse to
        begin another one with it, and keep a pointer to the graph. Only the device's allocator can be told from here,
        so the pool is given up for a new one, and the graph is kept alive.
        """
        if self._handle is None:
            return  # it was not even begun
        with contextlib.suppress(AttributeError, RuntimeError):  # raises where nothing was left open
            torch._C._cuda_endAllocateToPool(self._stream.device_index, self._handle)
            self._kept.append(graph)
            self._handle = None


class CudaCapture:
    """A capture of what ``stages`` launches, on ``stream``, into ``pool`` (None: a pool of its own)."""

    def __init__(
        self,
        stages: Callable[[], Iterator[None]],
        stream: torch.cuda.Stream,
        pool: GraphPool | None,
        bytes_of: BytesOf | None = None,
        mode: str = "relaxed",
        queue: torch.cuda.Stream | None = None,
        uploads: torch.cuda.Stream | None = None,
    ) -> None:
        self._stages = stages()
        self._stream = stream
        self._pool = pool
        self._bytes_of = bytes_of
        self._mode = mode
        self._queue = queue
        self._uploads = uploads
        self._graph = torch.cuda.CUDAGraph(keep_graph=True)
        self._progress = Progress.NEW

    def begin(self) -> None:
        """Opens the capture. In relaxed mode the thread may go on using its other streams as before."""
        assert self._progress is Progress.NEW
        self._progress = Progress.OPEN  # before the call: if it fails half-way, that half is to be taken back
        with torch.cuda.stream(self._stream):
            self._graph.capture_begin(
                pool=None if self._pool is None else self._pool.handle(), capture_error_mode=self._mode
            )

    def advance(self) -> bool:
        """Records up to the next ``yield`` of the stages; True where they have returned."""
        assert self._progress is Progress.OPEN
        with torch.cuda.stream(self._stream):
            return next(self._stages, _EXHAUSTED) is _EXHAUSTED

    def end(self) -> None:
        """Closes the capture; with ``keep_graph`` nothing is instantiated yet."""
        assert self._progress is Progress.OPEN
        with torch.cuda.stream(self._stream):
            self._graph.capture_end()
        self._progress = Progress.ENDED

    def instantiate(self) -> CudaGraph:
        """Makes the graph ready to replay: more than a millisecond, during which other threads run."""
        assert self._progress is Progress.ENDED
        graph = CudaGraph(self._graph, self._stream.device)
        with torch.cuda.device(self._stream.device):
            self._graph.instantiate()
            if self._queue is not None and self._uploads is not None:
                graph.bind(self._queue, self._uploads)
            graph.nbytes = 0 if self._bytes_of is None else self._bytes_of(graph)
        self._progress = Progress.OVER
        return graph

    def abort(self) -> None:
        """Ends an open capture, so that the stream is free again, and frees what was recorded."""
        stage, self._progress = self._progress, Progress.OVER
        if stage is Progress.OPEN:
            self._close()
        if stage in (Progress.OPEN, Progress.ENDED):
            with contextlib.suppress(RuntimeError), torch.cuda.device(self._stream.device):
                self._graph.reset()
        with contextlib.suppress(Exception):
            getattr(self._stages, "close", lambda: None)()

    def _close(self) -> None:
        with torch.cuda.stream(self._stream), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of a graph without nodes
            try:
                self._graph.capture_end()
            except RuntimeError:
                if self._pool is not None:
                    self._pool.mend(self._graph)


# ----------------------------------------------------------------------------------------------------------- front door


class Capturer:
    """Makes graphs for one device, all in one pool.

    ``queue`` is the stream that replays go to; None leaves them to the stream that is current then.
    ``bytes_of`` tells how much device memory a new graph holds; it is called right after instantiation, on the same
    thread.
    """

    def __init__(
        self, device: torch.device, bytes_of: BytesOf | None = None, queue: torch.cuda.Stream | None = None
    ) -> None:
        self._bytes_of = bytes_of
        self._queue = queue
        self._threads: set[int] = set()
        self._uploads = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = None if self._stream is None else GraphPool(self._stream)
        self.captures = 0
        """Blocking captures made."""

    @property
    def thread_is_prepared(self) -> bool:
        """Whether ``prepare_thread`` has been called on this thread."""
        return threading.get_ident() in self._threads

    def prepare_thread(self, dtype: torch.dtype) -> None:
        """Runs a small product on the capturing stream and on the queue, once for each thread that captures: cuBLAS
        keeps handles and workspaces by thread and stream, and to make them inside a capture would allocate, beside a
        device-side loop block."""
        if self.thread_is_prepared:
            return
        self._threads.add(threading.get_ident())
        for stream in (self._stream, self._queue):
            if stream is not None:
                with torch.inference_mode(), torch.cuda.stream(stream):
                    one = torch.ones(16, 16, dtype=dtype, device=stream.device)
                    torch.mm(one, one)
                stream.synchronize()

    def capture(self, work: Callable[[], None]) -> CapturedGraph:
        """A graph of ``work``, now; for before ready, largest first, so that the pool grows once.

        ``work`` must have run once on the engine's stream and must only launch, never wait or read back.
        """
        graph = _at_once(self.shadow(work, lambda: _one_stage(work)))
        self.captures += 1
        return graph

    def reserve(self, work: Callable[[], None], count: int) -> None:
        """Makes ``count`` graphs of ``work`` and destroys them again. The driver keeps their memory for later graphs,
        whose instantiation then need not ask for more: that would wait for a running device-side loop."""
        graphs = [self.capture(work) for _ in range(count)]
        for graph in graphs:
            graph.destroy()

    def shadow(self, work: Callable[[], None], stages: Callable[[], Iterator[None]]) -> ShadowCapture:
        """A graph of ``work`` in pieces: ``stages`` launches the same, one piece for each ``next``.

        A stage keeps to the stream that is current when it is resumed. On the CPU the stages are never run.
        """
        if self._stream is None:
            return EmulatedCapture(work, self._bytes_of)
        return CudaCapture(stages, self._stream, self._pool, self._bytes_of, queue=self._queue, uploads=self._uploads)


def capture_callable(work: Callable[[], None], device: torch.device) -> CapturedGraph:
    """A graph of any callable, captured on a stream of its own after one run there (for measurements)."""
    if device.type != "cuda":
        return EmulatedGraph(work)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        work()
    stream.synchronize()
    return _at_once(CudaCapture(lambda: _one_stage(work), stream, None, mode="thread_local"))


def _one_stage(work: Callable[[], None]) -> Iterator[None]:
    work()
    yield


def _at_once(capture: ShadowCapture) -> CapturedGraph:
    """All pieces of a capture, one after the other."""
    try:
        capture.begin()
        while not capture.advance():
            pass
        capture.end()
        return capture.instantiate()
    except BaseException:
        capture.abort()
        raise
