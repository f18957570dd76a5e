"""Measured algorithms: which counts are measured, that the result is kept and checked, and that products stay right."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jitgraph.jit.disk_cache import DiskCache
from jitgraph.ops import known_products, products
from jitgraph.ops.cublaslt import Algorithm
from jitgraph.ops.known_products import Where, code_name, known_codes, table
from jitgraph.ops.linear import Products
from jitgraph.ops.products import TUNED_TOKENS, TunedProducts, tune_products, tuned_points
from jitgraph.ops.reference_linear import ProductShape, SplitScratch, Use
from jitgraph.ops.tiles import is_tile, tile_of

LEAST, MOST = 17, 96
SHAPES = (ProductShape(512, 1024, False), ProductShape(1024, 512, True))


@given(st.integers(1, 600), st.integers(1, 2000))
def test_every_tuned_count_has_a_point_at_or_above_it(least: int, most: int) -> None:
    points = tuned_points(least, most)
    assert points == sorted(set(points))
    for tokens in (least, (least + min(most, TUNED_TOKENS)) // 2, min(most, TUNED_TOKENS)):
        if least <= tokens <= min(most, TUNED_TOKENS):
            assert any(point >= tokens for point in points)
    assert all(least <= point <= min(most, TUNED_TOKENS) for point in points)


def test_on_the_cpu_there_is_nothing_to_tune(tmp_path: Path) -> None:
    matrices = {SHAPES[0]: [torch.zeros(512, 1024, dtype=torch.float16)]}
    assert tune_products(matrices, LEAST, MOST, DiskCache(tmp_path), lambda done, total: None) is None


class _Recorder(TunedProducts):
    """Says of each product whether it was asked for it, and takes only those of 32 tokens."""

    def __init__(self) -> None:
        super().__init__({}, {}, torch.empty(0, dtype=torch.uint8))
        self.asked: list[tuple[int, bool]] = []

    def product(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, add: bool) -> bool:
        self.asked.append((x.shape[0], add))
        if x.shape[0] == 32:
            out.fill_(7)
            return True
        return super().product(x, weight, out, add)


@pytest.mark.parametrize("tokens", [32, 33])
def test_products_ask_it_first_and_else_use_torch(tokens: int) -> None:
    recorder = _Recorder()
    ops = Products(library=True, vector=True, tuned=recorder)
    x, weight = torch.randn(tokens, 24), torch.randn(16, 24)
    residual = torch.randn(tokens, 16)
    expected = torch.full_like(residual, 7) if tokens == 32 else residual + x @ weight.t()
    scratch = SplitScratch(torch.zeros(1), torch.zeros(1, dtype=torch.int32))
    assert ops.linear_add(x, weight, None, torch.empty(tokens, 16), residual, scratch) is None
    torch.testing.assert_close(residual, expected)
    assert recorder.asked == [(tokens, True)]


class _Numbered:
    """A product whose algorithms are (tile, custom option, cluster, parts of the sum). The library proposes tiles 1 and
    5; tile 8 needs too much room, and tiles under 0 or over 20 do not exist."""

    def candidates(self, most: int, workspace: int) -> list[Algorithm]:
        return [self._numbered(1, 0, 1, 1), self._numbered(5, 0, 1, 1)]

    def split(self, algorithm: Algorithm, parts: int) -> Algorithm | None:
        return self._numbered(*algorithm.code[:3], parts)

    def changed(
        self, algorithm: Algorithm, tile: int | None = None, custom: int | None = None, cluster: int | None = None
    ) -> Algorithm | None:
        now = algorithm.code
        wanted = [new if new is not None else old for new, old in zip((tile, custom, cluster), now[:3], strict=True)]
        return self._numbered(*wanted, now[3]) if 0 <= wanted[0] <= 20 else None

    def tile(self, algorithm: Algorithm) -> int:
        return algorithm.code[0]

    def custom(self, algorithm: Algorithm) -> int:
        return algorithm.code[1]

    @staticmethod
    def _numbered(*numbers: int) -> Algorithm:
        return Algorithm(bytes(numbers), products.WORKSPACE_BYTES + 1 if numbers[0] == 8 else 0)


def _bench(us: Callable[[bytes], float], monkeypatch: pytest.MonkeyPatch) -> products._Bench:
    like = [torch.zeros(4, 4)]
    bench = products._Bench(_Numbered(), False, 2, like, torch.empty(0), 0)  # type: ignore[arg-type]
    monkeypatch.setattr(bench, "_us", lambda algorithm, layers: us(algorithm.code))
    monkeypatch.setattr(bench, "_torch_us", lambda: 10.0)
    monkeypatch.setattr(bench, "_right", lambda algorithm: True)
    return bench


def test_the_search_finds_what_takes_several_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tile and cluster are of no use one without the other; option and split come after."""

    def us(code: bytes) -> float:
        tile, custom, cluster, parts = code
        if tile == 8:
            return 1.0  # but there is no room for it
        if (tile, cluster) != (7, 3):
            return 9.0 + tile / 100
        return 8.0 - (custom == 4) - (parts == 2)

    found = _bench(us, monkeypatch).search()
    assert found[0].code == bytes([7, 4, 3, 2]) and len(found) == products._FOUND


