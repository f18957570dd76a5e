"""The fastest cuBLASLt algorithm for each product of a model, measured once per device and kept on disk.

What torch gets from cuBLAS is often not its fastest for a prompt (``docs/log.md`` has the figures). The measurement
goes over the matrices of several layers, as a step does, so that no cache is warmer than there. At some counts, tiles,
clusters and splits near the library's proposals are tried as well, and the best of these at all counts.

A device that the package has a table for (``known_products.py``) needs no measurement. Any other's result lies in the
disk cache, so that it has the same bits from one start to the next; where the cache cannot be written, another start
may choose otherwise, and rounding may differ.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch

from jitgraph.jit.canonical import canonical
from jitgraph.jit.disk_cache import DiskCache, Lookup
from jitgraph.jit.driver import raw_stream
from jitgraph.ops.cublaslt import Algorithm, CublasLtUnavailable, Product, cublaslt
from jitgraph.ops.known_products import Codes, Where, code_name, known_codes
from jitgraph.ops.reference_linear import ProductShape, Use
from jitgraph.ops.tiles import TILE_TOKENS, Tile, is_tile, tile_of, width

TUNED_TOKENS = 512
"""Most tokens that are measured; a prompt's chunk is no longer by default."""
_GRAIN = 8
"""Tokens between two counts that are measured: the library's tiles come in such steps, and an algorithm that is good at
160 tokens is bad at 150."""
WORKSPACE_BYTES = 32 * 2**20
"""What cuBLAS itself has on this hardware."""
_SEARCHED_EVERY = 64
"""Tokens between two counts at which what lies around the library's proposals is searched, which takes longest."""
_NEAR = 3
"""What was found at so many searched counts is tried at a count, the nearest ones, with tiles around its own."""
_TILES_AROUND = 3
_CLUSTERS = range(1, 12)
_CUSTOMS = range(10)
_KEPT = 8
"""Of all tiles and clusters, those that are tried with other options."""
_FOUND = 2
"""Results of a search."""
_FORMAT = 3
_CANDIDATES = 8  # the library knows no more for these shapes
_SPLITS = (2, 3, 4)
_SPLIT_FIRST = 3  # how many of the candidates are also tried with their sum split
_FINALISTS = 3
_SCREEN_LAYERS, _FINAL_LAYERS = 4, 16
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 12
_AGREE = 0.01
"""The two fastest rounds of everything that is compared must be as close as this, as a share: the device may have other
work, and what is chosen beside it would stay on disk."""
_LEAST_GAIN = 0.02
"""Share of torch's time that an algorithm must save: measurements scatter by about half of this."""
_HEAD_START_CYCLES = 200_000  # the host launches all, or nearly, before the device begins


Choice = tuple[Product, Algorithm]
Named = tuple[int, int, int, Use]
"""Tokens, N, K and use."""
Progress = Callable[[int, int], None]


class TunedProducts:
    """Algorithms by shape and number of tokens, for one device and dtype."""

    def __init__(self, choices: dict[Named, Choice], tiles: dict[Named, Tile], workspace: torch.Tensor) -> None:
        """``tiles``: what the project's own kernel does, and how."""
        self._choices = choices
        self._tiles = tiles
        self._workspace = workspace

    def __len__(self) -> int:
        return len(self._choices)

    def product(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, add: bool) -> bool:
        """out = x @ weight.T (+ out) on the current stream; False, and nothing done, where torch does as well."""
        n, k = weight.shape
        choice = self._choices.get((x.shape[0], n, k, Use.ADD if add else Use.PLAIN))
        if choice is None:
            return False
        product, algorithm = choice
        product.launch(x, weight, out, add, algorithm, self._workspace, raw_stream()(x.device.index))
        return True

    def tile(self, x: torch.Tensor, weight: torch.Tensor, use: Use) -> Tile | None:
        """How the project's own kernel does a product; None where it does not."""
        n, k = weight.shape
        return self._tiles.get((x.shape[0], n, k, use))

    def classes(self) -> tuple[int, ...]:
        """Token counts that between them launch every kernel of a tile: Triton tells multiples of 16 from others."""
        found: dict[tuple[object, ...], int] = {}
        for (tokens, *product), tile in self._tiles.items():
            found.setdefault((*product, tile, width(tokens), tokens % 16 == 0), tokens)
        return tuple(sorted(set(found.values())))


