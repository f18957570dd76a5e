"""The Triton attention kernels against gathered SDPA, over caches whose unused cells are NaN, and their rows' bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ops_cases import DTYPES, LAYOUTS, close, decode_workspace, int32, make_paged, poison

from jitgraph.errors import DeviceError
from jitgraph.ops import attention, reference_attention
from jitgraph.ops.select import select_ops


def _prefill(
    device: torch.device,
    layout: tuple[int, int, int],
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    page: int = 8,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(kernel, reference) for ``shape`` = (tokens, of them real, start, window), on the real tokens."""
    tokens, real, start, window = shape
    hq, hkv, dh = layout
    paged = make_paged([3, start + real], hkv, dh, dtype, device, page=page)
    index = torch.arange(tokens, dtype=torch.int32, device=device)
    positions = torch.where(index < real, start + index, 0)
    token_slot = torch.where(index < real, 1, paged.slots.dummy).to(torch.int32)
    q = torch.randn(tokens, hq, dh, device=device).to(dtype)
    actual, expected = torch.full_like(q, torch.nan), torch.empty_like(q)
    where = (positions, token_slot, paged.slots, dh**-0.5, window)
    attention.prefill_attention(q, paged.k, paged.v, *where, actual)
    reference_attention.prefill_attention(q, paged.k0, paged.v0, *where, expected)
    assert torch.isfinite(actual).all()  # padding tokens too
    return actual[:real], expected[:real]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 1, 0, 0), (16, 11, 0, 0), (70, 67, 0, 0), (16, 16, 75, 0), (33, 20, 40, 13)])
