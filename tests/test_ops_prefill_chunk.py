"""A chunk's attention over what RoPE has left in QKV, against the reference, over caches whose unused cells are NaN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ops_cases import DTYPES, LAYOUTS, close
from prefill_cases import Chunk, chunk_inputs, rope_table

from jitgraph.config import interpreting
from jitgraph.model.batch import Batch
from jitgraph.model.decoder import Decoder, KVWindow, _Pass
from jitgraph.model.hf_config import spec_from_config
from jitgraph.model.packing import allocate_weights
from jitgraph.model.presets import preset_config
from jitgraph.ops import elementwise, prefill_chunk, reference, reference_prefill
from jitgraph.ops.select import prompt_classes, select_ops

Layout = tuple[int, int, int]
Tile = tuple[int, int, int, int]


def run(device: torch.device, layout: Layout, dtype: torch.dtype, chunk: Chunk, page: int = 8) -> torch.Tensor:
    """Appends in place and attends, as a step does; checks both against the reference, and returns the output. Cells of
    the cache that the chunk itself has filled are poisoned before: it must read its own keys from QKV."""
    hq, hkv, dh = layout
    paged, qkv, positions, token_slot, rope = chunk_inputs(device, layout, dtype, chunk, page)
    where, real = (positions, token_slot, paged.slots), chunk.real
    clean = qkv.nan_to_num(0.0)
    expected = torch.empty(chunk.tokens, hq, dh, dtype=dtype, device=device)
    turned, own = clean.clone(), torch.empty_like(expected)
    reference.rope_append(turned, None, None, 0.0, *where, rope, paged.k0, paged.v0, None)
    reference.rope_append(clean, None, None, 0.0, *where, rope, paged.k0, paged.v0, own)
    views = turned.view(chunk.tokens, hq + 2 * hkv, dh)
    assert torch.equal(views[:, :hq], own) and torch.equal(views[:, hq + hkv :].flatten(1), clean[:, -hkv * dh :])
    reference_prefill.chunk_attention(turned, paged.k0, paged.v0, *where, dh**-0.5, chunk.window, expected)

    elementwise.rope_append(qkv, None, None, 0.0, *where, rope, paged.k.clone(), paged.v.clone(), None)
    close(qkv[:real], turned[:real])
    assert qkv[real:, hq * dh :].isnan().all()  # padding is as it was
    out = torch.full_like(expected, torch.nan)
    prefill_chunk.chunk_attention(qkv, paged.k, paged.v, *where, dh**-0.5, chunk.window, out)
    close(out[:real], expected[:real])
    assert not out[real:].any()  # NaN counts as something
    return out[:real]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [*LAYOUTS, (2, 1, 80), (2, 2, 96)])
@pytest.mark.parametrize("chunk", [Chunk(70, 67), Chunk(33, 20, start=40, window=13)])
def test_layouts(device: torch.device, layout: Layout, dtype: torch.dtype, chunk: Chunk) -> None:
    run(device, layout, dtype, chunk)


CHUNKS = [
    Chunk(1, 1),
    Chunk(16, 11),
    Chunk(17, 17, start=1),
    Chunk(130, 65),
    Chunk(81, 80, start=37),
    Chunk(100, 97, window=1),
    Chunk(77, 70, start=51, window=33),
    Chunk(20, 20, start=51, window=8),
    Chunk(200, 129, start=9, window=70),
]
TILES = [(16, 32, 4, 2), (32, 64, 4, 2), (64, 32, 4, 3), (64, 64, 8, 3)]
"""Blocks of keys that divide those of queries and that do not."""


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch, tile: Tile, chunk: Chunk) -> None:
    monkeypatch.setattr(prefill_chunk, "chunk_tile", lambda *_: tile)
    run(device, (2, 1, 24), torch.float16, chunk)


@pytest.mark.usefixtures("products_in_order")
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("start", [0, 21])
def test_padding_does_not_change_the_bits(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, tile: Tile, start: int
) -> None:
    monkeypatch.setattr(prefill_chunk, "chunk_tile", lambda *_: tile)
    found = [run(device, (2, 1, 16), torch.float16, Chunk(tokens, 75, start)) for tokens in (75, 80, 160)]
    assert all(torch.equal(padded, found[0]) for padded in found[1:])


def test_a_step_of_padding_alone_is_finite(device: torch.device) -> None:
    """As a warm-up runs it: token 0 is the dummy's."""
    layout, chunk = (2, 2, 16), Chunk(70, 70)
    paged, qkv, positions, token_slot, _ = chunk_inputs(device, layout, torch.float32, chunk)
    token_slot.fill_(paged.slots.dummy)
    out = torch.full((chunk.tokens, 2, 16), torch.nan, device=device)
    prefill_chunk.chunk_attention(qkv, paged.k, paged.v, positions.zero_(), token_slot, paged.slots, 0.25, 0, out)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("heads", [2, 8, 32, 64])
