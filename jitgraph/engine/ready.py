"""Getting an engine ready: compile every kernel it can need, run every shape once, capture graphs, build loops.

Engine's thread and stream. After this a step compiles, captures and loads nothing.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from jitgraph.config import EngineConfig
from jitgraph.engine.memory import used_bytes
from jitgraph.engine.runner import Runner
from jitgraph.engine.sizing import Sizing
from jitgraph.graphs.capture import CapturedGraph, Capturer
from jitgraph.graphs.emulated import EmulatedLoop
from jitgraph.graphs.key import GraphKey, Phase, Sampling, precapture_keys, prompt_sampling
from jitgraph.graphs.loop_control import LOOP_STEPS, DeviceLoop, LoopControl, LoopReason, LoopUnavailable
from jitgraph.graphs.piecewise import PiecewiseGraph
from jitgraph.graphs.step import StepProgram
from jitgraph.graphs.store import Store
from jitgraph.jit.collect import collect
from jitgraph.jit.registry import compile_all
from jitgraph.ops.select import prompt_classes

Progress = Callable[[str, int, int], None]
"""(phase, done, total): told about everything that takes long before ready."""


@dataclass
class ReadyReport:
    """What getting ready took: milliseconds by phase, and what ``max_graphs`` left out."""

    phases_ms: dict[str, float] = field(default_factory=dict)
    phases_mib: dict[str, float] = field(default_factory=dict)
    """By how much the device's memory in use grew in each phase."""
    captured: tuple[GraphKey, ...] = ()
    left_out: tuple[GraphKey, ...] = ()
    uncaptured: str = ""
    """What to tell where the model's own code cannot be captured."""
    compiled: int = 0
    """Kernel specialisations compiled now; the others came from the disk cache."""
    pool_bytes: int = 0
    """Growth of the allocator's reserve while the first and largest graph was captured: the shared pool."""
    reserved_growth_bytes: int = 0
    """Growth of the allocator's reserve while all the others were captured."""
    graph_bytes: int = 0
    """Device memory that all graphs together took from the driver."""

    @contextmanager
    def timed(self, phase: str, device: torch.device) -> Iterator[None]:
        """Notes what the work inside takes."""
        started, before = time.perf_counter(), used_bytes(device)
        yield
        self.phases_ms[phase] = (time.perf_counter() - started) * 1e3
        self.phases_mib[phase] = (used_bytes(device) - before) / 2**20

    @property
    def bytes_of_a_graph(self) -> int:
        """What one more graph will take: the average of those captured at start."""
        return self.graph_bytes // max(1, len(self.captured))


