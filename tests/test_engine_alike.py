"""Prompts that begin alike and come at once: the beginning is computed once, and nobody waits for it in vain."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch
from engine_cases import answer, assert_nothing_left, bits, finish, make_engine, prompt, with_changes
from hypothesis import given, settings
from hypothesis import strategies as st

from jitgraph import SamplingParams
from jitgraph.engine.engine import Engine
from jitgraph.engine.scheduler import PrefillPlan, Scheduler, Sequence
from jitgraph.model.cache import PageAllocator
from jitgraph.model.prefix import PrefixIndex
from jitgraph.types import FinishReason, Request, TokenChunk

SPEC = with_changes(vocab_size=211, num_layers=2, layer_windows=(0, 0))
G = 8
SHORT_CHUNK = 16
SETTINGS: dict[str, Any] = {
    "page_size": G, "prefill_buckets": (4, 16, 48), "batch_invariant": True, "max_model_len": 256,
    "prefill_chunk_running": SHORT_CHUNK,
}  # fmt: skip
PARAMS = SamplingParams(max_tokens=6, logprobs=1)


def ids(length: int, kind: int = 0) -> tuple[int, ...]:
    return prompt(250, kind, SPEC.vocab_size)[:length]


@pytest.fixture
def engine(device: torch.device) -> Engine:
    return make_engine(device, SPEC, **SETTINGS)


def computed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(Request, prompt tokens) of each chunk that is launched from here on."""
    seen: list[tuple[int, int]] = []
    launch = engine.runner.launch

    def launched(plan: Any) -> Any:
        if isinstance(plan, PrefillPlan):
            seen.append((plan.sequence.request.request_id, plan.count))
        return launch(plan)

    monkeypatch.setattr(engine.runner, "launch", launched)
    return seen


@pytest.mark.parametrize("tail", [0, 5])
def test_the_same_beginning_at_once_is_computed_once(
    device: torch.device, engine: Engine, monkeypatch: pytest.MonkeyPatch, tail: int
) -> None:
    plain = make_engine(device, SPEC, **{**SETTINGS, "prefix_cache": False})
    prompts = [ids(200) + ids(250, kind)[:tail] for kind in range(1, 4)]
    expected = [answer(plain, one, PARAMS) for one in prompts]
    chunks, news = computed(engine, monkeypatch), dict[int, list[TokenChunk]]()
    for number, one in enumerate(prompts):
        engine.submit(Request(number, one, PARAMS))
    finish(engine, news)
    assert_nothing_left(engine)
    assert [bits(news[number]) for number in range(3)] == expected
    found = (199 + tail) // G * G if not tail else 200
    assert [news[number][0].cached_tokens for number in range(3)] == [0, found, found]
    assert sum(count for number, count in chunks if number == 0) == 200 + tail
    assert sum(count for number, count in chunks if number) == 2 * (200 + tail - found)


def test_what_is_computed_as_fast_does_not_wait(engine: Engine) -> None:
    for number in range(3):
        engine.submit(Request(number, ids(SHORT_CHUNK), PARAMS))
    engine.launch()
    assert len(engine.scheduler.running) == 3
    finish(engine, {})


def test_others_do_not_wait_with_it_and_take_no_place_from_it(device: torch.device) -> None:
    engine = make_engine(device, SPEC, **SETTINGS, max_streams=3)
    for number, one in enumerate([ids(200), ids(200), ids(30, 1), ids(30, 2)]):
        engine.submit(Request(number, one, PARAMS))
    engine.launch()
    names = [one.request.request_id for one in engine.scheduler.running]
    assert names == [0, 2], "the third place is kept for the second request"
    ended = set()
    while engine.busy:
        ended |= {chunk.request_id for chunk in engine.step() if chunk.finish_reason is not None}
        waiting = {one.request.request_id for one in engine.scheduler.waiting}
        assert 1 not in waiting or len(engine.scheduler.running) < 3
        assert 1 not in waiting or 0 not in ended, "and it does not wait for longer than it must"
    assert ended == {0, 1, 2, 3}
    assert_nothing_left(engine)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_whoever_was_waited_for_may_go(
    device: torch.device, engine: Engine, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """What it has computed by then is used, and the next one waits for the second."""
    plain = make_engine(device, SPEC, **{**SETTINGS, "prefix_cache": False})
    expected = answer(plain, ids(200), PARAMS)
    chunks, news = computed(engine, monkeypatch), dict[int, list[TokenChunk]]()
    for number in range(3):
        engine.submit(Request(number, ids(200), PARAMS))
    for _ in range(steps):
        engine.step()
    engine.cancel(0)
    finish(engine, news)
    assert_nothing_left(engine)
    assert bits(news[1]) == bits(news[2]) == expected
    assert news[2][0].cached_tokens == 192
    if steps == 3:
        assert news[1][0].cached_tokens > 0
    assert sum(count for number, count in chunks if number == 2) == 8


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 60), st.integers(1, 5), st.sampled_from(["", "x"])),
        min_size=1,
        max_size=12,
    ),
    streams=st.integers(1, 4),
    spare=st.integers(0, 40),
    lag=st.integers(1, 3),
    cancel=st.dictionaries(st.integers(0, 60), st.integers(0, 11), max_size=4),
)
def test_every_request_ends_whoever_waits_for_whom(
    requests: list[tuple[int, int, int, str]], streams: int, spare: int, lag: int, cancel: dict[int, int]
) -> None:
    """Families of prompts that begin alike, few slots, few pages, steps that are read late, cancels at any time."""
    size = 4
    index = PrefixIndex(size)
    pages = PageAllocator(2 + 17 + spare, index)  # the largest request fits
    scheduler = Scheduler(streams, 8, pages, index, 4)
    sequences = []
    for number, (kind, length, new, salt) in enumerate(requests):
        text = tuple(range(length)) if kind == 0 else (*range(length // 2), *range(100 * kind, 100 * kind + length))
        text = text[:length]
        request = Request(number, text, SamplingParams(max_tokens=new), salt=salt)
        sequences.append(Sequence(request, length + new, frozenset(), -(-(length + new) // size)))
        scheduler.add(sequences[-1])
    flights: deque[Any] = deque()
    for turn in range(4000):
        if cancel.get(turn, 99) < len(sequences):
            scheduler.finish(sequences[cancel[turn]], FinishReason.CANCELLED)
        while scheduler.admit() is not None:
            pass
        assert not scheduler.waiting or scheduler.running, "somebody waits and nobody works"
        assert len(scheduler.running) <= streams
        plan = scheduler.next_plan() if len(flights) < lag else None
        if plan is not None:
            flights.append(plan)
            continue
        if not flights:
            break
        done = flights.popleft()
        if isinstance(done, PrefillPlan):
            if done.emit:
                scheduler.record(done.sequence, 7)
            else:
                scheduler.chunk_read(done)
        else:
            for one in done.sequences:
                scheduler.record(one, 7)
    assert all(one.finished is not None for one in sequences)
    assert all(
        one.finished is FinishReason.CANCELLED or len(one.tokens) == one.request.params.max_tokens for one in sequences
    )
    assert pages.free == pages.total
