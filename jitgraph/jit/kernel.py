"""The ``kernel`` decorator: a Triton kernel that is launched without a C compiler or Python headers.

``@kernel`` on a body, then ``body[grid](*args, CONST=..., num_warps=4)``, as with ``triton.jit``. What a launch does:
inside ``compile_only`` or ``collect`` that mode takes it; under Triton's interpreter it runs there; on CUDA it runs on
torch's current device and stream. Each specialisation is compiled and loaded once per device and process, and counted
by the monitor; ``registry.compile_all`` does so beforehand, for many at once. Functions that a body calls are decorated
with ``triton.jit`` itself.

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
from jitgraph.jit.compiler import Made, make_binary
from jitgraph.jit.disk_cache import DiskCache
from jitgraph.jit.driver import LoadedKernel, bindings, device_index, raw_stream, require_stock_launcher
from jitgraph.jit.modes import ACTIVE_MODE, Mode
from jitgraph.jit.monitor import MONITOR, CompileMonitor, CompileRecord
from jitgraph.jit.specialise import UNREACHABLE, Parameters, Specialisation, scan, specialise
from jitgraph.jit.strict import require_compiles_allowed
from jitgraph.jit.target import device_arch

Grid = tuple[int, ...] | Callable[[dict[str, Any]], tuple[int, ...]]
Launch = Callable[..., None]


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
        self.interpreted = not isinstance(self.jit_function, triton.JITFunction)
        self.monitor = monitor
        self._params = Parameters.of(fn)
        self._lock = threading.Lock()
        self._calls: dict[Hashable, LoadedKernel] = {}
        self._stock_calls: set[Hashable] = set()
        self._loaded: dict[Hashable, LoadedKernel] = {}
        self._gates: dict[Hashable, threading.Lock] = {}
        self._launch = self._interpreted_launch() if self.interpreted else self._compiled_launch()

    def __getitem__(self, grid: Grid) -> Launch:
        """``kernel[grid]`` takes the arguments; ``grid`` is up to three sizes, or a function of the arguments."""
        return partial(self._launch, grid)

    def is_ready(self, spec: Specialisation, device: int) -> bool:
        """Whether a launch of ``spec`` on a device compiles and loads nothing."""
        return (device, spec.key) in self._loaded

    def make_ready(self, spec: Specialisation, device: int, cache: DiskCache | None = None) -> Made | None:
        """Compiles and loads ``spec`` for a CUDA device; None where that was done before.

        Several threads may do so at once for different specialisations. The device must be this thread's, or the
        thread must not have used CUDA yet.

        Raises:
            CompileError: it does not compile, or compiling is forbidden here.
            DeviceError: it cannot be loaded.
        """
        identity = (device, spec.key)
        with self._lock:
            gate = self._gates.setdefault(identity, threading.Lock())
        with gate:
            if identity in self._loaded:
                return None
            require_compiles_allowed(f"{self.__name__}({spec.describe()})")
            made = make_binary(self.jit_function, spec, device_arch(device), self.monitor, cache)
            self._loaded[identity] = LoadedKernel(made.binary, device)
            return made

    def _interpreted_launch(self) -> Launch:
        def launch(grid: Grid, /, *args: Any, **kwargs: Any) -> None:
            mode = ACTIVE_MODE.get()
            if mode is not None:
                self._hand_over(mode, args, kwargs)
            else:
                self.jit_function[grid](*args, **kwargs)

        return launch

    def _compiled_launch(self) -> Launch:
        """What runs at each launch. A function with everything at hand, because each look-up and call counts here.

        It turns the arguments into a key that is cheaper than their tokens and tells at least as much apart.
        """
        constexpr, leading, calls = self._params.constexpr, self._params.leading, self._calls
        active_mode, current_device, current_stream = ACTIVE_MODE.get, device_index(), raw_stream()
        tensor, low, high, keywords = torch.Tensor, -(2**31), 2**31, object()

        def launch(grid: Grid, /, *args: Any, **kwargs: Any) -> None:
            mode = active_mode()
            if mode is not None:
                self._hand_over(mode, args, kwargs)
                return
            if len(args) < leading:
                args, kwargs = self._params.positional(args, kwargs)
            try:
                device = current_device()
            except (AssertionError, RuntimeError) as error:
                raise DeviceError(f"kernel {self.__name__} needs a CUDA device ({error})") from error
            pattern: list[Any] = [device]
            values: list[int | float] = []
            note, give = pattern.append, values.append
            for arg, is_constant in zip(args, constexpr):  # noqa: B905 - constants may follow by keyword
                if is_constant:
                    note(type(arg))
                    note(arg)
                elif isinstance(arg, tensor):
                    address = arg.data_ptr()
                    if not (arg.is_cuda or arg.is_pinned()):
                        raise DeviceError(UNREACHABLE)
                    note(arg.dtype)
                    if address & 15:
                        note("unaligned")
                    give(address)
                elif type(arg) is int and low <= arg < high and arg != 1:
                    note("i32" if arg & 15 else "i32:16")
                    give(arg)
                elif arg is None:
                    note(None)
                elif type(arg) is float:
                    note("fp32")
                    give(arg)
                else:
                    scan((arg,), (False,), True, pattern, values)
            constants = kwargs.values()
            key = (*pattern, keywords, *kwargs, *constants, *map(type, constants))
            loaded = calls.get(key) or self._first_launch(key, device, grid, args, kwargs)
            if loaded is None:
                return
            if type(grid) is not tuple:
                grid = self._sizes(grid, args, kwargs)
            loaded.launch(grid, current_stream(device), values)

        return launch

    def _first_launch(
        self, key: Hashable, device: int, grid: Grid, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> LoadedKernel | None:
        """What is needed by a call that was not made before; calls that differ in spelling only share it.

        None where Triton's own launcher has done the launch.
        """
        spec = self._specialise(args, kwargs, True)
        if bindings() is None:
            self._launch_stock(key, spec, grid, args, kwargs)
            return None
        self.make_ready(spec, device)
        self._calls[key] = self._loaded[device, spec.key]
        return self._calls[key]

    def _hand_over(self, mode: Mode, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        mode.add(self, self._specialise(args, kwargs, False))

    def _specialise(self, args: Sequence[Any], kwargs: Mapping[str, Any], on_device: bool) -> Specialisation:
        params = self._params
        if not params.leading <= len(args) <= len(params.names) or not params.runtime_names.isdisjoint(kwargs):
            args, kwargs = params.positional(args, kwargs)
        tokens: list[Any] = []
        scan(args, params.constexpr, on_device, tokens, [])
        return specialise(params, tokens, kwargs)

    def _sizes(self, grid: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
        if callable(grid):
            grid = grid(dict(zip(self._params.names, args, strict=False)) | dict(kwargs))
        return tuple(grid)

    def _launch_stock(
        self, key: Hashable, spec: Specialisation, grid: Grid, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        """Triton's own launcher, where ``cuda.bindings`` is missing; slower, needs a C compiler, and keeps what it
        compiles in Triton's own cache."""
        if key in self._stock_calls:
            self.jit_function[grid](*args, **kwargs)
            return
        require_compiles_allowed(f"{self.__name__}({spec.describe()})")
        start = time.perf_counter()
        require_stock_launcher()
        self.jit_function[grid](*args, **kwargs)
        ms = (time.perf_counter() - start) * 1e3
        arch = device_arch(torch.cuda.current_device())
        self.monitor.record(CompileRecord(self.jit_function.__qualname__, arch, "stock launcher", ms))
        self._stock_calls.add(key)
