"""Fetching ahead: kernels that leave the memory idle ask for the weights that come next.

RoPE, attention, norms and activations work on a few kilobytes that lie in L2 anyway. Meanwhile the next product's
matrix can come from memory into L2 (``cp.async.bulk.prefetch.L2``): nobody waits for it, it changes no value, and the
product then finds that part there. Hopper and newer; elsewhere, and in the interpreter, nothing is asked for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from jitgraph.config import interpreting
from jitgraph.jit.target import target_arch

_FIRST_ARCH = 90
ATTENTION_BYTES = 24 * 2**20
"""In front of attention: what memory delivers while it runs, and no more than L2 keeps."""
ACTIVATION_BYTES = 12 * 2**20
NORM_BYTES = 8 * 2**20
_GRAIN = 128  # bytes of a cache line


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def fetch_ahead(  # type: ignore[no-untyped-def]
    matrix, program, programs, ROWS: tl.constexpr, STRIDE: tl.constexpr, BYTES: tl.constexpr, THREADS: tl.constexpr
):
    """Asks for the first ``BYTES`` of each of ``ROWS`` rows, ``STRIDE`` bytes apart; each program for its share."""
    if ROWS > 0:
        for first in range(program * THREADS, ROWS, programs * THREADS):
            row = tl.minimum(first + tl.arange(0, THREADS), ROWS - 1)
            address = matrix.to(tl.int64) + row.to(tl.int64) * STRIDE
            tl.inline_asm_elementwise(
                "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
                "=r,l,r",
                [address, tl.full([THREADS], BYTES, tl.int32)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )


def ahead_arguments(matrix: torch.Tensor | None, most: int, warps: int) -> tuple[torch.Tensor | None, dict[str, int]]:
    """What a wrapper passes to a kernel that calls ``fetch_ahead``: the matrix ``[N, K]``, of whose rows the first part
    is fetched, up to ``most`` bytes in all; and the constants, with ``num_warps``. None and no rows where nothing is
    fetched."""
    if matrix is not None and not interpreting() and target_arch() >= _FIRST_ARCH:
        rows, stride = matrix.shape[0], matrix.stride(0) * matrix.element_size()
        share = min(stride, most // rows) // _GRAIN * _GRAIN
        if share > 0 and stride % 16 == 0:
            return matrix, _figures(rows, stride, share, warps)
    return None, _figures(0, 0, 0, warps)


def _figures(rows: int, stride: int, share: int, warps: int) -> dict[str, int]:
    figures = {"AHEAD_ROWS": rows, "AHEAD_STRIDE": stride, "AHEAD_BYTES": share}
    return figures | {"THREADS": 32 * warps, "num_warps": warps}
