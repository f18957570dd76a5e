"""Plain PyTorch meaning of ops of a prompt chunk that gain nothing in PyTorch: RoPE, append and attention in one, and
attention over a chunk that stands in ``qkv``.

Letters and rules as in ``reference.py``. No engine is bound to these: they are the specification of the Triton twins in
``prefill_fused.py`` and ``prefill_chunk.py``.
"""

from __future__ import annotations

import torch

from jitgraph.ops.reference import Rope, rope_append
from jitgraph.ops.reference_attention import prefill_attention
from jitgraph.ops.reference_linear import SplitScratch
from jitgraph.ops.slots import SlotTable

JOINED_TOKENS = 160
"""Tokens up to which one launch is faster than two: beyond, its programs rotate the same keys too often (H200)."""


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
    """``rope_append`` without norms, then ``prefill_attention``, for a chunk of ONE sequence (that of token 0).

    qkv ``[T, (Hq + 2 Hkv) Dh]``; positions, token_slot int32 ``[T]``; caches ``[N, G, Hkv, Dh]``; out ``[T, Hq, Dh]``.
    Token t of the sequence stands at positions[0] + t; padding tokens come last. Nothing is split here.
    """
    q = torch.empty_like(out)
    rope_append(qkv, None, None, 0.0, positions, token_slot, slots, rope, k_cache, v_cache, q)
    prefill_attention(q, k_cache, v_cache, positions, token_slot, slots, scale, window, out)


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
    """``prefill_attention`` behind a ``rope_append`` in place: qkv ``[T, (Hq + 2 Hkv) Dh]`` holds the chunk's rotated
    queries, and its keys and values as the cache holds them too; which of the two is read is not promised."""
    tokens, hq, dh = out.shape
    q = qkv.view(tokens, -1, dh)[:, :hq].contiguous()
    prefill_attention(q, k_cache, v_cache, positions, token_slot, slots, scale, window, out)
