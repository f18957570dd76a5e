"""Plain PyTorch meaning of every op: the specification, and what the CPU runs.

Letters: T tokens of a step, R rows that get a token, S slots, D hidden, Hq/Hkv query and KV heads, Dh head size,
I intermediate size, V vocabulary, N pages of the cache, G tokens in a page, P pages in a slot's block table.

Each op writes into ``out`` tensors that the caller owns. No op reads device data on the host (except trimming on the
CPU, where the device is the host), none branches on data: all can be captured in a CUDA graph. Temporaries come from
PyTorch's allocator, which the Triton twins in ``elementwise.py``, ``attention.py`` and ``sampling.py`` avoid.
Sampling and append are in ``reference_sampling.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from jitgraph.ops import slots as slot_columns
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


# ---------------------------------------------------------------------------------------------------------- step inputs


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
    sample_index.copy_((n - 1).reshape(1))
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


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """out = x @ weight.T (+ bias); x ``[T, K]``, weight ``[N, K]``, bias ``[N]``, out ``[T, N]``."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """out = silu(gate) * up; gate_up ``[T, 2 I]`` (gate first), out ``[T, I]``."""
    gate, up = gate_up.chunk(2, dim=-1)
    torch.mul(F.silu(gate), up, out=out)


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
    q_out: torch.Tensor,
) -> None:
    """Splits QKV, optionally RMS-normalises q and k per head, rotates both, and writes k and v into the paged cache.

    qkv ``[T, (Hq + 2 Hkv) Dh]``; q_norm, k_norm ``[Dh]``; positions, token_slot int32 ``[T]``;
    k_cache, v_cache ``[N, G, Hkv, Dh]``; q_out ``[T, Hq, Dh]``. Rotation (halves convention, float32):
    (a, b) -> (a cos - b sin, b cos + a sin). Token t goes to page block_table[token_slot[t]][positions[t] // G], offset
    positions[t] % G.
    """
    t, hq, dh = q_out.shape
    page_size, hkv = k_cache.shape[1], k_cache.shape[2]
    q, k, v = qkv.view(t, hq + 2 * hkv, dh).split((hq, hkv, hkv), dim=1)
    if q_norm is not None:
        assert k_norm is not None
        q, k = _head_norm(q, q_norm, eps), _head_norm(k, k_norm, eps)
    cos, sin = _cos_sin(positions, token_slot, slots, rope, dh)
    q_out.copy_(_rotate(q, cos, sin))
    where = positions.long()
    pages = slots.block_table()[token_slot.long(), where // page_size].long()
    k_cache[pages, where % page_size] = _rotate(k, cos, sin).to(k_cache.dtype)
    v_cache[pages, where % page_size] = v.to(v_cache.dtype)


def _head_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def _cos_sin(
    positions: torch.Tensor, token_slot: torch.Tensor, slots: SlotTable, rope: Rope, dh: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 cosines and sines ``[T, 1, Dh / 2]`` of each token."""
    rows = rope.cos_sin[positions.long()]
    cos, sin = rows[:, : dh // 2], rows[:, dh // 2 :]
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


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    token_slot: torch.Tensor,
    slots: SlotTable,
    scale: float,
    window: int,
    out: torch.Tensor,
) -> None:
    """Causal attention of T tokens of ONE sequence (that of token 0) over its paged cache, this step's tokens included.

    q, out ``[T, Hq, Dh]``; caches ``[N, G, Hkv, Dh]``. Token t sees key positions j <= positions[t], and with a
    window w > 0 only positions[t] - j < w. Padding tokens stand at position 0 and see the sequence's first key:
    finite, unused.
    """
    hq, hkv = q.shape[1], k_cache.shape[2]
    table = slots.block_table()[token_slot[:1].long()]
    k, v = _gather(k_cache, v_cache, table, positions)
    mask = _visible(positions, k.shape[1], window)
    result = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask[None, None],
        scale=scale,
        enable_gqa=hq != hkv,
    )
    out.copy_(result[0].transpose(0, 1))


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    token_slot: torch.Tensor,
    slots: SlotTable,
    scale: float,
    window: int,
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Attention of one token of each of R sequences over its own paged cache; shapes as ``prefill_attention``, T = R.

    ``partial`` float32 ``[R, Hq, splits, Dh]`` and ``partial_lse`` float32 ``[R, Hq, splits]`` are the split-KV
    kernel's workspace, unused here.
    """
    del partial, partial_lse
    hq, hkv = q.shape[1], k_cache.shape[2]
    k, v = _gather(k_cache, v_cache, slots.block_table()[token_slot.long()], positions)
    mask = _visible(positions, k.shape[1], window)
    result = F.scaled_dot_product_attention(
        q[:, :, None],
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask[:, None, None],
        scale=scale,
        enable_gqa=hq != hkv,
    )
    out.copy_(result[:, :, 0])


def _gather(
    k_cache: torch.Tensor, v_cache: torch.Tensor, table: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V ``[rows, keys, Hkv, Dh]`` of each row of the block table ``[rows, P]``."""
    page_size = k_cache.shape[1]
    if table.device.type == "cpu":  # the device is the host here: gather only what is in use
        table = table[:, : int(positions.max()) // page_size + 1]
    pages = table.long()
    rows, keys = pages.shape[0], pages.shape[1] * page_size
    k, v = k_cache[pages], v_cache[pages]
    return k.view(rows, keys, *k.shape[3:]), v.view(rows, keys, *v.shape[3:])


def _visible(positions: torch.Tensor, keys: int, window: int) -> torch.Tensor:
    """bool ``[T, keys]``: which key positions each token sees."""
    j = torch.arange(keys, dtype=torch.int32, device=positions.device)
    mask = j[None] <= positions[:, None]
    if window > 0:
        mask &= positions[:, None] - j[None] < window
    return mask
