"""The timing protocol of one case: first requests, correctness gate, then the blocks of every row.

Runs on the main thread of the case's process. Nothing but the case runs inside a timed call, and garbage collection is
held still around the timed loops; lines go to the raw file between requests (interactive) or after a block (sustained).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from jitgraph.bench.cases.common import Case
from jitgraph.bench.gate import Reference, mismatches
from jitgraph.bench.plan import DECODE_TOKENS, INTERACTIVE, PAUSE_S, PROTOCOLS, WARMUP, WARMUP_REQUESTS, Plan
from jitgraph.bench.records import BlockKey, RawWriter
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
    sleep: Callable[[float], None] = time.sleep
    done: int = field(default=0, init=False)
    _certain: dict[int, int] = field(default_factory=dict, init=False)
    """Prompt length to the first token that every request must give, where the reference is certain."""

    def cold(self, ready_s: float, reference: Mapping[int, Reference] | None) -> list[str]:
        """First requests of the process, the gate, and only then their rows. Returns what the gate says it checked.

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
        gaps = {length: self.case.decode(self.prompts[length], DECODE_TOKENS) for length in self.plan.decode_lengths}
        self._count(len(gaps))
        now = time.time()
        memory = self.case.peak_memory_bytes() / 2**30
        ready = BlockKey(self.name, WARMUP, "ready_s", INTERACTIVE, 0)
        self.writer.sample(ready, 0, ready_s * 1e3, now)
        self.writer.block(ready, {}, memory)
        for length, token in first.items():
            key = BlockKey(self.name, WARMUP, "ttft_ms", INTERACTIVE, length)
            self.writer.sample(key, 0, token.client_ms, now)
            self.writer.block(key, {}, memory)
        for length, values in gaps.items():
            key = BlockKey(self.name, WARMUP, "itl_ms", INTERACTIVE, length)
            for index, gap in enumerate(values):
                self.writer.sample(key, index, gap, now)
            self.writer.block(key, {}, memory)
        self.writer.flush()
        return checked

    def timed(self) -> None:
        """Every row of the plan.

        Raises:
            TimeUp: the deadline passed; the rows so far are written.
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
        self._check_time()
        client = BlockKey(self.name, protocol, "ttft_ms", pacing, length)
        engine = BlockKey(self.name, protocol, "engine_ttft_ms", pacing, length)
        keys, prompt = [client], self.prompts[length]
        with self._block("prefill", keys):
            for iteration in range(self.plan.iterations(protocol)):
                self._pause(pacing)
                token = self.case.first_token(prompt)
                now = time.time()
                if token.token_id != self._certain.get(length, token.token_id):
                    raise GateFailed(
                        f"request {iteration} at {length} tokens gave another first token than the reference"
                    )
                self.writer.sample(client, iteration, token.client_ms, now)
                if token.engine_ms is not None:
                    keys[1:] = [engine]
                    self.writer.sample(engine, iteration, token.engine_ms, now)
                self._after(pacing)

    def _itl_block(self, protocol: str, pacing: str, length: int) -> None:
        self._check_time()
        key = BlockKey(self.name, protocol, "itl_ms", pacing, length)
        with self._block("decode", [key]):
            for request in range(self.plan.decode_requests(protocol)):
                self._pause(pacing)
                gaps = self.case.decode(self.prompts[length], DECODE_TOKENS)
                now = time.time()
                for index, gap in enumerate(gaps):
                    self.writer.sample(key, request * len(gaps) + index, gap, now)
                self._after(pacing)

    @contextmanager
    def _block(self, phase: str, keys: Sequence[BlockKey]) -> Iterator[None]:
        """Path counters and memory of a row, written even where the row is cut short."""
        before = self.case.paths().get(phase, {})
        start = self.done
        try:
            yield
        finally:
            after = self.case.paths().get(phase, {})
            paths = {name: count - before.get(name, 0) for name, count in after.items()}
            if self.done > start:
                for key in keys:
                    self.writer.block(key, paths, self.case.peak_memory_bytes() / 2**30)
            self.writer.flush()
            self.progress(self.done)

    def _pause(self, pacing: str) -> None:
        if pacing == INTERACTIVE:
            self.sleep(PAUSE_S)

    def _after(self, pacing: str) -> None:
        """Between two requests: back to back, nothing but the count."""
        self.done += 1
        if pacing == INTERACTIVE:
            self.writer.flush()
            self.progress(self.done)

    def _count(self, requests: int) -> None:
        self.done += requests
        self.progress(self.done)

    def _check_time(self) -> None:
        if self.deadline_s is not None and time.time() > self.deadline_s:
            raise TimeUp("the time limit was reached; rows not measured yet are missing")
