"""Plain PyTorch meaning of the attention ops; letters and rules as in ``reference.py``.

``invariant_*`` are the same ops with one promise more: the bits of a row depend on the keys it sees and on nothing
else, neither on the number of tokens, nor on padding, nor on other rows. They work row by row and read positions on the
host, so they are for the CPU, where the device is the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from jitgraph.ops.reference import Rolling, check_rolling, halves, rotate, window_position
from jitgraph.ops.slots import SlotTable


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
    rolling: Rolling | None = None,
) -> None:
    """Causal attention of T tokens of ONE sequence (that of token 0) over its paged cache, this step's tokens included.

    q, out ``[T, Hq, Dh]``; caches ``[N, G, Hkv, Dh]``. Token t sees key positions j <= positions[t], and with a
    window w > 0 only positions[t] - j < w; with a rolling window what ``Rolling`` says, where ``window`` is 0. Padding
    tokens stand at position 0 and see the sequence's first key: finite, unused.
    """
    hq, hkv = q.shape[1], k_cache.shape[2]
    k, v = _gather(k_cache, v_cache, slots.block_table()[token_slot[:1].long()], positions)
    if rolling is None:
        mask = _visible(positions, k.shape[1], window)
    else:
        assert window == 0
        check_rolling(rolling, q.shape[0], slots.pages_per_slot * k_cache.shape[1])
        k, v, token = _unroll(k, v, rolling)
        oldest = (rolling.sample_position - rolling.cells).clamp(min=0)  # padding, too, has a key to see
        mask = (token >= 0) & (token <= torch.maximum(positions, oldest)[:, None])
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
    arrivals: torch.Tensor,
    out: torch.Tensor,
    rolling: Rolling | None = None,
) -> None:
    """Attention of one token of each of R sequences over its own paged cache; shapes as ``prefill_attention``, T = R.

    ``partial`` float32 ``[R, Hq, splits, Dh]``, ``partial_lse`` float32 ``[R, Hq, splits]`` and ``arrivals`` int32
    ``[R, Hkv]`` (zeros before and after) are the split-KV kernel's workspace, unused here.
    """
    del partial, partial_lse, arrivals
    hq, hkv = q.shape[1], k_cache.shape[2]
    k, v = _gather(k_cache, v_cache, slots.block_table()[token_slot.long()], positions)
    if rolling is None:
        mask = _visible(positions, k.shape[1], window)
    else:
        assert window == 0
        check_rolling(rolling, q.shape[0], slots.pages_per_slot * k_cache.shape[1])
        k, v, token = _unroll(k, v, rolling)
        mask = token >= 0
    result = F.scaled_dot_product_attention(
        q[:, :, None],
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask[:, None, None],
        scale=scale,
        enable_gqa=hq != hkv,
    )
    out.copy_(result[:, :, 0])


def invariant_prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    token_slot: torch.Tensor,
    slots: SlotTable,
    scale: float,
    window: int,
    out: torch.Tensor,
    rolling: Rolling | None = None,
) -> None:
    """``prefill_attention`` whose rows have the same bits in every chunk. Padding gives 0."""
    if rolling is not None:
        check_rolling(rolling, q.shape[0], slots.pages_per_slot * k_cache.shape[1])
    sequence = token_slot[:1]
    out.zero_()
    for t in (token_slot == sequence).nonzero().flatten().tolist():
        _attend_row(t, q, k_cache, v_cache, positions, sequence, slots, scale, window, out, rolling)


def invariant_decode_attention(
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
    arrivals: torch.Tensor,
    out: torch.Tensor,
    rolling: Rolling | None = None,
) -> None:
    """``decode_attention`` whose rows have the same bits in every batch."""
    del partial, partial_lse, arrivals
    if rolling is not None:
        check_rolling(rolling, q.shape[0], slots.pages_per_slot * k_cache.shape[1])
    for r in range(q.shape[0]):
        at = slice(r, r + 1)
        own = None if rolling is None else rolling._replace(sample_position=rolling.sample_position[at])
        _attend_row(r, q, k_cache, v_cache, positions, token_slot[at], slots, scale, window, out, own)


def _attend_row(
    t: int,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    sequence: torch.Tensor,
    slots: SlotTable,
    scale: float,
    window: int,
    out: torch.Tensor,
    rolling: Rolling | None,
) -> None:
    """One row over exactly the keys it sees, in tensors of its own: no shape and no alignment comes from elsewhere."""
    position = positions[t : t + 1]
    reach = position if rolling is None else rolling.sample_position - 1
    k, v = _gather(k_cache, v_cache, slots.block_table()[sequence.long()], reach)
    if rolling is None:
        seen = _visible(position, k.shape[1], window)[0]
    else:
        assert window == 0
        k, v, token = _unroll(k, v, rolling)
        seen = ((token >= 0) & (token <= position))[0]
    result = F.scaled_dot_product_attention(
        q[t].clone()[None, :, None],
        k[:, seen].transpose(1, 2),
        v[:, seen].transpose(1, 2),
        scale=scale,
        enable_gqa=q.shape[1] != k_cache.shape[2],
    )
    out[t] = result[0, :, 0]


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


def _unroll(k: torch.Tensor, v: torch.Tensor, rolling: Rolling) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The window's K, rotated and rounded as an ordinary cache holds it, its V, and the absolute index of each cell's
    token, int64 ``[rows, keys]``, -1 where a cell has none yet. K, V ``[rows, keys, Hkv, Dh]``."""
    k, v = k[:, : rolling.cells], v[:, : rolling.cells]
    cell = torch.arange(k.shape[1], device=k.device)[None]
    last = rolling.sample_position.long()[:, None] - 1
    latest = last - (last - cell) % rolling.recent  # the largest t <= last that is congruent to the cell
    token = torch.where(cell < rolling.sinks, cell, latest)
    token = torch.where(cell <= last, token, -1)
    rows = rolling._replace(sample_position=rolling.sample_position[:, None])
    cos, sin = halves(rolling.cos_sin[window_position(rows, token.clamp(min=0))][:, :, None])
    return rotate(k, cos, sin).to(k.dtype), v, token
