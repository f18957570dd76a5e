"""The rolling KV window against its definition in float64: RoPE with append, prefill and decode attention.

Each test runs the PyTorch ops and the Triton ones. Kernels get a cache whose unwritten cells are NaN; both get a rotary
table that is NaN from position S + W on, so that a position out of the window cannot go unseen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from ops_cases import DTYPES, TOLERANCE, close, decode_workspace, int32, poison

from jitgraph.ops import attention, elementwise, reference, reference_attention
from jitgraph.ops.reference import Rolling, Rope
from jitgraph.ops.slots import SlotTable, encode_row
from jitgraph.types import SamplingParams

PAGE = 8
SPLITS = 3
ALL = pytest.mark.parametrize("ops", ["reference", "invariant reference", "kernels", "invariant kernels"])
DECODE = pytest.mark.parametrize("ops", ["reference", "invariant reference", "kernels"])  # kernels know one decode only
LAYOUTS = ((2, 2, 64), (6, 2, 80), (4, 4, 96), (4, 1, 128))
F32, F16, BF16 = DTYPES


@dataclass(frozen=True)
class Window:
    """Sequences in a rolling cache, and all they ever feed: qkv ``[tokens, (Hq + 2 Hkv) Dh]`` of each slot, the
    dummy's last."""

    ops: str
    layout: tuple[int, int, int]
    sinks: int
    recent: int
    slots: SlotTable
    k: torch.Tensor
    v: torch.Tensor
    table: torch.Tensor
    fed: list[torch.Tensor]

    @property
    def device(self) -> torch.device:
        return self.k.device

    def function(self, name: str) -> Any:
        modules = (elementwise, attention) if "kernels" in self.ops else (reference, reference_attention)
        prefixes = ("invariant_", "") if "invariant" in self.ops else ("",)
        return next(getattr(m, p + name) for p in prefixes for m in modules if hasattr(m, p + name))

    def rolling(self, sample_position: list[int]) -> Rolling:
        return Rolling(self.sinks, self.recent, int32(sample_position, self.device), self.table)

    def feed(self, slot: int, start: int, real: int, tokens: int) -> torch.Tensor:
        """A prompt chunk of ``real`` tokens padded to ``tokens``; the attention of the real ones ``[real, Hq, Dh]``."""
        hq, _, dh = self.layout
        index = torch.arange(tokens, dtype=torch.int32, device=self.device)
        positions = torch.where(index < real, start + index, 0).int()
        token_slot = torch.where(index < real, slot, self.slots.dummy).int()
        qkv = torch.zeros(tokens, self.fed[slot].shape[1], dtype=self.k.dtype, device=self.device)
        qkv[:real] = self.fed[slot][start : start + real]
        rolling = self.rolling([start + real])
        q, out = (poison(tokens, hq, dh, device=self.device, dtype=self.k.dtype) for _ in range(2))
        where = (positions, token_slot, self.slots)
        self.function("rope_append")(qkv, None, None, 1e-6, *where, Rope(self.table), self.k, self.v, q, rolling)
        self.function("prefill_attention")(q, self.k, self.v, *where, dh**-0.5, 0, out, rolling)
        assert torch.isfinite(out).all()  # padding too
        return out[:real]

    def decode(self, rows: list[tuple[int, int]]) -> torch.Tensor:
        """One token for each (slot, position); their attention ``[R, Hq, Dh]``."""
        hq, hkv, dh = self.layout
        slot, positions = (int32([row[i] for row in rows], self.device) for i in (0, 1))
        qkv = torch.stack([self.fed[s][p] for s, p in rows])
        rolling = self.rolling([p + 1 for _, p in rows])
        q, out = (poison(len(rows), hq, dh, device=self.device, dtype=self.k.dtype) for _ in range(2))
        where = (positions, slot, self.slots)
        self.function("rope_append")(qkv, None, None, 1e-6, *where, Rope(self.table), self.k, self.v, q, rolling)
        work = decode_workspace(len(rows), hq, hkv, SPLITS, dh, self.device)
        self.function("decode_attention")(q, self.k, self.v, *where, dh**-0.5, 0, *work, out, rolling)
        assert not work[2].any()
        return out

    def fill(self, slot: int, tokens: int) -> None:
        """Puts the first ``tokens`` tokens of a slot into the cache: with the reference, the interpreter is slow."""
        hq, _, dh = self.layout
        for start in range(0, tokens, self.recent):
            qkv = self.fed[slot][start : min(start + self.recent, tokens)]
            positions = start + torch.arange(len(qkv), dtype=torch.int32, device=self.device)
            where = (positions, torch.full_like(positions, slot), self.slots, Rope(self.table))
            q = torch.empty(len(qkv), hq, dh, dtype=self.k.dtype, device=self.device)
            rolling = self.rolling([start + len(qkv)])
            reference.rope_append(qkv, None, None, 1e-6, *where, self.k, self.v, q, rolling)


