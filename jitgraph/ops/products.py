"""The fastest cuBLASLt algorithm for each product of a model, measured once per device and kept on disk.

What torch gets from cuBLAS is often not its fastest for a prompt (``docs/log.md`` has the figures). The measurement
goes over the matrices of several layers, as a step does, so that no cache is warmer than there. Its result lies in the
disk cache, so that a device has the same bits from one start to the next; where the cache cannot be written, another
start may choose otherwise, and rounding may differ.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

from jitgraph.jit.canonical import canonical
from jitgraph.jit.disk_cache import DiskCache, Lookup
from jitgraph.jit.driver import raw_stream
from jitgraph.ops.cublaslt import Algorithm, CublasLtUnavailable, Product, cublaslt
from jitgraph.ops.reference_linear import ProductShape

TUNED_TOKENS = 512
"""Most tokens that are measured; a prompt's chunk is no longer by default."""
_GRAIN = 8
"""Tokens between two counts that are measured: the library's tiles come in such steps, and an algorithm that is good at
160 tokens is bad at 150."""
WORKSPACE_BYTES = 32 * 2**20
"""What cuBLAS itself has on this hardware."""
_FORMAT = 1
_CANDIDATES = 8  # the library knows no more for these shapes
_SPLITS = (2, 3, 4)
_SPLIT_FIRST = 3  # how many of the candidates are also tried with their sum split
_FINALISTS = 3
_SCREEN_LAYERS, _FINAL_LAYERS, _FINAL_ROUNDS = 6, 16, 3
_LEAST_GAIN = 0.02
"""Share of torch's time that an algorithm must save: measurements scatter by about half of this."""
_HEAD_START_CYCLES = 400_000  # the host launches all before the device begins


Choice = tuple[Product, Algorithm]
Progress = Callable[[int, int], None]


class TunedProducts:
    """Algorithms by shape and number of tokens, for one device and dtype."""

    def __init__(self, choices: dict[tuple[int, int, int, bool], Choice], workspace: torch.Tensor) -> None:
        self._choices = choices
        self._workspace = workspace

    def __len__(self) -> int:
        return len(self._choices)

    def product(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, add: bool) -> bool:
        """out = x @ weight.T (+ out) on the current stream; False, and nothing done, where torch does as well."""
        n, k = weight.shape
        choice = self._choices.get((x.shape[0], n, k, add))
        if choice is None:
            return False
        product, algorithm = choice
        product.launch(x, weight, out, add, algorithm, self._workspace, raw_stream()(x.device.index))
        return True


def tuned_points(least: int, most: int) -> list[int]:
    """Token counts that are measured, ascending; each stands for those between its predecessor and itself."""
    most = min(most, TUNED_TOKENS)
    return [n for n in range(_GRAIN, most, _GRAIN) if n >= least] + ([most] if least <= most else [])


def tune_products(
    matrices: Mapping[ProductShape, Sequence[torch.Tensor]], least: int, most: int, cache: DiskCache, progress: Progress
) -> TunedProducts | None:
    """The best algorithm of each shape for ``least`` to ``most`` tokens, from the cache or measured now.

    ``matrices``: of each shape, those of the layers. None where there is nothing to gain: another device than CUDA, a
    dtype that tensor cores would round, or no such library.
    """
    one = next(iter(matrices.values()))[0]
    points = tuned_points(least, most)
    if one.device.type != "cuda" or one.dtype not in (torch.float16, torch.bfloat16) or not points:
        return None
    try:
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=one.device)
        tuning = _Tuning(matrices, points, workspace)
        stored = tuning.load(cache)
        if stored is None:
            stored = tuning.measure(progress)
            tuning.store(cache, stored)
        return TunedProducts(dict(tuning.choices(stored, least)), workspace)
    except CublasLtUnavailable:
        return None


Codes = dict[str, str]
"""Shape and number of tokens (``_name``) to an algorithm's code in hexadecimal; only where it beats torch."""


