"""The project's own kernel against the library's tuned algorithms, for products of a few dozen tokens: which ways to
cut them are tried, and which one a table gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch

from jitgraph.jit.collect import collect
from jitgraph.jit.registry import compile_all
from jitgraph.ops.elementwise import silu_mul
from jitgraph.ops.known_products import Codes, code_name
from jitgraph.ops.linear import arrival_words, launch_tile, partial_words
from jitgraph.ops.products import TunedProducts, time_us
from jitgraph.ops.reference_linear import SplitScratch, Use
from jitgraph.ops.tiles import TILE_TOKENS, Tile, width

CUTS = (
    (64, 64, 4, 4),
    (64, 64, 4, 6),
    (64, 128, 4, 3),
    (64, 128, 4, 4),
    (128, 64, 4, 4),
    (128, 64, 8, 4),
    (32, 128, 4, 4),
)
"""(rows, depth, warps, stages)."""
SPLITS = (1, 2, 4)
SHARED_BYTES = 224 * 1024
LAYERS = 16
FINALISTS = 2
ROUNDS = 5
LEAST_GAIN = 0.02


class Wanted(NamedTuple):
    """Products of one kind: the layers' matrices, and what becomes of the result."""

    matrices: Sequence[torch.Tensor]
    use: Use


def candidates(tokens: int, k: int, use: Use, half_bytes: int = 2) -> Iterator[Tile]:
    """Ways to cut a product that fit a multiprocessor."""
    operands = 2 if use is Use.GATED else 1
    for (rows, depth, warps, stages), split in product(CUTS, SPLITS if use is Use.ADD else (1,)):
        fits = (operands * rows + width(tokens)) * depth * half_bytes * stages <= SHARED_BYTES
        if fits and k % (depth * split) == 0:
            yield Tile(rows, depth, split, warps, stages, early=False)


class Search:
    """One device's. ``tuned``: what the library does without this."""

    def __init__(self, tuned: TunedProducts, points: Sequence[int], say: Callable[[str], None]) -> None:
        self._tuned = tuned
        self._points = [point for point in points if point <= TILE_TOKENS]
        self._say = say

    def run(self, wanted: Sequence[Wanted]) -> Codes:
        """The codes of the products that the project's kernel does faster."""
        codes: Codes = {}
        for number, each in enumerate(wanted, 1):
            for wide in sorted({width(point) for point in self._points}):
                codes |= self._of_width(each, [point for point in self._points if width(point) == wide])
            self._say(f"  tiles: {number} of {len(wanted)}, {len(codes)} faster than the library")
        return codes

    def _of_width(self, each: Wanted, points: Sequence[int]) -> Codes:
        n, k = each.matrices[0].shape
        most = _Bench(each, points[-1], self._tuned)
        tiles = list(candidates(points[-1], k, each.use))
        with collect() as wanted:
            for tile, early, bench in product(tiles, (False, True), {points[0], points[-1]}):
                _Bench(each, bench, self._tuned).launch(tile._replace(early=early))(each.matrices[0])
        compile_all(wanted, each.matrices[0].device)
        ranked = sorted(tiles, key=lambda tile: most.us(most.launch(tile)))[:FINALISTS]
        finalists = [tile._replace(early=early) for tile in ranked for early in (False, True)]
        codes: Codes = {}
        for tokens in points:
            bench = _Bench(each, tokens, self._tuned)
            ways = [bench.library, *(bench.launch(tile) for tile in finalists)]
            library, *times = (
                min(turns) for turns in zip(*([bench.us(way) for way in ways] for _ in range(ROUNDS)), strict=True)
            )
            best = min(range(len(times)), key=times.__getitem__)
            if times[best] < library * (1 - LEAST_GAIN) and bench.right(finalists[best]):
                codes[code_name(n, k, tokens, each.use)] = finalists[best].code()
            self._say(
                f"  {n}x{k}{each.use.value} {tokens}: library {library:.1f} us, {finalists[best]} {times[best]:.1f}"
            )
        return codes


class _Bench:
    """Products of one kind and number of tokens."""

    def __init__(self, each: Wanted, tokens: int, tuned: TunedProducts) -> None:
        like = each.matrices[0]
        n, k = like.shape
        self._each, self._tuned = each, tuned
        self._x = torch.randn(tokens, k, device=like.device).to(like.dtype)
        outputs = n // 2 if each.use is Use.GATED else n
        self._out = torch.zeros(tokens, outputs, device=like.device, dtype=like.dtype)
        self._wide = torch.zeros(tokens, n, device=like.device, dtype=like.dtype)
        sums = torch.zeros(partial_words(n), device=like.device)
        self._scratch = SplitScratch(sums, torch.zeros(arrival_words(n), dtype=torch.int32, device=like.device))

    def launch(self, tile: Tile) -> Callable[[torch.Tensor], None]:
        """The project's kernel."""
        use, out = self._each.use, self._out
        residual = out if use is Use.ADD else None
        return lambda weight: launch_tile(self._x, weight, residual, out, self._scratch, use, tile)

    def library(self, weight: torch.Tensor) -> None:
        """What happens otherwise."""
        use, x = self._each.use, self._x
        out = self._wide if use is Use.GATED else self._out
        if not self._tuned.product(x, weight, out, add=use is Use.ADD):
            if use is Use.ADD:
                torch.addmm(out, x, weight.t(), out=out)
            else:
                torch.mm(x, weight.t(), out=out)
        if use is Use.GATED:
            silu_mul(out, self._out)

    def us(self, way: Callable[[torch.Tensor], None]) -> float:
        """Microseconds of one, over the matrices of several layers."""
        return time_us(way, self._each.matrices[:LAYERS], self._out)

    def right(self, tile: Tile) -> bool:
        """Whether the kernel gives what the library gives but for rounding."""
        self._out.zero_()
        self.library(self._each.matrices[0])
        expected = self._out.float()
        self._out.zero_()
        self.launch(tile)(self._each.matrices[0])
        return bool((self._out.float() - expected).abs().max() <= 2e-2 * expected.abs().max())
