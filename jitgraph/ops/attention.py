"""Triton twins of the attention ops in ``reference.py``, over the paged cache.

Signatures and meaning are the reference's. Grids depend on shapes alone; how far a program reads is data on the device.
Every row is reduced in one order that depends on its own position and the fixed number of splits, never on its
neighbours. No call allocates or synchronises.
"""

from __future__ import annotations

import math

import torch

from jitgraph.config import interpreting
from jitgraph.ops.attention_kernels import (
    decode_grouped_kernel,
    decode_merge_kernel,
    decode_single_kernel,
    prefill_attention_kernel,
)
from jitgraph.ops.elementwise import assert_contiguous, assert_slots, ceil_div, next_power_of_two
from jitgraph.ops.slots import SlotTable

_TARGET_PROGRAMS = 512
"""Decode programs of one row that keep an H200's 132 multiprocessors busy: about four each."""
_MIN_KEYS_PER_SPLIT = 64
_MAX_SPLITS = 32


def decode_splits(max_model_len: int, num_kv_heads: int) -> int:
    """How many parts the keys of a sequence are split into at decode: a power of two, fixed for an engine.

    Enough for one row to fill the device, but no split below 64 keys at the longest context.
    """
    wanted = max(1, _TARGET_PROGRAMS // num_kv_heads)
    possible = max(1, max_model_len // _MIN_KEYS_PER_SPLIT)
    return 1 << (min(wanted, possible, _MAX_SPLITS).bit_length() - 1)


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
    """Causal attention of T tokens of token 0's sequence; see ``reference.prefill_attention``. Padding tokens give
    0."""
    _check(q, k_cache, v_cache, positions, token_slot, slots, out)
    tokens, hq, dh = q.shape
    block_m, block_n, warps, stages = _prefill_tile(tokens, dh, q.dtype)
    prefill_attention_kernel[(hq, ceil_div(tokens, block_m))](
        q,
        k_cache,
        v_cache,
        positions,
        token_slot,
        slots.words,
        out,
        tokens,
        scale * math.log2(math.e),
        SLOT_STRIDE=slots.stride,
        HQ=hq,
        HKV=k_cache.shape[2],
        DH=dh,
        BLOCK_D=_padded_head(dh),
        PAGE=k_cache.shape[1],
        WINDOW=window,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        PRECISION=_precision(q.dtype),
        WIDEN=_widen(q.dtype),
        num_warps=warps,
        num_stages=stages,
    )


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
    """Attention of one token of each of R sequences; see ``reference.decode_attention``.

    ``partial.shape[2]`` is the number of splits. A split without keys writes only lse = -inf.
    """
    _check(q, k_cache, v_cache, positions, token_slot, slots, out)
    assert_contiguous(torch.float32, partial, partial_lse)
    rows, hq, dh = q.shape
    hkv, splits = k_cache.shape[2], partial.shape[2]
    assert partial.shape == (rows, hq, splits, dh) and partial_lse.shape == (rows, hq, splits)
    tensors = (q, k_cache, v_cache, positions, token_slot, slots.words, partial, partial_lse)
    geometry = {
        "SLOT_STRIDE": slots.stride,
        "HKV": hkv,
        "DH": dh,
        "BLOCK_D": _padded_head(dh),
        "PAGE": k_cache.shape[1],
        "WINDOW": window,
        "SPLITS": splits,
    }
    grid, scale_log2 = (rows, hkv, splits), scale * math.log2(math.e)
    if hq == hkv:
        block_n = 32 if dh <= 128 else 16
        decode_single_kernel[grid](*tensors, scale_log2, **geometry, BLOCK_N=block_n, num_warps=2, num_stages=2)
    else:
        decode_grouped_kernel[grid](
            *tensors,
            scale_log2,
            **geometry,
            HQ=hq,
            BLOCK_M=max(16, next_power_of_two(hq // hkv)),
            BLOCK_N=_grouped_block(dh, q.dtype),
            PRECISION=_precision(q.dtype),
            WIDEN=_widen(q.dtype),
            num_warps=4,
            num_stages=2,
        )
    decode_merge_kernel[(rows * hq,)](
        partial,
        partial_lse,
        out,
        DH=dh,
        BLOCK_D=_padded_head(dh),
        SPLITS=splits,
        BLOCK_S=next_power_of_two(splits),
        num_warps=4,
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


def _padded_head(dh: int) -> int:
    """Head size as a block: a power of two, at least the 16 that a matrix product needs."""
    return max(16, next_power_of_two(dh))


def _prefill_tile(tokens: int, dh: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(queries, keys, warps, stages) of a prefill program, within an A100's shared memory."""
    if dtype == torch.float32:
        return (16 if tokens <= 16 or dh > 128 else 32), (32 if dh <= 128 else 16), 4, 2
    if tokens <= 16:
        return 16, 64 if dh <= 128 else 32, 4, 3
    return 64, 64 if dh <= 128 else 32, 4, 3


def _grouped_block(dh: int, dtype: torch.dtype) -> int:
    """Keys that a grouped decode program takes at once, within registers and shared memory."""
    return 16 if dtype == torch.float32 and dh > 128 else 32


def _precision(dtype: torch.dtype) -> str:
    """float32 products in full precision; the half types have only one."""
    return "ieee" if dtype == torch.float32 else "tf32"


def _widen(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and interpreting()
