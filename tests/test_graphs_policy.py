"""Bucket functions, lists of lengths, and the dispatcher over every size; the declared buffers."""

from __future__ import annotations

import itertools

import pytest
import torch
from engine_cases import with_changes
from hypothesis import given
from hypothesis import strategies as st

from jitgraph.config import DEFAULT_PREFILL_BUCKETS
from jitgraph.errors import ConfigError
from jitgraph.graphs.buffers import INBOX_DEPTH, RING_DEPTH, Buffers, BufferSizes, Padding
from jitgraph.graphs.dispatch import Dispatcher, Reason
from jitgraph.graphs.key import GraphKey, Path, Phase, Sampling, precapture_keys, prompt_sampling, smallest_at_least
from jitgraph.graphs.loop_control import LOOP_STEPS
from jitgraph.graphs.store import Store
from jitgraph.graphs.store_records import State
from jitgraph.lengths import Lengths, parse_lengths
from jitgraph.ops.inbox import ADMIT, COUNT, EMIT, HEADER, MAX_ROWS, ROWS, SLOT, START
from jitgraph.ops.select import KernelWorkspace
from jitgraph.ops.slots import SlotTable


@pytest.mark.parametrize("sizes", [DEFAULT_PREFILL_BUCKETS, (1,), (3, 7), tuple(range(1, 9)), ()])
def test_smallest_at_least_for_every_size(sizes: tuple[int, ...]) -> None:
    for size in range(1, 600):
        fitting = [s for s in sizes if s >= size]
        assert smallest_at_least(size, sizes) == (min(fitting) if fitting else None)


def test_precapture_order_and_limit() -> None:
    for streams, fused, limit in itertools.product(range(1, 9), (True, False), range(0, 60)):
        kept, left_out = precapture_keys(streams, (8, 16, 32), (9, 16, 5, 9), fused, limit)
        rows = list(range(1, streams + 1))
        kinds = (Sampling.GREEDY, Sampling.FULL) if fused else (Sampling.OUTSIDE,)
        wanted = [GraphKey(Phase.DECODE, n, kind) for kind in kinds for n in rows]
        wanted += [GraphKey(Phase.PREFILL, n, prompt_sampling(fused)) for n in (8, 16, 32, 9, 5)]
        assert kept == wanted[:limit] and left_out == wanted[limit:]


# --------------------------------------------------------------------------------------------------- lists of lengths

BUCKETS = (8, 16, 64)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("1-5", (1, 2, 3, 4, 5)),
        ("10,50,20-22", (10, 20, 21, 22, 50)),
        ("buckets", BUCKETS),
        (" 7 , Buckets,7,7-8 ", (7, 8, 16, 64)),
        (64, (64,)),
        ([64, "3 - 4", ("buckets", [1])], (1, 3, 4, 8, 16, 64)),
        (range(3, 6), (3, 4, 5)),
        ([], ()),
        ("9-9", (9,)),
    ],
)
def test_lists_of_lengths(wanted: Lengths, found: tuple[int, ...]) -> None:
    assert parse_lengths(wanted, BUCKETS) == found


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        ("1-5,x", "'x' is no length"),
        ("1-5,,7", "an empty part"),
        ("", "an empty part"),
        ("5-3", "'5-3' descends"),
        ("3-65", "'3-65' is not between 1 and the largest bucket (64)"),
        ("1-999999999999", "'1-999999999999' is not between"),
        ("9" * 5000, "is no length"),
        ("0-3", "'0-3' is not between"),
        ([1, 0], "'0' is not between"),
        ([1, -3], "'-3' is not between"),
        ("-3", "'-3' is no length"),
        ("1.5", "'1.5' is no length"),
        ("１", "is no length"),  # noqa: RUF001 - a digit to Python, not to us
        ([2, True], "True is no length"),
        (1.5, "1.5 is no length"),
        (None, "None is no length"),
        (b"1", "b'1' is no length"),
        ({1: 2}, "{1: 2} is no length"),
    ],
)
def test_what_is_no_list_of_lengths_is_named(wanted: object, named: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_lengths(wanted, BUCKETS, "--lengths")  # type: ignore[arg-type]
    assert str(error.value).startswith("--lengths: ") and named in str(error.value)


SPANS = st.tuples(st.integers(1, 64), st.integers(0, 63)).map(lambda s: (s[0], min(s[0] + s[1], 64)))


@given(st.lists(SPANS, min_size=1, max_size=6), st.randoms(use_true_random=False), st.sampled_from([",", " , "]))
def test_every_way_to_write_a_list_means_the_same(spans: list[tuple[int, int]], random: object, comma: str) -> None:
    expected = tuple(sorted({n for first, last in spans for n in range(first, last + 1)}))
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in spans]
    assert parse_lengths(comma.join(texts), BUCKETS) == expected
    assert parse_lengths(texts, BUCKETS) == expected
    assert parse_lengths([list(range(first, last + 1)) for first, last in spans], BUCKETS) == expected
    assert parse_lengths(list(expected), BUCKETS) == expected


