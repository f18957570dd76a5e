"""RoPE, KV append and attention of a prompt chunk in one launch; the meaning is that of ``reference_prefill.py``.

For a plain cache: no norms of queries and keys, no rolling window, no dynamic RoPE. The order of a row's sums depends
on where it stands in its chunk, so the batch-invariant mode keeps the two ops. No call allocates or synchronises.

A short chunk has few programs, and behind a long context each would read much: the next turn of a chat. So programs
share the context's keys, as at decode. How many do is data on the device, since one graph serves a chunk wherever it
stands; those that are not needed leave at once.
"""

from __future__ import annotations

import math

import torch

from jitgraph.config import interpreting
from jitgraph.jit.target import target_arch
from jitgraph.ops.elementwise import assert_contiguous, assert_slots, ceil_div, next_power_of_two
from jitgraph.ops.pdl import PDL_TOKENS, pdl_options
from jitgraph.ops.prefill_fused_kernels import rope_prefill_attention_kernel
from jitgraph.ops.reference import Rope
from jitgraph.ops.reference_linear import SplitScratch
from jitgraph.ops.slots import SlotTable

_WGMMA_ARCH = 90
_ENOUGH_PROGRAMS = 64
"""About half the multiprocessors of an H200: with fewer programs, smaller ones are faster."""
_SPLITS = 4
"""Programs that may share the context of a block of queries."""
_SPLIT_TOKENS = 64
"""Tokens of a chunk up to which they do; more have programs enough, and the same tokens have smaller tiles."""
_MIN_KEYS_PER_SPLIT = 256
"""Keys of the context that make another program worth its merge, on average."""
_MOST_ROWS = 32
"""Queries of the largest of all tiles."""
_LEAST_ROWS = 16
"""Queries of the smallest."""


def fused_tile(tokens: int, num_heads: int, dh: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(queries, keys, warps, stages) of a program; one stage keeps the next block of keys in registers.

    Measured on an H200 (``docs/log.md`` has the figures); older architectures take smaller blocks, whose operands pass
    through registers. float32 products have no tensor cores: twice the warps share the tile.
    """
    if dtype == torch.float32:
        return (32 if dh <= 128 else 16), 16, 8, 2
    if dh > 128:
        return 16, 16, 4, 2
    few = tokens <= 64 or num_heads * ceil_div(tokens, 64) < _ENOUGH_PROGRAMS
    if target_arch() < _WGMMA_ARCH:
        return (16, 32, 4, 2) if few else (32, 32, 4, 3)
    if tokens <= 16:
        return 16, 32, 4, 1
    return (16, 64, 8, 1) if few else (32, 64, 8, 1)


def fused_splits(tokens: int) -> int:
    """Programs that may share the context of a block of queries. Those that a chunk does not need leave at once."""
    return _SPLITS if tokens <= _SPLIT_TOKENS else 1


def partial_words(num_heads: int, dh: int) -> int:
    """float32 words of ``SplitScratch.partial`` that chunks of any length need, whatever the dtype."""
    return max(_block_words(tokens, num_heads, dh, _MOST_ROWS) for tokens in range(1, _SPLIT_TOKENS + 1))


def arrival_words(num_heads: int) -> int:
    """int32 words of ``SplitScratch.arrivals`` for the same."""
    return num_heads * ceil_div(_SPLIT_TOKENS, _LEAST_ROWS)


def _block_words(tokens: int, num_heads: int, dh: int, block_m: int) -> int:
    splits = fused_splits(tokens)
    rows = num_heads * ceil_div(tokens, block_m) * block_m
    return rows * splits * (_block_d(dh) + 2) if splits > 1 else 0


def _block_d(dh: int) -> int:
    return max(16, next_power_of_two(dh))  # 16: the least that a matrix product takes


def fused_classes(num_heads: int, chunk_tokens: int) -> tuple[int, ...]:
    """Token counts that stand for all up to ``chunk_tokens``: the least of each (tile, class of integer), ascending.

    Triton compiles 1, multiples of 16 and other integers apart. The half types at ``Dh`` <= 128 tell the most tiles
    apart, so their classes serve the others too.
    """
    least: dict[tuple[tuple[int, ...], int, bool, bool, bool], int] = {}
    for tokens in range(1, chunk_tokens + 1):
        tile = fused_tile(tokens, num_heads, 128, torch.float16)
        splits = fused_splits(tokens)
        least.setdefault((tile, splits, tokens <= PDL_TOKENS, tokens == 1, tokens % 16 == 0), tokens)
    return tuple(least.values())


def rope_prefill_attention(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    token_slot: torch.Tensor,
    slots: SlotTable,
    rope: Rope,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    scale: float,
    window: int,
    out: torch.Tensor,
    scratch: SplitScratch,
) -> None:
    """Rotates, appends and attends; see ``reference_prefill.rope_prefill_attention``.

    Padding tokens give 0 and are not appended: nothing reads the dummy page in a prompt's step.
    """
    tokens, hq, dh = out.shape
    page, hkv = k_cache.shape[1], k_cache.shape[2]
    assert_contiguous(qkv.dtype, qkv, k_cache, v_cache, out)
    assert_contiguous(torch.int32, positions, token_slot)
    assert_contiguous(torch.float32, rope.cos_sin)
    assert_slots(slots)
    assert qkv.numel() == tokens * (hq + 2 * hkv) * dh and positions.shape == token_slot.shape == (tokens,)
    assert k_cache.shape == v_cache.shape and k_cache.shape[3] == dh and hq % hkv == 0
    assert dh % 2 == 0 and rope.cos_sin.shape[1] == dh and rope.cos_sin.shape[0] >= tokens
    assert not rope.dynamic_original, "frequencies that depend on the length are for rope_append"
    block_m, block_n, warps, stages = fused_tile(tokens, hq, dh, qkv.dtype)
    blocks, splits = ceil_div(tokens, block_m), fused_splits(tokens)
    assert scratch.partial.numel() >= _block_words(tokens, hq, dh, block_m)
    assert splits == 1 or scratch.arrivals.numel() >= hq * blocks
    rope_prefill_attention_kernel[(hq, blocks, splits)](
        qkv,
        positions,
        token_slot,
        slots.words,
        rope.cos_sin,
        k_cache,
        v_cache,
        out,
        scratch.partial,
        scratch.arrivals,
        tokens,
        scale * math.log2(math.e),
        SLOT_STRIDE=slots.stride,
        HQ=hq,
        HKV=hkv,
        DH=dh,
        BLOCK_D=_block_d(dh),
        BLOCK_H=max(16, next_power_of_two(dh // 2)),
        PAGE=page,
        WINDOW=window,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32",
        WIDEN=qkv.dtype == torch.bfloat16 and interpreting(),
        STAGES=stages,
        SPLITS=splits,
        MIN_KEYS=_MIN_KEYS_PER_SPLIT,
        num_warps=warps,
        **pdl_options(tokens),
    )
