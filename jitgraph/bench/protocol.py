"""The timing protocol of one case: first requests, correctness gate, then the blocks of every row.

Runs on the main thread of the case's process. Nothing but the case runs inside a timed call, and garbage collection is
held still around the timed loops; lines go to the raw file between requests (interactive) or after a block (sustained).
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from jitgraph.bench.cases.common import Case
from jitgraph.bench.gate import Reference, mismatches
from jitgraph.bench.instruments import Instruments, nothing
from jitgraph.bench.plan import DECODE_TOKENS, INTERACTIVE, PAUSE_S, PROTOCOLS, WARMUP, WARMUP_REQUESTS, Plan
from jitgraph.bench.records import BlockFacts, BlockKey, Event, RawWriter
from jitgraph.errors import JitgraphError


class GateFailed(JitgraphError):
    """A case whose first tokens are not those of the reference: it gets no times."""


class TimeUp(JitgraphError):
    """The run's time limit was reached between two rows."""


@contextmanager
def still_collector() -> Iterator[None]:
    """No garbage collection inside: what exists is moved out of its sight, and it is switched off."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def _no_turns(unit: str) -> None:
    """A case that runs alone never waits."""


@dataclass
class Meter:
    """Runs one loaded case through a plan and writes what it sees."""

    name: str
    case: Case
    plan: Plan
    prompts: Mapping[int, list[int]]
    writer: RawWriter
    progress: Callable[[int], None]
    """Told how many requests are done."""
    deadline_s: float | None = None
    """``time.time()`` after which no further row begins."""
    measured: frozenset[BlockKey] = frozenset()
    """Rows that an earlier process of the same run has whole: they are left out."""
    turn: Callable[[str], None] = _no_turns
    """Returns when this case may go on, where cases take turns; told what comes, ``request`` or ``block``."""
    sleep: Callable[[float], None] = time.sleep
    energy_j: Callable[[], float | None] = nothing
    """Joules that the device has taken so far."""
    instruments: Instruments = field(init=False)
    done: int = field(default=0, init=False)
    _certain: dict[int, int] = field(default_factory=dict, init=False)
    """Prompt length to the first token that every request must give, where the reference is certain."""
    _seen: Counter[str] = field(default_factory=Counter, init=False)
    """Events that are written already, or fell between two rows."""

    def __post_init__(self) -> None:
        self.instruments = Instruments(self.case.counters, self.energy_j)
        self.instruments.watch()

    def cold(self, ready_s: float | None, reference: Mapping[int, Reference] | None) -> list[str]:
        """First requests of the process, the gate, and only then their rows. Returns what the gate says it checked.
        ``ready_s``: None where the case was ready before this process began.

        Raises:
            GateFailed: a first token differs where the reference is certain.
        """
        first = {}
        for length in self.plan.prompt_lengths:
            first[length] = self.case.first_token(self.prompts[length])
            for _ in range(WARMUP_REQUESTS - 1):
                self.case.first_token(self.prompts[length])
            self._count(WARMUP_REQUESTS)
        checked: list[str] = []
        if reference is not None:
            self._certain = {n: one.token_id for n, one in reference.items() if n in first and one.certain}
            wrong, checked = mismatches(reference, {length: token.token_id for length, token in first.items()})
            if wrong:
                raise GateFailed("correctness gate failed, no times given: " + "; ".join(wrong))
        answers = {n: self.case.decode(self.prompts[n], DECODE_TOKENS) for n in self.plan.decode_lengths}
        self._count(len(answers))
        facts = BlockFacts(peak_memory_gib=self._memory_gib(), host_memory_gib=self.instruments.host_memory_gib())
        if ready_s is not None:
            self._write_row(BlockKey(self.name, WARMUP, "ready_s", INTERACTIVE, 0), [ready_s * 1e3], facts)
        for length, token in first.items():
            self._write_row(BlockKey(self.name, WARMUP, "ttft_ms", INTERACTIVE, length), [token.client_ms], facts)
        for length, answer in answers.items():
            self._write_row(BlockKey(self.name, WARMUP, "itl_ms", INTERACTIVE, length), answer.gaps_ms, facts)
        self.writer.flush()
        return checked

    def _write_row(self, key: BlockKey, values_ms: Sequence[float], facts: BlockFacts) -> None:
        if key in self.measured:
            return
        now = time.time()
        for index, value in enumerate(values_ms):
            self.writer.sample(key, index, value, now)
        self.writer.block(key, facts)

    def timed(self) -> None:
        """Every row of the plan.

        Raises:
            TimeUp: the deadline passed; the rows so far are written.
            GateFailed: a request gave another first token than the reference.
        """
        with still_collector():
            for protocol in PROTOCOLS:
                if not self.plan.iterations(protocol):
                    continue
                for pacing in self.plan.pacings:
                    for length in self.plan.prompt_lengths:
                        self._ttft_block(protocol, pacing, length)
                    for length in self.plan.decode_lengths:
                        self._itl_block(protocol, pacing, length)

    def _ttft_block(self, protocol: str, pacing: str, length: int) -> None:
        client = BlockKey(self.name, protocol, "ttft_ms", pacing, length)
        engine = replace(client, metric="engine_ttft_ms")
        count = self.plan.iterations(protocol)
        if self._has(client, count):
            return
        self._check_time()
        keys, prompt = [client], self.prompts[length]
        with self._block("prefill", keys, 1):
            for iteration in range(count):
                self._before(pacing)
                token = self.case.first_token(prompt)
                now = time.time()
                if token.token_id is not None and token.token_id != self._certain.get(length, token.token_id):
                    raise GateFailed(
                        f"request {iteration} at {length} tokens gave another first token than the reference"
                    )
                self.writer.sample(client, iteration, token.client_ms, now)
                if token.engine_ms is not None:
                    keys[1:] = [engine]
                    self.writer.sample(engine, iteration, token.engine_ms, now)
                self._after(pacing, client, iteration)
            self._note_events(client, count - 1)

    def _itl_block(self, protocol: str, pacing: str, length: int) -> None:
        gaps = BlockKey(self.name, protocol, "itl_ms", pacing, length)
        whole, each = replace(gaps, metric="e2e_ms"), replace(gaps, metric="tpot_ms")
        count = self.plan.decode_requests(protocol)
        if self._has(gaps, count):
            return
        self._check_time()
        last = 0
        with self._block("decode", [gaps, each, whole], DECODE_TOKENS):
            for request in range(count):
                self._before(pacing)
                answer = self.case.decode(self.prompts[length], DECODE_TOKENS)
                now = time.time()
                for index, gap in enumerate(answer.gaps_ms):
                    last = request * len(answer.gaps_ms) + index
                    self.writer.sample(gaps, last, gap, now)
                self.writer.sample(each, request, answer.tpot_ms, now)
                self.writer.sample(whole, request, answer.e2e_ms, now)
                self._after(pacing, gaps, last)
            self._note_events(gaps, last)

    def _has(self, key: BlockKey, requests: int) -> bool:
        """Whether a row is there already; its requests then count as done."""
        if key in self.measured:
            self._count(requests)
        return key in self.measured

    @contextmanager
    def _block(self, phase: str, keys: Sequence[BlockKey], tokens: int) -> Iterator[None]:
        """Path counters, memory and energy of a row, written even where the row is cut short. ``tokens``: of each
        request."""
        self.turn("block")
        before = self.case.paths().get(phase, {})
        self._seen = self.instruments.counts()
        start, joules = self.done, self.instruments.energy_j()
        try:
            yield
        finally:
            used = _difference(joules, self.instruments.energy_j())
            after = self.case.paths().get(phase, {})
            paths = {name: count - before.get(name, 0) for name, count in after.items()}
            if self.done > start:
                made = (self.done - start) * tokens
                host = self.instruments.host_memory_gib()
                for key in keys:
                    self.writer.block(key, BlockFacts(paths, self._memory_gib(), host, used, made))
            self.writer.flush()
            self.progress(self.done)

    def _memory_gib(self) -> float | None:
        peak = self.case.peak_memory_bytes()
        return None if peak is None else peak / 2**30

    def _before(self, pacing: str) -> None:
        self.turn("request")
        if pacing == INTERACTIVE:
            self.sleep(PAUSE_S)

    def _after(self, pacing: str, key: BlockKey, iteration: int) -> None:
        """Between two requests: back to back, nothing but the count."""
        self.done += 1
        if pacing == INTERACTIVE:
            self._note_events(key, iteration)
            self.writer.flush()
            self.progress(self.done)

    def _note_events(self, key: BlockKey, iteration: int) -> None:
        """Writes what has happened since the last look, beside the sample it fell into; back to back there is one look
        at the end of the row, so its events stand at the last sample."""
        counts = self.instruments.counts()
        now = time.time()
        for name, count in sorted((counts - self._seen).items()):
            for _ in range(count):
                self.writer.event(key, Event(name, iteration, now))
        self._seen = counts

    def _count(self, requests: int) -> None:
        self.done += requests
        self.progress(self.done)

    def _check_time(self) -> None:
        if self.deadline_s is not None and time.time() > self.deadline_s:
            raise TimeUp("the time limit was reached; rows not measured yet are missing")


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before
