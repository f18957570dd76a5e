"""The engine as a whole through random lives of requests: each gets, bit for bit, what it gets alone, and everything
comes back in the end.

The engine is batch-invariant, so that company may change nothing at all; pages are short, graphs roll, loops are of a
few steps, and the emulated device gets ahead of the host by any number of pieces.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from engine_cases import (
    Bits,
    answer,
    assert_nothing_left,
    bits,
    finish,
    make_engine,
    prompt,
    run_ahead,
    take,
    with_changes,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from jitgraph.engine.engine import Engine
from jitgraph.graphs.key import GraphKey
from jitgraph.types import FinishReason, Request, SamplingParams, TokenChunk

SPEC = with_changes(vocab_size=67, hidden_size=16, intermediate_size=24, num_heads=2, num_kv_heads=1)
PAGE = 8
BUCKETS = (4, 12)
SETTINGS: dict[str, Any] = {
    "max_streams": 3,
    "page_size": PAGE,
    "prefill_buckets": BUCKETS,
    "batch_invariant": True,
    "rolling": True,
    "loop_steps": 3,
    "max_graphs": 3 * 2 + 4,
}
WINDOWS = {"all tokens": {"max_model_len": 64}, "rolling window": {"kv_window": 20}}
PAGES = 9
"""Fewer than three long sequences need, so that some wait for memory."""
PARAMS = (
    {},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 1, "logprobs": 2},
    {"repetition_penalty": 1.4, "frequency_penalty": 0.2, "logprobs": 0},
    {"stop_token_ids": tuple(range(10)), "min_tokens": 2},
    {"temperature": 1.3, "seed": 5, "stop_token_ids": tuple(range(0, 60, 4)), "logit_bias": {7: 1.0}},
)


DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def short_of_memory(window: str) -> Engine:
    """The engine under test."""
    budget = PAGES * SPEC.kv_bytes_per_token(2 if DEVICE.type == "cuda" else 4) * PAGE
    return make_engine(DEVICE, SPEC, kv_cache_memory=budget, **SETTINGS, **WINDOWS[window])


@cache
def undisturbed(window: str) -> Engine:
    """One that serves one request at a time, step by step."""
    settings = {**SETTINGS, **WINDOWS[window], "device_loop": False, "rolling": False, "max_streams": 1}
    return make_engine(DEVICE, SPEC, **settings)


@cache
def expected(window: str, length: int, kind: int, most: int) -> Bits:
    return answer(undisturbed(window), prompt(length, vocabulary=SPEC.vocab_size), params(kind, most))


def params(kind: int, most: int) -> SamplingParams:
    values: dict[str, Any] = dict(PARAMS[kind])
    return SamplingParams(**{**values, "max_tokens": most, "min_tokens": min(most, values.get("min_tokens", 0))})


arrivals = st.tuples(
    st.sampled_from(["submit", "stream"]),
    st.integers(1, 30),
    st.integers(0, len(PARAMS) - 1),
    st.sampled_from([1, 2, 4, 7, 12, 22]),
)
moves = st.one_of(
    arrivals,
    arrivals,
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("launch")),
    st.tuples(st.just("ahead"), st.integers(1, 9)),
    st.tuples(st.just("cancel"), st.integers(0, 7)),
    st.tuples(st.just("idle"), st.integers(1, 9)),
    st.tuples(st.just("idle"), st.just(1000)),
    st.tuples(st.just("drain")),
    st.tuples(st.just("trap"), st.integers(1, 8), st.booleans()),
)


class Life:
    """An engine, the requests it was given, and what came of them."""

    def __init__(self, window: str) -> None:
        self.window = window
        self.engine = short_of_memory(window)
        self.asked: list[tuple[int, int, int]] = []
        self.cancelled: dict[int, int] = {}
        """Request to the tokens that had come by then."""
        self.chunks: dict[int, list[TokenChunk]] = {}
        self.trap: tuple[int, bool] | None = None
        """Steps until an interrupt, and whether it comes before the step's work or after it."""
        program = self.engine.runner._program
        self.prepare = program.prepare
        if self.engine.emulated:  # a GPU's work cannot be interrupted
            program.prepare = self._trapped  # type: ignore[method-assign]

    def _trapped(self, key: GraphKey) -> None:
        left, before = self.trap or (0, False)
        self.trap = None if left <= 1 else (left - 1, before)
        if left == 1 and before:
            raise KeyboardInterrupt
        self.prepare(key)
        if left == 1:
            raise KeyboardInterrupt

    def play(self, move: tuple[Any, ...]) -> None:
        try:
            getattr(self, f"_{move[0]}")(*move[1:])
        except KeyboardInterrupt:  # it ended whatever was there
            for identity in range(len(self.asked)):
                if identity not in self.cancelled and not self._ended(identity):
                    self.cancelled[identity] = len(self.chunks.get(identity, ()))
        held = {page for one in self.engine.scheduler.running for page in (*one.pages, *(p.page for p in one.chain))}
        assert len(held) + self.engine.pages.free == self.engine.pages.total
        slots = [one.slot for one in self.engine.scheduler.running]
        assert len(set(slots)) == len(slots)
        assert len(self.engine.store.ready_keys) <= SETTINGS["max_graphs"]

    def _ended(self, identity: int) -> bool:
        return any(chunk.finish_reason is not None for chunk in self.chunks.get(identity, ()))

    def _trap(self, steps: int, before: bool) -> None:
        self.trap = steps, before

    def _submit(self, length: int, kind: int, most: int) -> None:
        self.engine.submit(self._request(length, kind, most))

    def _stream(self, length: int, kind: int, most: int) -> None:
        """As a stream does: by the shortest way where there is one."""
        request = self._request(length, kind, most)
        shot = self.engine.fire(request.prompt_token_ids, request.params)
        if shot is not None:
            self.engine.book(request, shot)
        else:
            self.engine.submit(request)
            self.engine.launch()

    def _request(self, length: int, kind: int, most: int) -> Request:
        self.asked.append((length, kind, most))
        return Request(len(self.asked) - 1, prompt(length, vocabulary=SPEC.vocab_size), params(kind, most))

    def _step(self, times: int) -> None:
        for _ in range(times):
            take(self.engine, self.chunks)

    def _launch(self) -> None:
        self.engine.launch()

    def _ahead(self, pieces: int) -> None:
        self.trap = None
        run_ahead(self.engine, pieces)

    def _cancel(self, which: int) -> None:
        if which < len(self.asked):
            if which not in self.cancelled and which in self.engine._sequences:
                self.cancelled[which] = len(self.chunks.get(which, ()))
            self.engine.cancel(which)

    def _idle(self, pieces: int) -> None:
        for _ in range(pieces):
            self.engine.work_while_idle()

    def _drain(self) -> None:
        """Only without live requests: what is read then is dropped."""
        if self.engine.scheduler.idle:
            self.engine.drain()

    def check(self) -> None:
        self.trap = None
        finish(self.engine, self.chunks)
        assert_nothing_left(self.engine)
        for identity, asked in enumerate(self.asked):
            found, alone = bits(self.chunks.get(identity, [])), expected(self.window, *asked)
            if identity in self.cancelled:
                if found and found[-1][-1] is FinishReason.CANCELLED:
                    found.pop()  # the news of an interrupt
                # What had been recorded by then may still be handed out, and nothing after it.
                assert found == alone[: len(found)] and len(found) >= self.cancelled[identity]
            else:
                assert found == alone


@pytest.mark.parametrize("window", WINDOWS)
@settings(
    max_examples=100,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(script=st.lists(moves, min_size=8, max_size=30))
def test_everybody_gets_what_he_gets_alone(window: str, script: list[tuple[Any, ...]]) -> None:
    life = Life(window)
    for move in script:
        life.play(move)
    life.check()
    life.engine.close()
