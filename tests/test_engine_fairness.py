"""Several streams on one engine: nobody starves, a long prompt delays others by one short chunk at a time, and whoever
waits past its deadline is told so.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from engine_cases import answer, assert_nothing_left, bits, finish, make_engine, prompt, steps_until, take, with_changes
from hypothesis import given, settings
from hypothesis import strategies as st

from jitgraph import SamplingParams
from jitgraph.config import DEFAULT_PREFILL_BUCKETS, EngineConfig
from jitgraph.engine import scheduler as scheduler_module
from jitgraph.engine.engine import Engine
from jitgraph.engine.scheduler import DecodePlan, Plan, PrefillPlan, Scheduler, Sequence
from jitgraph.engine.sizing import resolve_sizing
from jitgraph.errors import ConfigError, RequestError
from jitgraph.model.cache import PageAllocator
from jitgraph.types import FinishReason, Request, TokenChunk

CHUNK, SHORT = 16, 4


def sequence(identity: int, length: int, new: int, pages: int = 1, deadline_s: float | None = None) -> Sequence:
    request = Request(identity, tuple(range(length)), SamplingParams(max_tokens=new), deadline_s=deadline_s)
    return Sequence(request, length + new, frozenset(), pages)


def identity(one: Sequence) -> int:
    return one.request.request_id


# ----------------------------------------------------------------------------------------------------------- scheduler


@settings(max_examples=300, deadline=None)
@given(
    streams=st.integers(1, 8),
    arrivals=st.lists(
        st.tuples(st.integers(0, 12), st.integers(1, 90), st.integers(1, 30), st.integers(1, 4)),
        min_size=1,
        max_size=25,
    ),
    cancelled=st.sets(st.integers(0, 24), max_size=5),
    late=st.integers(0, 2),
)
def test_everybody_gets_on(
    streams: int, arrivals: list[tuple[int, int, int, int]], cancelled: set[int], late: int
) -> None:
    """Under any load, a flood of newcomers included: who may decode does so in one plan of two; whose prompt waits gets
    a chunk within one turn of all the others; while anybody decodes, chunks are short and never follow one another.
    ``late``: plans that are launched before the first is read."""
    scheduler = Scheduler(streams, CHUNK, PageAllocator(9), None, SHORT)
    coming = [(delay, sequence(i, length, new, pages)) for i, (delay, length, new, pages) in enumerate(arrivals)]
    everyone = [one for _, one in coming]
    flights: list[Plan] = []
    admitted: list[int] = []
    since_chunk: dict[Sequence, int] = {}
    since_row: dict[Sequence, int] = {}
    last: Plan | None = None
    for turn in range(5000):
        while coming and coming[0][0] <= 0:
            scheduler.add(coming.pop(0)[1])
        if coming:
            coming[0] = (coming[0][0] - 1, coming[0][1])
        while (newcomer := scheduler.admit()) is not None:
            admitted.append(identity(newcomer))
        could_decode = [one for one in scheduler.running if one.decoding]
        plan = scheduler.next_plan()
        if isinstance(plan, PrefillPlan):
            assert plan.count <= (SHORT if could_decode else CHUNK)
            assert not (could_decode and isinstance(last, PrefillPlan))
        for one in scheduler.running:
            asked, got = one.prefilled < one.prompt_length, getattr(plan, "sequence", None) is one
            since_chunk[one] = 0 if got or not asked else since_chunk.get(one, 0) + 1
            assert since_chunk[one] <= 2 * streams
        for one in could_decode:
            got = isinstance(plan, DecodePlan) and one in plan.sequences
            since_row[one] = 0 if got else since_row.get(one, 0) + 1
            assert since_row[one] <= 1
        last = plan
        if plan is not None:
            flights.append(plan)
        while flights and (len(flights) > late or plan is None):
            read = flights.pop(0)
            if isinstance(read, PrefillPlan) and not read.emit:
                scheduler.chunk_read(read)
                continue
            for one in read.sequences if isinstance(read, DecodePlan) else (read.sequence,):  # type: ignore[union-attr]
                scheduler.record(one, 1)
        for one in [*scheduler.running, *scheduler.waiting]:
            if identity(one) in cancelled and turn > 3 + 2 * identity(one):
                scheduler.finish(one, FinishReason.CANCELLED)
        if not coming and scheduler.idle and not flights:
            break
    assert scheduler.idle and not coming and not flights
    assert admitted == sorted(admitted), "first come, first served"
    for one in everyone:
        if identity(one) not in cancelled:
            assert one.finished is FinishReason.LENGTH and len(one.tokens) == one.request.params.max_tokens


def test_prompts_take_turns() -> None:
    """One chunk each, in the order of admission; a newcomer joins at the end of the round."""
    scheduler = Scheduler(4, CHUNK, PageAllocator(9))
    for number, length in enumerate((5 * CHUNK, 2 * CHUNK, 1)):
        scheduler.add(sequence(number, length, 1))
    while scheduler.admit() is not None:
        pass
    order: list[int] = []
    while (plan := scheduler.next_plan()) is not None:
        assert isinstance(plan, PrefillPlan)
        order.append(identity(plan.sequence))
        if len(order) == 1:
            scheduler.add(sequence(3, CHUNK + 1, 1))
            scheduler.admit()
    assert order == [0, 1, 2, 0, 3, 1, 0, 3, 0, 0]


def test_chunks_grow_when_nobody_decodes_any_more() -> None:
    scheduler = Scheduler(2, CHUNK, PageAllocator(9), None, SHORT)
    stream, long = sequence(0, 3, 4), sequence(1, 60, 1)
    for one in (stream, long):
        scheduler.add(one)
        scheduler.admit()
    counts = []
    while (plan := scheduler.next_plan()) is not None:
        counts.append(plan.count if isinstance(plan, PrefillPlan) else 0)
        for one in plan.sequences if isinstance(plan, DecodePlan) else ():
            scheduler.record(one, 1)
        if isinstance(plan, PrefillPlan) and plan.emit:
            scheduler.record(plan.sequence, 1)
    assert counts == [3, 0, SHORT, 0, SHORT, 0, CHUNK, CHUNK, CHUNK, 60 - 2 * SHORT - 3 * CHUNK]


def test_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only who still waits when its time has come; nobody who runs, and nobody without a deadline."""
    now = 100.0
    monkeypatch.setattr(scheduler_module.time, "monotonic", lambda: now)
    scheduler = Scheduler(1, CHUNK, PageAllocator(9))
    runs, soon, never, later = (sequence(i, 3, 5, 1, when) for i, when in enumerate((101.0, 101.0, None, 103.0)))
    for one in (runs, soon, never, later):
        scheduler.add(one)
    assert scheduler.admit() is runs and not scheduler.overdue and scheduler.expire() == []
    now = 101.0
    assert scheduler.overdue and scheduler.expire() == [soon] and not scheduler.overdue
    assert (
        soon.finished is FinishReason.CANCELLED and runs.finished is None and list(scheduler.waiting) == [never, later]
    )
    now = 200.0
    assert scheduler.expire() == [later] and list(scheduler.waiting) == [never]
    scheduler.finish(runs, FinishReason.CANCELLED)
    assert scheduler.admit() is never and not scheduler.overdue


