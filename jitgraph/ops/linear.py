"""Matrix products chosen by the number of tokens; meaning and signatures are those of ``reference_linear.py``.

One token: a matrix-vector kernel with the norm, the residual and the activation inside. Up to ``SKINNY_TOKENS``: a
tensor-core kernel with the weights as rows. Above: cuBLAS, whose epilogue adds the residual. The ``invariant_``
variants use the tensor-core kernel for every count with one order of summation per element, so that the bits of a
token's row depend on that row alone. The ``kernels_`` variants never use the library. No call allocates (cuBLAS has its
workspace from the first call on) or synchronises.
``Products(..., tuned)`` takes the library's algorithms from a measurement (``products.py``), and up to ``TILE_TOKENS``
the tensor-core kernel where a table of the package says so, with the activation inside where that is its product.
"""

from __future__ import annotations

import torch

from jitgraph.config import interpreting
from jitgraph.ops.elementwise import add_rms_norm, assert_contiguous, ceil_div, next_power_of_two, rms_norm, silu_mul
from jitgraph.ops.linear_kernels import gemv_kernel, skinny_kernel
from jitgraph.ops.pdl import PDL_TOKENS, pdl_options
from jitgraph.ops.products import TunedProducts
from jitgraph.ops.reference_linear import SplitScratch, Use
from jitgraph.ops.tiles import LEAST_ROWS, MAX_SPLIT, TILE_TOKENS, Tile, width

SKINNY_TOKENS = 16
"""Tokens up to which the tensor-core kernel is ahead of cuBLAS on an H200 (``docs/log.md`` has the figures)."""
_FILL_PROGRAMS = 128
"""Programs that keep the multiprocessors of a large GPU busy; with fewer the sum is split."""
_BLOCK_N = 64


def partial_words(n: int) -> int:
    """float32 words of ``SplitScratch.partial`` that products of up to ``n`` outputs need."""
    return MAX_SPLIT * min(n, _FILL_PROGRAMS * _BLOCK_N) * TILE_TOKENS


def arrival_words(n: int) -> int:
    """int32 words of ``SplitScratch.arrivals`` for products of up to ``n`` outputs."""
    return ceil_div(min(n, _FILL_PROGRAMS * _BLOCK_N), LEAST_ROWS)


def product_classes(chunk_tokens: int) -> tuple[int, ...]:
    """Token counts that stand for all: one of each kernel, tile and class of integer."""
    counts = (1, 2, 16, 17, 32, 65, 80, PDL_TOKENS + 1, PDL_TOKENS + 16)
    return tuple(count for count in counts if count <= chunk_tokens)


