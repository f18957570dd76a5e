"""Launches steps and reads their tokens: the only place between the scheduler's plans and the device.

Engine's thread, one stream. A launch stages host inputs in pinned memory, enqueues their copies, asks the dispatcher,
and replays or runs eagerly. Tokens come back through the mapped ring: reading them polls memory and never
synchronises.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from jitgraph.engine.scheduler import DecodePlan, Plan, PrefillPlan, Sequence
from jitgraph.errors import DeviceError
from jitgraph.graphs.buffers import HEADER, RING_DEPTH, STAGING_DEPTH, Buffers
from jitgraph.graphs.capture import CapturedGraph, Capturer
from jitgraph.graphs.dispatch import Dispatcher, Path
from jitgraph.graphs.key import GraphKey, Phase, Sampling
from jitgraph.graphs.step import StepProgram
from jitgraph.ops.ring import RING_LOGPROB, RING_TOKEN, RING_TOP_IDS, RING_TOP_LOGPROBS
from jitgraph.ops.slots import encode_row
from jitgraph.types import TokenLogprobs

Words = np.ndarray[Any, np.dtype[np.int64]]

STALL_SECONDS = 60.0
"""A step that has not published its tokens after this long is taken for lost."""


@dataclass(frozen=True)
class InFlight:
    """A launched step: what it works on and the number its ring record will carry."""

    plan: Plan
    step: int


class Runner:
    """Owns the captured graphs and the device's step counter."""

    def __init__(
        self,
        program: StepProgram,
        dispatcher: Dispatcher,
        capturer: Capturer,
        stream: torch.cuda.Stream | None,
        fused_sampling: bool,
    ) -> None:
        self._program = program
        self._buffers: Buffers = program.buffers
        self._dispatcher = dispatcher
        self._capturer = capturer
        self._stream = stream
        self._fused = fused_sampling
        self._graphs: dict[GraphKey, CapturedGraph] = {}
        self._ring: Words = self._buffers.ring.numpy()
        self._staging = {name: tensor.numpy() for name, tensor in self._buffers.staging.items()}
        self._staged = dict.fromkeys(self._staging, 0)
        self._rows: tuple[int, ...] = ()
        self.steps = 0

    # ------------------------------------------------------------------------------------------------ before ready

    def warm_up(self, keys: Iterable[GraphKey], report: Callable[[GraphKey], None]) -> None:
        """Runs every key eagerly on the dummy slot: compiles its kernels, loads its modules, settles library choices.

        Raises:
            DeviceError: a kernel failed; the message carries the device's own words.
        """
        for key in keys:
            with self._on_stream():
                if key.phase is Phase.PREFILL:
                    self._stage_prompt(self._buffers.slots.dummy, 0, [0] * key.tokens, emit=False)
                else:
                    self._stage_rows((), key.rows)
                step = self._execute(key, self._sampling_kinds(key), None)
            self._await(step, key.rows)
            report(key)

    def capture(self, key: GraphKey) -> None:
        """Captures a key that has been warmed up and tells the dispatcher."""
        self._graphs[key] = self._capturer.capture(self._program.captured_part(key))
        self._dispatcher.add(key)

    def _sampling_kinds(self, key: GraphKey) -> tuple[Sampling, ...]:
        outside = key.sampling is Sampling.OUTSIDE
        return (Sampling.GREEDY, Sampling.FULL) if outside else (key.sampling,)

    # ------------------------------------------------------------------------------------------------------ launch

    def admit(self, sequence: Sequence, seed: int) -> None:
        """Writes a sequence into its slot of the table."""
        index = self._next_staging("slot")
        encode_row(
            self._buffers.staging["slot"][index],
            sequence.request.params,
            sequence.prompt_length,
            sequence.max_length,
            tuple(sorted(sequence.stop_ids)),
            seed,
            sequence.pages,
        )
        with self._on_stream():
            self._buffers.slots.words[sequence.slot].copy_(self._buffers.staging["slot"][index], non_blocking=True)

    def launch(self, plan: Plan) -> InFlight:
        """Enqueues one step and returns at once (on the CPU: when it is done)."""
        wanted, sampling = self._key(plan)
        decision = self._dispatcher.decide(wanted)
        graph = None if decision.path is Path.EAGER else self._graphs[decision.key]
        with self._on_stream():
            if isinstance(plan, PrefillPlan):
                prompt = plan.sequence.request.prompt_token_ids
                self._stage_prompt(
                    plan.sequence.slot, plan.start, prompt[plan.start : plan.start + plan.count], plan.emit
                )
            else:
                self._stage_rows(tuple(s.slot for s in plan.sequences), decision.key.rows)
            return InFlight(plan, self._execute(decision.key, (sampling,), graph))

    def can_run_ahead(self) -> bool:
        """Whether launching another step before reading this one costs the host next to nothing.

        True where steps are replayed on a GPU. Eager steps keep the host busy for their whole length, and on the CPU a
        launch *is* the step: there, running ahead would only delay the token at hand.
        """
        return self._stream is not None and bool(self._graphs)

    def _key(self, plan: Plan) -> tuple[GraphKey, Sampling]:
        sequences = plan.sequences if isinstance(plan, DecodePlan) else (plan.sequence,)
        greedy = all(s.request.params.greedy for s in sequences)
        sampling = Sampling.GREEDY if greedy else Sampling.FULL
        kind = sampling if self._fused else Sampling.OUTSIDE
        if isinstance(plan, DecodePlan):
            return GraphKey(Phase.DECODE, len(plan.sequences), kind), sampling
        return GraphKey(Phase.PREFILL, plan.count, kind), sampling

    def _execute(self, key: GraphKey, kinds: tuple[Sampling, ...], graph: CapturedGraph | None) -> int:
        """Runs a step whose inputs are staged; returns its number. Several ``kinds`` (warm-up) count several steps."""
        program = self._program
        if graph is not None:
            graph.replay()
        else:
            program.captured_part(key)()
        if key.sampling is Sampling.OUTSIDE:
            for kind in kinds[:-1]:
                program.finish(key, kind)
                program.host_step += 1
            program.finish(key, kinds[-1])
        step = program.host_step
        program.host_step += 1
        self.steps += 1
        return step

    def _stage_prompt(self, slot: int, start: int, ids: Iterable[int], emit: bool) -> None:
        index = self._next_staging("prompt")
        row = self._staging["prompt"][index]
        chunk = list(ids)
        end = HEADER + len(chunk)
        row[:HEADER] = (slot, start, len(chunk), int(emit))
        row[HEADER:end] = chunk
        self._buffers["prompt"][:end].copy_(self._buffers.staging["prompt"][index, :end], non_blocking=True)

    def _stage_rows(self, slots: tuple[int, ...], rows: int) -> None:
        """Puts the batch's slots into the first rows and the dummy into the others, where anything has changed."""
        dummy = self._buffers.slots.dummy
        wanted = slots + (dummy,) * (self._buffers.sizes.rows - len(slots))
        assert len(slots) <= rows
        if wanted == self._rows:
            return
        index = self._next_staging("row_slot")
        self._staging["row_slot"][index] = wanted
        self._buffers["row_slot"].copy_(self._buffers.staging["row_slot"][index], non_blocking=True)
        self._rows = wanted

    def _next_staging(self, name: str) -> int:
        self._staged[name] = (self._staged[name] + 1) % STAGING_DEPTH
        return self._staged[name]

    def _on_stream(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def resynchronise(self) -> None:
        """Waits for the device and takes over its step counter, after a launch that did not complete."""
        if self._stream is not None:
            try:
                self._stream.synchronize()
            except RuntimeError as error:
                raise DeviceError(f"the GPU failed, a new engine is needed: {error}") from error
        self._program.host_step = int(self._buffers["counter"])
        self._rows = ()

    # -------------------------------------------------------------------------------------------------------- read

    def read(self, flight: InFlight) -> tuple[list[int], int]:
        """Waits for a step's tokens, one per row of its plan, and the time at which the host had them (ns)."""
        rows = len(flight.plan.sequences) if isinstance(flight.plan, DecodePlan) else 1
        record = self._await(flight.step, rows)
        now = time.perf_counter_ns()
        return [int(word & 0xFFFFFFFF) for word in record[:rows, RING_TOKEN]], now

    def read_logprobs(self, flight: InFlight, row: int, count: int) -> TokenLogprobs:
        """Log-probabilities of a row whose tokens have been read, with ``count`` alternatives."""
        record = self._ring[flight.step % RING_DEPTH, row]
        columns = [RING_LOGPROB]
        columns += range(RING_TOP_IDS, RING_TOP_IDS + count)
        columns += range(RING_TOP_LOGPROBS, RING_TOP_LOGPROBS + count)
        self._poll(record, columns, flight.step)
        payload = (record & 0xFFFFFFFF).astype(np.uint32)
        values = payload.view(np.float32)
        top = tuple((int(payload[RING_TOP_IDS + i]), float(values[RING_TOP_LOGPROBS + i])) for i in range(count))
        return TokenLogprobs(int(payload[RING_TOKEN]), float(values[RING_LOGPROB]), top)

    def _await(self, step: int, rows: int) -> Words:
        record: Words = self._ring[step % RING_DEPTH]
        for row in range(rows):
            self._poll(record[row], [RING_TOKEN], step)
        return record

    def _poll(self, words: Words, columns: list[int], step: int) -> None:
        """Spins until each of the words carries the step's number."""
        stamp = step & 0xFFFFFFFF
        spins = 0
        deadline = 0.0
        for column in columns:
            while (int(words[column]) >> 32) & 0xFFFFFFFF != stamp:
                spins += 1
                if spins % 4096 == 0:
                    deadline = self._check_alive(deadline, step)

    def _check_alive(self, deadline: float, step: int) -> float:
        """Raises where the device reports an error or has been silent for too long; a query is no synchronisation."""
        if self._stream is not None:
            try:
                self._stream.query()
            except RuntimeError as error:
                raise DeviceError(f"the GPU failed in step {step}: {error}") from error
        now = time.monotonic()
        if deadline and now > deadline:
            raise DeviceError(f"step {step} gave no token within {STALL_SECONDS:.0f} s; the engine must be restarted")
        return deadline or now + STALL_SECONDS
