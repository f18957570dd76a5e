"""Graphs of the static ops alone, with the dynamic ones launched between them: what the hybrid is measured against.

Engine's thread and stream. A step of n layers replays n + 1 graphs and launches its attention kernels one by one. It
stands where a captured graph stands, so the same dispatcher and store serve it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby

from jitgraph.graphs.captured import CapturedGraph
from jitgraph.model.decoder import Section


class PiecewiseGraph:
    """The sections of one step: neighbouring static ones captured together, dynamic ones run at each replay."""

    raw = None

    def __init__(self, sections: Iterable[Section], capture: Callable[[Callable[[], None]], CapturedGraph]) -> None:
        """Captures the static sections in order; all of them must have run before."""
        self._graphs: list[CapturedGraph] = []
        self._pieces: list[Callable[[], None]] = []
        for dynamic, group in groupby(sections, key=lambda section: section.dynamic):
            runs = [section.run for section in group]
            if dynamic:
                self._pieces += runs
            else:
                graph = capture(lambda runs=runs: _run_all(runs))  # type: ignore[misc]
                self._graphs.append(graph)
                self._pieces.append(graph.replay)
        self.emulated = any(graph.emulated for graph in self._graphs)
        self.nbytes = sum(graph.nbytes for graph in self._graphs)

    @property
    def launches(self) -> int:
        """Graphs that a replay launches; the dynamic ops' kernels come on top."""
        return len(self._graphs)

    def replay(self) -> None:
        """Enqueues the step on the current stream."""
        for piece in self._pieces:
            piece()

    def destroy(self) -> None:
        """Gives back what the graphs hold."""
        for graph in self._graphs:
            graph.destroy()


def _run_all(runs: list[Callable[[], None]]) -> None:
    for run in runs:
        run()
