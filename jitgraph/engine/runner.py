"""Launches steps and loops and reads their tokens: the only place between the scheduler's plans and the device.

Engine's thread, one stream. A launch writes its inputs into the inbox, which the device reads from host memory, asks
the dispatcher, and replays or runs eagerly: one call, no copies. Tokens come back through the mapped ring: reading them
polls memory and never synchronises. While it polls, it lends its time to whoever has work for the GPU's shadow.
"""

from __future__ import annotations

import contextlib
import struct
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial

import torch

from jitgraph.engine.constraint import Constraints
from jitgraph.engine.flights import InFlight
from jitgraph.engine.loops import Loops
from jitgraph.engine.pace import Pace
from jitgraph.engine.prompt_logprobs import PromptScorer
from jitgraph.engine.reader import RingReader
from jitgraph.engine.scheduler import DecodePlan, LoopPlan, Plan, PrefillPlan, Sequence
from jitgraph.errors import DeviceError
from jitgraph.graphs.buffers import INBOX_DEPTH, Buffers
from jitgraph.graphs.capture import CapturedGraph
from jitgraph.graphs.dispatch import Decision, Dispatcher, Reason
from jitgraph.graphs.emulated import EmulatedDevice
from jitgraph.graphs.key import GraphKey, Path, Phase, Sampling, prompt_sampling
from jitgraph.graphs.step import StepProgram
from jitgraph.graphs.store import Store
from jitgraph.jit.monitor import MONITOR
from jitgraph.jit.strict import forbid_compiles
from jitgraph.ops.inbox import ADMIT, EMIT, HEADER, MAX_ROWS, ROWS, SLOT
from jitgraph.ops.slots import pack_row

CHUNK = struct.Struct(f"@i{4 * (SLOT - ADMIT - 1)}x{EMIT - SLOT + 1}i")
"""``ADMIT``, then ``SLOT``, ``START``, ``COUNT`` and ``EMIT``, at the beginning of a row."""
_ROWS = struct.Struct(f"@{MAX_ROWS}i")