@pytest.mark.parametrize(("fast_us", "expected"), [(6.0, bytes([10, 4, 3, 1])), (9.9, None), (math.inf, None)])
def test_what_was_found_nearby_must_beat_torch_here(
    monkeypatch: pytest.MonkeyPatch, fast_us: float, expected: bytes | None
) -> None:
    """With its own tile or one around it."""
    bench = _bench(lambda code: fast_us if code == bytes([10, 4, 3, 1]) else 11.0, monkeypatch)
    assert bench.best([]) is None, "the proposals are slower than torch"
    best = bench.best([Algorithm(bytes([9, 4, 3, 1]), 0)])
    assert (None if best is None else best.code) == expected


def test_rounds_go_on_until_the_fastest_two_agree() -> None:
    assert products._agree([[10.0, 5.0], [10.05, 9.0], [12.0, 5.04]])
    assert not products._agree([[10.0, 5.0], [10.05, 9.0], [12.0, 5.2]]), "the second one was fast but once"


# ------------------------------------------------------------------------------------------------------- known devices

HERE = Where("NVIDIA Some", 130000, "torch.float16")
CODES = {"512x1024x32": "ab" * 64, "1024x512x40+": "cd" * 64}


def test_a_table_serves_its_device_library_dtype_shapes_and_counts_alone(tmp_path: Path) -> None:
    assert known_codes(HERE, SHAPES, [32, 40], tmp_path) is None, "there is no table at all"
    (tmp_path / "some.json").write_text(table(HERE, SHAPES, [32, 40, 48], CODES))
    assert known_codes(HERE, SHAPES, [32, 40], tmp_path) == CODES
    assert known_codes(HERE, SHAPES[1:], [48], tmp_path) == CODES, "a part of what was measured"
    for other in (HERE._replace(device="NVIDIA Other"), HERE._replace(library=130001), HERE._replace(dtype="bf16")):
        assert known_codes(other, SHAPES, [32, 40], tmp_path) is None
    assert known_codes(HERE, SHAPES, [32, 56], tmp_path) is None, "a count that was not measured"
    for shape in (ProductShape(512, 1024, True), ProductShape(512, 1000, False)):
        assert known_codes(HERE, (SHAPES[0], shape), [32], tmp_path) is None, "a shape that was not measured"