def tuned_points(least: int, most: int) -> list[int]:
    """Token counts that are measured, ascending; each stands for those between its predecessor and itself."""
    most = min(most, TUNED_TOKENS)
    return [n for n in range(_GRAIN, most, _GRAIN) if n >= least] + ([most] if least <= most else [])


def tune_products(
    matrices: Mapping[ProductShape, Sequence[torch.Tensor]], least: int, most: int, cache: DiskCache, progress: Progress
) -> TunedProducts | None:
    """The best algorithm of each shape for ``least`` to ``most`` tokens, from the package, the cache or measured now.

    ``matrices``: of each shape, those of the layers. None where there is nothing to gain: another device than CUDA, a
    dtype that tensor cores would round, or no such library.
    """
    one = next(iter(matrices.values()))[0]
    points = tuned_points(least, most)
    if one.device.type != "cuda" or one.dtype not in (torch.float16, torch.bfloat16) or not points:
        return None
    try:
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=one.device)
        tuning = Tuning(matrices, points, workspace)
        stored = known_codes(tuning.where, matrices, points) or tuning.load(cache)
        if stored is None:
            stored = tuning.measure(progress)
            tuning.store(cache, stored)
        return TunedProducts(dict(tuning.choices(stored, least)), dict(tuning.tiles(stored, least)), workspace)
    except CublasLtUnavailable:
        return None


class Tuning:
    """The tuning of one model's shapes. Runs on the current stream, before ready."""

    def __init__(
        self, matrices: Mapping[ProductShape, Sequence[torch.Tensor]], points: list[int], workspace: torch.Tensor
    ) -> None:
        self._matrices = matrices
        self._points = points
        self._workspace = workspace
        like = next(iter(matrices.values()))[0]
        self._device, self._dtype = like.device, like.dtype
        torch.mm(torch.ones(16, 16, dtype=like.dtype, device=like.device), like[:16, :16])  # loads the library
        self._library = cublaslt(like.device.index)
        self._stream = int(torch.cuda.current_stream(like.device).cuda_stream)
        shapes = tuple((shape.n, shape.k, shape.add, len(found)) for shape, found in matrices.items())
        self.where = Where(torch.cuda.get_device_name(like.device), self._library.version, str(like.dtype))
        parts = ("products", _FORMAT, *self.where, shapes, tuple(points))
        self._key = hashlib.sha256(canonical(parts)).digest()

    # --------------------------------------------------------------------------------------------------------- on disk

    def load(self, cache: DiskCache) -> Codes | None:
        """What an earlier start measured; None for nothing that can be used."""
        found, payload = cache.get(self._key)
        return json.loads(payload) if found is Lookup.HIT else None

    def store(self, cache: DiskCache, codes: Codes) -> None:
        """Keeps it for later starts, if the folder can be written."""
        cache.put(self._key, json.dumps(codes).encode())

    def choices(self, codes: Codes, least: int) -> Iterator[tuple[Named, Choice]]:
        """For each count the algorithm of the next point above, if the library takes it for that count as well."""
        for shape in self._matrices:
            for tokens, code in self._spread(codes, shape.n, shape.k, shape.use, least):
                if is_tile(code):
                    continue
                product = self._product(shape, tokens)
                algorithm = product.checked(bytes.fromhex(code))
                if algorithm is not None and algorithm.workspace <= WORKSPACE_BYTES:
                    yield (tokens, shape.n, shape.k, shape.use), (product, algorithm)

    def tiles(self, codes: Codes, least: int) -> Iterator[tuple[Named, Tile]]:
        """The same for the project's own kernel, which may take the activation in as well."""
        for shape in self._matrices:
            for use in (shape.use,) if shape.add else (shape.use, Use.GATED):
                for tokens, code in self._spread(codes, shape.n, shape.k, use, least):
                    if is_tile(code) and tokens <= TILE_TOKENS:
                        yield (tokens, shape.n, shape.k, use), tile_of(code)

    def _spread(self, codes: Codes, n: int, k: int, use: Use, least: int) -> Iterator[tuple[int, str]]:
        """Each count from ``least`` on with the code of the next point above, where it has one."""
        first = least
        for point in self._points:
            code = codes.get(code_name(n, k, point, use))
            if code:
                yield from ((tokens, code) for tokens in range(first, point + 1))
            first = point + 1

    def _product(self, shape: ProductShape, tokens: int) -> Product:
        return Product(self._library, tokens, shape.n, shape.k, self._dtype)

    # ------------------------------------------------------------------------------------------------------- measuring

    def measure(self, progress: Progress, every: int = _SEARCHED_EVERY) -> Codes:
        """Measures every shape at every point, and searches every so many tokens."""
        codes: Codes = {}
        searched = [tokens for tokens in self._points if tokens % every == 0]
        done, total = 0, len(self._matrices) * (len(self._points) + len(searched))
        for shape, matrices in self._matrices.items():
            pool: dict[int, list[Algorithm]] = {}
            for tokens in searched:
                pool[tokens] = self._bench(shape, matrices, tokens).search()
                done += 1
                progress(done, total)
            for tokens in self._points:
                near = sorted(pool, key=lambda other, here=tokens: abs(other - here))[:_NEAR]  # type: ignore[misc]
                best = self._bench(shape, matrices, tokens).best([one for other in near for one in pool[other]])
                if best is not None:
                    codes[code_name(shape.n, shape.k, tokens, shape.use)] = best.code.hex()
                done += 1
                progress(done, total)
        return codes

    def _bench(self, shape: ProductShape, matrices: Sequence[torch.Tensor], tokens: int) -> _Bench:
        product = self._product(shape, tokens)
        return _Bench(product, shape.add, tokens, matrices, self._workspace, self._stream)