@pytest.mark.parametrize("chunk", [1, 5, 16, 100, 512, 2048])
def test_classes_stand_for_all_sizes(heads: int, chunk: int) -> None:
    classes = prefill_chunk.chunk_classes(heads, chunk)
    assert sorted(set(classes)) == list(classes) and classes[-1] <= chunk
    for dh, dtype in ((64, torch.bfloat16), (128, torch.float32), (256, torch.float16)):

        def kind(tokens: int, dh: int = dh, dtype: torch.dtype = dtype) -> tuple[object, ...]:
            return prefill_chunk.chunk_tile(tokens, heads, dh, dtype), tokens == 1, tokens % 16 == 0

        assert {kind(tokens) for tokens in classes} == {kind(tokens) for tokens in range(1, chunk + 1)}


def test_where_it_is_used(device: torch.device) -> None:
    """Wherever a prompt's two ops stay apart, but not in PyTorch, not where bits must not depend on the tile, and not
    with a window that rolls."""
    assert device.type == "cuda" or interpreting()
    ops = select_ops("jit", device)
    assert ops.chunk_attention is prefill_chunk.chunk_attention
    assert set(prefill_chunk.chunk_classes(32, 512)) <= set(prompt_classes(ops, 32, 512))
    for without in (select_ops("torch", torch.device("cpu")), select_ops("jit", device, invariant=True)):
        assert without.chunk_attention is None and "chunk_attention" not in without.describe()

    spec = spec_from_config(preset_config("tiny"), "tiny")
    weights = allocate_weights(spec, torch.device("cpu"), torch.float32)
    plain = Decoder(spec, weights, rope_table(spec.head_dim, 4, torch.device("cpu")), ops)
    rows = torch.zeros(1, dtype=torch.int32)
    batch = Batch(*[rows] * len(Batch.__dataclass_fields__))

    def op(decoder: Decoder, phase: str) -> object:
        work = type("Work", (), {"split_sums": rows, "split_arrivals": rows})
        return _Pass(decoder, phase, batch, work, None, None, False)._in_qkv  # type: ignore[arg-type]

    assert op(plain, "prefill") is ops.chunk_attention
    assert op(plain, "decode") is None
    assert op(replace(plain, window=KVWindow(4, 8)), "prefill") is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", [(32, 32, 128), (32, 8, 128), (14, 2, 64), (32, 32, 80), (32, 32, 96), (4, 2, 256)])
@pytest.mark.parametrize(
    "chunk",
    [
        Chunk(1, 1),
        Chunk(100, 97),
        Chunk(20, 20, start=2000),
        Chunk(200, 200),
        Chunk(300, 290, start=200),
        Chunk(512, 512, window=99),
    ],
)
def test_large(device: torch.device, layout: Layout, dtype: torch.dtype, chunk: Chunk) -> None:
    run(device, layout, dtype, chunk, page=16)
