"""The Triton attention kernels against gathered SDPA, over caches whose unused cells are NaN."""

from __future__ import annotations

import pytest
import torch
from ops_cases import DTYPES, LAYOUTS, close, int32, make_paged, poison

from jitgraph.ops import attention, reference


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
    reference.prefill_attention(q, paged.k0, paged.v0, *where, expected)
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
    partial, lse = poison(rows, hq, splits, dh, device=device), poison(rows, hq, splits, device=device)
    where = (positions, token_slot, paged.slots, dh**-0.5, window, partial, lse)
    attention.decode_attention(q, paged.k, paged.v, *where, actual)
    reference.decode_attention(q, paged.k0, paged.v0, *where, expected)
    return actual, expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [*LAYOUTS, (2, 1, 24)])
@pytest.mark.parametrize("splits,window", [(1, 0), (4, 0), (3, 21)])
def test_decode(
    device: torch.device, layout: tuple[int, int, int], dtype: torch.dtype, splits: int, window: int
) -> None:
    close(*_decode(device, layout, dtype, [1, 17, 150], splits, window))


def test_decode_does_not_depend_on_its_neighbours(device: torch.device) -> None:
    """A row's bits are the same alone and in a batch."""
    paged = make_paged([5, 33, 60], 2, 16, torch.float32, device)
    positions, slot = int32([4, 32, 59], device), int32([0, 1, 2], device)
    q = torch.randn(3, 4, 16, device=device)
    together, alone = torch.empty_like(q), torch.empty_like(q)
    partial, lse = poison(3, 4, 2, 16, device=device), poison(3, 4, 2, device=device)
    cache = (paged.k, paged.v)
    attention.decode_attention(q, *cache, positions, slot, paged.slots, 0.25, 0, partial, lse, together)
    for r in range(3):
        at = slice(r, r + 1)
        where = (positions[at], slot[at], paged.slots, 0.25, 0, partial[at], lse[at])
        attention.decode_attention(q[at], *cache, *where, alone[at])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("heads", [1, 2, 4, 8, 32, 64])
@pytest.mark.parametrize("length", [2, 64, 100, 2048, 4096, 131072])
def test_decode_splits(heads: int, length: int) -> None:
    splits = attention.decode_splits(length, heads)
    assert splits >= 1 and splits & (splits - 1) == 0
    assert splits == 1 or length // splits >= 64
    assert splits * heads <= 512


def test_decode_splits_fill_an_h200() -> None:
    assert attention.decode_splits(4096, 32) == 16
    assert attention.decode_splits(8192, 8) == 32


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [(32, 32, 128), (32, 8, 128), (14, 2, 64), (4, 2, 256)])
@pytest.mark.parametrize("tokens,start", [(1, 0), (8, 4000), (100, 0), (300, 200), (512, 0)])
def test_prefill_large(
    device: torch.device, layout: tuple[int, int, int], dtype: torch.dtype, tokens: int, start: int
) -> None:
    close(*_prefill(device, layout, dtype, (tokens, max(1, tokens - 3), start, 0), page=16))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [(32, 32, 128), (32, 8, 128), (14, 2, 64), (4, 2, 256), (4, 4, 256)])
@pytest.mark.parametrize("lengths", [[1], [500], [4096], [10, 300, 1, 4096, 77, 2000, 512]])
def test_decode_large(
    device: torch.device, layout: tuple[int, int, int], dtype: torch.dtype, lengths: list[int]
) -> None:
    splits = attention.decode_splits(4096, layout[1])
    close(*_decode(device, layout, dtype, lengths, splits, page=16))
