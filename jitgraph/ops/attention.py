"""Triton twins of the attention ops in ``reference_attention.py``, over the paged cache.

Signatures and meaning are the reference's. Grids depend on shapes alone; how far a program reads is data on the device.
Every row is reduced in one order. At decode that order depends on the row's position and figures of the engine, never
on its neighbours; ``invariant_prefill_attention`` promises the same for prompts. No call allocates or synchronises.
"""

from __future__ import annotations

import math

import torch

from jitgraph.config import interpreting
from jitgraph.ops.attention_decode_kernels import decode_grouped_kernel, decode_single_kernel
from jitgraph.ops.attention_kernels import prefill_attention_kernel
from jitgraph.ops.elementwise import assert_contiguous, assert_rolling, assert_slots, ceil_div, next_power_of_two
from jitgraph.ops.pdl import pdl_options
from jitgraph.ops.reference import Rolling
from jitgraph.ops.slots import SlotTable

_MULTIPROCESSORS = 132
"""Of an H200; tiles are chosen for it, whatever the device, so that a build has the same kernels everywhere."""
_TARGET_PROGRAMS = 512
"""Decode programs of one row that keep the multiprocessors busy: about four each."""
_MIN_KEYS_PER_SPLIT = 128
"""Fewer are not worth a program of their own and a merge; a multiple of every decode block."""
_MAX_SPLITS = 32
_MERGE_ELEMENTS = 8192
"""float32 elements that a merging program loads at once, at most 64 for each of its threads."""
_INVARIANT_BLOCK = 64, 64
"""Queries and keys of a prompt's program in the batch-invariant mode, for every prompt."""