class _Tuning:
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
        name = torch.cuda.get_device_name(like.device)
        parts = ("products", _FORMAT, name, self._library.version, str(like.dtype), shapes, tuple(points))
        self._key = hashlib.sha256(canonical(parts)).digest()

    # --------------------------------------------------------------------------------------------------------- on disk

    def load(self, cache: DiskCache) -> Codes | None:
        """What an earlier start measured; None for nothing that can be used."""
        found, payload = cache.get(self._key)
        return json.loads(payload) if found is Lookup.HIT else None

    def store(self, cache: DiskCache, codes: Codes) -> None:
        """Keeps it for later starts, if the folder can be written."""
        cache.put(self._key, json.dumps(codes).encode())

    def choices(self, codes: Codes, least: int) -> Iterator[tuple[tuple[int, int, int, bool], Choice]]:
        """For each count the algorithm of the next point above, if the library takes it for that count as well."""
        for shape in self._matrices:
            first = least
            for point in self._points:
                code = codes.get(_name(shape, point))
                for tokens in range(first, point + 1) if code else ():
                    product = self._product(shape, tokens)
                    algorithm = product.checked(bytes.fromhex(code or ""))
                    if algorithm is not None and algorithm.workspace <= WORKSPACE_BYTES:
                        yield (tokens, shape.n, shape.k, shape.add), (product, algorithm)
                first = point + 1

    def _product(self, shape: ProductShape, tokens: int) -> Product:
        return Product(self._library, tokens, shape.n, shape.k, self._dtype)

    # ------------------------------------------------------------------------------------------------------- measuring

    def measure(self, progress: Progress) -> Codes:
        """Measures every shape at every point."""
        codes: Codes = {}
        done, total = 0, len(self._matrices) * len(self._points)
        for shape, matrices in self._matrices.items():
            for tokens in self._points:
                best = self._best(shape, matrices, tokens)
                if best is not None:
                    codes[_name(shape, tokens)] = best.code.hex()
                done += 1
                progress(done, total)
        return codes

    def _best(self, shape: ProductShape, matrices: Sequence[torch.Tensor], tokens: int) -> Algorithm | None:
        """The fastest algorithm; None where torch is as fast, or nearly."""
        product = self._product(shape, tokens)
        x = torch.randn(tokens, shape.k, device=self._device).to(self._dtype)
        out = torch.zeros(tokens, shape.n, device=self._device, dtype=self._dtype)
        candidates = product.candidates(_CANDIDATES, WORKSPACE_BYTES)
        if not candidates:
            return None
        splits = [product.split(one, parts) for one in candidates[:_SPLIT_FIRST] for parts in _SPLITS]
        candidates += [one for one in splits if one is not None and one.workspace <= WORKSPACE_BYTES]
        candidates = list(dict.fromkeys(candidates))

        def launch(algorithm: Algorithm, weight: torch.Tensor) -> None:
            product.launch(x, weight, out, shape.add, algorithm, self._workspace, self._stream)

        def time(algorithm: Algorithm, layers: int) -> float:
            return _time_us(partial(launch, algorithm), matrices[:layers], out)

        def by_torch(weight: torch.Tensor) -> None:
            if shape.add:
                torch.addmm(out, x, weight.t(), out=out)
            else:
                torch.mm(x, weight.t(), out=out)

        screened = sorted((time(one, _SCREEN_LAYERS), index) for index, one in enumerate(candidates))
        finalists = [candidates[index] for us, index in screened[:_FINALISTS] if us < math.inf]
        finalists = [one for one in finalists if self._right(product, x, matrices[0], out, one)]
        if not finalists:
            return None
        rounds = [
            [_time_us(by_torch, matrices[:_FINAL_LAYERS], out), *(time(one, _FINAL_LAYERS) for one in finalists)]
            for _ in range(_FINAL_ROUNDS)
        ]
        torch_us, *others = (min(times) for times in zip(*rounds, strict=True))
        fastest = min(range(len(others)), key=others.__getitem__)
        return finalists[fastest] if others[fastest] < torch_us * (1 - _LEAST_GAIN) else None

    def _right(
        self, product: Product, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, algorithm: Algorithm
    ) -> bool:
        """Whether the algorithm gives what torch gives but for rounding."""
        product.launch(x, weight, out, False, algorithm, self._workspace, self._stream)
        expected = torch.mm(x, weight.t())
        scale = expected.abs().max().float()
        wrong = (out - expected).abs().max().float()
        out.zero_()
        return bool(wrong <= 2e-2 * scale)


def _time_us(launch: Callable[[torch.Tensor], None], matrices: Sequence[torch.Tensor], out: torch.Tensor) -> float:
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


def _name(shape: ProductShape, tokens: int) -> str:
    return f"{shape.n}x{shape.k}x{tokens}{'+' if shape.add else ''}"