def make_window(
    ops: str,
    layout: tuple[int, int, int],
    dtype: torch.dtype,
    window: tuple[int, int],
    tokens: list[int],
    device: torch.device,
    seed: int = 0,
) -> Window:
    """Sequences that will feed ``tokens[slot]`` tokens, their pages interleaved, nothing written yet."""
    generator = torch.Generator().manual_seed(seed)
    hq, hkv, dh = layout
    cells = sum(window)
    pages = -(-cells // PAGE)
    slots = SlotTable.allocate(len(tokens), pages, torch.device("cpu"))
    for slot in range(len(tokens)):
        own = [1 + slot + index * len(tokens) for index in range(pages)]
        encode_row(slots.words[slot], SamplingParams(), 1, 2, (), 0, own)
    empty = float("nan") if "kernels" in ops else 0.0  # a masked key still multiplies its value by 0 in PyTorch's op
    cache = torch.full((2, 1 + pages * len(tokens), PAGE, hkv, dh), empty, dtype=dtype, device=device)
    angle = torch.outer(torch.arange(cells), _frequencies(dh))
    table = torch.full((cells + 200, dh), torch.nan)
    table[:cells] = torch.cat((angle.cos(), angle.sin()), 1)
    widths = [(n, (hq + 2 * hkv) * dh) for n in [*tokens, 1]]
    fed = [torch.randn(width, generator=generator).to(dtype).to(device) for width in widths]
    table_on_device = SlotTable(slots.words.to(device), slots.pages_per_slot)
    return Window(ops, layout, *window, table_on_device, cache[0], cache[1], table.to(device), fed)


def _frequencies(dh: int) -> torch.Tensor:
    return 10000.0 ** -(torch.arange(0, dh, 2).double() / dh)


def by_definition(window: Window, slot: int, query: int, last: int) -> torch.Tensor:
    """Attention ``[Hq, Dh]`` in float64 of token ``query`` of a slot after a step whose last token is ``last``."""
    hq, hkv, dh = window.layout
    heads = window.fed[slot].double().cpu().view(-1, hq + 2 * hkv, dh)
    seen = [t for t in range(query + 1) if t < window.sinks or t > last - window.recent]
    shift = max(0, last + 1 - (window.sinks + window.recent))

    def turned(t: int, x: torch.Tensor) -> torch.Tensor:
        position = t if t < window.sinks else t - shift
        assert 0 <= position < window.sinks + window.recent
        pairs = torch.complex(x[:, : dh // 2], x[:, dh // 2 :]) * torch.exp(1j * position * _frequencies(dh))
        return torch.cat((pairs.real, pairs.imag), 1)

    group = hq // hkv
    k = torch.stack([turned(t, heads[t, hq : hq + hkv]) for t in seen]).repeat_interleave(group, 1)
    v = torch.stack([heads[t, hq + hkv :] for t in seen]).repeat_interleave(group, 1)
    weights = torch.softmax(torch.einsum("hd,khd->hk", turned(query, heads[query, :hq]), k) * dh**-0.5, 1)
    return torch.einsum("hk,khd->hd", weights, v)


def near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal within the rounding of the actual dtype, of keys and queries included."""
    tolerance = 2 * TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double().cpu(), expected, atol=tolerance, rtol=tolerance)


@ALL
@pytest.mark.parametrize(
    "layout,dtype,window",
    [
        (LAYOUTS[0], F32, (4, 12)),
        (LAYOUTS[0], BF16, (0, 9)),
        (LAYOUTS[1], F16, (1, 13)),
        (LAYOUTS[2], BF16, (4, 7)),
        (LAYOUTS[3], F16, (3, 66)),
        (LAYOUTS[3], F32, (0, 5)),
    ],
)
def test_chunks_follow_the_definition(
    device: torch.device, ops: str, layout: tuple[int, int, int], dtype: torch.dtype, window: tuple[int, int]
) -> None:
    """Chunks that stop before, at and after the wrap, some of them padded, then whole windows and straddling ones."""
    recent = window[1]
    sizes = [1, 4, recent, 3, recent - 1, recent, recent]
    w = make_window(ops, layout, dtype, window, [3, sum(sizes)], device)
    start = 0
    for count in sizes:
        actual = w.feed(1, start, count, count if count % 2 else min(recent, count + 3))
        for t in {0, count // 2, count - 1}:
            near(actual[t], by_definition(w, 1, start + t, start + count - 1))
        start += count


@DECODE
@pytest.mark.parametrize(
    "layout,dtype,window",
    [
        (LAYOUTS[0], F32, (4, 12)),
        (LAYOUTS[1], F16, (0, 9)),
        (LAYOUTS[2], BF16, (3, 64)),
        (LAYOUTS[2], F16, (1, 140)),
        (LAYOUTS[3], F32, (1, 270)),
        (LAYOUTS[3], BF16, (4, 70)),
    ],
)
def test_decode_follows_the_definition(
    device: torch.device, ops: str, layout: tuple[int, int, int], dtype: torch.dtype, window: tuple[int, int]
) -> None:
    """Rows before, at and after the wrap in one batch, and a dummy row; with over 256 cells a row has three splits."""
    cells = sum(window)
    lengths = [2, cells - 1, cells, cells + 1, 3 * cells + 2]
    w = make_window(ops, layout, dtype, window, [n + 1 for n in lengths], device)
    for slot, length in enumerate(lengths):
        w.fill(slot, length)
    rows = list(enumerate(lengths))
    actual = w.decode([*rows, (w.slots.dummy, 0)])
    assert torch.isfinite(actual).all()
    for row, (slot, position) in enumerate(rows):
        near(actual[row], by_definition(w, slot, position, position))


@DECODE
def test_a_long_stream_of_single_tokens(device: torch.device, ops: str) -> None:
    w = make_window(ops, (4, 2, 64), torch.float32, (2, 5), [25], device)
    w.feed(0, 0, 3, 5)
    for position in range(3, 25):
        near(w.decode([(0, position)])[0], by_definition(w, 0, position, position))


@ALL
def test_before_the_wrap_it_is_ordinary_attention(device: torch.device, ops: str) -> None:
    """Up to the first S + W tokens: the same cells, the same result as the ordinary ops over a rotated cache."""
    window, layout, tokens = (4, 20), (4, 2, 64), 24
    w = make_window(ops, layout, torch.float16, window, [tokens], device)
    ordinary = make_window(ops, layout, torch.float16, window, [tokens], device)
    index = torch.arange(20, dtype=torch.int32, device=device)
    q, expected = (poison(20, 4, 64, device=device, dtype=torch.float16) for _ in range(2))
    rope, where = Rope(w.table[:24].contiguous()), (index, torch.zeros_like(index), w.slots)
    k, v = ordinary.k, ordinary.v
    w.function("rope_append")(w.fed[0][:20], None, None, 1e-6, *where, rope, k, v, q)
    w.function("prefill_attention")(q, k, v, *where, 64**-0.5, 0, expected)
    actual = w.feed(0, 0, 20, 20)
    close(actual, expected)
    assert torch.equal(w.v.nan_to_num(7.0), v.nan_to_num(7.0))
    if "reference" in ops:  # keys are rounded as an ordinary cache holds them
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("layout,dtype", [*zip(LAYOUTS, (F32, F16, BF16, F16), strict=True), ((3, 1, 24), BF16)])
def test_rope_append(device: torch.device, layout: tuple[int, int, int], dtype: torch.dtype, norm: bool) -> None:
    """The kernel writes the reference's cells, keys without rotation, and turns q by the window position."""
    hq, hkv, dh = layout
    w = make_window("kernels", layout, dtype, (4, 12), [2, 2], device)
    positions, token_slot = int32([0, 3, 4, 15, 16, 27, 28, 101, 0], device), int32([0, 1, 0, 1, 0, 1, 1, 0, 2], device)
    last = positions + 1
    qkv = torch.randn(9, (hq + 2 * hkv) * dh, device=device).to(dtype)
    weights = [torch.rand(dh, device=device).to(dtype) + 0.5 if norm else None for _ in range(2)]
    for sample_position in (last, None):
        results = []
        chunk = slice(0, 9) if sample_position is not None else slice(5, 7)  # rows of a batch, tokens 27, 28 of one
        rolling = w.rolling([29]) if sample_position is None else Rolling(4, 12, sample_position, w.table)
        for ops in (elementwise, reference):
            k, v = w.k.clone(), w.v.clone()
            q = poison(chunk.stop - chunk.start, hq, dh, device=device, dtype=dtype)
            where = (positions[chunk], token_slot[chunk], w.slots)
            ops.rope_append(qkv[chunk], *weights, 1e-6, *where, Rope(w.table), k, v, q, rolling)
            results.append((q, k, v))
        for actual, expected in zip(*results, strict=True):
            assert torch.equal(actual.isnan(), expected.isnan())
            close(actual.nan_to_num(7.0), expected.nan_to_num(7.0))
        assert torch.equal(results[0][2].nan_to_num(7.0), results[1][2].nan_to_num(7.0))
        if not norm:
            assert torch.equal(results[0][1].nan_to_num(7.0), results[1][1].nan_to_num(7.0))


@pytest.mark.usefixtures("products_in_order")
@pytest.mark.parametrize("ops", ["invariant reference", "invariant kernels"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_and_neighbours_leave_the_bits(device: torch.device, ops: str, dtype: torch.dtype) -> None:
    lengths, layout, window = [5, 41, 197], (4, 2, 64), (4, 66)
    exact, padded = (make_window(ops, layout, dtype, window, [n + 9 for n in lengths], device) for _ in range(2))
    for slot, length in enumerate(lengths):
        exact.fill(slot, length)
        padded.fill(slot, length)
        chunk = exact.feed(slot, length, 8, 8)
        for tokens in (9, 33):
            assert torch.equal(padded.feed(slot, length, 8, tokens), chunk)
    rows = [(slot, length + 8) for slot, length in enumerate(lengths)]
    together = exact.decode(rows)
    assert torch.equal(together, torch.cat([padded.decode([row]) for row in rows]))


@ALL
def test_what_a_window_cannot_hold_is_refused(device: torch.device, ops: str) -> None:
    w = make_window(ops, (2, 2, 64), torch.float32, (4, 12), [40], device)
    w.feed(0, 0, 12, 12)
    with pytest.raises(AssertionError, match="over the window"):
        w.feed(0, 12, 13, 13)
    q = torch.zeros(2, 2, 64, device=device)
    where = (int32([12, 13], device), int32([0, 0], device), w.slots)
    with pytest.raises(AssertionError):
        w.function("prefill_attention")(q, w.k, w.v, *where, 0.125, 5, q.clone(), w.rolling([14]))
    with pytest.raises(AssertionError):  # the block table has not so many cells
        w.function("prefill_attention")(q, w.k, w.v, *where, 0.125, 0, q.clone(), w.rolling([14])._replace(recent=13))
    dynamic = Rope(w.table, dynamic_original=16, dynamic_base=1e4, dynamic_factor=2.0)
    qkv = torch.zeros(2, 6 * 64, device=device)
    with pytest.raises(AssertionError):
        w.function("rope_append")(qkv, None, None, 1e-6, *where, dynamic, w.k, w.v, q, w.rolling([14]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [(32, 32, 128), (32, 8, 128), (14, 2, 64)])
def test_large(device: torch.device, layout: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Whole chunks and a batch of streams at sizes of a model, kernels against the reference."""
    lengths = [700, 1023, 1500, 4000]
    windows = [make_window(ops, layout, dtype, (4, 1020), [5000] * 4, device) for ops in ("kernels", "reference")]
    for slot, length in enumerate(lengths):
        for start in range(0, length, 512):
            count = min(512, length - start)
            close(*(w.feed(slot, start, count, 512) for w in windows))
    close(*(w.decode(list(enumerate(lengths))) for w in windows))
