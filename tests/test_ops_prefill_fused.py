"""RoPE, KV append and attention in one kernel, against the two ops, over caches whose unused cells are NaN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ops_cases import DTYPES, LAYOUTS, close
from prefill_cases import Chunk, Inputs, chunk_inputs, rope_table

from jitgraph.config import interpreting
from jitgraph.model.decoder import Decoder, KVWindow
from jitgraph.model.hf_config import spec_from_config
from jitgraph.model.packing import allocate_weights
from jitgraph.model.presets import preset_config
from jitgraph.ops import elementwise, prefill_fused, reference, reference_prefill
from jitgraph.ops.pdl import PDL_TOKENS
from jitgraph.ops.reference_linear import SplitScratch
from jitgraph.ops.select import prompt_classes, select_ops

Tile = tuple[int, int, int, int]


def _scratch(layout: tuple[int, int, int], device: torch.device) -> SplitScratch:
    """Exactly as much as is promised to be enough, and poisoned."""
    hq, _, dh = layout
    partial = torch.full((prefill_fused.partial_words(hq, dh),), torch.nan, device=device)
    return SplitScratch(partial, torch.zeros(prefill_fused.arrival_words(hq), dtype=torch.int32, device=device))


def _fused(inputs: Inputs, layout: tuple[int, int, int], chunk: Chunk) -> tuple[torch.Tensor, ...]:
    """(out, k, v) of the kernel, on copies of the poisoned cache."""
    hq, _, dh = layout
    paged, qkv, positions, token_slot, rope = inputs
    k, v = paged.k.clone(), paged.v.clone()
    out = torch.full((chunk.tokens, hq, dh), torch.nan, dtype=qkv.dtype, device=qkv.device)
    where, scratch = (positions, token_slot, paged.slots, rope), _scratch(layout, qkv.device)
    prefill_fused.rope_prefill_attention(qkv, *where, k, v, dh**-0.5, chunk.window, out, scratch)
    assert not scratch.arrivals.any()  # ready for the next launch
    return out, k, v


def _check(device: torch.device, layout: tuple[int, int, int], dtype: torch.dtype, chunk: Chunk, page: int = 8) -> None:
    dh = layout[2]
    inputs = chunk_inputs(device, layout, dtype, chunk, page)
    paged, qkv, positions, token_slot, rope = inputs
    out, k, v = _fused(inputs, layout, chunk)
    where = (positions, token_slot, paged.slots, rope)
    expected = torch.empty_like(out)
    clean = qkv.nan_to_num(0.0)
    reference_prefill.rope_prefill_attention(
        clean, *where, paged.k0, paged.v0, dh**-0.5, chunk.window, expected, _scratch(layout, device)
    )  # fmt: skip
    close(out[: chunk.real], expected[: chunk.real])
    assert not out[chunk.real :].any()  # NaN counts as something
    appended = paged.k.clone(), paged.v.clone()
    # The bits of the op that appends alone. The interpreter takes as long for its kernel as for the one that is tested,
    # so long chunks are held against its meaning, which has the same bits there but in bfloat16 (cut, not rounded).
    by_kernel = device.type == "cuda" or chunk.tokens <= 33 or dtype == torch.bfloat16
    append = elementwise.rope_append if by_kernel else reference.rope_append
    append(clean, None, None, 0.0, *where, *appended, torch.empty_like(out))
    for mine, theirs in zip((k, v), appended, strict=True):
        assert torch.equal(mine[1:].isnan(), theirs[1:].isnan())  # no cell but the chunk's own
        if device.type == "cpu":  # on a GPU two kernels may differ in which product of a sum they fuse
            assert torch.equal(mine[1:].nan_to_num(7.0), theirs[1:].nan_to_num(7.0))
        close(mine[1:].nan_to_num(7.0), theirs[1:].nan_to_num(7.0))
    for mine, before in ((k, paged.k), (v, paged.v)):
        assert torch.equal(mine[0].nan_to_num(7.0), before[0].nan_to_num(7.0))  # padding is not appended


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [*LAYOUTS, (2, 1, 80), (2, 2, 96)])
@pytest.mark.parametrize("chunk", [Chunk(70, 67), Chunk(33, 20, start=40, window=13)])
def test_one_launch_for_two(
    device: torch.device, layout: tuple[int, int, int], dtype: torch.dtype, chunk: Chunk
) -> None:
    _check(device, layout, dtype, chunk)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize(
    "chunk",
    [Chunk(1, 1), Chunk(16, 11), Chunk(17, 17, start=1), Chunk(16, 16, start=75), Chunk(20, 20, start=64)],
)
def test_sizes(device: torch.device, layout: tuple[int, int, int], chunk: Chunk) -> None:
    _check(device, layout, torch.float16, chunk)


SPLIT = [
    Chunk(20, 20, start=800),  # as many programs as may be
    Chunk(16, 11, start=257),  # two
    Chunk(16, 16, start=256),  # one: the context is not worth another
    Chunk(40, 20, start=700),  # a block of nothing but padding
    Chunk(20, 20, start=600, window=300),
    Chunk(20, 17, start=800, window=9),  # most parts of the context are seen by nobody
]


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("chunk", SPLIT)
def test_programs_share_a_long_context(device: torch.device, layout: tuple[int, int, int], chunk: Chunk) -> None:
    assert prefill_fused.fused_splits(chunk.tokens) > 1
    _check(device, layout, torch.float16, chunk, page=64)


@pytest.mark.usefixtures("products_in_order")
def test_shared_contexts_give_the_same_bits_again(device: torch.device) -> None:
    """Whoever arrives last adds in the order of the parts."""
    layout, chunk = LAYOUTS[0], SPLIT[0]
    inputs = chunk_inputs(device, layout, torch.float16, chunk, page=64)
    first = _fused(inputs, layout, chunk)[0]
    for _ in range(1 if device.type == "cpu" else 50):
        assert torch.equal(_fused(inputs, layout, chunk)[0], first)


TILES = [(16, 16, 4, 1), (16, 32, 4, 1), (16, 64, 4, 2), (32, 16, 4, 3), (64, 32, 4, 1), (64, 64, 8, 1)]
"""Blocks of keys that divide those of queries and that do not; the next block in registers and in shared memory."""


def _use(tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_fused, "fused_tile", lambda *_: tile)
    monkeypatch.setattr(prefill_fused, "_MOST_ROWS", max(tile[0], prefill_fused._MOST_ROWS))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(
    "chunk",
    [
        Chunk(130, 65),
        Chunk(81, 80, start=37),
        Chunk(100, 97, window=1),
        Chunk(77, 70, start=51, window=33),
        Chunk(20, 20, start=51, window=8),
    ],
)
def test_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch, tile: Tile, chunk: Chunk) -> None:
    _use(tile, monkeypatch)
    _check(device, (2, 1, 24), torch.float16, chunk)


def test_keys_below_the_window_are_not_read(device: torch.device) -> None:
    layout, chunk = (2, 2, 16), Chunk(8, 8, start=16, window=8)
    inputs = chunk_inputs(device, layout, torch.float32, chunk)
    first_page = int(inputs.paged.slots.block_table()[1, 0])
    inputs.paged.k[first_page], inputs.paged.v[first_page] = torch.nan, torch.nan
    assert torch.isfinite(_fused(inputs, layout, chunk)[0]).all()


@pytest.mark.usefixtures("products_in_order")
@pytest.mark.parametrize("tile", TILES[1::2])
@pytest.mark.parametrize("start", [0, 21])
def test_padding_does_not_change_the_bits(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, tile: Tile, start: int
) -> None:
    _use(tile, monkeypatch)
    layout, found = (2, 1, 16), []
    for tokens in (75, 80, 160):
        chunk = Chunk(tokens, 75, start)
        out, k, v = _fused(chunk_inputs(device, layout, torch.float16, chunk), layout, chunk)
        found.append((out[:75], k.nan_to_num(7.0), v.nan_to_num(7.0)))
    for padded in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(padded, found[0], strict=True))


def test_a_prompt_in_chunks_is_the_prompt(device: torch.device) -> None:
    """Each chunk reads from the cache what the ones before it appended."""
    layout, whole = (4, 2, 16), Chunk(90, 90)
    inputs = chunk_inputs(device, layout, torch.float32, whole)
    out, k, v = _fused(inputs, layout, whole)
    cache, parts = (inputs.paged.k.clone(), inputs.paged.v.clone()), []
    for at in (slice(0, 40), slice(40, 41), slice(41, 90)):
        part = torch.full_like(out[at], torch.nan)
        where = (inputs.positions[at], inputs.token_slot[at], inputs.paged.slots, inputs.rope)
        prefill_fused.rope_prefill_attention(
            inputs.qkv[at], *where, *cache, 16**-0.5, 0, part, _scratch(layout, device)
        )
        parts.append(part)
    close(torch.cat(parts), out)
    for a, b in zip(cache, (k, v), strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def test_a_step_of_padding_alone_is_finite(device: torch.device) -> None:
    """As a warm-up runs it: token 0 is the dummy's, and only its page is written."""
    layout, chunk = (2, 2, 16), Chunk(20, 20)
    inputs = chunk_inputs(device, layout, torch.float32, chunk)
    inputs.positions.zero_()
    inputs.token_slot.fill_(inputs.paged.slots.dummy)
    out, k, v = _fused(inputs, layout, chunk)
    assert torch.isfinite(out).all()
    for after, before in ((k, inputs.paged.k), (v, inputs.paged.v)):
        assert torch.equal(after[1:].nan_to_num(7.0), before[1:].nan_to_num(7.0))