class _Bench:
    """Algorithms of one shape and count against each other, and against torch."""

    def __init__(
        self,
        product: Product,
        add: bool,
        tokens: int,
        matrices: Sequence[torch.Tensor],
        workspace: torch.Tensor,
        stream: int,
    ) -> None:
        n, k = matrices[0].shape
        like = matrices[0]
        self._product = product
        self._add = add
        self._matrices = matrices
        self._workspace = workspace
        self._stream = stream
        self._x = torch.randn(tokens, k, device=like.device).to(like.dtype)
        self._out = torch.zeros(tokens, n, device=like.device, dtype=like.dtype)

    def best(self, found: Iterable[Algorithm]) -> Algorithm | None:
        """The fastest of the library's proposals and of what was ``found`` at counts nearby, with tiles around its own;
        None where torch is as fast, or nearly."""
        candidates = self._proposed()
        for one in found:
            candidates += self._with_tiles(one, self._around([one]))
        finalists = [one for _, one in self._ranked(candidates)[:_FINALISTS] if self._right(one)]
        if not finalists:
            return None
        rounds: list[list[float]] = []
        while len(rounds) < _LEAST_ROUNDS or (len(rounds) < _MOST_ROUNDS and not _agree(rounds)):
            rounds.append([self._torch_us(), *(self._us(one, _FINAL_LAYERS) for one in finalists)])
        torch_us, *times = (min(one) for one in zip(*rounds, strict=True))
        fastest = min(range(len(times)), key=times.__getitem__)
        return finalists[fastest] if times[fastest] < torch_us * (1 - _LEAST_GAIN) else None

    def search(self) -> list[Algorithm]:
        """The fastest of those around the proposals: all tiles near theirs with all clusters, the best of these with
        all custom options, and the best of these with the sum split. The library proposes few of them by itself."""
        product, proposed = self._product, self._proposed()
        tiles, bases = self._around(proposed), {product.custom(one): product.split(one, 1) for one in proposed[::-1]}
        grid = [
            product.changed(one, tile=tile, cluster=cluster)
            for one in bases.values()
            if one is not None
            for tile in tiles
            for cluster in _CLUSTERS
        ]
        best = [one for _, one in self._ranked([*proposed, *grid])[:_KEPT]]
        others = [product.changed(one, custom=custom) for one in best for custom in _CUSTOMS]
        best = [one for _, one in self._ranked([*best, *others])[:_KEPT]]
        others = [product.split(one, parts) for one in best[:_SPLIT_FIRST] for parts in (1, *_SPLITS)]
        finalists = self._ranked([*best, *others])[:_KEPT]
        final = sorted(((self._us(one, _FINAL_LAYERS), one) for _, one in finalists), key=lambda each: each[0])
        return [one for _, one in final[:_FOUND]]

    def _around(self, algorithms: Iterable[Algorithm]) -> list[int]:
        """The numbers of tiles like those of these algorithms."""
        numbers = {tile for one in algorithms if (tile := self._product.tile(one)) is not None}
        return sorted({tile + by for tile in numbers for by in range(-_TILES_AROUND, _TILES_AROUND + 1)})

    def _with_tiles(self, algorithm: Algorithm, tiles: Iterable[int]) -> list[Algorithm]:
        changed = [self._product.changed(algorithm, tile=tile) for tile in tiles]
        return [one for one in changed if one is not None]

    def _proposed(self) -> list[Algorithm]:
        candidates = self._product.candidates(_CANDIDATES, WORKSPACE_BYTES)
        splits = [self._product.split(one, parts) for one in candidates[:_SPLIT_FIRST] for parts in _SPLITS]
        return candidates + [one for one in splits if one is not None]

    def _ranked(self, algorithms: Iterable[Algorithm | None]) -> list[tuple[float, Algorithm]]:
        """Those that exist, have room and run, by a first look at their time."""
        fitting = dict.fromkeys(one for one in algorithms if one is not None and one.workspace <= WORKSPACE_BYTES)
        timed = [(self._us(one, _SCREEN_LAYERS), one) for one in fitting]
        return sorted((each for each in timed if each[0] < math.inf), key=lambda each: each[0])

    def _us(self, algorithm: Algorithm, layers: int) -> float:
        def launch(weight: torch.Tensor) -> None:
            self._product.launch(self._x, weight, self._out, self._add, algorithm, self._workspace, self._stream)

        return time_us(launch, self._matrices[:layers], self._out)

    def _torch_us(self) -> float:
        def launch(weight: torch.Tensor) -> None:
            if self._add:
                torch.addmm(self._out, self._x, weight.t(), out=self._out)
            else:
                torch.mm(self._x, weight.t(), out=self._out)

        return time_us(launch, self._matrices[:_FINAL_LAYERS], self._out)

    def _right(self, algorithm: Algorithm) -> bool:
        """Whether the algorithm gives what torch gives but for rounding."""
        weight = self._matrices[0]
        self._product.launch(self._x, weight, self._out, False, algorithm, self._workspace, self._stream)
        expected = torch.mm(self._x, weight.t())
        scale = expected.abs().max().float()
        wrong = (self._out - expected).abs().max().float()
        self._out.zero_()
        return bool(wrong <= 2e-2 * scale)


def _agree(rounds: Sequence[Sequence[float]]) -> bool:
    """Whether what was fastest once was nearly so a second time, for each that takes part."""
    best = (sorted(one)[:2] for one in zip(*rounds, strict=True))
    return all(second <= first * (1 + _AGREE) for first, second in best)


def time_us(launch: Callable[[torch.Tensor], None], matrices: Sequence[torch.Tensor], out: torch.Tensor) -> float:
    """Microseconds of one product, over several layers' matrices one after the other; infinite if it fails."""
    out.zero_()  # sums of many products would leave the range of half floats
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(_HEAD_START_CYCLES)
    begin.record()
    try:
        for weight in matrices:
            launch(weight)
    except CublasLtUnavailable:
        return math.inf
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / len(matrices) * 1e3
