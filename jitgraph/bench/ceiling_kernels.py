"""A kernel that only reads: the bandwidth that streaming weights can hope for. Used on CUDA alone."""

from __future__ import annotations

import torch
import triton.language as tl

from jitgraph.jit.kernel import kernel

READ_SHAPES = ((4096, 16), (8192, 16), (8192, 64))
"""(elements per load, loads per program): the best of them is the ceiling."""
READ_GRANULE = 8192 * 64


@kernel
def _read(data, sums, BLOCK: tl.constexpr, LOADS: tl.constexpr):  # type: ignore[no-untyped-def]
    program = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    base = program.to(tl.int64) * BLOCK * LOADS
    for index in range(LOADS):
        total += tl.load(data + base + index * BLOCK + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(sums + program, tl.sum(total))


def read_all(data: torch.Tensor, sums: torch.Tensor, block: int, loads: int) -> None:
    """Reads ``data`` ``[n]`` once; ``n`` is a multiple of ``block * loads``. A sum per program keeps every load."""
    programs = data.numel() // (block * loads)
    assert data.numel() == programs * block * loads and sums.numel() >= programs
    _read[(programs,)](data, sums, BLOCK=block, LOADS=loads, num_warps=8)