def test_tables_of_the_package_are_whole() -> None:
    """Each code belongs to a shape and count that the table says it has, and is as long as the library's."""
    for path in sorted(known_products.FOLDER.glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        shapes = [ProductShape(*shape) for shape in found["shapes"]]
        names = {
            code_name(*shape[:2], tokens, use)
            for shape in shapes
            for tokens in found["points"]
            for use in (shape.use, Use.GATED)
        }
        assert set(found["codes"]) <= names and found["codes"]
        for name, code in found["codes"].items():
            if is_tile(code):
                assert tile_of(code).split == 1 or not name.endswith(Use.GATED.value)
            else:
                assert len(bytes.fromhex(code)) == 64


# ------------------------------------------------------------------------------------------------------------- on a GPU


@pytest.fixture
def matrices(device: torch.device) -> Iterator[dict[ProductShape, list[torch.Tensor]]]:
    torch.manual_seed(0)
    yield {shape: [torch.randn(shape.n, shape.k, device=device).half() * 0.02 for _ in range(4)] for shape in SHAPES}


@pytest.mark.gpu
def test_tuned_products_are_right_and_the_same_in_a_graph_and_after_a_restart(
    matrices: dict[ProductShape, list[torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_LEAST_GAIN", -10.0)  # so that every point has an algorithm of ours
    cache, told = DiskCache(tmp_path), []
    tuned = tune_products(matrices, LEAST, MOST, cache, lambda done, total: told.append((done, total)))
    assert tuned is not None and len(tuned) == len(SHAPES) * (MOST - LEAST + 1)
    assert told[-1] == (told[-1][1], told[-1][1])
    told.clear()
    again = tune_products(matrices, LEAST, MOST, cache, lambda done, total: told.append((done, total)))
    assert again is not None and not told, "measured although the result was on disk"
    for shape, (weight, *_) in matrices.items():
        for tokens in (LEAST, 32, 50, MOST):
            x = torch.randn(tokens, shape.k, device=weight.device).half()
            start = torch.randn(tokens, shape.n, device=weight.device).half()
            expected = x.float() @ weight.float().t() + (start.float() if shape.add else 0)
            out, other = start.clone(), start.clone()
            assert tuned.product(x, weight, out, shape.add) and again.product(x, weight, other, shape.add)
            torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)
            assert torch.equal(out, other)
            graph, replayed = torch.cuda.CUDAGraph(), start.clone()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                tuned.product(x, weight, replayed, shape.add)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, replayed)
    x = torch.zeros(MOST + 1, SHAPES[0].k, device=x.device).half()
    assert not tuned.product(x, matrices[SHAPES[0]][0], x.new_empty(MOST + 1, SHAPES[0].n), add=False)


@pytest.mark.gpu
def test_a_stored_algorithm_that_the_library_refuses_is_not_used(
    matrices: dict[ProductShape, list[torch.Tensor]], tmp_path: Path
) -> None:
    cache = DiskCache(tmp_path)
    tuning = products.Tuning(matrices, tuned_points(LEAST, MOST), torch.empty(2**20, dtype=torch.uint8, device="cuda"))
    names = [code_name(*shape[:2], point, shape.use) for shape in SHAPES for point in tuned_points(LEAST, MOST)]
    tuning.store(cache, dict.fromkeys(names, "ff" * 64))
    tuned = tune_products(matrices, LEAST, MOST, cache, lambda done, total: None)
    assert tuned is not None and len(tuned) == 0


@pytest.mark.gpu
def test_what_the_package_knows_is_not_measured(
    matrices: dict[ProductShape, list[torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = tuned_points(LEAST, MOST)
    tuning = products.Tuning(matrices, points, torch.empty(2**20, dtype=torch.uint8, device="cuda"))
    product = tuning._product(SHAPES[0], 32)
    code = product.candidates(1, products.WORKSPACE_BYTES)[0].code.hex()
    text = table(tuning.where, matrices, points, {code_name(*SHAPES[0][:2], 32, Use.PLAIN): code})
    (tmp_path / "this.json").write_text(text)
    known = partial(known_codes, folder=tmp_path)
    monkeypatch.setattr(products, "known_codes", known)

    def measured(done: int, total: int) -> None:
        raise AssertionError("measured although the package has a table")

    tuned = tune_products(matrices, LEAST, MOST, DiskCache(tmp_path / "cache"), measured)
    assert tuned is not None and len(tuned) == 32 - 24, "one point, which stands for the counts after the one before"
    assert not (tmp_path / "cache").exists(), "what is known need not be stored"