# --------------------------------------------------------------------------------------------------------- dispatcher


def prompt(tokens: int) -> GraphKey:
    return GraphKey(Phase.PREFILL, tokens, Sampling.FULL)


def store_with(*keys: GraphKey, **settings: int) -> Store[str]:
    store: Store[str] = Store(**settings)  # type: ignore[arg-type]
    for key in keys:
        assert store.begin(key) and store.finish(key, str(key), 0)
    return store


@pytest.mark.parametrize("captured", [(), (8,), (8, 16, 64), DEFAULT_PREFILL_BUCKETS])
def test_every_size_has_a_path(captured: tuple[int, ...]) -> None:
    store = store_with(*map(prompt, captured))
    dispatcher = Dispatcher(True, store)
    for size in range(1, 600):
        decision = dispatcher.decide(prompt(size))
        if size in captured:
            assert (decision.path, decision.key, decision.reason) == (Path.EXACT, prompt(size), Reason.CAPTURED)
        elif captured and size < captured[-1]:
            assert decision.path is Path.PADDED and decision.reason is Reason.NEVER_CAPTURED
            assert decision.key == prompt(min(s for s in captured if s > size))
        else:
            assert (decision.path, decision.key) == (Path.EAGER, prompt(size))
            assert decision.reason is Reason.NEVER_CAPTURED
        assert (store.state(prompt(size)) is State.QUEUED) == (size not in captured), "what is missing is asked for"
    assert sum(dispatcher.paths.values()) == sum(dispatcher.reasons.values()) == store.counters.requests == 599
    assert dict(store.counters.served) == {path: count for (_, path), count in dispatcher.paths.items()}
    dispatcher.reset()
    assert not dispatcher.paths and not dispatcher.reasons


def test_kinds_and_phases_do_not_mix() -> None:
    dispatcher = Dispatcher(True, store_with(prompt(8)))
    assert dispatcher.decide(GraphKey(Phase.DECODE, 8, Sampling.FULL)).path is Path.EAGER
    assert dispatcher.decide(GraphKey(Phase.PREFILL, 8, Sampling.OUTSIDE)).path is Path.EAGER
    assert dispatcher.decide(prompt(7)).path is Path.PADDED


def test_decoding_asks_for_nothing_and_is_no_request() -> None:
    store = store_with(GraphKey(Phase.DECODE, 4, Sampling.GREEDY))
    dispatcher = Dispatcher(True, store)
    decision = dispatcher.decide(GraphKey(Phase.DECODE, 3, Sampling.GREEDY))
    assert (decision.path, decision.key.tokens) == (Path.PADDED, 4)
    assert dispatcher.decide(GraphKey(Phase.DECODE, 5, Sampling.GREEDY)).path is Path.EAGER
    assert store.next_key(0.0) is None and store.counters.requests == 0


