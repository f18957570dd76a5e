"""The script behind the package's tables: which tiles are tried; a table gets only what is faster, and right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tune_parts import tiles
from tune_parts.tiles import SHARED_BYTES, Search, Wanted, candidates

from jitgraph.ops.products import TunedProducts
from jitgraph.ops.reference_linear import Use
from jitgraph.ops.tiles import Tile, tile_of, width

POINTS = [24, 32, 40, 48, 56, 64, 72, 512]


@pytest.mark.parametrize("use", Use)
@pytest.mark.parametrize("tokens", [24, 64, 128])
def test_candidates_fit_and_divide_the_sum(use: Use, tokens: int) -> None:
    found = list(candidates(tokens, 4096, use))
    assert len(found) == len(set(found)) > 3
    for tile in found:
        assert 4096 % (tile.depth * tile.split) == 0 and (tile.split == 1 or use is Use.ADD)
        operands = 2 if use is Use.GATED else 1
        assert (operands * tile.rows + width(tokens)) * tile.depth * 2 * tile.stages <= SHARED_BYTES
    assert {tile.split for tile in found} == ({1, 2, 4} if use is Use.ADD else {1})
    assert {tile.split for tile in candidates(tokens, 128 * 3, Use.ADD)} < {1, 2, 4}, "a sum that is not divided"


class _Timed(tiles._Bench):
    """Takes as long as ``cost`` says, and counts as right but where ``wrong`` does."""

    cost: Callable[[int, Tile | None], float]
    wrong: Callable[[Tile], bool]

    def us(self, way: Any) -> float:
        return type(self).cost(self._x.shape[0], getattr(way, "tile", None))

    def launch(self, tile: Tile) -> Any:
        def way(weight: torch.Tensor) -> None:
            del weight

        way.tile = tile  # type: ignore[attr-defined]
        return way

    def right(self, tile: Tile) -> bool:
        return not type(self).wrong(tile)


def test_a_table_gets_what_is_faster_and_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best tile of a width is as fast early as late, but wrong early; at 48 tokens it saves too little."""
    best = Tile(64, 128, 2, 4, 3, early=False)

    def cost(tokens: int, tile: Tile | None) -> float:
        if tile is None:
            return 10.0
        return (9.9 if tokens == 48 else 8.0) + 0.1 * tile.early if tile._replace(early=False) == best else 9.0 + tokens

    _Timed.cost, _Timed.wrong = staticmethod(cost), staticmethod(lambda tile: tile.early)
    monkeypatch.setattr(tiles, "_Bench", _Timed)
    monkeypatch.setattr(tiles, "compile_all", lambda wanted, device: None)
    tuned = TunedProducts({}, {}, torch.empty(0, dtype=torch.uint8))
    matrices = [torch.zeros(64, 1024, dtype=torch.float16)]
    told: list[str] = []
    codes = Search(tuned, POINTS, told.append).run([Wanted(matrices, Use.ADD)])
    assert set(codes) == {f"64x1024x{tokens}+" for tokens in POINTS[:-1] if tokens != 48}
    assert {tile_of(code) for code in codes.values()} == {best}
    assert "tiles: 1 of 1, 6 faster" in told[-1]
    _Timed.wrong = staticmethod(lambda tile: True)
    assert Search(tuned, POINTS, told.append).run([Wanted(matrices, Use.ADD)]) == {}
