"""The scheduler alone: pure policy, driven through random lives of requests."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jitgraph.engine.scheduler import DecodePlan, LoopPlan, Plan, PrefillPlan, Scheduler, Sequence
from jitgraph.model.cache import PageAllocator
from jitgraph.types import FinishReason, Request, SamplingParams

CHUNK = 8


class Pages:
    """A page pool that checks every hand-over."""

    def __init__(self, count: int) -> None:
        self.owned: set[int] = set()
        self._spare = set(range(1, count + 1))

    @property
    def free(self) -> int:
        return len(self._spare)

    def upcoming(self, most: int) -> list[int]:
        return list(self._spare)[:most]

    def take(self, count: int) -> list[int] | None:
        if count > self.free:
            return None
        taken = [self._spare.pop() for _ in range(count)]
        self.owned.update(taken)
        return taken

    def give_back(self, pages: list[int]) -> None:
        for page in pages:
            self.owned.remove(page)
            self._spare.add(page)


def sequence(identity: int, prompt: int, new: int, pages: int, stop: frozenset[int] = frozenset()) -> Sequence:
    request = Request(identity, tuple(range(prompt)), SamplingParams(max_tokens=new))
    return Sequence(request, prompt + new, stop, pages)


@settings(max_examples=200, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(1, 6)), min_size=1, max_size=10),
    streams=st.integers(1, 8),
    ahead=st.integers(1, 3),
    stops=st.lists(st.integers(0, 3), min_size=40, max_size=40),
    cancel=st.sets(st.integers(0, 9), max_size=3),
)
def test_every_request_ends_and_nothing_leaks(
    requests: list[tuple[int, int, int]], streams: int, ahead: int, stops: list[int], cancel: set[int]
) -> None:
    """Whatever the load: chunks cover each prompt in order, no slot or page is shared, none is lost, all requests
    end."""
    pages = Pages(6)
    scheduler = Scheduler(streams, CHUNK, pages)
    everyone = [sequence(i, p, n, k, frozenset({0})) for i, (p, n, k) in enumerate(requests)]
    for one in everyone:
        scheduler.add(one)
    flights: deque[Plan] = deque()
    seen: dict[int, int] = {}
    for turn in range(2000):
        while (admitted := scheduler.admit()) is not None:
            assert len(admitted.pages) == admitted.pages_needed
        running = [one.slot for one in scheduler.running]
        assert len(set(running)) == len(running) <= streams
        assert sum(len(one.pages) for one in scheduler.running) == len(pages.owned)
        while len(flights) < ahead and (plan := scheduler.next_plan()) is not None:
            if isinstance(plan, PrefillPlan):
                start = seen.get(plan.sequence.request.request_id, 0)
                assert plan.start == start and 1 <= plan.count <= CHUNK
                seen[plan.sequence.request.request_id] = start + plan.count
                assert plan.emit == (start + plan.count == plan.sequence.prompt_length)
            flights.append(plan)
        if not flights:
            break
        plan = flights.popleft()
        rows = plan.sequences if isinstance(plan, DecodePlan) else (plan.sequence,) * plan.emit
        for one in rows:
            scheduler.record(one, stops[turn % len(stops)] + (turn % 7 != 0))
        for one in everyone:
            if one.request.request_id in cancel and turn == 5 + one.request.request_id:
                scheduler.finish(one, FinishReason.CANCELLED)
    assert scheduler.idle and not pages.owned
    for one in everyone:
        assert one.finished is not None
        assert len(one.tokens) <= one.request.params.max_tokens
        if one.finished is FinishReason.LENGTH:
            assert len(one.tokens) == one.request.params.max_tokens
        if one.finished is FinishReason.STOP:
            assert one.tokens[-1] == 0 and 0 not in one.tokens[:-1]


def test_prompt_chunks_and_decode_steps_alternate() -> None:
    """A long prompt does not starve a running stream, nor the other way round."""
    scheduler = Scheduler(2, CHUNK, Pages(10))
    first, second = sequence(0, 4, 50, 1), sequence(1, 40, 5, 1)
    scheduler.add(first)
    scheduler.admit()
    assert isinstance(scheduler.next_plan(), PrefillPlan)
    scheduler.add(second)
    scheduler.admit()
    kinds = [type(scheduler.next_plan()).__name__ for _ in range(8)]
    assert kinds == ["DecodePlan", "PrefillPlan"] * 4


def test_launching_ahead_never_passes_the_length() -> None:
    """With steps in flight, no more are launched than the request may have tokens."""
    scheduler = Scheduler(1, CHUNK, Pages(4))
    scheduler.add(sequence(0, 3, 2, 1))
    scheduler.admit()
    plans = [scheduler.next_plan() for _ in range(5)]
    assert [type(plan).__name__ for plan in plans] == ["PrefillPlan", "DecodePlan", "NoneType", "NoneType", "NoneType"]


def test_admission_waits_for_pages_in_order() -> None:
    """The oldest request goes first even where a younger one would fit; nothing is taken from a running one."""
    scheduler = Scheduler(4, CHUNK, Pages(5))
    big, bigger, small = sequence(0, 1, 1, 4), sequence(1, 1, 1, 3), sequence(2, 1, 1, 1)
    for one in (big, bigger, small):
        scheduler.add(one)
    assert [scheduler.admit(), scheduler.admit()] == [big, None]
    scheduler.finish(big, FinishReason.CANCELLED)
    assert [scheduler.admit(), scheduler.admit(), scheduler.admit()] == [bigger, small, None]


def test_every_prompt_is_cut_into_chunks() -> None:
    """Whole chunks and then the rest, for every prompt length; only the last chunk gives a token."""
    for length in range(1, 200):
        scheduler = Scheduler(1, CHUNK, Pages(1))
        scheduler.add(sequence(0, length, 1, 1))
        scheduler.admit()
        plans = []
        while (plan := scheduler.next_plan()) is not None:
            assert isinstance(plan, PrefillPlan)
            plans.append(plan)
        assert [plan.count for plan in plans[:-1]] == [CHUNK] * (len(plans) - 1)
        assert sum(plan.count for plan in plans) == length and 1 <= plans[-1].count <= CHUNK
        assert [plan.start for plan in plans] == [CHUNK * i for i in range(len(plans))]
        assert [plan.emit for plan in plans] == [False] * (len(plans) - 1) + [True]


def test_late_tokens_do_not_count() -> None:
    scheduler = Scheduler(1, CHUNK, Pages(4))
    one = sequence(0, 1, 10, 1, frozenset({7}))
    scheduler.add(one)
    scheduler.admit()
    assert scheduler.record(one, 5)
    assert scheduler.record(one, 7) and one.finished is FinishReason.STOP
    assert not scheduler.record(one, 9)
    assert one.tokens == [5, 7]


# ---------------------------------------------------------------------------------------------------------------- loops


def start(scheduler: Scheduler, *sequences: Sequence) -> None:
    """Adds, admits, and launches every prompt."""
    for one in sequences:
        scheduler.add(one)
        assert scheduler.admit() is one
    while any(one.prefilled < one.prompt_length for one in sequences):
        assert scheduler.next_plan() is not None


def test_a_sequence_is_alone_until_somebody_could_run() -> None:
    """Alone means that no other one runs, and that none that waits could: for want of a slot, or of its pages."""
    scheduler = Scheduler(2, CHUNK, Pages(5))
    first, second, big = sequence(0, 3, 9, 1), sequence(1, 3, 9, 1), sequence(2, 3, 9, 5)
    assert scheduler.lone() is None
    start(scheduler, first)
    assert scheduler.alone(first) and not scheduler.alone(second) and scheduler.lone() is first
    scheduler.add(big)
    assert not scheduler.admissible and scheduler.alone(first), "four pages are left, it needs five"
    scheduler.finish(big, FinishReason.CANCELLED)
    scheduler.add(second)
    assert scheduler.admissible and not scheduler.alone(first) and scheduler.lone() is None, "it could run now"
    scheduler.admit()
    assert not scheduler.admissible and not scheduler.alone(first) and scheduler.lone() is None, "it runs"
    scheduler.finish(first, FinishReason.CANCELLED)
    assert scheduler.alone(second) and scheduler.lone() is None, "its prompt has not been launched"
    scheduler.next_plan()
    assert scheduler.lone() is second
    one_slot = Scheduler(1, CHUNK, Pages(5))
    start(one_slot, first := sequence(0, 3, 9, 1))
    one_slot.add(sequence(1, 3, 9, 1))
    assert not one_slot.admissible and one_slot.lone() is first, "no slot is free"


@pytest.mark.parametrize("steps", [1, 3, 64])
def test_loops_cover_what_is_left_and_no_more(steps: int) -> None:
    """For every number of tokens: loops and the prompt's step together launch just as many as there may be."""
    for new in range(1, 70):
        scheduler = Scheduler(1, CHUNK, Pages(1))
        one = sequence(0, 11, new, 1)
        start(scheduler, one)
        counts = []
        while scheduler.lone() is one:
            plan = scheduler.plan_loop(one, steps)
            assert isinstance(plan, LoopPlan) and plan.sequence is one
            counts.append(plan.count)
        assert 1 + sum(counts) == new == one.launched and one.remaining == 0
        assert all(count == steps for count in counts[:-1]) and all(1 <= count <= steps for count in counts)
        assert scheduler.next_plan() is None