# ------------------------------------------------------------------------------------------------------------- engine


class Plans:
    """What an engine launches: each chunk's request and size, and 0 for a decode step."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[int, int]] = []
        launch = engine.runner.launch

        def launched(plan: Plan) -> Any:
            chunk = isinstance(plan, PrefillPlan)
            self.seen.append((identity(plan.sequence), plan.count) if chunk else (-1, 0))  # type: ignore[union-attr]
            return launch(plan)

        monkeypatch.setattr(engine.runner, "launch", launched)


def test_a_long_prompt_beside_a_stream(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the moment it comes, the stream gets a token between any two of its chunks, which are short; alone it is cut
    into large ones. The tokens are the same."""
    engine = make_engine(device, batch_invariant=True, prefill_chunk_running=20, max_model_len=400)
    params, long = SamplingParams(max_tokens=60, ignore_eos=True), SamplingParams(max_tokens=3)
    expected = [answer(engine, ids, one) for ids, one in ((prompt(5), params), (prompt(300), long))]
    engine = make_engine(device, batch_invariant=True, prefill_chunk_running=20, max_model_len=400)
    plans = Plans(engine, monkeypatch)
    chunks: dict[int, list[TokenChunk]] = {}
    engine.submit(Request(0, prompt(5), params))
    steps_until(engine, chunks, 0, 5)
    plans.seen.clear()
    engine.submit(Request(1, prompt(300), long))
    steps_until(engine, chunks, 1, 1)
    seen = plans.seen[: plans.seen.index((1, 300 % 16)) + 1]
    assert [count for who, count in seen if who == 1] == [16] * (300 // 16) + [300 % 16]
    assert all(0 in (one, other) for (_, one), (_, other) in pairwise(seen)), "never two chunks in a row"
    finish(engine, chunks)
    assert [bits(chunks[0]), bits(chunks[1])] == expected
    plans.seen.clear()
    engine.submit(Request(2, prompt(300, salt=1), long))
    finish(engine, chunks)
    assert [count for who, count in plans.seen if who == 2] == [48] * 6 + [12]
    assert_nothing_left(engine)


def test_a_short_prompt_behind_a_long_one(device: torch.device) -> None:
    """It is answered while the long one is still being read."""
    engine = make_engine(device, max_model_len=400)
    chunks: dict[int, list[TokenChunk]] = {}
    engine.submit(Request(0, prompt(390), SamplingParams(max_tokens=2)))
    engine.submit(Request(1, prompt(7), SamplingParams(max_tokens=2, ignore_eos=True)))
    steps_until(engine, chunks, 1, 2)
    assert 0 not in chunks
    finish(engine, chunks)
    assert len(chunks[0]) == len(chunks[1]) == 2
    assert_nothing_left(engine)


@pytest.mark.parametrize("loops", [True, False])
def test_a_deadline_that_passes(device: torch.device, monkeypatch: pytest.MonkeyPatch, loops: bool) -> None:
    """Whoever could not begin in time ends as cancelled, without a token, while the others notice nothing; also where a
    lone stream runs in loops and nothing has to be planned."""
    now = 50.0
    monkeypatch.setattr(scheduler_module.time, "monotonic", lambda: now)
    engine = make_engine(device, max_streams=1, device_loop=loops)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    expected = answer(engine, prompt(5), params)
    chunks: dict[int, list[TokenChunk]] = {}
    engine.submit(Request(0, prompt(5), params, deadline_s=51.0))
    steps_until(engine, chunks, 0, 6)
    engine.submit(Request(1, prompt(6), params, deadline_s=51.0))
    engine.submit(Request(2, prompt(7), params, deadline_s=1e9))
    steps_until(engine, chunks, 0, 12)
    assert 1 not in chunks
    now = 51.0
    take(engine, chunks)
    (ended,) = chunks[1]
    assert ended.token_id is None and ended.finish_reason is FinishReason.CANCELLED
    engine.cancel(1)  # is known no more
    finish(engine, chunks)
    assert bits(chunks[0]) == expected and len(chunks[2]) == 40 and len(chunks[1]) == 1
    assert_nothing_left(engine)


def test_a_deadline_that_has_passed_already(device: torch.device) -> None:
    """It ends at the next step, whoever is there or not."""
    engine = make_engine(device)
    engine.submit(Request(0, prompt(6), SamplingParams(max_tokens=4), deadline_s=0.0))
    assert engine.busy
    chunks: dict[int, list[TokenChunk]] = {}
    finish(engine, chunks)
    assert [chunk.finish_reason for chunk in chunks[0]] == [FinishReason.CANCELLED]
    assert engine.runner.launches == 0
    assert_nothing_left(engine)


# ----------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("limit", "expected"), [(128, 128), (127, 96), (1, 8), (7, 8), (512, 512), (10**6, 512), (200, 192)]
)
def test_the_limit_is_a_bucket(limit: int, expected: int) -> None:
    spec = with_changes(max_position_embeddings=1024)
    config = EngineConfig(prefill_chunk_running=limit, max_model_len=1024)
    assert resolve_sizing(config, spec, 4).running_chunk_tokens == expected and expected in DEFAULT_PREFILL_BUCKETS


@pytest.mark.parametrize("value", [0, -1, True, "128", 1.5, None])
def test_limits_that_are_none(value: Any) -> None:
    with pytest.raises(ConfigError, match="prefill_chunk_running") as caught:
        EngineConfig(prefill_chunk_running=value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [{"salt": None}, {"salt": b"a"}, {"deadline_s": "soon"}, {"deadline_s": float("nan")}, {"deadline_s": True}],
)
def test_requests_that_are_none(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(RequestError, match=name):
        Request(0, (5,), SamplingParams(), **fields)


@pytest.mark.parametrize("value", [0, "yes", None])
def test_the_switch_of_the_prefix_cache(value: Any) -> None:
    with pytest.raises(ConfigError, match="prefix_cache must be true or false"):
        EngineConfig(prefix_cache=value)
