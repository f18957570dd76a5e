"""The Triton row-wise ops against their PyTorch meaning."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from ops_cases import DTYPES, LAYOUTS, PAGE, close, int32, make_paged, poison

from jitgraph.ops import elementwise, reference
from jitgraph.ops.inbox import ADMIT, HEADER, SLOT, InboxLayout
from jitgraph.ops.reference import Rope
from jitgraph.ops.slots import FINISHED, LENGTH, NEXT_TOKEN, PROMPT_LENGTH, SlotTable


def _outputs(tokens: int, rows: int, device: torch.device) -> list[torch.Tensor]:
    return [poison(n, device=device, dtype=torch.int32) for n in (tokens, tokens, tokens, rows, rows, rows)]


@pytest.mark.parametrize("tokens,n,start,emit", [(1, 1, 0, 1), (8, 5, 0, 1), (300, 300, 0, 0), (300, 7, 512, 1)])
def test_prepare_prefill(device: torch.device, tokens: int, n: int, start: int, emit: int) -> None:
    header = int32([2, start, n, emit], device)
    prompt = torch.randint(0, 1000, (512,), dtype=torch.int32, device=device)
    actual, expected = _outputs(tokens, 1, device), _outputs(tokens, 1, device)
    elementwise.prepare_prefill(header, prompt, 5, *actual)
    reference.prepare_prefill(header, prompt, 5, *expected)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("rows", [[0], [2, 0, 1], [3, 1, 4, 0, 2], [4, 4, 4, 1, 4, 4, 4, 4]])
def test_prepare_decode(device: torch.device, rows: list[int]) -> None:
    slots = SlotTable.allocate(4, 3, device)
    slots.words[:4, FINISHED] = int32([0, 1, 0, 0], device)
    slots.words[:4, LENGTH] = int32([7, 9, 1, 300], device)
    slots.words[:4, NEXT_TOKEN] = int32([11, 22, 33, 44], device)
    actual, expected = _outputs(len(rows), len(rows), device), _outputs(len(rows), len(rows), device)
    elementwise.prepare_decode(int32(rows, device), slots, *actual)
    reference.prepare_decode(int32(rows, device), slots, *expected)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


class Mailbox:
    """An inbox whose rows are all different, and what ``receive`` writes, which is poison before."""

    def __init__(self, device: torch.device, pages: int, prompt: int, launch: int, depth: int = 4) -> None:
        self.slots = SlotTable.allocate(3, pages, device)
        self.slots.words.fill_(-5)
        self.layout = InboxLayout(self.slots.stride, prompt)
        rows = torch.arange(depth * self.layout.width, dtype=torch.int32).view(depth, -1) + 1000
        rows[:, ADMIT] = 0
        self.inbox = rows.pin_memory() if device.type == "cuda" else rows
        self.launches = torch.full((1,), launch, dtype=torch.int64, device=device)
        self.inputs = poison(self.layout.width, device=device, dtype=torch.int32)

    def receive(self, ops: ModuleType, prompt: bool) -> None:
        launch = int(self.launches)
        ops.receive(self.inbox, self.launches, launch, self.layout, prompt, self.inputs, self.slots)


@pytest.mark.parametrize("launch", [0, 3, 4, 2**40 + 1])
@pytest.mark.parametrize("prompt", [False, True], ids=["decode", "prompt"])
def test_receive_takes_the_row_of_its_launch(device: torch.device, launch: int, prompt: bool) -> None:
    """A prompt gets the whole row, a decode step the header alone; each launch the row that is its own."""
    for ops in (elementwise, reference):
        box = Mailbox(device, pages=5, prompt=24, launch=launch)
        for number in range(launch, launch + 6):
            box.inputs.fill_(-1)
            box.receive(ops, prompt)
            row = box.inbox[number % 4].to(device)
            read = box.layout.width if prompt else HEADER
            assert torch.equal(box.inputs[:read], row[:read]) and (box.inputs[read:] == -1).all()
            assert int(box.launches) == number + 1
        assert (box.slots.words == -5).all(), "nobody was admitted"


@pytest.mark.parametrize(("pages", "tokens"), [(1, 1), (5, 24), (130, 512)])
@pytest.mark.parametrize("slot", [0, 2])
def test_receive_admits(device: torch.device, pages: int, tokens: int, slot: int) -> None:
    """A row that admits fills its slot's row of the table, every word of it, and no other; a decode step never does."""
    for ops in (elementwise, reference):
        box = Mailbox(device, pages, tokens, launch=9)
        box.inbox[1, ADMIT], box.inbox[1, SLOT] = 1, slot
        row = box.inbox[1, HEADER : box.layout.prompt].to(device)
        box.receive(ops, prompt=True)
        assert torch.equal(box.slots.words[slot], row) and row.numel() == box.slots.words.shape[1]
        others = [other for other in range(4) if other != slot]
        assert (box.slots.words[others] == -5).all()
        assert torch.equal(box.inputs, box.inbox[1].to(device))
        box.launches.fill_(1)
        box.slots.words.fill_(-5)
        box.receive(ops, prompt=False)
        assert (box.slots.words == -5).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 100, 1500])