class Products:
    """The products of a layer under one policy. Stateless: one instance serves all engines."""

    def __init__(self, library: bool, vector: bool, tuned: TunedProducts | None = None) -> None:
        """``library``: above ``SKINNY_TOKENS``, and for float32, cuBLAS does it. ``vector``: one token has a kernel of
        its own. With neither, every count goes through one kernel and one order of summation. ``tuned``: the library's
        algorithms where its own choice is not the fastest."""
        self._library = library
        self._vector = vector
        self._tuned = tuned

    def norm_linear(
        self,
        pending: torch.Tensor | None,
        residual: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        normed: torch.Tensor,
        out: torch.Tensor,
        scratch: SplitScratch,
    ) -> None:
        """out = rms_norm(residual + pending) @ weight.T (+ bias); see ``reference_linear.norm_linear``."""
        if self._is_vector(residual) and pending is None:
            _gemv(residual, norm, eps, weight, bias, None, out, gated=False)
            return
        _norm(pending, residual, norm, eps, normed)
        if (tile := self._tile(normed, weight, bias, Use.PLAIN)) is not None:
            launch_tile(normed, weight, None, out, scratch, Use.PLAIN, tile)
        elif self._in_library(normed):
            self._library_linear(normed, weight, bias, out)
        else:
            self._tiles(normed, weight, bias, None, out, scratch, gated=False)

    def linear_add(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        hidden: torch.Tensor,
        residual: torch.Tensor,
        scratch: SplitScratch,
    ) -> torch.Tensor | None:
        """residual += x @ weight.T (+ bias); see ``reference_linear.linear_add``. In the library a product with a bias
        leaves the addition to the next norm."""
        if self._is_vector(x):
            _gemv(x, None, 0.0, weight, bias, residual, residual, gated=False)
        elif (tile := self._tile(x, weight, bias, Use.ADD)) is not None:
            launch_tile(x, weight, residual, residual, scratch, Use.ADD, tile)
        elif not self._in_library(x):
            self._tiles(x, weight, bias, residual, residual, scratch, gated=False)
        elif bias is None:
            if self._tuned is None or not self._tuned.product(x, weight, residual, add=True):
                torch.addmm(residual, x, weight.t(), out=residual)
        else:
            torch.addmm(bias, x, weight.t(), out=hidden)
            return hidden
        return None

    def norm_gated(
        self,
        pending: torch.Tensor | None,
        residual: torch.Tensor,
        norm: torch.Tensor,
        eps: float,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        normed: torch.Tensor,
        gate_up: torch.Tensor,
        activated: torch.Tensor,
        scratch: SplitScratch,
    ) -> None:
        """activated = silu(gate) * up of the normed residual; see ``reference_linear.norm_gated``."""
        if self._is_vector(residual) and pending is None:
            _gemv(residual, norm, eps, weight, bias, None, activated, gated=True)
            return
        _norm(pending, residual, norm, eps, normed)
        if (tile := self._tile(normed, weight, bias, Use.GATED)) is not None:
            launch_tile(normed, weight, None, activated, scratch, Use.GATED, tile)
        elif self._in_library(normed):
            self._library_linear(normed, weight, bias, gate_up)
            silu_mul(gate_up, activated)
        else:
            self._tiles(normed, weight, bias, None, activated, scratch, gated=True)

    def _is_vector(self, x: torch.Tensor) -> bool:
        return self._vector and x.shape[0] == 1

    def _tile(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, use: Use) -> Tile | None:
        """How the tensor-core kernel does this product, where a table says that it is the fastest."""
        return None if self._tuned is None or bias is not None else self._tuned.tile(x, weight, use)

    def _in_library(self, x: torch.Tensor) -> bool:
        """float32 as well: tensor cores would round it, and plain arithmetic in a tile is slow."""
        return self._library and (x.shape[0] > SKINNY_TOKENS or x.dtype == torch.float32)

    def _library_linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        if bias is not None:
            torch.addmm(bias, x, weight.t(), out=out)
        elif self._tuned is None or not self._tuned.product(x, weight, out, add=False):
            torch.mm(x, weight.t(), out=out)

    def _tiles(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        out: torch.Tensor,
        scratch: SplitScratch,
        gated: bool,
    ) -> None:
        if self._vector and x.shape[0] <= SKINNY_TOKENS:
            _skinny(x, weight, bias, residual, out, scratch, gated)
        else:
            _tiled(x, weight, bias, residual, out, scratch, gated)


_STANDARD = Products(library=True, vector=True)
_INVARIANT = Products(library=False, vector=False)
_KERNELS = Products(library=False, vector=True)

norm_linear, linear_add, norm_gated = _STANDARD.norm_linear, _STANDARD.linear_add, _STANDARD.norm_gated
invariant_norm_linear, invariant_linear_add = _INVARIANT.norm_linear, _INVARIANT.linear_add
invariant_norm_gated = _INVARIANT.norm_gated
kernels_norm_linear, kernels_linear_add = _KERNELS.norm_linear, _KERNELS.linear_add
kernels_norm_gated = _KERNELS.norm_gated


# ------------------------------------------------------------------------------------------------------------- launches


def _norm(
    pending: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
) -> None:
    if pending is None:
        rms_norm(residual, weight, eps, out)
    else:
        add_rms_norm(pending, residual, weight, eps, out)


