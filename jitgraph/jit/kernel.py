"""The ``kernel`` decorator: a Triton kernel that is launched without a C compiler or Python headers.

``@kernel`` on a body, then ``body[grid](*args, CONST=..., num_warps=4)``, as with ``triton.jit``. What a launch does:
under Triton's interpreter it runs there; inside ``compile_only`` it compiles; on CUDA it runs on torch's current device
and stream. Each specialisation is compiled and loaded once per device and process, and counted by the monitor.
Functions that a body calls are decorated with ``triton.jit`` itself.

Arguments: CUDA tensors, pinned CPU tensors (the GPU sees them at the same address), ints, bools, floats (as fp32) and
None.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import triton

from jitgraph.errors import DeviceError
from jitgraph.jit.compile_only import ACTIVE_REPORT
from jitgraph.jit.compiler import compile_binary, use_cache_dir
from jitgraph.jit.driver import LoadedKernel, bindings, raw_stream, require_stock_launcher
from jitgraph.jit.monitor import MONITOR, CompileMonitor, CompileRecord
from jitgraph.jit.specialise import Parameters, scan, specialise

Grid = tuple[int, ...] | Callable[[dict[str, Any]], tuple[int, ...]]


def kernel(fn: Callable[..., Any]) -> Kernel:
    """Makes a Triton kernel of a body; decorator."""
    return Kernel(fn, MONITOR)


class Kernel:
    """A kernel body with its compiled specialisations. Any thread may launch it."""

    def __init__(self, fn: Callable[..., Any], monitor: CompileMonitor) -> None:
        """Wraps ``fn``; compilations are counted in ``monitor``.

        Raises:
            TypeError: a parameter that ``Parameters.of`` refuses.
        """
        self.jit_function = triton.jit(fn)
        self.__name__ = fn.__name__
        self.__doc__ = fn.__doc__
        self._interpreted = not isinstance(self.jit_function, triton.JITFunction)
        self._monitor = monitor
        self._params = Parameters.of(fn)
        self._lock = threading.Lock()
        self._calls: dict[Hashable, LoadedKernel] = {}
        self._stock_calls: set[Hashable] = set()
        self._loaded: dict[Hashable, LoadedKernel] = {}

    def __getitem__(self, grid: Grid) -> Callable[..., None]:
        """``kernel[grid]`` takes the arguments; ``grid`` is up to three sizes, or a function of the arguments."""
        return partial(self._run, grid)

    def _run(self, grid: Grid, /, *args: Any, **kwargs: Any) -> None:
        if self._interpreted:
            self._interpret(grid, args, kwargs)
            return
        params = self._params
        if len(args) < params.leading or not params.runtime_names.isdisjoint(kwargs):
            args, kwargs = params.positional(args, kwargs)
        tokens: list[Any] = []
        values: list[int | float] = []
        report = ACTIVE_REPORT.get()
        if report is not None:
            scan(args, params.constexpr, False, tokens, values)
            report.add(self.jit_function, specialise(params, tokens, kwargs), self._monitor)
            return
        device = _current_device(self.__name__)
        scan(args, params.constexpr, True, tokens, values)
        key = (device, *tokens, None, *kwargs.items(), *map(type, kwargs.values()))
        if callable(grid):
            grid = grid(dict(zip(params.names, args, strict=False)) | kwargs)
        if bindings() is None:
            self._launch_stock(key, grid, args, kwargs)
            return
        loaded = self._calls.get(key) or self._prepare(key, device, tokens, kwargs)
        sizes = (*grid, 1, 1)
        loaded.launch(sizes[0], sizes[1], sizes[2], raw_stream()(device), values)

    def _interpret(self, grid: Grid, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if ACTIVE_REPORT.get() is not None:
            raise DeviceError("kernels cannot be compiled under TRITON_INTERPRET=1; unset it before importing jitgraph")
        self.jit_function[grid](*args, **kwargs)

    def _prepare(self, key: Hashable, device: int, tokens: Sequence[Any], kwargs: Mapping[str, Any]) -> LoadedKernel:
        """Compiles and loads what a call needs; calls that differ in spelling only share it."""
        with self._lock:
            spec = specialise(self._params, tokens, kwargs)
            identity = (device, spec.key)
            if identity not in self._loaded:
                binary = compile_binary(self.jit_function, spec, _arch(device), self._monitor)
                self._loaded[identity] = LoadedKernel(binary, device)
            self._calls[key] = self._loaded[identity]
            return self._loaded[identity]

    def _launch_stock(self, key: Hashable, grid: Sequence[int], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Triton's own launcher, where ``cuda.bindings`` is missing; slower, and needs a C compiler."""
        if key in self._stock_calls:
            self.jit_function[grid](*args, **kwargs)
            return
        start = time.perf_counter()
        require_stock_launcher()
        use_cache_dir()
        self.jit_function[grid](*args, **kwargs)
        ms = (time.perf_counter() - start) * 1e3
        arch = _arch(torch.cuda.current_device())
        self._monitor.record(CompileRecord(self.jit_function.__qualname__, arch, "stock launcher", ms))
        self._stock_calls.add(key)


def _arch(device: int) -> int:
    """Compute capability of a CUDA device, 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def _current_device(name: str) -> int:
    """torch's current CUDA device.

    Raises:
        DeviceError: there is none.
    """
    try:
        return torch.cuda.current_device()
    except (AssertionError, RuntimeError) as error:
        raise DeviceError(f"kernel {name} needs a CUDA device ({error})") from error