class Runner:
    """Owns the inbox, the ring and the numbers of launches and steps."""

    def __init__(
        self,
        program: StepProgram,
        dispatcher: Dispatcher,
        store: Store[CapturedGraph],
        loops: Loops,
        constraints: Constraints,
        stream: torch.cuda.Stream | None,
        fused_sampling: bool,
        whole_steps: bool = True,
        strict: bool = False,
        chunk_tokens: int = 1,
    ) -> None:
        """``whole_steps``: a graph holds all of its step. ``strict``: a compilation in a step is an error.
        ``chunk_tokens``: the largest chunk of a prompt."""
        self._program = program
        self._buffers: Buffers = program.buffers
        self.dispatcher = dispatcher
        self._store = store
        self.stream = stream
        self._fused = fused_sampling
        self._strict = strict
        self._chunk = chunk_tokens
        alone = fused_sampling and whole_steps and program.decoder.ops.receives_on_device
        self.replays_alone = stream is not None and alone
        """Whether a step is its graph and nothing beside it."""
        self.has_ways = self.replays_alone or (stream is None and fused_sampling and whole_steps)
        """Whether a whole prompt can be one call, for ``way``."""
        self.loops = loops
        self.constraints = constraints
        self.scorer = PromptScorer(program)
        self.emulated = EmulatedDevice() if stream is None else None
        self.pace = Pace()
        self.reader = RingReader(self._buffers.ring, loops, stream, self.emulated)
        self.inbox = memoryview(self._buffers.inbox.numpy().data).cast("B")
        self._row_bytes = 4 * self._buffers.layout.width
        self.prompt_offset = 4 * self._buffers.layout.prompt
        """Bytes from the beginning of the inbox's row to its first token id."""
        self._prompt_keys: dict[int, GraphKey] = {}
        self.steps = 0
        self.launches = 0
        self.compiles = 0
        """Kernel specialisations that an eager step had to make ready; a replay launches what is there."""

    # ------------------------------------------------------------------------------------------------ before ready

    def warm_up(self, keys: Iterable[GraphKey], report: Callable[[GraphKey], None]) -> None:
        """Runs every key eagerly on the dummy slot: loads its modules, settles library choices.

        Raises:
            DeviceError: a kernel failed; the message carries the device's own words.
        """
        for key in keys:
            for _ in self.warm_up_stages(key):
                pass
            report(key)

    def warm_up_stages(self, key: GraphKey) -> Iterator[None]:
        """One eager run of a key on the dummy slot, in pieces of a layer; at the end it has run.

        It may be given up between any two pieces: launches and steps are counted as the device counts them. A piece is
        launched once the one before it has run, so that a request in between waits for one piece.
        """
        program = self._program
        self._stage_dummy(key)
        stages = self._warm_up_pieces(key)
        while True:
            with self._on_stream():  # each piece enters the stream anew: the caller's own code runs between them
                if next(stages, self) is self:
                    break
                done = None if self.stream is None else self.stream.record_event()
            yield
            while done is not None and not done.query():
                yield
        self.reader.wait(program.next_step - 1, key.rows)

    def _warm_up_pieces(self, key: GraphKey) -> Iterator[None]:
        program = self._program
        program.before_graph(key)
        stages = program.body_stages(key, brief=True)
        if program.decoder.ops.receives_on_device:
            program.receive(key)
        program.next_launch += 1
        self.launches += 1
        yield
        yield from stages
        kinds = (Sampling.GREEDY, Sampling.FULL) if key.sampling is Sampling.OUTSIDE else ()
        for kind in kinds:
            program.finish(key, kind)
            program.next_step += 1
        if not kinds:
            program.next_step += 1
        self.steps += max(1, len(kinds))

    def _stage_dummy(self, key: GraphKey) -> None:
        dummy = self._buffers.slots.dummy
        if key.phase is Phase.PREFILL:
            self._stage_prompt(dummy, 0, [0] * key.tokens, emit=False)
        else:
            self._stage_rows((), key.rows)

    # ------------------------------------------------------------------------------------------------------ launch

    def launch(self, plan: Plan) -> InFlight:
        """Enqueues one step, or one loop, and returns at once (on the CPU: when the step is done)."""
        if isinstance(plan, LoopPlan):
            return self._launch_loop(plan)
        wanted, sampling = self._key(plan)
        scoring: Callable[[], None] | None = None
        if isinstance(plan, PrefillPlan) and plan.sequence.request.prompt_logprobs is not None:
            decision = Decision(Path.EAGER, GraphKey(Phase.PREFILL, plan.count, Sampling.OUTSIDE), Reason.SCORED)
            scoring = partial(self.scorer.run, plan, self._program.next_step)
        else:
            decision = self.dispatcher.choose(wanted)
        key = decision.key
        graph = None if decision.path is Path.EAGER else self._store.lookup(key)
        if isinstance(plan, PrefillPlan):
            first = plan.start == plan.sequence.cached
            if first and plan.start and plan.sequence.request.params.penalised:
                self._note_cached(plan.sequence)
            self._stage_chunk(plan.sequence, plan.start, plan.count, plan.emit, admit=first)
        else:
            self._stage_rows(tuple(s.slot for s in plan.sequences), key.rows)
        if graph is not None and self.replays_alone:
            graph.replay()
        elif self.emulated is not None:
            self.emulated.submit_step(partial(self._execute, key, sampling, graph, scoring))
        else:
            with torch.inference_mode(), self._on_stream(), self._watched():
                self._execute(key, sampling, graph, scoring)
        # The GPU is at work from here on; books are kept beside it.
        step = self._count()
        self.dispatcher.note(wanted, decision)
        if graph is not None:
            self._store.use(key, step)
        return InFlight(plan, key, step)

    def _note_cached(self, sequence: Sequence) -> None:
        """Notes a cached beginning in the slot's history of ids, which its penalties need and no chunk will bring: the
        first ops of a prompt's step, without the step."""
        program = self._program
        key = self._prompt_key(self._chunk)

        def note() -> None:
            program.before_graph(key)
            if program.decoder.ops.receives_on_device:
                program.receive(key)
            program.prepare(key)

        for start in range(0, sequence.cached, self._chunk):
            self._stage_chunk(sequence, start, min(self._chunk, sequence.cached - start), emit=False, admit=not start)
            with torch.inference_mode(), self._on_stream(), self._watched():
                note() if self.emulated is None else self.emulated.submit_step(note)
            program.next_launch += 1
            self.launches += 1

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Counts what is compiled inside, and in strict mode forbids it."""
        before = MONITOR.count
        try:
            with forbid_compiles("after ready, in strict mode") if self._strict else contextlib.nullcontext():
                yield
        finally:
            self.compiles += MONITOR.count - before

    def way(self, count: int) -> tuple[GraphKey, Decision, Callable[[], None]] | None:
        """How a whole prompt of ``count`` tokens would run as one graph: what it wants, what was chosen, and the replay
        alone. None where it would not."""
        wanted = self._prompt_key(count)
        decision = self.dispatcher.choose(wanted)
        graph = self._store.lookup(decision.key)
        if graph is None:
            return None
        replay = graph.replay if self.replays_alone else partial(self._emulate, decision.key, graph)
        return wanted, decision, replay

    def _emulate(self, key: GraphKey, graph: CapturedGraph) -> None:
        assert self.emulated is not None
        with torch.inference_mode():
            self.emulated.submit_step(lambda: self._execute(key, key.sampling, graph))

    def book(self, sequence: Sequence, wanted: GraphKey, decision: Decision) -> InFlight:
        """Counts a whole prompt's step that has been launched."""
        step = self._count()
        self.dispatcher.note(wanted, self.dispatcher.choose(wanted))  # the same, and the reason of today
        self._store.use(decision.key, step)
        start = sequence.cached
        return InFlight(PrefillPlan(sequence, start, sequence.prompt_length - start, True), decision.key, step)

    def _execute(
        self, key: GraphKey, sampling: Sampling, graph: CapturedGraph | None, scoring: Callable[[], None] | None = None
    ) -> None:
        """Runs a step whose inputs are in the inbox, with its ``scoring`` where its prompt is scored."""
        program = self._program
        program.before_graph(key)
        if graph is not None:
            graph.replay()
        else:
            program.graph_part(key, scoring is not None)()
        if scoring is not None:
            scoring()
        if key.sampling is Sampling.OUTSIDE:
            program.finish(key, sampling)

    def _launch_loop(self, plan: LoopPlan) -> InFlight:
        kind = self.loop_kind(plan.sequence)
        self._stage_rows((plan.sequence.slot,), 1)
        self.loops.launch(kind)
        program = self._program
        flight = InFlight(plan, GraphKey(Phase.DECODE, 1, kind), program.next_step, plan.count)
        program.next_step += plan.count
        program.next_launch += 1
        self.launches += 1
        return flight

    def loop_kind(self, sequence: Sequence) -> Sampling:
        """The sampling of a lone sequence's decode steps."""
        return Sampling.GREEDY if sequence.request.greedy else Sampling.FULL

    def can_run_ahead(self) -> bool:
        """Whether launching another step before reading this one costs the host next to nothing.

        True where steps are replayed on a GPU. Eager steps keep the host busy for their whole length, and on the CPU a
        launch *is* the step: there, running ahead would only delay the token at hand. Nor where a sequence follows a
        grammar: its next step needs the token of this one.
        """
        return self.stream is not None and self._store.holds_graphs and not self.constraints.active

    def _key(self, plan: PrefillPlan | DecodePlan) -> tuple[GraphKey, Sampling]:
        if isinstance(plan, PrefillPlan):
            key = self._prompt_key(plan.count)
            return key, key.sampling if self._fused else self.loop_kind(plan.sequence)
        greedy = all(s.request.greedy for s in plan.sequences)
        sampling = Sampling.GREEDY if greedy else Sampling.FULL
        kind = sampling if self._fused else Sampling.OUTSIDE
        return GraphKey(Phase.DECODE, len(plan.sequences), kind), sampling

    @property
    def generation(self) -> int:
        """Changes with the graphs that are ready."""
        return self._store.generation

    def _prompt_key(self, count: int) -> GraphKey:
        key = self._prompt_keys.get(count)
        if key is None:
            key = self._prompt_keys[count] = GraphKey(Phase.PREFILL, count, prompt_sampling(self._fused))
        return key

    def _count(self) -> int:
        """Gives the launch that has just been made its numbers; returns that of its step."""
        program = self._program
        step = program.next_step
        program.next_step += 1
        program.next_launch += 1
        self.steps += 1
        self.launches += 1
        return step

    # ------------------------------------------------------------------------------------------------------- inbox

    def _stage_chunk(self, sequence: Sequence, start: int, count: int, emit: bool, admit: bool) -> None:
        request = sequence.request
        prompt = request.prompt_token_ids
        ids = prompt if count == len(prompt) else prompt[start : start + count]
        row = self._stage_prompt(sequence.slot, start, ids, emit, admit)
        if admit:
            pack_row(
                self.inbox,
                row + 4 * HEADER,
                self._buffers.layout.slot_words,
                request.params,
                len(prompt),
                sequence.max_length,
                sequence.sorted_stop_ids,
                sequence.seed,
                sequence.pages,
                request.grammar is not None,
            )
            if request.grammar is not None:
                self.constraints.begin(sequence)

    def _stage_prompt(self, slot: int, start: int, ids: Iterable[int], emit: bool, admit: bool = False) -> int:
        """A chunk in the inbox; returns the byte at which its row begins."""
        row = self.next_row()
        words = array("i", ids)
        CHUNK.pack_into(self.inbox, row, admit, slot, start, len(words), emit)
        at = row + self.prompt_offset
        self.inbox[at : at + 4 * len(words)] = memoryview(words).cast("B")
        return row

    def _stage_rows(self, slots: tuple[int, ...], rows: int) -> None:
        """The batch's slots in the first rows, the dummy in the others."""
        assert len(slots) <= rows <= MAX_ROWS
        padding = (self._buffers.slots.dummy,) * (MAX_ROWS - len(slots))
        _ROWS.pack_into(self.inbox, self.next_row() + 4 * ROWS, *slots, *padding)

    def next_row(self) -> int:
        """The byte of the inbox at which the next launch's row begins."""
        return self._program.next_launch % INBOX_DEPTH * self._row_bytes

    def _on_stream(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def rewind(self, step: int) -> None:
        """The next step's number is ``step``: loops that ended early have run fewer than were counted."""
        self._program.next_step = step

    def resynchronise(self) -> None:
        """Waits for the device and takes over its counters, after a launch that did not complete."""
        self.loops.call_off()
        if self.emulated is not None:
            self.emulated.drain()
        elif self.stream is not None:
            try:
                self.stream.synchronize()
            except RuntimeError as error:
                raise DeviceError(f"the GPU failed, a new engine is needed: {error}") from error
        self.reader.broken = False
        self.scorer.forget()
        self.loops.clear()
        self.loops.forget()
        self._program.next_step = int(self._buffers["counter"])
        self._program.next_launch = int(self._buffers["launches"])

    # -------------------------------------------------------------------------------------------------------- read

    def read(self, flight: InFlight) -> tuple[list[int], int] | None:
        """Waits for the tokens of a flight's next step, one per row, and the time at which the host had them (ns).

        None where that step never comes: the flight is a loop that was called off, and all loops are over.
        """
        step, rows = flight.step, max(1, len(flight.sequences))
        if not self.reader.wait(step, rows, self.pace.due(flight.key, step), flight.loop and self.loops.called_off):
            return None
        now = time.perf_counter_ns()
        tokens = self.reader.tokens(step, rows)
        self.pace.note(flight.key, step, now)
        self._store.completed(step)
        if self.scorer.pending:
            self.scorer.collect(step)
        flight.read += 1
        if flight.loop:
            self.dispatcher.looped += 1
            self.steps += 1
        return tokens, now

    def await_loops(self) -> int:
        """Waits until all loops are over, whose steps have all been read; returns the number of the next step."""
        return self.reader.await_loops(self._program.next_step)
