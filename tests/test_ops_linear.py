"""The Triton matrix products, with what is fused around them, against their PyTorch meaning."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ops_cases import DTYPES, poison

from jitgraph.ops import linear, reference_linear
from jitgraph.ops.products import TunedProducts
from jitgraph.ops.reference_linear import SplitScratch, Use
from jitgraph.ops.tiles import TILE_TOKENS, Tile, is_tile, tile_of, width

TOKENS = (1, 7, 17)
SHAPES = ((24, 40), (70, 96), (34, 520))
"""(outputs, inputs): neither multiples of the tiles nor powers of two."""


def _scratch(device: torch.device) -> SplitScratch:
    sums = torch.full((linear.partial_words(4096),), torch.nan, device=device)
    return SplitScratch(sums, torch.zeros(linear.arrival_words(4096), dtype=torch.int32, device=device))


def _random(*shape: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def _weights(
    n: int, k: int, bias: bool, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight = (torch.randn(n, k, device=device) / k**0.5).to(dtype)
    return weight, _random(n, device=device, dtype=dtype) if bias else None


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal within rounding over the whole tensor; NaN is never equal."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= RELATIVE[expected.dtype], f"relative error {error:.2e}"


VARIANTS = {
    "standard": (linear.norm_linear, linear.linear_add, linear.norm_gated),
    "invariant": (linear.invariant_norm_linear, linear.invariant_linear_add, linear.invariant_norm_gated),
    "kernels": (linear.kernels_norm_linear, linear.kernels_linear_add, linear.kernels_norm_gated),
}
RELATIVE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 4e-2}
"""Largest error over a whole tensor: single elements may be rounded twice. The interpreter truncates to bfloat16."""
Triple = tuple[Callable[..., None], Callable[..., torch.Tensor | None], Callable[..., None]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_products(device: torch.device, dtype: torch.dtype, variant: str, bias: bool, tokens: int) -> None:
    """Each product with each neighbour, over odd sizes, with and without something pending."""
    torch.manual_seed(tokens)
    norm_linear, linear_add, norm_gated = VARIANTS[variant]
    n, k = SHAPES[tokens % len(SHAPES)]
    scratch = _scratch(device)
    weight, b = _weights(n, k, bias, device, dtype)
    norm = torch.rand(k, device=device).to(dtype) + 0.5
    for pending in (None, _random(tokens, k, device=device, dtype=dtype)):
        residual = _random(tokens, k, device=device, dtype=dtype)
        expected, actual = (poison(tokens, n, device=device, dtype=dtype) for _ in range(2))
        normed, other = poison(tokens, k, device=device, dtype=dtype), residual.clone()
        reference_linear.norm_linear(pending, residual, norm, 1e-5, weight, b, normed, expected, scratch)
        norm_linear(pending, other, norm, 1e-5, weight, b, torch.empty_like(normed), actual, scratch)
        close(actual, expected)
        close(other, residual)

    x, residual = _random(tokens, k, device=device, dtype=dtype), _random(tokens, n, device=device, dtype=dtype)
    total = residual + reference_linear.linear_add(x, weight, b, torch.empty_like(residual), residual, scratch)
    left = linear_add(x, weight, b, torch.empty_like(residual), residual, scratch)
    close(residual if left is None else residual + left, total)

    gate_up, b = _weights(2 * n, k, bias, device, dtype)
    residual = _random(tokens, k, device=device, dtype=dtype)
    work = (torch.empty_like(residual), torch.empty(tokens, 2 * n, device=device, dtype=dtype))
    expected, actual = (poison(tokens, n, device=device, dtype=dtype) for _ in range(2))
    reference_linear.norm_gated(None, residual, norm, 1e-5, gate_up, b, *work, expected, scratch)
    norm_gated(None, residual, norm, 1e-5, gate_up, b, *work, actual, scratch)
    close(actual, expected)
    assert not scratch.arrivals.any(), "every launch leaves the arrivals at zero"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_split_sums(device: torch.device, dtype: torch.dtype) -> None:
    """A long product with few outputs is summed by several programs: right, and the same bits every time."""
    torch.manual_seed(0)
    x, scratch = _random(5, 4200, device=device, dtype=dtype), _scratch(device)
    weight, _ = _weights(70, 4200, False, device, dtype)
    start = _random(5, 70, device=device, dtype=dtype)
    expected = start.float() + (x.float() @ weight.float().t()).to(dtype).float()
    results = []
    for _ in range(3):
        residual = start.clone()
        scratch.partial.fill_(torch.nan)
        assert linear.linear_add(x, weight, None, torch.empty_like(start), residual, scratch) is None
        close(residual, expected.to(dtype))
        results.append(residual)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.usefixtures("products_in_order")
@pytest.mark.parametrize("name", ["norm_linear", "linear_add", "norm_gated"])
def test_invariant_rows_do_not_depend_on_their_number(device: torch.device, name: str) -> None:
    """Bit for bit: a row alone, among few and among many, for the kernels and for the reference's twin."""
    torch.manual_seed(3)
    most, n, k = 200 if device.type == "cuda" else 20, 96, 320
    dtype = torch.float16
    scratch = _scratch(device)
    weight = _weights(2 * n if name == "norm_gated" else n, k, False, device, dtype)[0]
    norm = torch.rand(k, device=device).to(dtype) + 0.5
    rows, base = _random(most, k, device=device, dtype=dtype), _random(most, n, device=device, dtype=dtype)

    def run(module: object, count: int) -> torch.Tensor:
        op = getattr(module, f"invariant_{name}")
        x, out = rows[:count].clone(), base[:count].clone()
        if name == "linear_add":
            left = op(x, weight, None, torch.empty_like(out), out, scratch)
            return out if left is None else left
        work = [torch.empty_like(x)] + (
            [torch.empty(count, 2 * n, dtype=dtype, device=device)] if name == "norm_gated" else []
        )
        op(None, x, norm, 1e-5, weight, None, *work, out, scratch)
        return out

    for module in (linear, reference_linear) if device.type == "cpu" else (linear,):
        whole = run(module, most)
        for count in (1, 2, 16, 17, 65, 129):
            if count <= most:
                assert torch.equal(run(module, count), whole[:count]), f"{module.__name__}, {count} rows"


