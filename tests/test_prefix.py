"""Which pages are kept and found again: the index alone, and with the scheduler before a device that checks whatever it
reads. Pure Python.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jitgraph.engine.scheduler import DecodePlan, Plan, PrefillPlan, Scheduler, Sequence
from jitgraph.model import prefix
from jitgraph.model.cache import PageAllocator
from jitgraph.model.prefix import PrefixIndex
from jitgraph.types import FinishReason, Request, SamplingParams

G = 4
"""Tokens of a page."""


def book(pages: int = 20, outputs: bool = True) -> tuple[PageAllocator, PrefixIndex]:
    index = PrefixIndex(G, outputs)
    return PageAllocator(pages + 1, index), index


def live(pages: PageAllocator, ids: list[int], salt: str = "", output: tuple[int, ...] = ()) -> list[int]:
    """A sequence's whole life, nobody else being there; returns its pages."""
    index = pages.prefixes
    assert index is not None
    chain = index.match(salt, ids)
    index.hold(chain)
    own = pages.take(-(-(len(ids) + len(output)) // G) - len(chain))
    assert own is not None
    held = [page.page for page in chain] + own
    index.end(salt, ids, output, len(ids) + max(0, len(output) - 1), held, chain)
    pages.settle()
    return held


def found(index: PrefixIndex, ids: list[int], salt: str = "") -> list[int]:
    return [page.page for page in index.match(salt, ids)]


@pytest.mark.parametrize("length", range(1, 4 * G + 2))
def test_what_a_prompt_finds_of_itself(length: int) -> None:
    """Whole pages only, and never its last token, whose logits are wanted."""
    pages, index = book()
    ids = list(range(length))
    held = live(pages, ids)
    assert pages.free == pages.total and index.kept == length // G
    assert found(index, ids) == held[: (length - 1) // G]
    assert found(index, [*ids, 99]) == held[: length // G]
    assert found(index, [*ids[: length // 2], 99, *ids[length // 2 :]]) == held[: length // 2 // G]


def test_generated_tokens_are_found_too() -> None:
    """All but the last one: it was never fed, so its page has nothing of it."""
    pages, index = book()
    held = live(pages, [1, 2, 3, 4, 5], output=(6, 7, 8, 9))
    assert found(index, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == held[:2]
    held = live(pages, [21, 2, 3, 4, 5], output=(6, 7, 8))
    assert found(index, [21, 2, 3, 4, 5, 6, 7, 8, 9]) == held[:1]
    pages, index = book(outputs=False)
    held = live(pages, [1, 2, 3, 4, 5], output=(6, 7, 8, 9))
    assert found(index, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == held[:1], "unless decode steps have bits of their own"


def test_salts_share_nothing() -> None:
    pages, index = book()
    first = live(pages, list(range(9)), "a")
    assert found(index, list(range(9)), "b") == found(index, list(range(9))) == []
    second = live(pages, list(range(9)), "b")
    assert found(index, list(range(9)), "a") == first[:2] and found(index, list(range(9)), "b") == second[:2]
    assert not set(first[:2]) & set(second[:2])


def test_the_same_page_after_another_beginning_is_another_page() -> None:
    pages, index = book()
    first = live(pages, [1, 1, 1, 1, 7, 7, 7, 7])
    second = live(pages, [2, 2, 2, 2, 7, 7, 7, 7])
    assert found(index, [1, 1, 1, 1, 7, 7, 7, 7, 0]) == first
    assert found(index, [2, 2, 2, 2, 7, 7, 7, 7, 0]) == second
    assert found(index, [7, 7, 7, 7, 0]) == []


class Colliding(bytes):
    """A page's tokens, all with one hash."""

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        return bytes.__eq__(self, other)  # type: ignore[arg-type]

    def __getitem__(self, at: Any) -> Any:
        return Colliding(super().__getitem__(at))


def test_hashes_that_collide_find_nothing_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "pack", lambda ids, packed=prefix.pack: Colliding(packed(ids)))
    pages, index = book(60)
    prompts = [[a, 0, 0, b, 0, 0, 0, c, 5] for a in range(3) for b in range(3) for c in range(3)]
    for ids in prompts:
        live(pages, ids)
    pages.settle()
    assert len({hash(key[1]) for key in index._known}) == 1
    chains = [found(index, ids) for ids in prompts]
    assert all(len(chain) == 2 for chain in chains) and len(set(map(tuple, chains))) == len(prompts)
    assert found(index, [0, 0, 0, 3, 0, 0, 0, 0, 5]) == []


def test_the_least_recently_used_goes_first_and_ends_go_before_beginnings() -> None:
    pages, index = book(6)
    old, new = [1] * 8, [2] * 8
    live(pages, old)
    second = live(pages, new)
    live(pages, [*old, 3])  # used again; its third page is not full and goes back
    assert pages.free == 6 and index.kept == 4
    assert pages.upcoming(4)[2:] == [second[1], second[0]]
    assert pages.take(3) is not None
    assert found(index, [*new, 0]) == second[:1] and len(found(index, [*old, 0])) == 2
    assert pages.take(3) is not None and index.kept == 0 and pages.take(1) is None


def test_held_pages_are_not_free() -> None:
    pages, index = book(4)
    held = live(pages, list(range(8)))
    chain = index.match("", list(range(9)))
    index.hold(chain)
    assert pages.free == 2 and pages.take(3) is None
    own = pages.take(2)
    assert own is not None and not set(own) & set(held[:2])
    index.let_go(chain)
    assert pages.free == 2


def test_two_that_compute_the_same_keep_it_once() -> None:
    """The second's pages go back, and what it adds stands behind the first's."""
    pages, index = book()
    ids = list(range(4))
    first, second = pages.take(1), pages.take(3)
    assert first and second
    index.end("", ids, (), 4, first, [])
    index.end("", [*ids, 5, 6, 7, 8, 9], (), 9, second, [])
    assert pages.free == pages.total and index.kept == 2
    assert found(index, [*ids, 5, 6, 7, 8, 9]) == [first[0], second[1]]
    assert pages.take(pages.total) is not None and not index.kept


# ------------------------------------------------------------------------------------------------------ a whole device

CHUNK, SHORT = 6, 3
SLOTS = 3
STOP = 0


@dataclass(eq=False)
class OnDevice:
    """A slot as the device has it: block table, tokens so far, and whether it has seen the end."""

    sequence: Sequence
    table: list[int]
    tokens: list[int] = field(default_factory=list)
    finished: bool = False


def next_token(tokens: list[int]) -> int:
    """What the model says: any function of all tokens; ``STOP`` now and then."""
    return (sum(tokens) + 3 * len(tokens)) % 5


class Device:
    """KV cells that remember all they depend on. Launches run later, in order, as a stream's do."""

    def __init__(self) -> None:
        self.cells: dict[tuple[int, int], object] = {}
        self.launched: deque[tuple[Plan, list[OnDevice]]] = deque()
        self.executed: deque[tuple[Plan, list[int]]] = deque()
        self.slots: dict[Sequence, OnDevice] = {}

    def launch(self, plan: Plan) -> None:
        assert isinstance(plan, (PrefillPlan, DecodePlan))
        rows = plan.sequences if isinstance(plan, DecodePlan) else (plan.sequence,)
        for one in rows:
            if one not in self.slots:
                self.slots[one] = OnDevice(one, list(one.pages), list(one.request.prompt_token_ids[: one.cached]))
        self.launched.append((plan, [self.slots[one] for one in rows]))

    def execute(self) -> None:
        """The oldest launch: each row reads all cells before its own, and writes its own."""
        plan, rows = self.launched.popleft()
        given = []
        for row in rows:
            prompt = row.sequence.request.prompt_token_ids
            if isinstance(plan, PrefillPlan):
                self._feed(row, list(prompt[plan.start : plan.start + plan.count]), plan.start)
                emit = plan.emit
            else:
                emit = not row.finished
                if emit:
                    self._feed(row, [], len(row.tokens) - 1)
            if emit:
                token = next_token(row.tokens)
                row.tokens.append(token)
                row.finished = token == STOP or len(row.tokens) >= row.sequence.max_length
                given.append(token)
            else:
                given.append(-1)
        self.executed.append((plan, given))

    def _feed(self, row: OnDevice, ids: list[int], start: int) -> None:
        salt = row.sequence.request.salt
        row.tokens += ids
        if row.sequence.finished is None:
            for position in range(start):
                cell = self.cells.get((row.table[position // G], position % G))
                assert cell == (salt, tuple(row.tokens[: position + 1])), "a page holds what was not computed for it"
        for position in range(start, start + max(1, len(ids))):
            self.cells[row.table[position // G], position % G] = (salt, tuple(row.tokens[: position + 1]))


class Lives(RuleBasedStateMachine):
    """Requests that come, share beginnings, are cancelled with steps in flight, and fail: over few pages."""

    pages_in_all = 12

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(G)
        self.pages = PageAllocator(self.pages_in_all + 1, self.index)
        self.scheduler = Scheduler(SLOTS, CHUNK, self.pages, self.index, SHORT)
        self.device = Device()
        self.everyone: list[Sequence] = []

    def _sequence(self, kind: int, length: int, tail: int, new: int, salt: str) -> Sequence:
        prompt = (*(kind * (1 + i // 7) % 3 for i in range(length)), tail)
        request = Request(len(self.everyone), prompt, SamplingParams(max_tokens=new), salt)
        limit = len(prompt) + new
        one = Sequence(request, limit, frozenset({STOP}), max(1, -(-(limit - 1) // G)))
        self.everyone.append(one)
        return one

    shapes = st.tuples(
        st.integers(0, 2), st.integers(0, 24), st.integers(0, 2), st.integers(1, 9), st.sampled_from(["", "", "", "b"])
    )

    @rule(shape=shapes)
    def submit(self, shape: Any) -> None:
        self.scheduler.add(self._sequence(*shape))

    @precondition(lambda self: self.everyone)
    @rule(which=st.integers(0, 50), new=st.integers(1, 9), extra=st.integers(0, 5))
    def next_turn(self, which: int, new: int, extra: int) -> None:
        """What somebody said so far, and a little more."""
        before = self.everyone[which % len(self.everyone)]
        prompt = (*before.request.prompt_token_ids, *before.tokens, *range(extra))[:30]
        request = Request(len(self.everyone), prompt, SamplingParams(max_tokens=new), before.request.salt)
        limit = len(prompt) + new
        one = Sequence(request, limit, frozenset({STOP}), max(1, -(-(limit - 1) // G)))
        self.everyone.append(one)
        self.scheduler.add(one)

    @precondition(lambda self: self.scheduler.idle and not self.device.launched)
    @rule(shape=shapes)
    def express(self, shape: Any) -> None:
        """The shortest way: pages and slot are foretold, and are what is given."""
        one = self._sequence(*shape)
        slot, upcoming = self.scheduler.upcoming(self.pages_in_all)
        chain = self.index.match(one.request.salt, one.request.prompt_token_ids)
        cached = [page.page for page in chain]
        own = [page for page in upcoming if page not in cached][: one.pages_needed - len(chain)]
        if self.scheduler.admit_whole(one, chain):
            assert one.slot == slot and one.pages == cached + own
            start = one.cached
            self.device.launch(PrefillPlan(one, start, one.prompt_length - start, True))
        else:
            assert one.prompt_length - len(chain) * G > CHUNK
            self.everyone.pop()

    @rule(times=st.integers(1, 4))
    def launch(self, times: int) -> None:
        for _ in range(times):
            while self.scheduler.admit() is not None:
                pass
            plan = self.scheduler.next_plan()
            if plan is None:
                break
            self.device.launch(plan)
        if times % 2:
            self.pages.settle()

    @rule(times=st.integers(1, 8))
    def execute(self, times: int) -> None:
        for _ in range(min(times, len(self.device.launched))):
            self.device.execute()

    @rule(times=st.integers(1, 8))
    def read(self, times: int) -> None:
        for _ in range(min(times, len(self.device.executed))):
            plan, given = self.device.executed.popleft()
            if isinstance(plan, PrefillPlan) and not plan.emit:
                self.scheduler.chunk_read(plan)
                continue
            rows = plan.sequences if isinstance(plan, DecodePlan) else (plan.sequence,)  # type: ignore[union-attr]
            for one, token in zip(rows, given, strict=True):
                self.scheduler.record(one, token)

    @precondition(lambda self: self.scheduler.running or self.scheduler.waiting)
    @rule(which=st.integers(0, 50))
    def cancel(self, which: int) -> None:
        there = [*self.scheduler.running, *self.scheduler.waiting]
        self.scheduler.finish(there[which % len(there)], FinishReason.CANCELLED)

    @rule(really=st.integers(0, 9))
    def fail(self, really: int) -> None:
        """A launch broke off: device and books begin anew, and the cells hold anything."""
        if not really:
            self.device.launched.clear()
            self.device.executed.clear()
            self.device.cells = dict.fromkeys(self.device.cells, "garbage")
            self.scheduler.reset()
            assert self.scheduler.idle and self.pages.free == self.pages.total

    @invariant()
    def every_page_is_in_one_place(self) -> None:
        self.pages.settle()
        running, kept = self.scheduler.running, list(self.index._known.values())
        free, of_index = set(self.pages._free), {page.page for page in kept}
        own = [p for one in running for p in one.pages if p not in {page.page for page in one.chain}]
        assert len(free) == len(self.pages._free) and len(own) == len(set(own)) and len(kept) == len(of_index)
        assert not free & of_index and not free & set(own) and not of_index & set(own)
        assert len(free) + len(of_index) + len(own) == self.pages.total
        held = [page for one in running for page in one.chain]
        assert all(page.holders == held.count(page) for page in kept) and set(held) <= set(kept)
        assert {page for page in kept if not page.holders} == set(self.index._idle)
        assert self.pages.free == len(free) + self.index.idle

    @invariant()
    def ends_go_before_beginnings(self) -> None:
        place = {page.number: at for at, page in enumerate(self.index._idle)}
        by_number = {page.number: page for page in self.index._known.values()}
        for page in by_number.values():
            before = page.key[0]
            if isinstance(before, int):
                assert before in by_number, "a beginning went before its end"
                assert page.holders <= by_number[before].holders
                assert before not in place or place[page.number] < place[before]

    def teardown(self) -> None:
        """Everybody comes to an end, with the tokens that the model says, and all pages come back."""
        for _ in range(2000):
            self.launch(1)
            self.execute(1)
            self.read(1)
            if self.scheduler.idle and not self.device.launched and not self.device.executed:
                break
        assert self.scheduler.idle and self.pages.free == self.pages.total
        for one in self.everyone:
            tokens = list(one.request.prompt_token_ids)
            for token in one.tokens:
                assert token == next_token(tokens)
                tokens.append(token)
            assert one.finished is not None
            if one.finished is not FinishReason.CANCELLED:
                assert one.tokens[-1] == STOP or len(one.tokens) == one.request.params.max_tokens


TestLives = Lives.TestCase
TestLives.settings = settings(
    max_examples=300, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_lives_do_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device above notices what it is there for: a page that is shared before the steps that write it are over."""
    monkeypatch.setattr(Sequence, "written", property(lambda one: one.prefilled + len(one.tokens)))
    lives = Lives()
    lives.scheduler.add(lives._sequence(1, 20, 1, 3, ""))
    lives.launch(1)
    lives.cancel(0)  # its first chunk was launched and never read
    lives.device.launched.clear()
    lives.scheduler.add(lives._sequence(1, 20, 1, 3, ""))
    lives.launch(1)
    with pytest.raises(AssertionError, match="what was not computed"):
        lives.execute(1)


def test_a_cancelled_prompt_leaves_only_what_has_been_read() -> None:
    """Chunks in flight are not counted on: two of three launched ones are over when it is withdrawn."""
    lives = Lives()
    lives.scheduler.add(one := lives._sequence(1, 23, 1, 1, ""))
    lives.launch(3)
    lives.execute(3)
    lives.read(2)
    assert one.prefilled == 3 * CHUNK and one.written == 2 * CHUNK
    lives.cancel(0)
    lives.pages.settle()
    assert (
        lives.index.kept == 2 * CHUNK // G and found(lives.index, list(one.request.prompt_token_ids)) == one.pages[:3]
    )


def test_who_was_computed_twice_is_not_counted_as_free_twice() -> None:
    """A runs with pages of its own that B has kept meanwhile. When C asks, A comes to hold B's, which are free no more;
    C then has to wait where it had room before."""
    pages, index = book(6)
    scheduler = Scheduler(3, 2 * G, pages, index)
    ids = tuple(range(2 * G))

    def one(identity: int, prompt: tuple[int, ...], needed: int) -> Sequence:
        made = Sequence(Request(identity, prompt, SamplingParams(max_tokens=9)), 40, frozenset(), needed)
        scheduler.add(made)
        return made

    a, b = one(0, ids, 2), one(1, ids, 2)
    assert scheduler.admit() is a and scheduler.admit() is b
    prompts = [plan for plan in (scheduler.next_plan() for _ in range(3)) if isinstance(plan, PrefillPlan)]
    assert [(plan.sequence, plan.start, plan.emit) for plan in prompts] == [(a, 0, True), (b, 0, True)]
    assert scheduler.record(a, 1) and scheduler.record(b, 1)
    scheduler.finish(b, FinishReason.CANCELLED)
    c = one(2, (*range(G), 77), 4)
    assert pages.free == 4 and scheduler.admissible
    assert scheduler.admit() is None and pages.free == 2 and c.slot < 0
    scheduler.finish(a, FinishReason.CANCELLED)
    assert scheduler.admit() is c and c.cached == G
    scheduler.finish(c, FinishReason.CANCELLED)
    assert pages.free == pages.total == 6


def test_an_ended_sequence_costs_its_reader_nothing() -> None:
    """The hashing of a long answer's pages is left for later, and done before anybody asks for pages."""
    pages, index = book(600)
    held = pages.take(500)
    assert held is not None
    ids = list(range(4 * 500))
    index.end("", ids, (), len(ids), held, [])
    assert not index.settled and index.kept == 0
    started = time.perf_counter()
    assert pages.free == pages.total and index.kept == 500 and index.settled
    assert time.perf_counter() - started < 5.0, "some 500 microseconds"