def decode_splits(max_model_len: int, num_kv_heads: int) -> int:
    """Most parts that the keys of a sequence are split into at decode: a power of two, fixed for an engine.

    Enough for one row to fill the device, but no split below 128 keys at the longest context. Shorter contexts use as
    many as have 128 keys on average.
    """
    wanted = max(1, _TARGET_PROGRAMS // num_kv_heads)
    possible = max(1, max_model_len // _MIN_KEYS_PER_SPLIT)
    return 1 << (min(wanted, possible, _MAX_SPLITS).bit_length() - 1)


def prefill_classes(num_heads: int, chunk_tokens: int) -> tuple[int, ...]:
    """Token counts that stand for all up to ``chunk_tokens``: the least of each (tile, class of integer), ascending.

    Triton compiles 1, multiples of 16 and other integers apart. When each of these has run once, no prompt compiles
    ``prefill_attention`` again.
    """
    least: dict[tuple[tuple[int, int], bool, bool], int] = {}
    for tokens in range(1, chunk_tokens + 1):
        kind = _prefill_block(tokens, num_heads), tokens == 1, tokens % 16 == 0
        least.setdefault(kind, tokens)
    return tuple(least.values())


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
    *,
    invariant: bool = False,
) -> None:
    """Causal attention of T tokens of token 0's sequence; see ``reference_attention.prefill_attention``. Padding tokens
    give 0. ``invariant`` fixes the tile, so that a row's bits do not depend on T."""
    _check(q, k_cache, v_cache, positions, token_slot, slots, out)
    tokens, hq, dh = q.shape
    block_m, block_n, warps, stages = prefill_tile(tokens, hq, dh, q.dtype, rolling is not None, invariant)
    prefill_attention_kernel[(hq, ceil_div(tokens, block_m))](
        q,
        k_cache,
        v_cache,
        positions,
        token_slot,
        slots.words,
        None if rolling is None else rolling.sample_position,
        None if rolling is None else rolling.cos_sin,
        out,
        tokens,
        scale * math.log2(math.e),
        HQ=hq,
        **_geometry(q, k_cache, slots, window, rolling),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        PRECISION=_precision(q.dtype),
        WIDEN=_widen(q.dtype),
        STAGES=stages,
        num_warps=warps,
        **pdl_options(),
    )


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
    """``prefill_attention`` with one tile for all T: a row has the same bits in every chunk and beside any padding."""
    prefill_attention(
        q, k_cache, v_cache, positions, token_slot, slots, scale, window, out, rolling, invariant=True
    )  # fmt: skip


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
    """Attention of one token of each of R sequences; see ``reference_attention.decode_attention``.

    ``partial.shape[2]`` is the most splits a row may use. ``arrivals`` must be zeros, and is when the launch is done.
    """
    _check(q, k_cache, v_cache, positions, token_slot, slots, out)
    assert_contiguous(torch.float32, partial, partial_lse)
    assert_contiguous(torch.int32, arrivals)
    rows, hq, dh = q.shape
    hkv, splits = k_cache.shape[2], partial.shape[2]
    assert partial.shape == (rows, hq, splits, dh) and partial_lse.shape == (rows, hq, splits)
    assert arrivals.shape == (rows, hkv) and (rolling is None or rolling.sample_position.shape == (rows,))
    inputs = (q, k_cache, v_cache, positions, token_slot, slots.words, None if rolling is None else rolling.cos_sin)
    tensors = (*inputs, partial, partial_lse, arrivals, out)
    group, block_s = next_power_of_two(hq // hkv), next_power_of_two(splits)
    geometry = _geometry(q, k_cache, slots, window, rolling)
    chunk = max(1, min(block_s, _MERGE_ELEMENTS // (group * geometry["BLOCK_D"])))
    geometry |= {"HQ": hq, "SPLITS": splits, "MIN_KEYS": _MIN_KEYS_PER_SPLIT, "BLOCK_S": block_s, "CHUNK": chunk}
    grid, scale_log2 = (rows, hkv, splits), scale * math.log2(math.e)
    wide = q.dtype == torch.float32
    tile = {"BLOCK_N": 32 if dh <= 128 else 16, "STAGES": 2 if wide else 3, **pdl_options()}
    if hq == hkv:
        decode_single_kernel[grid](*tensors, scale_log2, **geometry, **tile, num_warps=4)
    else:
        decode_grouped_kernel[grid](
            *tensors,
            scale_log2,
            **geometry,
            **tile,
            BLOCK_M=max(16, group),
            BLOCK_G=group,
            PRECISION=_precision(q.dtype),
            WIDEN=_widen(q.dtype),
            num_warps=8 if wide else 4,  # float32 products have no tensor cores
        )


def _check(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    token_slot: torch.Tensor,
    slots: SlotTable,
    out: torch.Tensor,
) -> None:
    assert_contiguous(q.dtype, q, k_cache, v_cache, out)
    assert_contiguous(torch.int32, positions, token_slot)
    assert_slots(slots)
    tokens, hq, dh = q.shape
    assert out.shape == q.shape and positions.shape == token_slot.shape == (tokens,)
    assert k_cache.shape == v_cache.shape and k_cache.shape[3] == dh and hq % k_cache.shape[2] == 0


def _geometry(
    q: torch.Tensor, k_cache: torch.Tensor, slots: SlotTable, window: int, rolling: Rolling | None
) -> dict[str, int]:
    """The constants that all attention kernels share. RECENT = 0 stands for an ordinary cache."""
    tokens, _, dh = q.shape
    page, hkv = k_cache.shape[1], k_cache.shape[2]
    if rolling is not None:
        assert window == 0, "a sliding window of the model and the rolling window of the cache exclude each other"
        assert_rolling(rolling, tokens, slots.pages_per_slot * page, dh)
    return {
        "SLOT_STRIDE": slots.stride,
        "HKV": hkv,
        "DH": dh,
        "BLOCK_D": max(16, next_power_of_two(dh)),  # 16: the least that a matrix product takes
        "BLOCK_H": max(16, next_power_of_two(ceil_div(dh, 2))),
        "PAGE": page,
        "WINDOW": window,
        "SINKS": 0 if rolling is None else rolling.sinks,
        "RECENT": 0 if rolling is None else rolling.recent,
    }


def _prefill_block(tokens: int, num_heads: int) -> tuple[int, int]:
    """(queries, keys) of a prefill program. 64 queries where that gives half a device of programs; fewer keys at a time
    where a program's time is that of its first block (measured; ``docs/log.md`` has the figures)."""
    if tokens <= 16:
        return 16, 32
    if tokens <= 64 or num_heads * ceil_div(tokens, 64) < _MULTIPROCESSORS // 2 - 2:
        return 16, 64
    return 64, 32 if tokens <= 256 else 64


def prefill_tile(
    tokens: int, num_heads: int, dh: int, dtype: torch.dtype, rolling: bool, invariant: bool
) -> tuple[int, int, int, int]:
    """(queries, keys, warps, stages) of a prefill program; with ``invariant`` the same for all token counts.

    Three stages load a block's keys and values one block ahead of their use; a rolling window loads cosines and sines
    beside them, so its blocks are half as long. float32 products have no tensor cores: twice the warps share the tile.
    """
    rows, keys = _INVARIANT_BLOCK if invariant else _prefill_block(tokens, num_heads)
    keys = max(16, keys // (1 if dh <= 128 else 2) // (2 if rolling else 1))
    if dtype == torch.float32:
        return min(rows, 32 if dh <= 128 else 16), max(16, keys // 2), 8, (2 if rolling and dh > 128 else 3)
    return rows, keys, 4, 3


def _precision(dtype: torch.dtype) -> str:
    """float32 products in full precision; the half types have only one."""
    return "ieee" if dtype == torch.float32 else "tf32"


def _widen(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and interpreting()
