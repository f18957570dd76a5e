"""What the benchmark touches inside an engine, all of it here: things that users have no use for.

Main thread, with the engine's lock where something is changed.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from jitgraph import LLM
from jitgraph.bench.ceiling import model_linears
from jitgraph.graphs.captured import CapturedGraph, ShadowCapture
from jitgraph.graphs.key import GraphKey, Path, Phase, Sampling
from jitgraph.graphs.store import Store


class InjectedFailure(RuntimeError):
    """A failure that the benchmark planted."""


def linear_matrices(llm: LLM) -> list[Any]:
    """The matrices of the engine's own weights, ``[out, in]``, in the order of a step."""
    return model_linears(llm._engine.runner._program.decoder.weights)


def store(llm: LLM) -> Store[CapturedGraph]:
    """The engine's graphs."""
    return llm._engine.store


def prompt_key(tokens: int) -> GraphKey:
    """The key of a prompt's step."""
    return GraphKey(Phase.PREFILL, tokens, Sampling.FULL)


def make_room(llm: LLM, lengths: Sequence[int]) -> None:
    """Room for graphs of these prompt lengths, and demand for them. What the limit left out at the start has run, so
    that it may be captured beside running steps; it waits in the order of its length."""
    with llm._lock:
        store(llm).budget.max_graphs += len(lengths)
        for length in lengths:
            store(llm).want(prompt_key(length))


def reserve(llm: LLM, graphs: int) -> None:
    """Driver memory for so many graphs more, taken as an engine takes it for its ``max_graphs`` before it is ready:
    there ``make_room`` raises the limit afterwards."""
    engine = llm._engine
    largest = prompt_key(engine.sizing.chunk_tokens)
    with llm._lock, torch.inference_mode():
        engine._shadow.abandon()
        engine._capturer.reserve(engine.runner._program.graph_part(largest), graphs if llm.device.type == "cuda" else 0)


def want(llm: LLM, lengths: Iterable[int], requests: int = 0) -> None:
    """Demand for the graphs of these prompt lengths, as prompts of these lengths make it; ``requests`` others were
    served before, which is the store's measure of time."""
    with llm._lock:
        for _ in range(requests):
            store(llm).served(Path.EXACT)
        for length in lengths:
            store(llm).want(prompt_key(length))


def capture_piece(llm: LLM) -> None:
    """One piece of capturing, now: on the CPU a step leaves no time to wait in, so that somebody must do it between
    two tokens."""
    with llm._lock:
        llm._engine._shadow.advance()


def blocking_captures(llm: LLM) -> int:
    """Captures that the engine's thread stood still for, those before ready included."""
    return llm._engine._capturer.captures


def decode_graphs_used(llm: LLM) -> list[str]:
    """Keys of the decode graphs that a step has replayed."""
    entries = store(llm)._entries.values()
    return sorted(str(entry.key) for entry in entries if entry.key.phase is Phase.DECODE and entry.ticket >= 0)


def graph_memory_bytes(llm: LLM) -> tuple[int, int]:
    """Device memory that the graphs of the start took from the driver, and that of the pool they share."""
    report = llm._engine.ready
    return report.graph_bytes, report.pool_bytes


# ------------------------------------------------------------------------------------------------------------- failures

STAGES = ("begin", "stage", "end", "instantiate")


class FailingCapture:
    """A capture that fails at one stage, as far into it as may be: what is open then has to be closed."""

    def __init__(self, inner: ShadowCapture, stage: str, after: int) -> None:
        self._inner = inner
        self._stage = stage
        self._left = after

    def _fail(self, stage: str) -> None:
        if stage == self._stage:
            raise InjectedFailure(f"planted at {stage}")

    def begin(self) -> None:
        """Opens the capture, then may fail."""
        self._inner.begin()
        self._fail("begin")

    def advance(self) -> bool:
        """Records a stage; after some of them it may fail."""
        done = self._inner.advance()
        self._left -= 1
        if self._left < 0 or done:
            self._fail("stage")
        return done

    def end(self) -> None:
        """May fail, the capture being open."""
        self._fail("end")
        self._inner.end()

    def instantiate(self) -> CapturedGraph:
        """May fail, the capture having ended."""
        self._fail("instantiate")
        return self._inner.instantiate()

    def abort(self) -> None:
        """Takes back what was begun."""
        self._inner.abort()


@contextmanager
def planted_failures(llm: LLM, share: float, seed: int) -> Iterator[dict[str, int]]:
    """Inside the block this share of the engine's captures fails, at each stage in turn; yields how many were planted
    at each so far."""
    shadow, generator = llm._engine._shadow, random.Random(seed)
    inner, planted = shadow._backend, dict.fromkeys(STAGES, 0)

    def backend(key: GraphKey) -> ShadowCapture:
        capture = inner(key)
        if generator.random() >= share:
            return capture
        stage = STAGES[sum(planted.values()) % len(STAGES)]
        planted[stage] += 1
        return FailingCapture(capture, stage, generator.randrange(40))

    shadow._backend = backend
    try:
        yield planted
    finally:
        shadow._backend = inner