def test_embed(device: torch.device, dtype: torch.dtype, width: int) -> None:
    table = torch.randn(50, width, device=device).to(dtype)
    ids = int32([0, 49, 7, 7, 13], device)
    out = poison(5, width, device=device, dtype=dtype)
    elementwise.embed(ids, table, out)
    assert torch.equal(out, table[ids.long()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens,width", [(1, 64), (3, 100), (2, 1537)])
def test_norms(device: torch.device, dtype: torch.dtype, tokens: int, width: int) -> None:
    x, residual = (torch.randn(tokens, width, device=device).to(dtype) for _ in range(2))
    weight = torch.rand(width, device=device).to(dtype) + 0.5
    expected, actual = torch.empty_like(x), torch.full_like(x, torch.nan)
    reference.rms_norm(x, weight, 1e-5, expected)
    elementwise.rms_norm(x, weight, 1e-5, actual)
    close(actual, expected)
    other = residual.clone()
    reference.add_rms_norm(x, residual, weight, 1e-5, expected)
    elementwise.add_rms_norm(x, other, weight, 1e-5, actual)
    close(other, residual)
    close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens,width", [(1, 16), (3, 100), (2, 1100)])
def test_silu_mul(device: torch.device, dtype: torch.dtype, tokens: int, width: int) -> None:
    gate_up = (torch.randn(tokens, 2 * width, device=device) * 3).to(dtype)
    expected = torch.empty(tokens, width, dtype=dtype, device=device)
    actual = torch.full_like(expected, torch.nan)
    reference.silu_mul(gate_up, expected)
    elementwise.silu_mul(gate_up, actual)
    close(actual, expected)


def _rope(dh: int, device: torch.device, dynamic: bool) -> Rope:
    frequency = 10000.0 ** -(torch.arange(0, dh, 2, device=device).float() / dh)
    angle = torch.arange(64, device=device).float()[:, None] * frequency
    table = torch.cat((angle.cos(), angle.sin()), dim=1)
    return Rope(table, dynamic_original=16, dynamic_base=10000.0, dynamic_factor=2.0) if dynamic else Rope(table)


@pytest.mark.parametrize("norm,dynamic", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [*LAYOUTS, (3, 1, 24)])
def test_rope_append(
    device: torch.device, layout: tuple[int, int, int], dtype: torch.dtype, norm: bool, dynamic: bool
) -> None:
    hq, hkv, dh = layout
    paged = make_paged([20, 9], hkv, dh, dtype, device)
    paged.slots.words[1, PROMPT_LENGTH] = 3
    dummy = paged.slots.dummy
    positions, token_slot = int32([0, 3, 17, 8, 19, 0], device), int32([0, 0, 0, 1, 0, dummy], device)
    qkv = torch.randn(6, (hq + 2 * hkv) * dh, device=device).to(dtype)
    weights = [torch.rand(dh, device=device).to(dtype) + 0.5 if norm else None for _ in range(2)]
    rope = _rope(dh, device, dynamic)
    results = []
    for ops in (elementwise, reference):
        k, v = paged.k.clone(), paged.v.clone()
        q = poison(6, hq, dh, device=device, dtype=dtype)
        ops.rope_append(qkv, *weights, 1e-6, positions, token_slot, paged.slots, rope, k, v, q)
        results.append((q, k, v))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual.isnan(), expected.isnan())  # nothing but the tokens' own cells was written
        close(actual.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 8, 100, 512])
def test_llama_2_7b_shapes(device: torch.device, tokens: int) -> None:
    dtype, hidden, inner, heads, dh = torch.float16, 4096, 11008, 32, 128
    x, residual = (torch.randn(tokens, hidden, device=device).to(dtype) for _ in range(2))
    weight = torch.rand(hidden, device=device).to(dtype)
    gate_up = torch.randn(tokens, 2 * inner, device=device).to(dtype)
    paged = make_paged([512], heads, dh, dtype, device, page=16)
    qkv = torch.randn(tokens, 3 * heads * dh, device=device).to(dtype)
    positions = torch.arange(tokens, dtype=torch.int32, device=device)
    slot = torch.zeros_like(positions)
    rope = Rope(torch.randn(512, dh, device=device))
    results = []
    for ops in (elementwise, reference):
        total, normed = residual.clone(), torch.empty_like(x)
        ops.add_rms_norm(x, total, weight, 1e-5, normed)
        activated = torch.empty(tokens, inner, dtype=dtype, device=device)
        ops.silu_mul(gate_up, activated)
        k, v, q = paged.k0.clone(), paged.v0.clone(), torch.empty(tokens, heads, dh, dtype=dtype, device=device)
        ops.rope_append(qkv, None, None, 1e-5, positions, slot, paged.slots, rope, k, v, q)
        results.append((total, normed, activated, q, k, v))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


def test_blocks_cover_a_cache_page_by_page(device: torch.device) -> None:
    """Appending a whole prompt token by token or at once leaves the same cache."""
    paged = make_paged([2 * PAGE + 3], 2, 16, torch.float32, device)
    tokens = 2 * PAGE + 3
    qkv = torch.randn(tokens, 6 * 16, device=device)
    positions = torch.arange(tokens, dtype=torch.int32, device=device)
    slot = torch.zeros_like(positions)
    q = torch.empty(tokens, 2, 16, device=device)
    together, single = (paged.k.clone(), paged.v.clone()), (paged.k.clone(), paged.v.clone())
    rope = _rope(16, device, dynamic=False)
    elementwise.rope_append(qkv, None, None, 1e-5, positions, slot, paged.slots, rope, *together, q)
    for t in range(tokens):
        at = slice(t, t + 1)
        elementwise.rope_append(qkv[at], None, None, 1e-5, positions[at], slot[at], paged.slots, rope, *single, q[at])
    for a, b in zip(together, single, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