class Preparation:
    """One engine's way to ready."""

    def __init__(
        self,
        config: EngineConfig,
        sizing: Sizing,
        program: StepProgram,
        runner: Runner,
        store: Store[CapturedGraph],
        capturer: Capturer,
        progress: Progress,
        report: ReadyReport,
    ) -> None:
        self.config = config
        """The settings that hold: without graphs once it is known that the model's own code cannot be captured."""
        self._sizing = sizing
        self._program = program
        self._runner = runner
        self._store = store
        self._capturer = capturer
        self._stream = runner.stream
        self._device = program.buffers.arena.device
        self._progress = progress
        self.report = report

    def run(self) -> set[GraphKey]:
        """Does it all; returns the keys that have run, whose kernels are all loaded."""
        if self.config.graphs and not self._program.decoder.capturable:
            self._give_up_graphs("the host takes part in each of its steps")
        config, report = self.config, self.report
        keys, left_out = precapture_keys(
            config.max_streams,
            self._sizing.buckets,
            self._sizing.exact_lengths,
            config.fused_sampling,
            config.max_graphs if config.graphs else 0,
        )
        report.left_out = tuple(left_out) if config.graphs else ()
        everything = list(dict.fromkeys([*keys, *left_out, *self._eager_prompts()]))
        if self._stream is not None:
            # Weights, cache and buffers were filled on the caller's stream; the engine's own must not overtake it.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            if self._program.decoder.ops.flavour != "torch":
                self._timed("compile", lambda: self._compile(everything))
            self._timed("warm up", lambda: self._warm_up(everything))
        self._timed("capture", lambda: self._capture(keys))
        self._timed("loops", self._build_loops)
        return set(everything)

    def _eager_prompts(self) -> list[GraphKey]:
        """Prompt sizes that stand for all others: whatever the size, its kernels are then compiled."""
        kind, chunk = prompt_sampling(self.config.fused_sampling), self._sizing.chunk_tokens
        decoder = self._program.decoder
        sizes = prompt_classes(decoder.ops, decoder.spec.num_heads, chunk)
        return [GraphKey(Phase.PREFILL, size, kind) for size in sizes]

    def _timed(self, phase: str, work: Callable[[], None]) -> None:
        with self.report.timed(phase, self._device):
            work()

    # ------------------------------------------------------------------------------------------------- compile, warm up

    def _compile(self, keys: list[GraphKey]) -> None:
        """Every step that can occur is walked through without launching, which names every kernel it needs."""
        assert self._stream is not None
        with collect() as wanted, torch.cuda.stream(self._stream):
            for key in keys:
                self._program.graph_part(key, brief=True)()
                if key.sampling is Sampling.OUTSIDE:
                    self._program.finish(key, Sampling.GREEDY)
                    self._program.finish(key, Sampling.FULL)
            self._runner.scorer.warm_up()
        self.report.compiled = compile_all(wanted, self._device, progress=self._progress).compiled

    def _warm_up(self, keys: list[GraphKey]) -> None:
        assert self._stream is not None
        done = 0

        def report(_: GraphKey) -> None:
            nonlocal done
            done += 1
            self._progress("warm up", done, len(keys))

        self._runner.warm_up(keys, report)
        with torch.cuda.stream(self._stream):
            self._runner.scorer.warm_up()
        self._stream.synchronize()

    # ---------------------------------------------------------------------------------------------------------- capture

    def _capture(self, keys: list[GraphKey]) -> None:
        """The largest graph first: what a library wants from the shared pool it gets then, and the rest reuse it."""
        made: list[tuple[GraphKey, CapturedGraph]] = []
        before, used = self._reserved(), self._used()
        failed: list[tuple[GraphKey, Exception]] = []
        for key in sorted(keys, key=lambda key: key.tokens, reverse=True):
            try:
                made.append((key, self._capture_one(key)))
            except Exception as error:
                if self._program.decoder.native:
                    raise
                failed.append((key, error))  # what transformers runs may do what no capture allows
                continue
            if len(made) == 1:
                self.report.pool_bytes = self._reserved() - before
                before = self._reserved()
            self._progress("capture", len(made), len(keys))
        self.report.captured = tuple(key for key, _ in made)
        if made:
            self.report.reserved_growth_bytes = self._reserved() - before
            self.report.graph_bytes = max(0, self._used() - used - self.report.pool_bytes)
        if made and self.config.rolling and self.config.graph_scope == "step" and self._stream is not None:
            largest = max((key for key, _ in made), key=lambda key: key.tokens)
            self._capturer.reserve(self._program.graph_part(largest), self.config.max_graphs - len(made))
        self._store.precapture([*keys, *self.report.left_out])
        for key, graph in made:
            graph.nbytes = each = self.report.bytes_of_a_graph
            began = self._store.begin(key)
            if began:
                self._store.finish(key, graph, each)  # over the byte budget, the store lets it go again
            if not began:
                graph.destroy()
        self._note_failures(failed, len(made))

    def _note_failures(self, failed: list[tuple[GraphKey, Exception]], made: int) -> None:
        """Counts what could not be captured with the store; where that is everything, graphs are given up."""
        for key, error in failed:
            if self._store.begin(key):
                self._store.fail(key, f"capture: {type(error).__name__}", time.perf_counter(), str(error))
        if failed and not made:
            words = str(failed[0][1]).strip().splitlines() or [""]
            self._give_up_graphs(f"{type(failed[0][1]).__name__}: {words[0][:160]}")

    def _give_up_graphs(self, why: str) -> None:
        self.config = dataclasses.replace(self.config, graphs=False)
        self.report.uncaptured = f"it cannot be captured in CUDA graphs ({why}), so every step runs eagerly"

    def _capture_one(self, key: GraphKey) -> CapturedGraph:
        if self.config.graph_scope == "static":
            return PiecewiseGraph(self._program.sections(key), self._capturer.capture)
        return self._capturer.capture(self._program.graph_part(key))

    def _reserved(self) -> int:
        return torch.cuda.memory_reserved(self._device) if self._stream is not None else 0

    def _used(self) -> int:
        """Bytes in use on the device, whoever uses them."""
        if self._stream is None:
            return 0
        self._stream.synchronize()
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free

    # ------------------------------------------------------------------------------------------------------------ loops

    def _build_loops(self) -> None:
        loops = self._runner.loops
        reason = self._without_loops()
        if reason is not None:
            loops.reasons[reason] += 1
            return
        control = LoopControl(self._device)
        for kind in (Sampling.GREEDY, Sampling.FULL):
            try:
                loops.add(kind, self._build_loop(GraphKey(Phase.DECODE, 1, kind), control), control)
            except LoopUnavailable as error:
                loops.reasons[error.reason] += 1
            except RuntimeError:
                if self._program.decoder.native:
                    raise
                loops.reasons[LoopReason.REFUSED] += 1

    def _without_loops(self) -> LoopReason | None:
        config = self.config
        if not config.device_loop:
            return LoopReason.SWITCHED_OFF
        if not config.graphs or config.graph_scope != "step" or not config.fused_sampling:
            return LoopReason.STEPS_OUTSIDE_GRAPHS
        return None

    def _build_loop(self, key: GraphKey, control: LoopControl) -> DeviceLoop:
        program, buffers = self._program, self._program.buffers
        state = (buffers.row_slot, buffers.slots, buffers["counter"], control)
        if self._runner.emulated is not None:
            enter, body = (lambda: program.receive(key)), program.body_part(key)
            return EmulatedLoop(enter, body, *state, self._runner.emulated, LOOP_STEPS)
        from jitgraph.graphs.loop import build_cuda_loop

        assert self._stream is not None
        captured = [self._capturer.capture(part) for part in (lambda: program.receive(key), program.body_part(key))]
        raw = [graph.raw for graph in captured]
        assert raw[0] is not None and raw[1] is not None
        return build_cuda_loop(raw[0], raw[1], *state, self._stream, self._device, LOOP_STEPS, tuple(captured))