@pytest.mark.parametrize("heads", [2, 8, 32, 64])
@pytest.mark.parametrize("chunk", [1, 5, 16, 100, 512, 2048])
def test_fused_classes_stand_for_all_sizes(heads: int, chunk: int) -> None:
    classes = prefill_fused.fused_classes(heads, chunk)
    assert sorted(set(classes)) == list(classes) and classes[-1] <= chunk
    for dh, dtype in ((64, torch.bfloat16), (128, torch.float32), (256, torch.float16)):

        def kind(tokens: int, dh: int = dh, dtype: torch.dtype = dtype) -> tuple[object, ...]:
            tile = prefill_fused.fused_tile(tokens, heads, dh, dtype)
            splits = prefill_fused.fused_splits(tokens)
            return tile, splits, tokens == 1, tokens % 16 == 0, tokens <= PDL_TOKENS

        assert {kind(tokens) for tokens in classes} == {kind(tokens) for tokens in range(1, chunk + 1)}


def test_where_it_is_used(device: torch.device) -> None:
    """Not in PyTorch, not where bits must not depend on the tile, and not by models that want the two ops apart."""
    assert device.type == "cuda" or interpreting()
    ops = select_ops("jit", device)
    assert ops.rope_prefill_attention is prefill_fused.rope_prefill_attention
    assert set(prefill_fused.fused_classes(32, 512)) <= set(prompt_classes(ops, 32, 512))
    assert ops.describe()["rope_prefill_attention"] == "prefill_fused"
    for apart in (select_ops("torch", torch.device("cpu")), select_ops("jit", device, invariant=True)):
        assert apart.rope_prefill_attention is None and "rope_prefill_attention" not in apart.describe()

    spec = spec_from_config(preset_config("tiny"), "tiny")
    weights = allocate_weights(spec, torch.device("cpu"), torch.float32)
    plain = Decoder(spec, weights, rope_table(spec.head_dim, 4, device), ops)
    assert plain.one_launch is ops.rope_prefill_attention
    assert replace(plain, spec=replace(spec, qk_norm=True)).one_launch is None
    assert replace(plain, window=KVWindow(4, 8)).one_launch is None
    assert replace(plain, rope=plain.rope._replace(dynamic_original=4)).one_launch is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", [(32, 32, 128), (32, 8, 128), (14, 2, 64), (32, 32, 80), (32, 32, 96), (4, 2, 256)])
@pytest.mark.parametrize(
    "chunk",
    [
        Chunk(1, 1),
        Chunk(100, 97),
        Chunk(20, 20, start=2000),
        Chunk(64, 50, start=1000, window=700),
        Chunk(300, 290, start=200),
        Chunk(512, 512, window=99),
    ],
)
def test_large(device: torch.device, layout: tuple[int, int, int], dtype: torch.dtype, chunk: Chunk) -> None:
    _check(device, layout, dtype, chunk, page=16)