def test_prefill(
    device: torch.device, layout: tuple[int, int, int], dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    close(*_prefill(device, layout, dtype, shape))


@pytest.mark.parametrize("shape", [(1, 1, 30, 1), (20, 20, 0, 1), (80, 80, 0, 5), (80, 3, 90, 64)])
def test_prefill_window_and_odd_head(device: torch.device, shape: tuple[int, int, int, int]) -> None:
    close(*_prefill(device, (2, 1, 24), torch.float32, shape))


def test_prefill_skips_keys_below_the_window(device: torch.device) -> None:
    """Cells that no token of the chunk sees may hold NaN: they are not read."""
    paged = make_paged([40], 2, 16, torch.float32, device, page=8)
    first_page = int(paged.slots.block_table()[0, 0])
    paged.k[first_page], paged.v[first_page] = torch.nan, torch.nan
    positions = torch.arange(16, 24, dtype=torch.int32, device=device)
    q, out = torch.randn(8, 2, 16, device=device), poison(8, 2, 16, device=device)
    attention.prefill_attention(q, paged.k, paged.v, positions, torch.zeros_like(positions), paged.slots, 0.25, 8, out)
    assert torch.isfinite(out).all()


def _decode(
    device: torch.device,
    layout: tuple[int, int, int],
    dtype: torch.dtype,
    lengths: list[int],
    splits: int,
    window: int = 0,
    page: int = 8,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(kernel, reference): one token of each sequence, and one dummy row at the end."""
    hq, hkv, dh = layout
    paged = make_paged(lengths, hkv, dh, dtype, device, page=page)
    rows = len(lengths) + 1
    positions = int32([n - 1 for n in lengths] + [0], device)
    token_slot = torch.arange(rows, dtype=torch.int32, device=device)
    q = torch.randn(rows, hq, dh, device=device).to(dtype)
    actual, expected = torch.full_like(q, torch.nan), torch.empty_like(q)
    work = decode_workspace(rows, hq, hkv, splits, dh, device)
    where = (positions, token_slot, paged.slots, dh**-0.5, window, *work)
    attention.decode_attention(q, paged.k, paged.v, *where, actual)
    reference_attention.decode_attention(q, paged.k0, paged.v0, *where, expected)
    assert not work[2].any()  # the counters are left as the next launch wants them
    return actual, expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [*LAYOUTS, (2, 1, 24)])
@pytest.mark.parametrize("splits,window", [(1, 0), (4, 0), (3, 21)])
def test_decode(
    device: torch.device, layout: tuple[int, int, int], dtype: torch.dtype, splits: int, window: int
) -> None:
    close(*_decode(device, layout, dtype, [1, 17, 150], splits, window))


@pytest.mark.parametrize("layout", [(2, 2, 16), (6, 2, 64)])
@pytest.mark.parametrize("splits,window", [(2, 0), (3, 0), (8, 0), (8, 140)])
def test_decode_at_the_ends_of_splits(
    device: torch.device, layout: tuple[int, int, int], splits: int, window: int
) -> None:
    """Contexts of one split, of two, of more than there are: each count of splits that take part, and the merge."""
    lengths = [32, 33, 64, 127, 128, 129, 160, 256, 257, 385]
    close(*_decode(device, layout, torch.float32, lengths, splits, window))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [(32, 32, 128), (32, 8, 128)])
def test_the_last_split_to_arrive_is_not_seen_in_the_bits(device: torch.device, layout: tuple[int, int, int]) -> None:
    hq, hkv, dh = layout
    lengths = [4096, 65, 1, 2000, 300, 129, 64, 4000]
    paged = make_paged(lengths, hkv, dh, torch.float16, device, page=16)
    positions, slot = int32([n - 1 for n in lengths], device), int32(list(range(8)), device)
    q = torch.randn(8, hq, dh, device=device).half()
    work = decode_workspace(8, hq, hkv, 16, dh, device)
    results = []
    for _ in range(100):
        out = torch.empty_like(q)
        where = (positions, slot, paged.slots, dh**-0.5, 0, *work)
        attention.decode_attention(q, paged.k, paged.v, *where, out)
        results.append(out)
    assert not work[2].any()
    assert all(torch.equal(out, results[0]) for out in results)


@pytest.mark.usefixtures("products_in_order")
def test_decode_does_not_depend_on_its_neighbours(device: torch.device) -> None:
    """A row's bits are the same alone and in a batch."""
    paged = make_paged([5, 33, 60], 2, 16, torch.float32, device)
    positions, slot = int32([4, 32, 59], device), int32([0, 1, 2], device)
    q = torch.randn(3, 4, 16, device=device)
    together, alone = torch.empty_like(q), torch.empty_like(q)
    work = decode_workspace(3, 4, 2, 2, 16, device)
    cache = (paged.k, paged.v)
    attention.decode_attention(q, *cache, positions, slot, paged.slots, 0.25, 0, *work, together)
    for r in range(3):
        at = slice(r, r + 1)
        where = (positions[at], slot[at], paged.slots, 0.25, 0, *(tensor[at] for tensor in work))
        attention.decode_attention(q[at], *cache, *where, alone[at])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("heads", [1, 2, 4, 8, 32, 64])
@pytest.mark.parametrize("length", [2, 64, 100, 2048, 4096, 131072])
def test_decode_splits(heads: int, length: int) -> None:
    splits = attention.decode_splits(length, heads)
    assert splits >= 1 and splits & (splits - 1) == 0
    assert splits == 1 or length // splits >= 128
    assert splits * heads <= 512


def test_decode_splits_fill_an_h200() -> None:
    assert attention.decode_splits(4096, 32) == 16
    assert attention.decode_splits(8192, 8) == 32


# ------------------------------------------------------------------------------------------------- batch-invariant mode


CHUNKS = [(0, 90, 96), (0, 20, 20), (40, 1, 1), (40, 8, 8), (40, 8, 16), (40, 50, 64), (63, 27, 27)]
"""(start, real tokens, tokens) out of a prompt of 90"""


def _changed_bits(
    prefill: Callable[..., None], device: torch.device, layout: tuple[int, int, int], dtype: torch.dtype, window: int
) -> list[int]:
    """For each of ``CHUNKS``: elements that differ from those of the whole prompt at once."""
    hq, hkv, dh = layout
    paged = make_paged([90], hkv, dh, dtype, device)
    k, v = (paged.k0, paged.v0) if prefill.__module__.endswith("reference_attention") else (paged.k, paged.v)
    every_q = torch.randn(90, hq, dh, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)

    def chunk(start: int, real: int, tokens: int) -> torch.Tensor:
        index = torch.arange(tokens, dtype=torch.int32, device=device)
        positions = torch.where(index < real, start + index, 0).int()
        token_slot = torch.where(index < real, 0, paged.slots.dummy).int()
        q = torch.zeros(tokens, hq, dh, dtype=dtype, device=device)
        q[:real] = every_q[start : start + real]
        out = torch.full_like(q, torch.nan)
        prefill(q, k, v, positions, token_slot, paged.slots, dh**-0.5, window, out)
        return out[:real]

    whole = chunk(0, 90, 90)
    return [int((chunk(*sizes) != whole[sizes[0] : sizes[0] + sizes[1]]).sum()) for sizes in CHUNKS]


@pytest.mark.usefixtures("products_in_order")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout,window", [((2, 2, 16), 0), ((4, 2, 64), 13)])
def test_invariant_prefill_has_the_same_bits_in_every_chunk(
    device: torch.device, layout: tuple[int, int, int], dtype: torch.dtype, window: int
) -> None:
    for prefill, where in (
        (attention.invariant_prefill_attention, device),
        (reference_attention.invariant_prefill_attention, torch.device("cpu")),
    ):
        assert _changed_bits(prefill, where, layout, dtype, window) == [0] * len(CHUNKS)


def test_other_prefill_has_not(device: torch.device) -> None:
    """Why there is a mode: the order of the sums depends on the shapes of the call."""
    for prefill, where in ((attention.prefill_attention, device), (reference_attention.prefill_attention, "cpu")):
        assert any(_changed_bits(prefill, torch.device(where), (4, 2, 64), torch.float32, 0))


@pytest.mark.parametrize("rolling", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dh", [64, 128, 256])
def test_invariant_prefill_has_one_tile(dh: int, dtype: torch.dtype, rolling: bool) -> None:
    """What decides the order of the sums beside the row's own position."""

    def tiles(invariant: bool) -> set[tuple[int, ...]]:
        return {attention.prefill_tile(tokens, 32, dh, dtype, rolling, invariant) for tokens in range(1, 513)}

    assert len(tiles(invariant=True)) == 1
    assert len(tiles(invariant=False)) > 1 or (dtype == torch.float32 and dh == 256)


def _row_bits(
    decode: Callable[..., None], device: torch.device, dtype: torch.dtype, length: int = 21
) -> tuple[torch.Tensor, ...]:
    """The same row of ``length`` tokens alone and beside a longer one."""
    paged = make_paged([length, 190], 2, 64, dtype, device)
    q = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(2)).to(dtype).to(device)
    positions, slot, out = int32([length - 1, 189], device), int32([0, 1], device), torch.empty_like(q)
    alone = torch.empty_like(q[:1])
    work = decode_workspace(2, 4, 2, 3, 64, device)
    decode(q, paged.k0, paged.v0, positions, slot, paged.slots, 0.125, 0, *work, out)
    decode(q[:1], paged.k0, paged.v0, positions[:1], slot[:1], paged.slots, 0.125, 0, *(w[:1] for w in work), alone)
    return out[:1], alone


@pytest.mark.usefixtures("products_in_order")
@pytest.mark.parametrize("dtype", DTYPES)
def test_invariant_decode_does_not_depend_on_its_neighbours(device: torch.device, dtype: torch.dtype) -> None:
    assert torch.equal(*_row_bits(attention.decode_attention, device, dtype))
    assert torch.equal(*_row_bits(reference_attention.invariant_decode_attention, torch.device("cpu"), dtype))


def test_other_decode_does() -> None:
    """Somewhere: at which lengths the library's sums come out alike is the processor's matter."""
    lengths = (21, 37, 53, 90, 121, 150, 171)
    pairs = (_row_bits(reference_attention.decode_attention, torch.device("cpu"), torch.float32, n) for n in lengths)
    if all(torch.equal(*pair) for pair in pairs):
        pytest.skip("the library's sums on this processor do not depend on neighbours, with the mode or without")


def test_the_mode_binds_the_invariant_ops() -> None:
    cpu = torch.device("cpu")
    on, off = (select_ops("torch", cpu, invariant=invariant) for invariant in (True, False))
    assert on.invariant and on.prefill_attention is reference_attention.invariant_prefill_attention
    assert on.decode_attention is reference_attention.invariant_decode_attention
    assert not off.invariant and off.prefill_attention is reference_attention.prefill_attention
    assert on.rope_append is off.rope_append
    for flavour in ("torch", "mixed"):
        with pytest.raises(DeviceError, match="needs ops='jit'"):
            select_ops(flavour, torch.device("cuda", 0), invariant=True)


@pytest.mark.parametrize("heads", [2, 8, 32, 64])
@pytest.mark.parametrize("chunk", [1, 5, 16, 100, 512, 2048])
def test_prefill_classes_stand_for_all_sizes(heads: int, chunk: int) -> None:
    def kind(tokens: int) -> tuple[object, ...]:
        tile = attention.prefill_tile(tokens, heads, 128, torch.float16, False, False)
        return tile, tokens == 1, tokens % 16 == 0

    classes = attention.prefill_classes(heads, chunk)
    assert sorted(set(classes)) == list(classes) and classes[-1] <= chunk
    assert {kind(tokens) for tokens in classes} == {kind(tokens) for tokens in range(1, chunk + 1)}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [(32, 32, 128), (32, 8, 128), (14, 2, 64), (4, 2, 256)])
@pytest.mark.parametrize("tokens,start", [(1, 0), (8, 4000), (100, 0), (300, 200), (512, 0)])
def test_prefill_large(
    device: torch.device, layout: tuple[int, int, int], dtype: torch.dtype, tokens: int, start: int
) -> None:
    close(*_prefill(device, layout, dtype, (tokens, max(1, tokens - 3), start, 0), page=16))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [(32, 32, 128), (32, 8, 128)])
def test_invariant_prefill_large(device: torch.device, layout: tuple[int, int, int]) -> None:
    changed = _changed_bits(attention.invariant_prefill_attention, device, layout, torch.float16, 0)
    assert changed == [0] * len(CHUNKS)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [(32, 32, 128), (32, 8, 128), (14, 2, 64), (4, 2, 256), (4, 4, 256)])
@pytest.mark.parametrize("lengths", [[1], [500], [4096], [10, 300, 1, 4096, 77, 2000, 512]])
def test_decode_large(
    device: torch.device, layout: tuple[int, int, int], dtype: torch.dtype, lengths: list[int]
) -> None:
    splits = attention.decode_splits(4096, layout[1])
    close(*_decode(device, layout, dtype, lengths, splits, page=16))