def test_reasons_say_why_there_is_no_exact_graph() -> None:
    store = store_with(prompt(16), max_graphs=1)
    dispatcher = Dispatcher(True, store, buckets=(16, 32))
    reasons = [dispatcher.decide(prompt(7)).reason, dispatcher.decide(prompt(7)).reason]
    store.fail(prompt(7), "begin: RuntimeError", 0.0)
    reasons.append(dispatcher.decide(prompt(7)).reason)
    assert store.next_key(9.0) is None
    (retired,) = store.destroyable()
    store.destroyed(retired)
    assert store.begin(prompt(7)) and store.finish(prompt(7), "seven", 0)
    reasons += [dispatcher.decide(prompt(n)).reason for n in (7, 16, 33)]
    assert reasons == [
        Reason.NEVER_CAPTURED,
        Reason.CAPTURE_PENDING,
        Reason.CAPTURE_FAILED,
        Reason.CAPTURED,
        Reason.EVICTED,
        Reason.OVER_LARGEST,
    ]
    assert store.state(prompt(33)) is State.MISSING, "longer than any graph may be: not asked for"


def test_an_eager_prompt_asks_for_its_bucket_as_well() -> None:
    """An evicted bucket would otherwise never come back: no prompt need have its very length."""
    store = store_with(prompt(16))
    dispatcher = Dispatcher(True, store, buckets=(16, 32))
    assert dispatcher.decide(prompt(7)).path is Path.PADDED
    assert store.state(prompt(32)) is State.MISSING
    assert dispatcher.decide(prompt(20)).path is Path.EAGER
    assert store.state(prompt(20)) is State.QUEUED and store.state(prompt(32)) is State.QUEUED
    assert dispatcher.decide(prompt(32)).path is Path.EAGER
    assert store.demand(prompt(32)) == pytest.approx(2, abs=0.02), "once for each prompt"


def test_choosing_leaves_no_trace_until_it_is_noted() -> None:
    store = store_with(prompt(8))
    dispatcher = Dispatcher(True, store)
    decision = dispatcher.choose(prompt(5))
    assert not dispatcher.paths and store.counters.requests == 0 and store.state(prompt(5)) is State.MISSING
    dispatcher.note(prompt(5), decision)
    assert dispatcher.paths == {(Phase.PREFILL, Path.PADDED): 1} and store.state(prompt(5)) is State.QUEUED
    dispatcher.looped += 1
    assert dispatcher.paths[Phase.DECODE, Path.LOOP] == dispatcher.reasons[Reason.LONE_STREAM] == 1


def test_graphs_off_is_always_eager_and_says_so() -> None:
    store = store_with(prompt(8))
    decision = Dispatcher(False, store).decide(prompt(8))
    assert (decision.path, decision.reason) == (Path.EAGER, Reason.GRAPHS_OFF)
    assert store.counters.requests == 0 and Dispatcher(False, store).decide(prompt(7)).path is Path.EAGER
    assert store.state(prompt(7)) is State.MISSING


# ------------------------------------------------------------------------------------------------------------ buffers

SPEC = with_changes(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_heads=3,
    num_kv_heads=1,
    head_dim=8,
    max_position_embeddings=64,
)


def test_buffers_share_one_arena_without_overlap() -> None:
    cpu = torch.device("cpu")
    slots = SlotTable.allocate(3, 4, cpu)
    buffers = Buffers(
        SPEC,
        BufferSizes(16, 3, KernelWorkspace(splits=2, scratch_words=5, split_sums=7, split_arrivals=3)),
        slots,
        torch.float16,
        cpu,
    )
    spans = sorted((buffers[d.name].data_ptr(), buffers[d.name].data_ptr() + d.nbytes) for d in buffers.declared)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans)), "two buffers overlap"
    assert all(start % 16 == buffers.arena.data_ptr() % 16 for start, _ in spans), "kernels assume 16-byte alignment"
    base, size = buffers.arena.data_ptr(), buffers.arena.nbytes
    assert spans[0][0] >= base and spans[-1][1] <= base + size


