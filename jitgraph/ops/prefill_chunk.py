"""Attention of a prompt chunk that stands in ``qkv``, as ``rope_append`` left it; the meaning is that of
``reference_prefill.chunk_attention``.

Faster than ``attention.prefill_attention``, which reads all keys through the page table, and beyond 160 tokens faster
than ``prefill_fused``, whose programs each rotate the keys that they read. A row's order of summation depends on where
it stands in its chunk, so the batch-invariant mode keeps the former. No call allocates or synchronises.
"""

from __future__ import annotations

import math

import torch

from jitgraph.config import interpreting
from jitgraph.ops.elementwise import assert_contiguous, assert_slots, ceil_div, next_power_of_two
from jitgraph.ops.pdl import pdl_options
from jitgraph.ops.prefill_chunk_kernels import chunk_attention_kernel
from jitgraph.ops.slots import SlotTable

_ENOUGH_PROGRAMS = 64
"""About half the multiprocessors of an H200: with fewer programs, smaller ones are faster."""
_MANY_TOKENS = 320
"""From here on a device has more than one program for each multiprocessor, and four warps are enough for each."""


def chunk_tile(tokens: int, num_heads: int, dh: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(queries, keys, warps, stages) of a program. Measured on an H200 (``docs/log.md`` has the figures). float32
    products have no tensor cores: twice the warps share the tile."""
    few = tokens <= 64 or num_heads * ceil_div(tokens, 64) < _ENOUGH_PROGRAMS
    if dtype == torch.float32:
        return (32 if dh <= 128 else 16), 16, 8, 2
    if dh > 128:
        return (16 if few else 64), 32, 4, 2
    if tokens <= 16:
        return 16, 32, 4, 3
    if few:
        return 32, 64, 4, 2
    return 64, 64, (4 if tokens >= _MANY_TOKENS else 8), 3


def chunk_classes(num_heads: int, chunk_tokens: int) -> tuple[int, ...]:
    """Token counts that stand for all up to ``chunk_tokens``: the least of each (tile, class of integer), ascending.

    Triton compiles 1, multiples of 16 and other integers apart. The half types at ``Dh`` <= 128 tell the most tiles
    apart, so their classes serve the others too.
    """
    least: dict[tuple[tuple[int, ...], bool, bool], int] = {}
    for tokens in range(1, chunk_tokens + 1):
        kind = chunk_tile(tokens, num_heads, 128, torch.float16), tokens == 1, tokens % 16 == 0
        least.setdefault(kind, tokens)
    return tuple(least.values())


def chunk_attention(
    qkv: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    positions: torch.Tensor,
    token_slot: torch.Tensor,
    slots: SlotTable,
    scale: float,
    window: int,
    out: torch.Tensor,
) -> None:
    """Causal attention of the T tokens in ``qkv``; see ``reference_prefill.chunk_attention``. Padding tokens give 0."""
    tokens, hq, dh = out.shape
    page, hkv = k_cache.shape[1], k_cache.shape[2]
    assert_contiguous(qkv.dtype, qkv, k_cache, v_cache, out)
    assert_contiguous(torch.int32, positions, token_slot)
    assert_slots(slots)
    assert qkv.numel() == tokens * (hq + 2 * hkv) * dh and positions.shape == token_slot.shape == (tokens,)
    assert k_cache.shape == v_cache.shape and k_cache.shape[3] == dh and hq % hkv == 0
    block_m, block_n, warps, stages = chunk_tile(tokens, hq, dh, qkv.dtype)
    chunk_attention_kernel[(hq, ceil_div(tokens, block_m))](
        qkv,
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
        HKV=hkv,
        DH=dh,
        BLOCK_D=max(16, next_power_of_two(dh)),  # 16: the least that a matrix product takes
        PAGE=page,
        WINDOW=window,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32",
        WIDEN=qkv.dtype == torch.bfloat16 and interpreting(),
        STAGES=stages,
        num_warps=warps,
        **pdl_options(),  # it follows ``rope_append``, never a product that it would disturb
    )
