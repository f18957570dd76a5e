"""Plain PyTorch meaning of every op: the specification, and what the CPU runs.

Letters: T tokens of a step, R rows that get a token, S slots, D hidden, Hq/Hkv query and KV heads, Dh head size,
I intermediate size, V vocabulary, N pages of the cache, G tokens in a page, P pages in a slot's block table.

Each op writes into ``out`` tensors that the caller owns. No op reads device data on the host (except trimming on the
CPU, where the device is the host), none branches on data: all can be captured in a CUDA graph. Temporaries come from
PyTorch's allocator, which the Triton twins in ``elementwise.py``, ``attention.py`` and ``sampling.py`` avoid.
Matrix products are in ``reference_linear.py``, attention in ``reference_attention.py``, sampling and append in
``reference_sampling.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from jitgraph.ops import slots as slot_columns
from jitgraph.ops.inbox import ADMIT, HEADER, SLOT, InboxLayout
from jitgraph.ops.slots import SlotTable


class Rope(NamedTuple):
    """Rotary embedding as data.

    ``cos_sin``: float32 ``[max_positions, Dh]``, the first Dh/2 columns cosines, the others sines (any attention
    factor multiplied in). Dynamic NTK scaling (``dynamic_original`` > 0) recomputes the frequencies from the
    sequence's length L once L > ``dynamic_original``: base' = base * (factor * L / original - (factor - 1)) ** (Dh /
    (Dh - 2)), with L = max(prompt length, position + 1), as transformers' ``dynamic`` rope type does.
    """

    cos_sin: torch.Tensor
    dynamic_original: int = 0
    dynamic_base: float = 0.0
    dynamic_factor: float = 1.0


class Rolling(NamedTuple):
    """A KV window that rolls, for streams without an end: the first ``sinks`` tokens of a sequence and its latest
    ``recent`` ones, after Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (2023).

    S and W are the two counts, S + W the cells that a sequence owns. The token of absolute index t lies in cell t while
    t < S + W, then in cell S + (t - S) % W. Keys are cached without rotation and rotated when they are read, by their
    position inside the window as it stands after the step: t - shift, with shift = max(0, last + 1 - (S + W)) and last
    the step's last token of the sequence; sinks keep t. So no position reaches S + W, and up to the first S + W tokens
    this is ordinary attention. A query t sees the sinks and every token u <= t with u > last - W, so a chunk may have
    at most W tokens.

    ``sample_position``: int32 ``[1]`` for a chunk of one sequence, ``[T]`` for one token of each of T: last + 1.
    ``cos_sin``: float32 ``[>= S + W, Dh]``, the very tensor that ``Rope`` has.
    """

    sinks: int
    recent: int
    sample_position: torch.Tensor
    cos_sin: torch.Tensor

    @property
    def cells(self) -> int:
        """Tokens of a sequence that the cache holds at most."""
        return self.sinks + self.recent


# ---------------------------------------------------------------------------------------------------------- step inputs


def receive(
    inbox: torch.Tensor,
    launches: torch.Tensor,
    host_launch: int,
    layout: InboxLayout,
    prompt: bool,
    inputs: torch.Tensor,
    slots: SlotTable,
) -> None:
    """Brings a launch's inputs to the device: inputs = inbox[launch % depth]; a row that admits a sequence also writes
    its slot. Decode steps (``prompt`` False) need the header alone.

    inbox int32 ``[depth, width]`` in pinned host memory; inputs int32 ``[width]``. The launch is ``launches`` int64
    ``[1]`` on the device, to which 1 is added. Plain PyTorch cannot index by it, so here the host passes the same
    number as ``host_launch``, and a captured graph must not contain this op.
    """
    launches.add_(1)
    row = inbox[host_launch % inbox.shape[0]]
    words = layout.width if prompt else HEADER
    inputs[:words].copy_(row[:words], non_blocking=True)
    if prompt and int(row[ADMIT]):
        slots.words[int(row[SLOT])].copy_(row[HEADER : layout.prompt], non_blocking=True)


def prepare_prefill(
    header: torch.Tensor,
    prompt: torch.Tensor,
    dummy: int,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    token_slot: torch.Tensor,
    sample_index: torch.Tensor,
    sample_slot: torch.Tensor,
    sample_position: torch.Tensor,
) -> None:
    """Turns a chunk of one prompt into a step's tensors.

    ``header`` int32 ``[4]``: slot, start position, n tokens, emit (1 where the chunk ends the prompt). ``prompt``
    int32 ``[>= T]``: the chunk's ids, anything after the first n. Tokens past n become id 0 at position 0 of the
    dummy slot. Writes ``token_ids``, ``positions``, ``token_slot`` int32 ``[T]`` and ``sample_index`` (the last real
    token), ``sample_slot`` (the slot, or the dummy where nothing is emitted), ``sample_position`` (start + n) int32
    ``[1]``.
    """
    t = token_ids.shape[0]
    slot, start, n, emit = header[0], header[1], header[2], header[3]
    index = torch.arange(t, dtype=torch.int32, device=token_ids.device)
    real = index < n
    token_ids.copy_(torch.where(real, prompt[:t], 0))
    positions.copy_(torch.where(real, start + index, 0))
    token_slot.copy_(torch.where(real, slot, dummy))
    sample_index.copy_((n - 1).clamp(min=0).reshape(1))
    sample_slot.copy_(torch.where(emit > 0, slot, dummy).reshape(1))
    sample_position.copy_((start + n).reshape(1))


def prepare_decode(
    row_slot: torch.Tensor,
    slots: SlotTable,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    token_slot: torch.Tensor,
    sample_index: torch.Tensor,
    sample_slot: torch.Tensor,
    sample_position: torch.Tensor,
) -> None:
    """Turns the slots in ``row_slot`` int32 ``[R]`` into a step of one token per row (all outputs int32 ``[R]``).

    A finished slot (the dummy always is) becomes id 0 at position 0 of the dummy slot.
    """
    table = slots.words[row_slot.long()]
    live = table[:, slot_columns.FINISHED] == 0
    token_ids.copy_(torch.where(live, table[:, slot_columns.NEXT_TOKEN], 0))
    positions.copy_(torch.where(live, table[:, slot_columns.LENGTH], 0))
    slot = torch.where(live, row_slot, slots.dummy)
    token_slot.copy_(slot)
    sample_index.copy_(torch.arange(row_slot.shape[0], dtype=torch.int32, device=row_slot.device))
    sample_slot.copy_(slot)
    sample_position.copy_(positions + 1)


# --------------------------------------------------------------------------------------------------------------- layers


def embed(token_ids: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> None:
    """out[t] = table[token_ids[t]]; token_ids int32 ``[T]``, table ``[V, D]``, out ``[T, D]``. Also gathers rows."""
    torch.index_select(table, 0, token_ids, out=out)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32; x, out ``[T, D]``, weight ``[D]``."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    out.copy_((wide * scale).to(x.dtype) * weight)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """residual += x (rounded to its dtype), then out = rms_norm(residual); x, residual, out ``[T, D]``."""
    residual.add_(x)
    rms_norm(residual, weight, eps, out)


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """out = silu(gate) * up; gate_up ``[T, 2 I]`` (gate first), out ``[T, I]``."""
    gate, up = gate_up.chunk(2, dim=-1)
    torch.mul(F.silu(gate), up, out=out)


def query_shape(qkv: torch.Tensor, k_cache: torch.Tensor, positions: torch.Tensor) -> tuple[int, int, int]:
    """(T, Hq, Dh) of the queries in qkv ``[T, (Hq + 2 Hkv) Dh]``."""
    tokens, (hkv, dh) = positions.shape[0], k_cache.shape[2:]
    return tokens, qkv.numel() // (tokens * dh) - 2 * hkv, dh


def rope_append(
    qkv: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    positions: torch.Tensor,
    token_slot: torch.Tensor,
    slots: SlotTable,
    rope: Rope,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    q_out: torch.Tensor | None,
    rolling: Rolling | None = None,
) -> None:
    """Splits QKV, optionally RMS-normalises q and k per head, rotates both, and writes k and v into the paged cache.

    qkv ``[T, (Hq + 2 Hkv) Dh]``; q_norm, k_norm ``[Dh]``; positions, token_slot int32 ``[T]``;
    k_cache, v_cache ``[N, G, Hkv, Dh]``; q_out ``[T, Hq, Dh]``. Rotation (halves convention, float32):
    (a, b) -> (a cos - b sin, b cos + a sin). Token t goes to page block_table[token_slot[t]][positions[t] // G], offset
    positions[t] % G. Without q_out, q and k are left, rotated, where they stand in qkv. A rolling window wants it: q is
    rotated by its window position, k is written without rotation, and the window's cell takes positions[t]'s place.
    """
    t, hq, dh = query_shape(qkv, k_cache, positions)
    page_size, hkv = k_cache.shape[1], k_cache.shape[2]
    q, k, v = qkv.view(t, hq + 2 * hkv, dh).split((hq, hkv, hkv), dim=1)
    if q_norm is not None:
        assert k_norm is not None
        q, k = _head_norm(q, q_norm, eps), _head_norm(k, k_norm, eps)
    if rolling is None:
        cos, sin = _cos_sin(positions, token_slot, slots, rope, dh)
        k, where = rotate(k, cos, sin), positions.long()
    else:
        check_rolling(rolling, t, slots.pages_per_slot * page_size)
        assert rope.cos_sin is rolling.cos_sin and not rope.dynamic_original
        cos, sin = (part[:, None] for part in halves(rolling.cos_sin[window_position(rolling, positions)]))
        where = window_cell(rolling, positions)
    q = rotate(q, cos, sin)
    if q_out is not None:
        q_out.copy_(q)
    else:
        assert rolling is None
        qkv.view(t, hq + 2 * hkv, dh)[:, : hq + hkv] = torch.cat((q, k), dim=1)
    pages = slots.block_table()[token_slot.long(), where // page_size].long()
    k_cache[pages, where % page_size] = k.to(k_cache.dtype)
    v_cache[pages, where % page_size] = v.to(v_cache.dtype)


def _head_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def _cos_sin(
    positions: torch.Tensor, token_slot: torch.Tensor, slots: SlotTable, rope: Rope, dh: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 cosines and sines ``[T, 1, Dh / 2]`` of each token."""
    cos, sin = halves(rope.cos_sin[positions.long()])
    if rope.dynamic_original:
        prompt = slots.column(slot_columns.PROMPT_LENGTH)[token_slot.long()]
        length = torch.maximum(prompt, positions + 1).float()
        stretch = rope.dynamic_factor * length / rope.dynamic_original - (rope.dynamic_factor - 1.0)
        base = rope.dynamic_base * stretch.clamp(min=1.0) ** (dh / (dh - 2))
        exponent = torch.arange(0, dh, 2, device=positions.device).float() / dh
        angle = positions.float()[:, None] * (1.0 / base[:, None] ** exponent)
        stretched = (length > rope.dynamic_original)[:, None]
        cos, sin = torch.where(stretched, angle.cos(), cos), torch.where(stretched, angle.sin(), sin)
    return cos[:, None], sin[:, None]


def halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two halves of the last axis: of a head, or the cosines and sines of a table's rows."""
    a, b = x.chunk(2, dim=-1)
    return a, b


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """float32 rotation of heads ``[..., Dh]`` by cosines and sines ``[..., Dh / 2]``."""
    a, b = halves(x.float())
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# ------------------------------------------------------------------------------------------------------- rolling window


def check_rolling(rolling: Rolling, tokens: int, capacity: int) -> None:
    """What a step of ``tokens`` tokens assumes of its window; ``capacity`` is the tokens of a slot's block table."""
    last = rolling.sample_position
    assert rolling.sinks >= 0 and rolling.recent >= 1
    assert last.dtype == torch.int32 and last.shape in ((1,), (tokens,))
    assert last.shape[0] == tokens or tokens <= rolling.recent, "a chunk over the window overwrites its own keys"
    assert rolling.cells <= capacity and rolling.cos_sin.shape[0] >= rolling.cells


def window_cell(rolling: Rolling, token: torch.Tensor) -> torch.Tensor:
    """int64: the cell of the token of each absolute index."""
    t = token.long()
    return torch.where(t < rolling.cells, t, rolling.sinks + (t - rolling.sinks) % rolling.recent)


def window_position(rolling: Rolling, token: torch.Tensor) -> torch.Tensor:
    """int64: the position inside the window of the token of each absolute index; 0 for padding that is out of it."""
    t = token.long()
    shift = (rolling.sample_position.long() - rolling.cells).clamp(min=0)
    return torch.where(t < rolling.sinks, t, (t - shift).clamp(min=0))