def test_poison_spares_state_and_host_inputs() -> None:
    cpu = torch.device("cpu")
    buffers = Buffers(SPEC, BufferSizes(8, 2, KernelWorkspace()), SlotTable.allocate(2, 4, cpu), torch.float32, cpu)
    for d in buffers.declared:
        buffers[d.name].fill_(3)
    buffers.poison()
    for d in buffers.declared:
        content = buffers[d.name]
        if d.padding in (Padding.STATE, Padding.HOST):
            assert (content == 3).all(), d.name
        elif d.dtype.is_floating_point:
            assert content.isnan().all(), d.name
        else:
            assert (content < 0).all(), d.name


def test_state_begins_idle() -> None:
    """Step numbers begin at 1, so that an empty ring never looks like a record; launches at 0, as the inbox's rows."""
    cpu = torch.device("cpu")
    buffers = Buffers(SPEC, BufferSizes(8, 2, KernelWorkspace()), SlotTable.allocate(2, 4, cpu), torch.float32, cpu)
    assert int(buffers["counter"]) == 1 and int(buffers["launches"]) == 0 and not buffers.ring.any()
    assert (buffers.row_slot == buffers.slots.dummy).all(), "before the first step every row is padding"
    for name in ("arrivals", "split_arrivals", "history"):
        assert not buffers[name].any(), name


@pytest.mark.parametrize("tokens", [1, 8, 15, 512])
@pytest.mark.parametrize("pages", [1, 4, 33])
def test_inputs_have_their_places_in_the_inbox(tokens: int, pages: int) -> None:
    """Header, rows, a row of the slot table and a chunk's ids lie side by side without overlap, in the inbox as on the
    device; each row of the inbox begins on a boundary of 64 bytes."""
    cpu = torch.device("cpu")
    slots = SlotTable.allocate(2, pages, cpu)
    buffers = Buffers(SPEC, BufferSizes(tokens, 2, KernelWorkspace()), slots, torch.float32, cpu)
    layout, inputs = buffers.layout, buffers["inputs"]
    assert inputs.shape == (layout.width,) and buffers.inbox.shape == (INBOX_DEPTH, layout.width)
    assert layout.width % 16 == 0 and layout.slot_words == slots.words.shape[1] == slots.stride
    inputs.copy_(torch.arange(layout.width, dtype=torch.int32))
    header, rows, prompt = (view.tolist() for view in (buffers.header, buffers.row_slot, buffers.prompt))
    assert header == [SLOT, START, COUNT, EMIT] and rows == list(range(ROWS, ROWS + MAX_ROWS))
    assert len(prompt) == tokens and prompt[0] == layout.prompt and prompt[-1] < layout.width
    assert ADMIT not in header and max(header) < ROWS and HEADER == ROWS + MAX_ROWS
    assert HEADER + layout.slot_words == layout.prompt


def test_the_ring_holds_all_that_may_be_unread() -> None:
    """Two loops, and the steps before and behind them; the inbox all launches that may be waiting."""
    assert RING_DEPTH >= 2 * LOOP_STEPS + 4
    assert INBOX_DEPTH >= 8


def test_views_are_leading_slices() -> None:
    cpu = torch.device("cpu")
    buffers = Buffers(SPEC, BufferSizes(8, 2, KernelWorkspace()), SlotTable.allocate(2, 4, cpu), torch.float32, cpu)
    batch, work = buffers.views(GraphKey(Phase.PREFILL, 5, Sampling.GREEDY))
    assert batch.token_ids.shape == (5,) and batch.sample_slot.shape == (1,)
    assert work.hidden.shape == (5, 24) and work.logits.shape == (1, 50)
    assert work.hidden.data_ptr() == buffers["hidden"].data_ptr() and work.hidden.is_contiguous()
    assert buffers.views(GraphKey(Phase.PREFILL, 5, Sampling.GREEDY))[0] is batch, "made once"
    with pytest.raises(AssertionError, match="larger than the arena"):
        buffers.views(GraphKey(Phase.DECODE, 3, Sampling.GREEDY))
