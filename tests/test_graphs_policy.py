"""Bucket functions and the dispatcher over every size; the declared buffers."""

from __future__ import annotations

import itertools

import pytest
import torch

from jitgraph.config import DEFAULT_PREFILL_BUCKETS
from jitgraph.graphs.buffers import Buffers, BufferSizes, Padding
from jitgraph.graphs.dispatch import Dispatcher, Path, Reason
from jitgraph.graphs.key import GraphKey, Phase, Sampling, precapture_keys, smallest_at_least
from jitgraph.model.spec import ModelSpec, RopeSpec
from jitgraph.ops.slots import SlotTable


@pytest.mark.parametrize("sizes", [DEFAULT_PREFILL_BUCKETS, (1,), (3, 7), tuple(range(1, 9)), ()])
def test_smallest_at_least_for_every_size(sizes: tuple[int, ...]) -> None:
    for size in range(1, 600):
        fitting = [s for s in sizes if s >= size]
        assert smallest_at_least(size, sizes) == (min(fitting) if fitting else None)


def test_precapture_order_and_limit() -> None:
    for streams, fused, limit in itertools.product(range(1, 9), (True, False), range(0, 60)):
        kept, left_out = precapture_keys(streams, (8, 16, 32), (5, 16, 5, 9), fused, limit)
        assert len(kept) == min(limit, len(kept) + len(left_out))
        assert len(set(kept + left_out)) == len(kept + left_out), "no key twice"
        kinds = 2 if fused else 1
        assert len(kept + left_out) == kinds * (streams + 5)
        decode = [key.tokens for key in (kept + left_out)[:streams]]
        assert decode == list(range(1, streams + 1)), "decode comes first"


@pytest.mark.parametrize("captured", [(), (8,), (8, 16, 64), DEFAULT_PREFILL_BUCKETS])
def test_every_size_has_a_path(captured: tuple[int, ...]) -> None:
    dispatcher = Dispatcher(graphs_enabled=True)
    for size in captured:
        dispatcher.add(GraphKey(Phase.PREFILL, size, Sampling.GREEDY))
    for size in range(1, 600):
        wanted = GraphKey(Phase.PREFILL, size, Sampling.GREEDY)
        decision = dispatcher.decide(wanted)
        if size in captured:
            assert (decision.path, decision.key, decision.reason) == (Path.EXACT, wanted, Reason.CAPTURED)
        elif captured and size < captured[-1]:
            assert decision.path is Path.PADDED and decision.reason is Reason.NEXT_SIZE
            assert decision.key.tokens == min(s for s in captured if s > size)
        else:
            assert (decision.path, decision.key) == (Path.EAGER, wanted)
            assert decision.reason is Reason.NOT_CAPTURED
    assert sum(dispatcher.paths.values()) == sum(dispatcher.reasons.values()) == 599


def test_kinds_and_phases_do_not_mix() -> None:
    dispatcher = Dispatcher(graphs_enabled=True)
    dispatcher.add(GraphKey(Phase.PREFILL, 8, Sampling.GREEDY))
    assert dispatcher.decide(GraphKey(Phase.DECODE, 8, Sampling.GREEDY)).path is Path.EAGER
    assert dispatcher.decide(GraphKey(Phase.PREFILL, 8, Sampling.FULL)).path is Path.EAGER
    assert dispatcher.decide(GraphKey(Phase.PREFILL, 7, Sampling.GREEDY)).path is Path.PADDED


def test_graphs_off_is_always_eager_and_says_so() -> None:
    dispatcher = Dispatcher(graphs_enabled=False)
    dispatcher.add(GraphKey(Phase.DECODE, 1, Sampling.GREEDY))
    decision = dispatcher.decide(GraphKey(Phase.DECODE, 1, Sampling.GREEDY))
    assert (decision.path, decision.reason) == (Path.EAGER, Reason.GRAPHS_OFF)


SPEC = ModelSpec(
    family="llama",
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_layers=1,
    num_heads=3,
    num_kv_heads=1,
    head_dim=8,
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
    rope=RopeSpec(),
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    tie_embeddings=False,
    layer_windows=(0,),
    dtype="float32",
    bos_token_id=None,
    eos_token_ids=(),
    pad_token_id=None,
)


def test_buffers_share_one_arena_without_overlap() -> None:
    cpu = torch.device("cpu")
    slots = SlotTable.allocate(3, 4, cpu)
    buffers = Buffers(SPEC, BufferSizes(tokens=16, rows=3, splits=2, scratch_words=5), slots, torch.float16, cpu)
    spans = sorted((buffers[d.name].data_ptr(), buffers[d.name].data_ptr() + d.nbytes) for d in buffers.declared)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans)), "two buffers overlap"
    assert all(start % 16 == buffers.arena.data_ptr() % 16 for start, _ in spans), "kernels assume 16-byte alignment"
    base, size = buffers.arena.data_ptr(), buffers.arena.nbytes
    assert spans[0][0] >= base and spans[-1][1] <= base + size


def test_poison_spares_state_and_host_inputs() -> None:
    cpu = torch.device("cpu")
    buffers = Buffers(SPEC, BufferSizes(8, 2, 1, 1), SlotTable.allocate(2, 4, cpu), torch.float32, cpu)
    buffers["prompt"].fill_(3)
    buffers.poison()
    for d in buffers.declared:
        content = buffers[d.name]
        if d.padding in (Padding.STATE, Padding.HOST):
            assert (content >= 0).all(), d.name
        elif d.dtype.is_floating_point:
            assert content.isnan().all(), d.name
        else:
            assert (content < 0).all(), d.name


def test_views_are_leading_slices() -> None:
    cpu = torch.device("cpu")
    buffers = Buffers(SPEC, BufferSizes(8, 2, 1, 1), SlotTable.allocate(2, 4, cpu), torch.float32, cpu)
    batch, work = buffers.views(GraphKey(Phase.PREFILL, 5, Sampling.GREEDY))
    assert batch.token_ids.shape == (5,) and batch.sample_slot.shape == (1,)
    assert work.hidden.shape == (5, 24) and work.logits.shape == (1, 50)
    assert work.hidden.data_ptr() == buffers["hidden"].data_ptr() and work.hidden.is_contiguous()
    assert buffers.views(GraphKey(Phase.PREFILL, 5, Sampling.GREEDY))[0] is batch, "made once"
    with pytest.raises(AssertionError, match="larger than the arena"):
        buffers.views(GraphKey(Phase.DECODE, 3, Sampling.GREEDY))
