"""Captures a callable and replays it: the only file that uses ``CUDAGraph``.

On CUDA a capture runs on the engine's own thread. It drives ``capture_begin`` and ``capture_end`` itself, because
``torch.cuda.graph`` synchronises the device and empties the allocator's cache on entry. On the CPU the emulated graph
re-runs the callable on its static buffers: same interface, same store, no claim about speed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Protocol

import torch


class CapturedGraph(Protocol):
    """Something that repeats exactly the work it was captured from. It decides nothing."""

    emulated: bool

    def replay(self) -> None:
        """Enqueues the work on the current stream; takes no arguments, returns before it is done."""


class EmulatedGraph:
    """Re-runs a callable: the CPU's stand-in for a CUDA graph, labelled as such wherever a number shows."""

    emulated = True

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work

    def replay(self) -> None:
        """Runs the callable now."""
        self._work()


class CudaGraph:
    """A CUDA graph of a callable's launches on one stream."""

    emulated = False

    def __init__(self, work: Callable[[], None], stream: torch.cuda.Stream, pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # the capture is lost; what broke it is the better message
                    self._graph.capture_end()
                raise
            self._graph.capture_end()

    def replay(self) -> None:
        """Launches the graph on the current stream."""
        self._graph.replay()


class Capturer:
    """Makes graphs for one device. ``stream`` is the engine's own, on which every kernel has run before its capture."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self._device = device
        self._stream = stream
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.captures = 0

    def capture(self, work: Callable[[], None]) -> CapturedGraph:
        """A graph of ``work``, which must have run once on the stream and must only launch, never wait or read back."""
        self.captures += 1
        if self._stream is None:
            return EmulatedGraph(work)
        return CudaGraph(work, self._stream, self._pool)


def capture_callable(work: Callable[[], None], device: torch.device) -> CapturedGraph:
    """A graph of any callable, captured on a stream of its own after one run there (for measurements)."""
    if device.type != "cuda":
        return EmulatedGraph(work)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        work()
    stream.synchronize()
    return CudaGraph(work, stream, None)