@settings(max_examples=100, deadline=None)
@given(new=st.integers(2, 40), steps=st.integers(1, 9), ran=st.lists(st.integers(0, 20), max_size=8))
def test_loops_that_are_called_off_lose_no_token(new: int, steps: int, ran: list[int]) -> None:
    """Two loops are launched, some steps of them run, the count starts again from what was read: in the end every
    token has been launched, read and counted once."""
    scheduler = Scheduler(1, CHUNK, Pages(1))
    one = sequence(0, 2, new, 1)
    start(scheduler, one)
    scheduler.record(one, 5)
    for done in [*ran, *[10**6] * new]:
        launched = sum(scheduler.plan_loop(one, steps).count for _ in range(2) if scheduler.lone() is one)
        for _ in range(min(done, launched)):
            assert scheduler.record(one, 5)
        if one.finished is not None:
            break
        scheduler.recount(one)
        assert one.launched == len(one.tokens) and one.remaining == new - len(one.tokens)
    assert one.finished is FinishReason.LENGTH and len(one.tokens) == new and scheduler.idle


# ------------------------------------------------------------------------------------------------- the shortest way in


@settings(max_examples=100, deadline=None)
@given(
    before=st.lists(st.tuples(st.integers(1, 4), st.booleans()), max_size=8),
    needed=st.integers(1, 5),
    asked=st.integers(0, 20),
)
def test_what_is_upcoming_is_what_comes(before: list[tuple[int, bool]], needed: int, asked: int) -> None:
    """Whatever has come and gone in whatever order: the next admission gets the slot and the pages foretold."""
    pages = PageAllocator(13)
    scheduler = Scheduler(3, CHUNK, pages)
    for identity, (count, stays) in enumerate(before):
        scheduler.add(one := sequence(identity, 3, 5, count))
        if scheduler.admit() is None or not stays:
            scheduler.finish(one, FinishReason.CANCELLED)
    for one in list(scheduler.running):
        scheduler.finish(one, FinishReason.CANCELLED)
    slot, foretold = scheduler.upcoming(asked)
    assert len(foretold) == min(asked, pages.total) and len(set(foretold)) == len(foretold)
    one = sequence(99, 3, 5, needed)
    assert scheduler.admit_whole(one)
    assert one.slot == slot and one.pages[:asked] == foretold[:needed]


def test_a_whole_prompt_is_admitted_alone_or_not_at_all() -> None:
    """One that fits a step and finds nobody is admitted with its step counted; any other changes nothing."""
    pages = PageAllocator(4)
    scheduler = Scheduler(2, CHUNK, pages)
    for refused in (sequence(0, CHUNK + 1, 5, 1), sequence(1, 3, 5, 4)):
        assert not scheduler.admit_whole(refused)
        assert scheduler.idle and pages.free == pages.total == 3 and refused.slot == -1 and not refused.launched
    one = sequence(2, CHUNK, 2, 3)
    assert scheduler.admit_whole(one)
    assert (one.prefilled, one.launched, one.remaining) == (CHUNK, 1, 1) and scheduler.lone() is one
    assert not scheduler.admit_whole(sequence(3, 3, 5, 1)), "somebody runs"
    scheduler.record(one, 5)
    assert isinstance(scheduler.next_plan(), DecodePlan)
    scheduler.record(one, 5)
    assert one.finished is FinishReason.LENGTH and scheduler.idle and pages.free == pages.total
    scheduler.add(sequence(4, 3, 5, 1))
    assert not scheduler.admit_whole(sequence(5, 3, 5, 1)), "somebody waits"