# ----------------------------------------------------------------------------------------------------- tiles of a table

TILES = (Tile(64, 32, 1, 4, 3, early=False), Tile(32, 64, 4, 4, 2, early=True), Tile(128, 16, 2, 8, 3, early=False))


def _tuned(weights: dict[Use, torch.Tensor], tile: Tile, counts: range) -> TunedProducts:
    """Tables that give these products to the project's kernel."""
    tiles = {}
    for use, weight in weights.items():
        one = tile if use is not Use.GATED else tile._replace(split=1)
        tiles |= {(tokens, *weight.shape, use): one for tokens in counts}
    return TunedProducts({}, tiles, torch.empty(0, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("tokens", [17, 64, 100])
def test_products_in_the_tiles_of_a_table(device: torch.device, dtype: torch.dtype, tile: Tile, tokens: int) -> None:
    """Each use, with a neighbour and a residual, and twice, so that what a split sum leaves behind is nothing."""
    torch.manual_seed(tokens)
    n, k = 70, 136
    scratch, norm = _scratch(device), torch.rand(k, device=device).to(dtype) + 0.5
    weights = {
        use: _weights(rows, k, False, device, dtype)[0] for use, rows in zip(Use, (n, n + 2, 2 * n), strict=True)
    }
    products = linear.Products(library=True, vector=True, tuned=_tuned(weights, tile, range(tokens, tokens + 1)))
    for _ in range(2):
        residual = _random(tokens, k, device=device, dtype=dtype)
        work = (torch.empty_like(residual), torch.empty(tokens, 2 * n, device=device, dtype=dtype))
        expected, actual = (poison(tokens, n, device=device, dtype=dtype) for _ in range(2))
        for run, out in ((reference_linear.norm_linear, expected), (products.norm_linear, actual)):
            run(None, residual, norm, 1e-5, weights[Use.PLAIN], None, work[0], out, scratch)
        close(actual, expected)
        for gated, out in ((reference_linear.norm_gated, expected), (products.norm_gated, actual)):
            gated(None, residual, norm, 1e-5, weights[Use.GATED], None, *work, out, scratch)
        close(actual, expected)
        start = _random(tokens, n + 2, device=device, dtype=dtype)
        total = start.clone()
        assert products.linear_add(residual, weights[Use.ADD], None, torch.empty_like(start), total, scratch) is None
        close(total, start + (residual.float() @ weights[Use.ADD].float().t()).to(dtype))
    assert not scratch.arrivals.any()


def test_a_table_gives_away_only_what_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(16, 24, dtype=torch.float16)
    tuned = _tuned({Use.PLAIN: weight}, TILES[0], range(20, 40))
    products = linear.Products(library=True, vector=True, tuned=tuned)
    for tokens, other, bias, expected in (
        (20, weight, None, True), (39, weight, None, True), (40, weight, None, False), (19, weight, None, False),
        (20, weight[:8], None, False), (20, weight, torch.zeros(16), False),
    ):  # fmt: skip
        x = torch.zeros(tokens, 24, dtype=torch.float16)
        assert (products._tile(x, other, bias, Use.PLAIN) is not None) == expected
        assert products._tile(x, other, bias, Use.ADD) is None


def test_one_size_of_each_kind_stands_for_all() -> None:
    """Of each kernel: product, tile, width, and whether the size is a multiple of 16."""
    tuned = _tuned({Use.PLAIN: torch.zeros(16, 24)}, TILES[0], range(20, 100))
    found = tuned.classes()
    assert {(width(count), count % 16 == 0) for count in found} == {
        (wide, even) for wide in (32, 64, 128) for even in (False, True)
    }
    assert len(found) == 6


@pytest.mark.parametrize("tile", TILES)
def test_a_tile_survives_a_table(tile: Tile) -> None:
    assert is_tile(tile.code()) and tile_of(tile.code()) == tile
    assert not is_tile("ab" * 64)


@pytest.mark.parametrize("code", ["tile 64 64 1 4 3", "tile 64 64 8 4 3 0", "tile 8 64 1 4 3 0", "tile a b c d e f"])
def test_what_is_no_tile_is_refused(code: str) -> None:
    with pytest.raises(ValueError, match=r"tile|range|invalid literal"):
        tile_of(code)


def test_tiles_are_as_wide_as_their_tokens() -> None:
    for tokens in range(2, TILE_TOKENS + 1):
        assert tokens <= width(tokens) < max(17, 2 * tokens) and width(tokens) & (width(tokens) - 1) == 0
