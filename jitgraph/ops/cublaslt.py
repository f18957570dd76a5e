"""Matrix products through cuBLASLt with the algorithm named by the caller, which torch has no way to do.

cuBLAS picks an algorithm by rules. For the few tokens of a prompt the best of its candidates is often another one, and
only measuring tells (``products.py``). The library is the one that torch has loaded; an algorithm's 64 bytes mean
something to that version alone. Launches are legal under capture and never allocate: the workspace is the caller's.
"""

from __future__ import annotations

import ctypes
import re
from ctypes import byref, c_float, c_int, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

# Values of cublasLt.h.
_COMPUTE_F32, _REAL_F32 = 68, 0
_TYPES = {torch.float16: 2, torch.bfloat16: 14}
_DESC_TRANSPOSE_A, _TRANSPOSED = 3, 1
_PREFERENCE_WORKSPACE = 1
_CONFIG_TILE, _CONFIG_SPLIT_K, _CONFIG_REDUCTION, _CONFIG_CUSTOM, _CONFIG_CLUSTER = 1, 2, 3, 5, 8
_CONFIG_BYTES = {_CONFIG_CLUSTER: 2}
"""Of an attribute's value, where it is not four."""
_REDUCTION_IN_F32 = 2


class CublasLtUnavailable(RuntimeError):
    """There is no such library in this process, or it refused a call."""


class _Algorithm(ctypes.Structure):
    _fields_ = [("data", c_uint64 * 8)]


class _Heuristic(ctypes.Structure):
    _fields_ = [
        ("algorithm", _Algorithm),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    ]


@dataclass(frozen=True)
class Algorithm:
    """One way to compute a product."""

    code: bytes
    """64 bytes that the library understands."""
    workspace: int
    """Bytes of workspace that it needs."""