def _gemv(
    x: torch.Tensor,
    norm: torch.Tensor | None,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    gated: bool,
) -> None:
    """One token. ``gated``: the weight holds the gate's rows, then up's, and out is half as wide."""
    _check(x, weight, bias, residual, out, gated)
    n, k = out.shape[1], x.shape[1]
    whole = norm is not None or k > 4096
    most = 4096 if whole else 1024
    block = min(next_power_of_two(k), most * 2 // max(2, x.element_size()))
    gemv_kernel[(ceil_div(n, 2),)](
        x,
        x if norm is None else norm,  # never read without NORM
        eps,
        weight,
        x if bias is None else bias,
        x if residual is None else residual,
        out,
        N=n,
        K=k,
        NORM=norm is not None,
        GATED=gated,
        BIAS=bias is not None,
        ADD=residual is not None,
        ROWS=2,
        BLOCK_K=block,
        num_warps=8 if n > 16384 else 4,
        **pdl_options(),
    )


def _skinny(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    scratch: SplitScratch,
    gated: bool,
) -> None:
    """2 to ``SKINNY_TOKENS`` tokens; the sum is split where there are too few rows of weight to fill the device."""
    n, k = out.shape[1], x.shape[1]
    split = 1
    while not gated and split < MAX_SPLIT and ceil_div(n, _BLOCK_N) * split < _FILL_PROGRAMS and k // split > 1024:
        split *= 2
    depth = min(128, max(16, next_power_of_two(k)))
    tile = Tile(_BLOCK_N, depth, split, 4, 3 if gated else 4, early=False)
    _launch_tiled(x, weight, bias, residual, out, scratch, gated, 16, tile)


def _tiled(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    scratch: SplitScratch,
    gated: bool,
) -> None:
    """Any number of tokens, each element summed over K in one order.

    The tile's width in tokens may vary: a tensor-core product sums each element of its tile alike whatever the tile's
    width, as long as the instruction's depth is the same (tested bit for bit on the device).
    """
    tokens = x.shape[0]
    wide = 16 if tokens <= 16 else 64 if tokens <= 64 or gated else 128
    depth = min(128, max(16, next_power_of_two(x.shape[1]))) if wide < 128 else 64
    _launch_tiled(x, weight, bias, residual, out, scratch, gated, wide, Tile(_BLOCK_N, depth, 1, 4, 3, early=False))


def launch_tile(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    scratch: SplitScratch,
    use: Use,
    tile: Tile,
) -> None:
    """2 to ``TILE_TOKENS`` tokens of half floats, cut as ``tile`` says. ``residual``: with ``Use.ADD`` what is added,
    which may be ``out``."""
    gated = use is Use.GATED
    assert tile.split == 1 or not gated, "two sums are not split"
    _launch_tiled(x, weight, None, residual, out, scratch, gated, width(x.shape[0]), tile)


def _launch_tiled(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    scratch: SplitScratch,
    gated: bool,
    block_m: int,
    tile: Tile,
) -> None:
    _check(x, weight, bias, residual, out, gated)
    tokens, k = x.shape
    n, split = out.shape[1], tile.split
    blocks = ceil_div(n, tile.rows)
    assert split == 1 or (scratch.partial.numel() >= split * n * tokens and scratch.arrivals.numel() >= blocks)
    wide = x.dtype == torch.float32
    skinny_kernel[(blocks, split, ceil_div(tokens, block_m))](
        x,
        weight,
        x if bias is None else bias,  # never read without BIAS
        x if residual is None else residual,
        out,
        scratch.partial,
        scratch.arrivals,
        tokens,
        N=n,
        K=k,
        GATED=gated,
        BIAS=bias is not None,
        ADD=residual is not None,
        BLOCK_M=block_m,
        BLOCK_N=tile.rows,
        BLOCK_K=32 if wide else tile.depth,
        SPLIT_K=split,
        PRECISION="ieee" if wide else "tf32",
        WIDEN=x.dtype == torch.bfloat16 and interpreting(),
        num_warps=tile.warps,
        num_stages=2 if wide else tile.stages,
        **(pdl_options(tokens) if tile.early else {"PDL": False}),
    )


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    gated: bool,
) -> None:
    assert_contiguous(x.dtype, x, weight, out)
    tokens, k = x.shape
    n = out.shape[1]
    assert out.shape[0] == tokens and weight.shape == (2 * n if gated else n, k)
    if bias is not None:
        assert_contiguous(x.dtype, bias)
        assert bias.shape == (weight.shape[0],)
    if residual is not None:
        assert_contiguous(x.dtype, residual)
        assert residual.shape == out.shape
