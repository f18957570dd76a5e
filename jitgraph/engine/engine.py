"""The engine: one model on one device, and the loop schedule - launch - read - record.

Owned by one thread at a time; all its work goes to one stream. Before ready it compiles, warms up and captures; after
ready ``step`` only stages, replays and reads. It knows token ids, never text.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import torch

from jitgraph.config import EngineConfig, parse_size
from jitgraph.engine.allocate import Weights, allocate, choose_ops, settled
from jitgraph.engine.constraint import Constraints
from jitgraph.engine.express import Express, Shot
from jitgraph.engine.flights import InFlight
from jitgraph.engine.grammar import GrammarCompiler
from jitgraph.engine.intake import Intake
from jitgraph.engine.loops import Loops
from jitgraph.engine.planner import Planner
from jitgraph.engine.ready import Preparation, Progress, ReadyReport
from jitgraph.engine.recorder import Recorder
from jitgraph.engine.runner import Runner
from jitgraph.engine.scheduler import Scheduler, Sequence
from jitgraph.engine.sizing import Sizing, resolve_sizing
from jitgraph.engine.steady import Steady
from jitgraph.errors import ConfigError
from jitgraph.graphs.capture import CapturedGraph, Capturer
from jitgraph.graphs.capturer import ShadowCapturer
from jitgraph.graphs.dispatch import Dispatcher
from jitgraph.graphs.key import GraphKey
from jitgraph.graphs.step import StepProgram
from jitgraph.graphs.store import Store, is_decode
from jitgraph.model.spec import ModelSpec
from jitgraph.text.tokenizer import find_tokenizer
from jitgraph.types import FinishReason, Request, SamplingParams, TokenChunk

__all__ = ["Engine", "Progress", "ReadyReport"]

Ids = list[int] | tuple[int, ...]
_NOTHING = contextlib.nullcontext()
HELPER_WAIT_S = 200e-6
"""Pause between looks at what the helper thread does, while idle."""


class Engine:
    """Runs requests of token ids, several at once.

    Raises:
        ConfigError, CapacityError, DeviceError, CompileError: settings that cannot work on this model and device.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        config: EngineConfig,
        eos_token_ids: tuple[int, ...],
        progress: Progress | None = None,
        folder: Path | None = None,
    ) -> None:
        """``folder``: the checkpoint's, whose tokenizer grammars are compiled for; None is a preset's."""
        device, dtype = weights.embedding.device, weights.embedding.dtype
        config, self.notices = settled(config, weights)
        if device.type == "cuda" and config.ops == "torch" and config.graphs and config.fused_sampling:
            raise ConfigError("ops='torch' cannot publish tokens from inside a CUDA graph: set fused_sampling=False")
        self.spec = spec
        self.config = config
        self.device = device
        self.dtype = dtype
        self.sizing: Sizing = resolve_sizing(config, spec, dtype.itemsize)
        self.ready = ReadyReport()
        tell = progress or (lambda phase, done, total: None)
        with self.ready.timed("tune", device):
            self.ops = choose_ops(config, self.sizing, weights, tell)
        with self.ready.timed("allocate", device):
            self.cache, self.pages, self.buffers, program = allocate(config, spec, self.sizing, self.ops, weights)
        limits = (config.max_graphs, parse_size(config.graph_memory, "graph_memory"))
        self.store: Store[CapturedGraph] = Store(*limits, pinned=self._is_pinned)
        self.dispatcher = Dispatcher(config.graphs, self.store, self.sizing.buckets)
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._capturer = Capturer(device, lambda _: self.ready.bytes_of_a_graph, stream)
        chunk, how = self.sizing.chunk_tokens, (config.fused_sampling, config.graph_scope == "step", config.strict)
        compiler = GrammarCompiler(partial(find_tokenizer, folder), spec.vocab_size, eos_token_ids)
        self.constraints = Constraints(compiler, self.buffers.masks)
        self.runner = Runner(program, self.dispatcher, self.store, Loops(), self.constraints, stream, *how, chunk)
        self.intake = Intake(spec.vocab_size, self.sizing, self.pages.total, frozenset(eos_token_ids))
        running_chunk = self.sizing.running_chunk_tokens
        self.scheduler = Scheduler(config.max_streams, chunk, self.pages, self.pages.prefixes, running_chunk)
        self._sequences: dict[int, Sequence] = {}
        self._flights: deque[InFlight] = deque()
        self._planner = Planner(self.runner, self.scheduler, self.intake, self._flights)
        self._recorder = Recorder(self.runner, self.scheduler, spec.vocab_size)
        self._steady = Steady(self.runner, self.scheduler, self._flights, self._recover)
        self._news: list[TokenChunk] = []
        self._get_ready(program, tell)

    def _is_pinned(self, key: GraphKey) -> bool:
        """Graphs that never make room for others: decoding, and the buckets that serve every prompt."""
        return is_decode(key) or key.tokens in self.sizing.buckets

    def _get_ready(self, program: StepProgram, progress: Progress) -> None:
        with torch.inference_mode():
            preparation = Preparation(
                self.config, self.sizing, program, self.runner, self.store, self._capturer, progress, self.ready
            )
            warm = preparation.run()
        if preparation.config is not self.config:  # the model's own code cannot be captured
            self.config, self.notices = preparation.config, (*self.notices, self.ready.uncaptured)
            self.dispatcher.give_up()
        self._shadow = ShadowCapturer(
            self.store,
            lambda key: self._capturer.shadow(program.graph_part(key), lambda: program.graph_stages(key)),
            is_warm=lambda key: key in warm or self.emulated,
            warm_up=self.runner.warm_up_stages,
        )
        vocabulary = self.spec.vocab_size
        self._express = Express(self.runner, self.scheduler, self.sizing, vocabulary, self.intake, self.pages.prefixes)
        self._rolling = self.config.graphs and self.config.rolling and self.config.graph_scope == "step"
        if self._rolling and program.decoder.native:
            self.runner.reader.shadow = self._in_shadow
        self._capturer.prepare_thread(self.dtype)
        self.reset_counters()

    # ---------------------------------------------------------------------------------------------------- requests

    def validate(self, request: Request) -> None:
        """Checks a request against the model and the cache (see ``Intake.validate``), and compiles its grammar."""
        self.intake.validate(request)
        self.constraints.check(request)

    def submit(self, request: Request) -> None:
        """Queues a request; its tokens come out of ``step``. Raises as ``validate`` does."""
        self.validate(request)
        self.enqueue(request)

    def enqueue(self, request: Request) -> None:
        """Queues a request that ``validate`` has passed."""
        self._forget_shot()
        self.scheduler.add(self._sequence(request))

    def fire(self, ids: Ids, params: SamplingParams, salt: str = "") -> Shot | None:
        """Sends a prompt to the GPU by the shortest way; ``book`` must follow. None: it must be submitted."""
        try:
            return self._express.fire(ids, params, salt)
        except BaseException:
            self._recover()
            raise

    def rehearse(self) -> None:
        """Goes the way of ``fire`` up to the launch, for nothing; does nothing where no prompt could be fired."""
        self._express.rehearse()

    def book(self, request: Request, shot: Shot) -> None:
        """Takes a request that ``fire`` has launched into the books, and launches what comes next."""
        try:
            assert request.plain, "a grammar or scores take the ordinary way"
            sequence = self._sequence(request)
            admitted = self.scheduler.admit_whole(sequence, shot.chain)
            assert admitted, "fired on an engine that was not idle"
            self._flights.append(self.runner.book(sequence, shot.wanted, shot.decision))
            self._express.unbooked = False
        except BaseException:
            self._recover()
            raise
        self.launch()

    def _forget_shot(self) -> None:
        """The way is no longer free; a shot that an interrupt kept out of the books is waited for and forgotten."""
        if self._express.unbooked:
            self._recover()
        self._express.disarm()

    def _sequence(self, request: Request) -> Sequence:
        assert request.request_id not in self._sequences, "request ids must not repeat while in use"
        sequence = self.intake.sequence(request)
        self.constraints.admit(sequence)
        self._sequences[request.request_id] = sequence
        return sequence

    def cancel(self, request_id: int, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """Ends a request now; steps already in flight are read and dropped. Unknown or finished ids are ignored."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self.scheduler.finish(sequence, reason)
            self.constraints.drop(sequence)
            if any(flight.loop for flight in self._flights):
                self.runner.loops.call_off()  # it was the only one

    @property
    def busy(self) -> bool:
        """Whether ``step`` has anything to do."""
        return bool(self._flights) or bool(self._news) or not self.scheduler.idle

    def step(self) -> list[TokenChunk]:
        """Admits, launches (ahead where that is free), reads the oldest step and returns its tokens.

        An interrupt while it waits for tokens changes nothing: the next call goes on. One in the middle of a launch
        ends all requests as cancelled (the next call says so) and leaves the engine ready for new ones.
        """
        if not self._news and (steady := self._steady.token()) is not None:
            return steady
        if self._news or self._express.unbooked or self.scheduler.overdue or not self._planner.looping_on():
            self.launch()
            news, self._news = self._news, []
            if news or not self._flights:
                return news
        with self._torch():
            return self._read()

    def early_token(self, rehearse: Callable[[], None] | None = None) -> list[TokenChunk] | None:
        """A lone stream's first or last token, ahead of the books: ``step`` must follow, and leaves it out."""
        return None if self._news else self._steady.early(self._shadow.pending, rehearse)

    def launch(self) -> None:
        """Launches what can be launched now and returns without waiting for any of it. ``step`` calls it too."""
        try:
            with self._torch():
                self._forget_shot()
                for sequence in self.scheduler.expire():
                    self._end(sequence.request.request_id)
                self._settle_loops()
                while (plan := self._planner.next_plan()) is not None:
                    self._shadow.interrupt()
                    self._flights.append(self.runner.launch(plan))
                self.pages.settle()  # while the GPU works
        except BaseException:
            self._recover()
            raise

    def _torch(self) -> AbstractContextManager[object]:  # on a GPU replays and reading are no work for PyTorch
        return torch.inference_mode() if self.emulated else _NOTHING

    def _read(self) -> list[TokenChunk]:
        """Waits for the oldest flight's next step and records it."""
        flight = self._flights[0]
        already = flight.read
        try:
            read = self.runner.read(flight)
            if read is None:
                self._settle_loops()
                return []
            if flight.read == flight.count:
                self._flights.popleft()
            self._steady.look(flight, self._shadow.pending)
            return self._record(flight, *read)
        except BaseException:  # while it waited, nothing has changed; afterwards a token may be lost
            if self.runner.reader.broken or flight.read != already or flight not in self._flights:
                self._recover()
            raise

    def _settle_loops(self) -> None:
        """Once loops that were called off are over: reads what they still gave, and gives ordinary steps the word."""
        loops = self.runner.loops
        if not loops.called_off:
            return
        end = loops.over()
        if end is None and any(flight.loop for flight in self._flights):
            return  # some of their steps are still to be read
        if end is None:
            end = self.runner.await_loops()  # all are read: nothing may be numbered before the device says where it is
        while self._flights:
            flight = self._flights[0]
            if flight.step >= end:
                break
            read = self.runner.read(flight)
            assert read is not None, "a step before the end has been published"
            if flight.read == flight.count:
                self._flights.popleft()
            self._news += self._record(flight, *read)
        for flight in self._flights:
            self.scheduler.recount(flight.sequences[0])
        self._flights.clear()
        self.runner.rewind(end)
        loops.clear()

    def _recover(self) -> None:
        """After a launch that did not complete: ends every request and brings host and device back in step."""
        self._express.disarm()
        self._shadow.interrupt()
        self._flights.clear()
        for identity in list(self._sequences):
            self._end(identity)
        self.scheduler.reset()  # the books, too, may have been left half-way
        with self._torch():
            self.runner.resynchronise()

    def _end(self, identity: int) -> None:  # strikes off a request that ends without a token, and says so
        self.constraints.drop(self._sequences.pop(identity))
        self._news.append(TokenChunk(identity, None, time.perf_counter_ns(), finish_reason=FinishReason.CANCELLED))

    def _record(self, flight: InFlight, tokens: list[int], now: int) -> list[TokenChunk]:
        chunks = self._recorder.record(flight, tokens, now)
        for chunk in chunks:
            if chunk.finish_reason is not None:
                del self._sequences[chunk.request_id]
                self._end_loops(flight)
        told, flight.told = flight.told, False
        return [] if told else chunks

    def _end_loops(self, flight: InFlight) -> None:
        """A sequence ended with a token of this flight. Where it was alone, the device has seen it too: what is left
        of its loops runs no step."""
        loops = [one for one in self._flights if one.loop]
        if loops and not self.runner.loops.called_off:
            for one in loops:
                self._flights.remove(one)
            self.runner.rewind(flight.step if flight.loop else loops[0].first)

    def drain(self) -> None:
        """Reads and drops every step in flight and gives up an open capture: the device may be synchronised then."""
        self._shadow.abandon()
        with self._torch():
            while self._flights:
                self._read()

    # ------------------------------------------------------------------------------------------------- idle and shadow

    def _in_shadow(self, due: float) -> bool:  # a piece of capturing, where it ends before the next token is due
        if not self._shadow.pending or not self._capturer.thread_is_prepared:
            return False
        with torch.inference_mode():
            return self._shadow.advance(due)

    @property
    def idle_work(self) -> bool:
        """Whether ``work_while_idle`` has anything to do."""
        if not self.scheduler.idle:
            return False
        return bool(self._flights) or self.capturing or (self._express.usable and not self._express.armed)

    @property
    def capturing(self) -> bool:
        """Whether idle work begins with graphs: that may wait for a quiet moment, the preparations may not."""
        return self._rolling and self._shadow.pending

    def work_while_idle(self) -> bool:
        """One piece (a layer's time) of what the store still wants: warming up, capturing, destroying; before that, one
        step that a cancelled request left in flight; at the end, the preparations for the next prompt. Whether there is
        more. For the thread that owns the engine, while no request is there."""
        if not self.idle_work:
            return False
        try:
            return self._work_while_idle()
        except BaseException:
            self._recover()
            raise

    def _work_while_idle(self) -> bool:
        self._capturer.prepare_thread(self.dtype)
        with self._torch():
            if self._flights:
                self._read()
                return self.idle_work
            self._forget_shot()
            self._settle_loops()  # anything launched before would be numbered wrong
        if not self.capturing:
            self._express.arm()
            return False
        with torch.inference_mode():
            if not self._shadow.advance(idle=True):
                time.sleep(HELPER_WAIT_S)  # the helper thread is at it
        return self.idle_work

    def close(self) -> None:
        """Ends what runs; frees graphs, loops and the helper thread. The engine is of no use afterwards."""
        for identity in list(self._sequences):
            self.cancel(identity)
        self.drain()
        self.constraints.compiler.close()
        self.runner.reader.shadow = None
        with torch.inference_mode():
            self._shadow.close()
            self.runner.loops.destroy()

    # ------------------------------------------------------------------------------------------------------- report

    @property
    def emulated(self) -> bool:
        """Whether graphs are the CPU's emulation and kernels plain PyTorch."""
        return self.device.type != "cuda"

    def reset_counters(self) -> None:
        """Counts steps, paths and compiles from here on."""
        self.dispatcher.reset()
        if self.pages.prefixes is not None:
            self.pages.prefixes.reset_counters()
        self.runner.steps = self.runner.launches = self.runner.compiles = self.constraints.failures = 0

    @property
    def compiles_after_ready(self) -> int:
        """Kernel specialisations compiled by a step; each one was a pause for somebody."""
        return self.runner.compiles
