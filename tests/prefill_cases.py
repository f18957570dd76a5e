"""A chunk of a prompt before its attention: its QKV, the cache before it, and all that must not be read poisoned."""

from __future__ import annotations

from typing import NamedTuple

import torch
from ops_cases import Paged, make_paged

from jitgraph.ops.reference import Rope


class Chunk(NamedTuple):
    """A chunk of slot 1: ``real`` of ``tokens`` tokens are not padding."""

    tokens: int
    real: int
    start: int = 0
    window: int = 0


class Inputs(NamedTuple):
    paged: Paged
    qkv: torch.Tensor
    positions: torch.Tensor
    token_slot: torch.Tensor
    rope: Rope


def rope_table(dh: int, positions: int, device: torch.device) -> Rope:
    frequency = 10000.0 ** -(torch.arange(0, dh, 2, device=device).float() / dh)
    angle = torch.arange(positions, device=device).float()[:, None] * frequency
    return Rope(torch.cat((angle.cos(), angle.sin()), dim=1))


def chunk_inputs(
    device: torch.device, layout: tuple[int, int, int], dtype: torch.dtype, chunk: Chunk, page: int = 8
) -> Inputs:
    """A cache with the tokens before the chunk. The cells of the chunk, and all that no token has, are NaN; so is the
    K and V of padding, which nothing may be multiplied with."""
    hq, hkv, dh = layout
    tokens, real, start, _ = chunk
    paged = make_paged([3, start + real], hkv, dh, dtype, device, page=page)
    for position in range(start, start + real):
        cell = int(paged.slots.block_table()[1, position // page]), position % page
        for k, v, unwritten in ((paged.k, paged.v, torch.nan), (paged.k0, paged.v0, 0.0)):
            k[cell], v[cell] = unwritten, unwritten
    index = torch.arange(tokens, dtype=torch.int32, device=device)
    positions = torch.where(index < real, start + index, 0).int()
    token_slot = torch.where(index < real, 1, paged.slots.dummy).int()
    generator = torch.Generator().manual_seed(7)  # the same first tokens whatever the padding
    qkv = torch.randn(tokens, (hq + 2 * hkv) * dh, generator=generator).to(dtype).to(device)
    qkv[real:] = torch.nan
    return Inputs(paged, qkv, positions, token_slot, rope_table(dh, start + tokens + 1, device))