class CublasLt:
    """The library: one handle, for the device that is current when it is made."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        self._library.cublasLtGetVersion.restype = c_size_t
        self.version = int(self._library.cublasLtGetVersion())
        self.handle = c_void_p()
        self.call("cublasLtCreate", byref(self.handle))

    def call(self, name: str, *arguments: Any) -> None:
        """Calls a function of the library.

        Raises:
            CublasLtUnavailable: it does not exist or reports a failure.
        """
        function = getattr(self._library, name, None)
        status = -1 if function is None else function(*arguments)
        if status:
            raise CublasLtUnavailable(f"{name} returned {status}")

    def function(self, name: str) -> Any:
        """The bare function, for the caller that checks the status itself."""
        return getattr(self._library, name)


@lru_cache(maxsize=8)
def cublaslt(device_index: int) -> CublasLt:
    """The library for a CUDA device.

    Raises:
        CublasLtUnavailable: torch has not loaded it.
    """
    path = _loaded_path()
    if path is None:
        raise CublasLtUnavailable("torch has not loaded cuBLASLt")
    try:
        with torch.cuda.device(device_index):
            return CublasLt(path)
    except OSError as error:
        raise CublasLtUnavailable(str(error)) from error


def _loaded_path() -> str | None:
    """Where the library lies that this process has loaded already."""
    try:
        with open("/proc/self/maps") as maps:
            found = re.search(r"\S*/libcublasLt\.so\S*", maps.read())
    except OSError:
        return None
    return found.group() if found else None


class Product:
    """The products ``out [T, N] = x [T, K] @ weight [N, K].T`` of one shape, row-major and contiguous.

    The library thinks in columns: what it computes is ``out.T = weight @ x.T``. Objects live as long as the process.
    """

    def __init__(self, library: CublasLt, tokens: int, n: int, k: int, dtype: torch.dtype) -> None:
        self._library = library
        self._matmul = library.function("cublasLtMatmul")
        self._description = c_void_p()
        library.call("cublasLtMatmulDescCreate", byref(self._description), _COMPUTE_F32, _REAL_F32)
        transposed = c_int(_TRANSPOSED)
        attribute = (_DESC_TRANSPOSE_A, byref(transposed), c_size_t(4))
        library.call("cublasLtMatmulDescSetAttribute", self._description, *attribute)
        self._weight = self._layout(dtype, k, n)
        self._x = self._layout(dtype, k, tokens)
        self._out = self._layout(dtype, n, tokens)
        self._one, self._zero = c_float(1), c_float(0)

    def _layout(self, dtype: torch.dtype, rows: int, columns: int) -> c_void_p:
        layout = c_void_p()
        shape = (c_uint64(rows), c_uint64(columns), ctypes.c_int64(rows))
        self._library.call("cublasLtMatrixLayoutCreate", byref(layout), _TYPES[dtype], *shape)
        return layout

    @property
    def _shape(self) -> tuple[c_void_p, ...]:
        return self._description, self._weight, self._x, self._out, self._out

    def candidates(self, most: int, workspace: int) -> list[Algorithm]:
        """Up to ``most`` algorithms that the library would consider, its favourite first, and variants of the first
        ones that split the sum, all within ``workspace`` bytes."""
        preference = c_void_p()
        self._library.call("cublasLtMatmulPreferenceCreate", byref(preference))
        limit = c_size_t(workspace)
        try:
            arguments = (preference, _PREFERENCE_WORKSPACE, byref(limit), c_size_t(8))
            self._library.call("cublasLtMatmulPreferenceSetAttribute", *arguments)
            results = (_Heuristic * most)()
            count = c_int()
            where = (self._library.handle, *self._shape, preference, most, results, byref(count))
            self._library.call("cublasLtMatmulAlgoGetHeuristic", *where)
        finally:
            self._library.call("cublasLtMatmulPreferenceDestroy", preference)
        found = [_named(one) for one in results[: count.value] if one.state == 0]
        return list(dict.fromkeys(found))

    def split(self, algorithm: Algorithm, parts: int) -> Algorithm | None:
        """The same algorithm with the sum over K in so many parts; None where it cannot."""
        reduction = _REDUCTION_IN_F32 if parts > 1 else 0
        return self._set(algorithm, {_CONFIG_SPLIT_K: parts, _CONFIG_REDUCTION: reduction})

    def changed(
        self, algorithm: Algorithm, tile: int | None = None, custom: int | None = None, cluster: int | None = None
    ) -> Algorithm | None:
        """The same algorithm with another tile, custom option or shape of clusters, by the library's numbers; None
        where there is no such one for this shape."""
        wanted = {_CONFIG_TILE: tile, _CONFIG_CUSTOM: custom, _CONFIG_CLUSTER: cluster}
        return self._set(algorithm, {attribute: value for attribute, value in wanted.items() if value is not None})

    def tile(self, algorithm: Algorithm) -> int | None:
        """The number that the library gives to the algorithm's tile; similar tiles have close ones."""
        return self._get(algorithm, _CONFIG_TILE)

    def custom(self, algorithm: Algorithm) -> int | None:
        """The algorithm's custom option."""
        return self._get(algorithm, _CONFIG_CUSTOM)

    def _get(self, algorithm: Algorithm, attribute: int) -> int | None:
        words, value, written = _Algorithm.from_buffer_copy(algorithm.code), c_int(), c_size_t()
        read = self._library.function("cublasLtMatmulAlgoConfigGetAttribute")
        failed = read(byref(words), attribute, byref(value), c_size_t(4), byref(written))
        return None if failed else value.value

    def _set(self, algorithm: Algorithm, settings: dict[int, int]) -> Algorithm | None:
        words = _Algorithm.from_buffer_copy(algorithm.code)
        for attribute, value in settings.items():
            arguments = (byref(words), attribute, byref(c_int(value)), c_size_t(_CONFIG_BYTES.get(attribute, 4)))
            if self._library.function("cublasLtMatmulAlgoConfigSetAttribute")(*arguments):
                return None
        return self.checked(bytes(words))

    def checked(self, code: bytes) -> Algorithm | None:
        """The algorithm of this code, if the library can compute this shape with it."""
        words, result = _Algorithm.from_buffer_copy(code), _Heuristic()
        check = self._library.function("cublasLtMatmulAlgoCheck")
        if check(self._library.handle, *self._shape, byref(words), byref(result)) or result.state:
            return None
        return Algorithm(code, int(result.workspace))

    def launch(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        out: torch.Tensor,
        add: bool,
        algorithm: Algorithm,
        workspace: torch.Tensor,
        stream: int,
    ) -> None:
        """out = x @ weight.T, plus what ``out`` held if ``add``, on a stream (its handle).

        Raises:
            CublasLtUnavailable: the library refused.
        """
        target = c_void_p(out.data_ptr())
        status = self._matmul(
            self._library.handle,
            self._description,
            byref(self._one),
            c_void_p(weight.data_ptr()),
            self._weight,
            c_void_p(x.data_ptr()),
            self._x,
            byref(self._one if add else self._zero),
            target,
            self._out,
            target,
            self._out,
            algorithm.code,
            c_void_p(workspace.data_ptr()),
            c_size_t(algorithm.workspace),
            c_void_p(stream),
        )
        if status:
            raise CublasLtUnavailable(f"cublasLtMatmul returned {status}")


def _named(result: _Heuristic) -> Algorithm:
    return Algorithm(bytes(result.algorithm), int(result.workspace))
