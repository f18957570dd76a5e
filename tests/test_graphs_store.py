"""The rolling store alone: pure policy, driven by hand, exhaustively over small cases, and through random lives."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jitgraph.graphs.demand import COLD, HALF_LIFE_REQUESTS, THRASH_LIMIT, demand, heated
from jitgraph.graphs.dispatch import Dispatcher
from jitgraph.graphs.key import GraphKey, Path, Phase, Sampling
from jitgraph.graphs.store import LOGGED_EVENTS, OVER_BUDGET, Store
from jitgraph.graphs.store_records import Absence, EventKind, Retired, State


@dataclass(eq=False)
class Graph:
    """Something to keep, which notices a second destruction."""

    key: GraphKey
    nbytes: int
    destroyed: bool = False

    def destroy(self) -> None:
        assert not self.destroyed, f"{self.key} destroyed twice"
        self.destroyed = True


def prompt(tokens: int) -> GraphKey:
    return GraphKey(Phase.PREFILL, tokens, Sampling.FULL)


def decode(rows: int) -> GraphKey:
    return GraphKey(Phase.DECODE, rows, Sampling.GREEDY)


def capture(store: Store[Graph], key: GraphKey, nbytes: int = 1) -> Graph:
    """A capture that succeeds at once."""
    assert store.begin(key)
    graph = Graph(key, nbytes)
    assert store.finish(key, graph, nbytes)
    return graph


def destroy_retired(store: Store[Graph]) -> list[GraphKey]:
    gone = store.destroyable()
    for retired in gone:
        retired.graph.destroy()
        store.destroyed(retired)
    return [retired.key for retired in gone]


def settle(store: Store[Graph], now: float = 0.0) -> list[GraphKey]:
    """Captures and destroys until there is nothing to do; the keys captured, in order."""
    captured = []
    while True:
        key = store.next_key(now)
        if key is not None:
            capture(store, key)
            captured.append(key)
        elif not destroy_retired(store):
            return captured


def ask(store: Store[Graph], dispatcher: Dispatcher, tokens: int, ticket: int) -> Path:
    """One prompt of ``tokens``, its step done at once."""
    decision = dispatcher.decide(prompt(tokens))
    store.use(decision.key, ticket)
    store.completed(ticket)
    return decision.path


# --------------------------------------------------------------------------------------------------------------- order


def test_the_list_first_in_its_order_then_by_demand() -> None:
    store: Store[Graph] = Store()
    store.precapture([prompt(n) for n in (7, 3, 5)])
    for tokens, times in ((20, 1), (21, 3), (22, 2), (5, 1)):
        for _ in range(times):
            store.want(prompt(tokens))
    assert [key.tokens for key in settle(store)] == [7, 3, 5, 21, 22, 20]
    assert store.ready_sizes(Phase.PREFILL, Sampling.FULL) == [3, 5, 7, 20, 21, 22]
    assert store.counters.captures == 6 and store.counters.evictions == 0


def test_pinned_keys_go_before_the_list_and_abandoned_ones_before_all() -> None:
    store: Store[Graph] = Store()
    store.precapture([prompt(3), prompt(4), decode(1)])
    store.want(prompt(9))
    assert store.next_key(0.0) == decode(1)
    assert store.begin(prompt(9))
    store.abandon(prompt(9))
    assert store.counters.abandoned == 1 and store.budget.graphs == 0
    assert settle(store) == [prompt(9), decode(1), prompt(3), prompt(4)]


def test_what_was_broken_off_and_then_failed_waits_its_turn() -> None:
    store: Store[Graph] = Store()
    store.precapture([prompt(1), prompt(2)])
    store.abandon(prompt(2))
    assert store.next_key(0.0) == prompt(2)
    store.fail(prompt(2), "warm up: RuntimeError", 0.0)
    assert store.next_key(5.0) == prompt(1)


def test_recent_demand_counts_more() -> None:
    store: Store[Graph] = Store()
    for _ in range(3):
        store.want(prompt(1))
    for _ in range(2 * HALF_LIFE_REQUESTS):
        store.served(Path.EXACT)
    assert store.demand(prompt(1)) == pytest.approx(3 / 4)
    store.want(prompt(2))
    assert settle(store) == [prompt(2), prompt(1)]


def test_a_wish_is_merged_and_a_list_displaces_nobody() -> None:
    store: Store[Graph] = Store(max_graphs=2)
    store.precapture([prompt(1), prompt(2), prompt(3)])
    store.want(prompt(1))
    store.want(prompt(1))
    assert sum(event.kind is EventKind.QUEUED for event in store.events) == 3
    assert settle(store) == [prompt(1), prompt(2)]
    assert store.state(prompt(3)) is State.QUEUED and not store.worth_asking(0.0)


# ------------------------------------------------------------------------------------------------------------ eviction


def test_only_a_hotter_length_displaces_the_least_recently_used() -> None:
    store: Store[Graph] = Store(max_graphs=2)
    dispatcher = Dispatcher(True, store)
    for key in (prompt(10), prompt(20)):
        store.want(key)
        capture(store, key)
    for ticket in range(4):
        ask(store, dispatcher, (10, 20)[ticket % 2], ticket)
    ask(store, dispatcher, 7, 4)  # 10 serves it, so 20 is the least recently used
    assert settle(store) == [], "one asking is less than the demand for 20"
    for ticket in range(5, 8):
        ask(store, dispatcher, 7, ticket)
    assert settle(store) == [prompt(7)]
    assert store.state(prompt(20)) is State.MISSING and store.absence(prompt(20)) is Absence.EVICTED
    assert set(store.ready_keys) == {prompt(7), prompt(10)}


def test_room_is_made_by_destruction_not_by_eviction() -> None:
    store: Store[Graph] = Store(max_graphs=1)
    old = capture(store, prompt(10))
    store.want(prompt(5))
    assert store.next_key(0.0) is None, "10 is evicted, but still holds its memory"
    assert store.state(prompt(10)) is State.RETIRING and store.lookup(prompt(10)) is None
    assert store.next_key(0.0) is None and store.counters.evictions == 1
    assert not store.begin(prompt(5))
    (retired,) = store.destroyable()
    assert retired.graph is old and store.destroyable() == []
    assert store.next_key(0.0) is None, "handed out is not destroyed"
    store.destroyed(retired)
    assert store.state(prompt(10)) is State.MISSING and store.next_key(0.0) == prompt(5)


def test_one_newcomer_displaces_one() -> None:
    store: Store[Graph] = Store(max_graphs=2)
    capture(store, prompt(10))
    capture(store, prompt(20))
    for _ in range(5):
        store.want(prompt(5))
    for _ in range(3):
        assert store.next_key(0.0) is None
        assert store.counters.evictions == 1, "the room to come is enough"
    destroy_retired(store)
    assert store.next_key(0.0) == prompt(5)


def test_a_running_graph_is_not_evicted() -> None:
    store: Store[Graph] = Store(max_graphs=1)
    capture(store, prompt(10))
    store.use(prompt(10), 1)
    for _ in range(9):
        store.want(prompt(5))
    assert store.next_key(0.0) is None and store.counters.evictions == 0
    assert not store.worth_asking(0.0)
    store.completed(0)
    assert store.next_key(0.0) is None and store.counters.evictions == 0
    store.completed(1)
    assert store.worth_asking(0.0)
    assert settle(store) == [prompt(5)]


def test_pinned_graphs_stay_and_displace_others() -> None:
    store: Store[Graph] = Store(max_graphs=2)
    capture(store, decode(1))
    capture(store, prompt(10))
    store.use(prompt(10), 0)
    store.completed(0)
    for _ in range(9):
        store.want(prompt(10))
        store.want(prompt(5))
    store.want(decode(2))
    assert settle(store) == [decode(2)]
    assert set(store.ready_keys) == {decode(1), decode(2)}
    assert settle(store) == [], "nothing but pinned graphs is left"


def test_of_graphs_nobody_used_the_least_useful_goes_first() -> None:
    store: Store[Graph] = Store(max_graphs=3)
    useful_first = [prompt(n) for n in (16, 32, 5)]
    store.precapture(useful_first)
    for key in sorted(useful_first, key=lambda key: -key.tokens):  # largest first, whatever their places
        capture(store, key)
    for expected in (5, 32, 16):
        newcomer = prompt(100 + expected)
        store.want(newcomer)
        settle(store)
        assert prompt(expected) not in store.ready_keys
        assert newcomer in store.ready_keys


def test_a_hot_set_survives_a_scan() -> None:
    """Lengths that come again and again keep their graphs while a thousand others pass once each."""
    store: Store[Graph] = Store(max_graphs=6)
    dispatcher = Dispatcher(True, store)
    hot = (100, 200, 300, 400)
    paths = []
    for ticket in range(4000):
        tokens = hot[ticket % 4] if ticket % 2 else 401 + ticket // 2
        path = ask(store, dispatcher, tokens, ticket)
        settle(store)
        if ticket % 2 and ticket > 100:
            paths.append(path)
    assert paths.count(Path.EXACT) == len(paths)


# --------------------------------------------------------------------------------------------------------------- bytes


def test_bytes_are_reserved_measured_and_limited() -> None:
    store: Store[Graph] = Store(max_bytes=13, estimated_bytes=4)
    capture(store, prompt(1), nbytes=2)
    assert store.begin(prompt(2)) and store.budget.nbytes == 6
    assert store.begin(prompt(3)) and not store.begin(prompt(4))
    store.abandon(prompt(3))
    assert store.finish(prompt(2), Graph(prompt(2), 6), 6), "over the reserve, within the budget"
    assert store.budget.nbytes == 8 and store.budget.most_bytes == 10
    assert not store.begin(prompt(3)), "6 is what an unmeasured graph is now expected to take"


def test_a_measured_size_is_taken_at_its_word() -> None:
    store: Store[Graph] = Store(max_bytes=10, estimated_bytes=6)
    capture(store, prompt(1), nbytes=3)
    capture(store, decode(1), nbytes=4)
    store.want(prompt(2))
    assert settle(store) == [prompt(2)] and store.absence(prompt(1)) is Absence.EVICTED
    assert store.budget.nbytes == 4 + 1
    assert not store.begin(prompt(3)), "6 are set aside for what was never measured"
    assert store.begin(prompt(1)), "this one is known to take 3"


def test_a_graph_within_its_reserve_is_taken_even_where_another_went_over() -> None:
    store: Store[Graph] = Store(max_bytes=2, estimated_bytes=1)
    assert store.begin(prompt(1)) and store.begin(prompt(2))
    assert not store.finish(prompt(1), Graph(prompt(1), 5), 5), "now 6 bytes are held until it is destroyed"
    assert store.finish(prompt(2), Graph(prompt(2), 1), 1)
    destroy_retired(store)
    assert store.budget.nbytes == 1


def test_a_graph_over_the_budget_is_refused_and_its_size_remembered() -> None:
    store: Store[Graph] = Store(max_bytes=10, estimated_bytes=1)
    capture(store, prompt(1), nbytes=5)
    store.want(prompt(2))
    assert store.begin(prompt(2))
    graph = Graph(prompt(2), 6)
    assert not store.finish(prompt(2), graph, 6, now=0.0)
    assert store.counters.failures == {OVER_BUDGET: 1} and store.lookup(prompt(2)) is None
    assert destroy_retired(store) == [prompt(2)] and graph.destroyed
    assert store.budget.nbytes == 5 and store.next_key(0.5) is None
    assert store.next_key(1.0) is None and store.counters.evictions == 1, "now room is made for what it truly takes"
    destroy_retired(store)
    assert store.next_key(1.0) == prompt(2)


def test_what_never_fits_does_not_stand_in_the_way() -> None:
    store: Store[Graph] = Store(max_bytes=10, estimated_bytes=1)
    store.want(prompt(2))
    store.want(prompt(2))
    assert store.begin(prompt(2))
    assert not store.finish(prompt(2), Graph(prompt(2), 11), 11, now=0.0)
    destroy_retired(store)
    small: Store[Graph] = Store(max_bytes=10, estimated_bytes=1)
    small.want(prompt(3))
    capture(small, prompt(3), nbytes=10)
    assert small.next_key(0.0) is None
    assert store.next_key(100.0) is None and store.counters.evictions == 0
    assert store.state(prompt(2)) is State.QUEUED, "not forgotten"


# ------------------------------------------------------------------------------------------------------------- failure


def test_failures_back_off_and_are_retried_for_ever() -> None:
    store: Store[Graph] = Store(first_backoff=1.0, longest_backoff=300.0)
    store.want(prompt(5))
    now, waits = 0.0, []
    for _ in range(12):
        assert store.next_key(now) == prompt(5)
        assert store.begin(prompt(5))
        store.fail(prompt(5), "begin: RuntimeError", now)
        assert store.budget.graphs == store.budget.nbytes == 0
        assert store.absence(prompt(5)) is Absence.FAILED
        assert store.next_key(now) is None and not store.worth_asking(now)
        wait = next(w for w in itertools.count() if store.worth_asking(now + w))
        assert store.next_key(now + wait) == prompt(5)
        waits.append(wait)
        now += wait
    assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300]
    assert store.counters.failures == {"begin: RuntimeError": 12}
    capture(store, prompt(5))
    assert store.lookup(prompt(5)) is not None


def test_one_failing_key_does_not_hold_up_others() -> None:
    store: Store[Graph] = Store()
    store.precapture([prompt(1), prompt(2)])
    assert store.begin(prompt(1))
    store.fail(prompt(1), "end: RuntimeError", 0.0)
    assert settle(store) == [prompt(2)]
    assert settle(store, now=2.0) == [prompt(1)]


def test_a_success_ends_the_back_off() -> None:
    store: Store[Graph] = Store(max_graphs=1)
    store.want(prompt(1))
    for now in (0.0, 10.0):
        store.fail(prompt(1), "x", now)
    capture(store, prompt(1))
    store.want(prompt(2))
    store.want(prompt(2))
    settle(store)
    for _ in range(5):
        store.want(prompt(1))
    store.fail(prompt(1), "x", 20.0)
    assert store.next_key(20.9) is None
    assert settle(store, 21.0) == [prompt(1)], "the first wait again"


# -------------------------------------------------------------------------------------------------------------- thrash


def cycle(store: Store[Graph], lengths: int, requests: int) -> None:
    """Lengths in turn, one more than there is room for: the worst case of least recently used."""
    dispatcher = Dispatcher(True, store)
    for ticket in range(requests):
        ask(store, dispatcher, 1 + ticket % lengths, ticket)
        settle(store)


def test_thrash_is_detected_and_damped(monkeypatch: pytest.MonkeyPatch) -> None:
    damped: Store[Graph] = Store(max_graphs=20)
    cycle(damped, 25, 5000)
    kinds = [event.kind for event in damped.events if event.key is None]
    assert kinds[0] is EventKind.THRASHING and set(itertools.pairwise(kinds)) <= {
        (EventKind.THRASHING, EventKind.CALM),
        (EventKind.CALM, EventKind.THRASHING),
    }
    assert damped.counters.thrash_alarms == kinds.count(EventKind.THRASHING) >= 1
    assert damped.thrash.rate <= THRASH_LIMIT + 1
    assert damped.counters.recaptures <= 6 * (THRASH_LIMIT + 1)

    undamped: Store[Graph] = Store(max_graphs=20)
    monkeypatch.setattr("jitgraph.graphs.demand.Thrash.margin", 0.0)
    cycle(undamped, 25, 5000)
    assert undamped.counters.recaptures > 10 * damped.counters.recaptures


def test_thrash_is_forgotten_when_it_is_over() -> None:
    store: Store[Graph] = Store(max_graphs=20)
    cycle(store, 25, 1500)
    assert store.thrash.rate > THRASH_LIMIT - 5
    for _ in range(1001):
        store.served(Path.EXACT)
    assert store.thrash.rate == 0 and not store.thrash.over and store.thrash.margin == 0


@settings(deadline=None)
@given(st.lists(st.integers(0, 2000), min_size=1, max_size=30), st.integers(0, 500))
def test_heat_is_the_sum_of_faded_askings(requests: list[int], later: int) -> None:
    heat, now = COLD, max(requests) + later
    for request in sorted(requests):
        heat = heated(heat, request)
    expected = sum(0.5 ** ((now - request) / HALF_LIFE_REQUESTS) for request in requests)
    assert demand(heat, now) == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------------------- rest


def test_reasons_of_absence() -> None:
    store: Store[Graph] = Store(max_graphs=1)
    assert store.absence(prompt(1)) is Absence.NEVER
    store.want(prompt(1))
    assert store.absence(prompt(1)) is Absence.PENDING
    assert store.begin(prompt(1)) and store.absence(prompt(1)) is Absence.PENDING
    store.fail(prompt(1), "x", 0.0)
    assert store.absence(prompt(1)) is Absence.FAILED
    capture(store, prompt(1))
    for _ in range(3):
        store.want(prompt(2))
    settle(store)
    assert store.absence(prompt(1)) is Absence.EVICTED


def test_calls_that_come_too_late_change_nothing() -> None:
    store: Store[Graph] = Store()
    store.use(prompt(1), 5)
    store.fail(prompt(1), "x", 0.0)
    store.abandon(prompt(1))
    assert list(store.events) == [] and store.state(prompt(1)) is State.MISSING
    capture(store, prompt(1))
    before = len(store.events)
    store.fail(prompt(1), "x", 0.0)
    store.abandon(prompt(1))
    assert not store.begin(prompt(1))
    assert len(store.events) == before and store.lookup(prompt(1)) is not None


def test_the_log_is_bounded_and_dated() -> None:
    store: Store[Graph] = Store()
    for tokens in range(LOGGED_EVENTS + 10):
        store.want(prompt(tokens + 1))
    assert len(store.events) == LOGGED_EVENTS
    capture(store, prompt(1))
    store.use(prompt(1), 77)
    store.next_key(12.5)
    assert store.begin(prompt(2)) and store.finish(prompt(2), Graph(prompt(2), 9), 9, now=13.0)
    begun, ready = list(store.events)[-2:]
    assert (begun.kind, begun.time, begun.ticket) == (EventKind.BEGUN, 12.5, 77)
    assert (ready.kind, ready.key, ready.time, ready.nbytes) == (EventKind.READY, prompt(2), 13.0, 9)


def test_eligible_keys_alone_are_named_and_evicted_for() -> None:
    store: Store[Graph] = Store(max_graphs=1)
    capture(store, prompt(9))
    for _ in range(5):
        store.want(prompt(1))
    store.want(prompt(2))

    def only_two(key: GraphKey) -> bool:
        return key.tokens == 2

    def none(key: GraphKey) -> bool:
        return False

    assert store.next_key(0.0, none) is None and store.counters.evictions == 0
    assert not store.worth_asking(0.0, none) and store.worth_asking(0.0, only_two)
    assert store.next_key(0.0, only_two) is None and destroy_retired(store) == [prompt(9)]
    assert store.next_key(0.0, only_two) == prompt(2) and store.next_key(0.0) == prompt(1)


# ------------------------------------------------------------------------------------------------- every short sequence


def test_every_short_sequence_keeps_the_books() -> None:
    """All sequences of five out of seven operations on two keys with room for one."""
    names = ("want a", "want b", "begin", "finish", "fail", "retire", "step")
    for sequence in itertools.product(names, repeat=5):
        run_sequence(sequence)


def run_sequence(sequence: tuple[str, ...]) -> None:
    store: Store[Graph] = Store(max_graphs=1, max_bytes=3, estimated_bytes=3, first_backoff=0.0)
    made: list[Graph] = []
    under_way: GraphKey | None = None
    for ticket, name in enumerate(sequence):
        if name.startswith("want"):
            store.want(prompt(1 if name == "want a" else 2))
        elif name == "begin" and under_way is None:
            key = store.next_key(float(ticket))
            if key is not None:
                assert store.begin(key), sequence
                under_way = key
        elif name == "finish" and under_way is not None:
            made.append(Graph(under_way, 3))
            assert store.finish(under_way, made[-1], 3)
            under_way = None
        elif name == "fail" and under_way is not None:
            store.fail(under_way, "x", float(ticket))
            under_way = None
        elif name == "retire":
            destroy_retired(store)
        elif name == "step":
            for key in store.ready_keys:
                store.use(key, ticket)
            store.completed(ticket - 1)
        alive = sum(not graph.destroyed for graph in made) + (under_way is not None)
        assert store.budget.graphs == alive <= 1 and store.budget.nbytes == 3 * alive, sequence
    if under_way is not None:
        store.abandon(under_way)
    for retired in store.close():
        retired.graph.destroy()
        store.destroyed(retired)
    assert all(graph.destroyed for graph in made) and store.budget.graphs == store.budget.nbytes == 0


# --------------------------------------------------------------------------------------------------------- random lives

SIZES = st.integers(1, 8)
KEYS = st.one_of(SIZES.map(prompt), st.integers(1, 3).map(decode))


class Life(RuleBasedStateMachine):
    """A store in the hands of an engine and a capturer that do whatever they may, in any order."""

    @initialize(
        graphs=st.integers(0, 5),
        budget=st.one_of(st.none(), st.integers(1, 20)),
        estimate=st.integers(0, 4),
        listed=st.lists(KEYS, max_size=6, unique=True),
        buckets=st.lists(SIZES, max_size=3, unique=True),
    )
    def build(self, graphs: int, budget: int | None, estimate: int, listed: list[GraphKey], buckets: list[int]) -> None:
        self.store: Store[Graph] = Store(graphs, budget, estimated_bytes=estimate)
        self.dispatcher = Dispatcher(True, self.store, sorted(buckets))
        self.store.precapture(listed)
        self.largest = max(buckets, default=8)
        self.under_way: dict[GraphKey, int] = {}
        self.ready: dict[GraphKey, Graph] = {}
        self.made: list[Graph] = []
        self.handed: list[Retired[Graph]] = []
        self.last_step: dict[Graph, int] = {}
        self.refused: list[Graph] = []
        self.ticket = self.done = 0
        self.now = 0.0

    @rule(wanted=KEYS)
    def request(self, wanted: GraphKey) -> None:
        """Every size has a path, whatever the store is doing."""
        decision = self.dispatcher.decide(wanted)
        sizes = sorted(key.tokens for key in self.ready if (key.phase, key.sampling) == (wanted.phase, wanted.sampling))
        larger = [size for size in sizes if size > wanted.tokens]
        if wanted.tokens in sizes:
            assert (decision.path, decision.key) == (Path.EXACT, wanted)
        elif larger:
            assert (decision.path, decision.key.tokens) == (Path.PADDED, larger[0])
        else:
            assert (decision.path, decision.key) == (Path.EAGER, wanted)
        self.ticket += 1
        self.store.use(decision.key, self.ticket)
        if decision.path is not Path.EAGER:
            self.last_step[self.ready[decision.key]] = self.ticket
        wishes = wanted.phase is Phase.PREFILL and wanted.tokens <= self.largest and decision.path is not Path.EXACT
        if wishes:
            assert self.store.state(wanted) in (State.QUEUED, State.CAPTURING)

    @rule(steps=st.integers(1, 3))
    def complete(self, steps: int) -> None:
        self.done = min(self.done + steps, self.ticket)
        self.store.completed(self.done)

    @rule(passed=st.sampled_from([0.0, 0.5, 1.0, 400.0]))
    def wait(self, passed: float) -> None:
        self.now += passed

    @rule(picky=st.booleans())
    def plan(self, picky: bool) -> None:
        eligible: Callable[[GraphKey], bool] | None = is_odd if picky else None
        asked = self.store.worth_asking(self.now, eligible)
        before = set(self.ready)
        key = self.store.next_key(self.now, eligible)
        for gone in before - set(self.store.ready_keys):
            graph = self.ready.pop(gone)
            assert gone.phase is Phase.PREFILL, "a pinned graph was evicted"
            assert self.last_step.get(graph, 0) <= self.done, "a running graph was evicted"
        assert asked or (key is None and before == set(self.ready)), "it said that there was nothing to ask"
        if key is not None:
            assert not picky or is_odd(key)
            room = self.store.budget.nbytes
            assert self.store.begin(key), "the key that is named has room"
            self.under_way[key] = self.store.budget.nbytes - room

    @rule(key=KEYS)
    def begin_unasked(self, key: GraphKey) -> None:
        room = self.store.budget.nbytes
        if self.store.begin(key):
            assert key not in self.ready and key not in self.under_way
            self.under_way[key] = self.store.budget.nbytes - room

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), nbytes=st.integers(0, 6))
    def finish(self, data: st.DataObject, nbytes: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.under_way, key=str)))
        reserved = self.under_way.pop(key)
        graph = Graph(key, nbytes)
        self.made.append(graph)
        if self.store.finish(key, graph, nbytes, self.now):
            self.ready[key] = graph
        else:
            assert nbytes > reserved
            self.refused.append(graph)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data(), failed=st.booleans())
    def break_off(self, data: st.DataObject, failed: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.under_way, key=str)))
        reserved = self.under_way.pop(key)
        graphs, nbytes = self.store.budget.graphs, self.store.budget.nbytes
        if failed:
            self.store.fail(key, "x", self.now)
        else:
            self.store.abandon(key)
        assert (self.store.budget.graphs, self.store.budget.nbytes) == (graphs - 1, nbytes - reserved)
        assert self.store.state(key) is State.QUEUED, "it will be tried again"

    @rule()
    def hand_out(self) -> None:
        for retired in self.store.destroyable():
            assert retired.ticket <= self.done
            self.handed.append(retired)

    @precondition(lambda self: self.handed)
    @rule(data=st.data())
    def destroy(self, data: st.DataObject) -> None:
        retired = self.handed.pop(data.draw(st.integers(0, len(self.handed) - 1)))
        retired.graph.destroy()
        self.store.destroyed(retired)

    @invariant()
    def books(self) -> None:
        store = self.store
        alive = [graph for graph in self.made if not graph.destroyed]
        assert store.budget.graphs == len(alive) + len(self.under_way)
        assert store.budget.nbytes == sum(graph.nbytes for graph in alive) + sum(self.under_way.values())
        refused = sum(graph.nbytes for graph in self.refused if not graph.destroyed)
        assert store.budget.graphs <= store.budget.max_graphs
        assert store.budget.max_bytes is None or store.budget.nbytes - refused <= store.budget.max_bytes
        assert {key: store.lookup(key) for key in store.ready_keys} == self.ready
        for key in self.ready:
            assert key.tokens in store.ready_sizes(key.phase, key.sampling)

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        for key in self.under_way:
            self.store.abandon(key)
        for retired in self.handed + self.store.close():
            retired.graph.destroy()
            self.store.destroyed(retired)
        assert all(graph.destroyed for graph in self.made), "a graph leaked"
        assert self.store.budget.graphs == self.store.budget.nbytes == 0
        assert self.store.ready_keys == () and self.store.close() == [] and self.store.next_key(1e9) is None


def is_odd(key: GraphKey) -> bool:
    return key.tokens % 2 == 1


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
