"""Cases of launching that need Triton's compiler: ``python jit_launch_cases.py FOLDER CASE...``.

A driver made of plain Python stands in for the GPU's and notes what it is asked to do, so that the whole path of a
launch runs without a GPU. A script of their own because ``triton.jit`` decides at import whether to interpret.
In ``FOLDER`` each case has a cache folder of its own.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from jit_cases import add_body, types_body

from jitgraph.errors import CompileError, DeviceError
from jitgraph.jit import driver, kernel, registry
from jitgraph.jit.collect import collect
from jitgraph.jit.kernel import Kernel
from jitgraph.jit.monitor import CompileMonitor
from jitgraph.jit.registry import compile_all
from jitgraph.jit.strict import forbid_compiles

ARCH = 90


class Cuda(torch.Tensor):
    """A tensor that says it is on the GPU."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]


def gpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(Cuda)


class FakeDriver:
    """``cuda.bindings.driver`` as far as ``jitgraph.jit.driver`` uses it; notes the grid, stream and arguments of each
    launch."""

    CUresult = SimpleNamespace(CUDA_ERROR_INVALID_CONTEXT=201)
    CUlaunchAttributeID = SimpleNamespace()
    CUlaunchConfig = SimpleNamespace

    def __init__(self) -> None:
        self.layout: tuple[Any, ...] = ()
        """C types of the arguments of the next launches."""
        self.loads = 0
        self.launched: list[tuple[Any, ...]] = []
        self.functions: list[bytes] = []
        self.contexts: dict[int, int] = {}
        self.failures: list[int] = []

    def cuCtxGetCurrent(self) -> tuple[int, int]:
        return 0, self.contexts.get(threading.get_ident(), 0)

    def cuCtxSetCurrent(self, context: int) -> tuple[int]:
        self.contexts[threading.get_ident()] = context
        return (0,)

    def cuDeviceGet(self, index: int) -> tuple[int, int]:
        return 0, index

    def cuDevicePrimaryCtxRetain(self, index: int) -> tuple[int, int]:
        return 0, 1000 + index

    def cuModuleLoadData(self, cubin: bytes) -> tuple[int, bytes]:
        assert self.contexts[threading.get_ident()] == 1000 and cubin.startswith(b"\x7fELF")
        self.loads += 1
        return 0, cubin

    def cuModuleGetFunction(self, module: bytes, symbol: bytes) -> tuple[int, bytes]:
        return (0, bytes(bytearray(symbol))) if symbol in module else (500, b"")  # each is an object of its own

    def cuGetErrorString(self, error: int) -> tuple[int, bytes]:
        return 0, b"error %d" % error

    def cuLaunchKernelEx(self, config: Any, function: bytes, pointer: int, extra: int) -> tuple[int]:
        if self.failures:
            return (self.failures.pop(),)
        read = self._read(pointer)
        time.sleep(0)  # lets other threads run, as the driver does
        assert self._read(pointer) == read, "another launch wrote over these arguments"
        self.functions.append(function)
        self.launched.append(((config.gridDimX, config.gridDimY, config.gridDimZ), config.hStream, *read))
        return (0,)

    def _read(self, pointer: int) -> tuple[Any, ...]:
        addresses = (ctypes.c_uint64 * len(self.layout)).from_address(pointer)
        return tuple(kind.from_address(at).value for kind, at in zip(self.layout, addresses, strict=True))


@contextmanager
def fake_gpu() -> Iterator[FakeDriver]:
    """Kernels made inside the block take the fake for device 0 of compute capability 9.0, with stream 7."""
    fake = FakeDriver()
    fake.layout = (*[ctypes.c_uint64] * 3, ctypes.c_int32, ctypes.c_float)
    patched = {
        (driver, "bindings"): lambda: fake,
        (kernel, "bindings"): lambda: fake,
        (registry, "bindings"): lambda: fake,
        (kernel, "device_index"): lambda: lambda: 0,
        (kernel, "raw_stream"): lambda: lambda device: 7 + device,
        (kernel, "device_arch"): lambda device: ARCH,
        (registry, "device_arch"): lambda device: ARCH,
    }
    before = {place: getattr(*place) for place in patched}
    for (module, name), value in patched.items():
        setattr(module, name, value)
    try:
        yield fake
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)


def case_launches() -> None:
    """What was made ready launches with the right arguments and compiles nothing; strictness refuses the rest."""
    with fake_gpu() as fake:
        monitor = CompileMonitor()
        own = Kernel(add_body, monitor)
        x, y, out = (gpu(torch.zeros(64)) for _ in range(3))
        addresses = tuple(tensor.data_ptr() for tensor in (x, y, out))

        def steps() -> None:
            own[(4,)](x, y, out, 64, 0.5, None, BLOCK=64, num_warps=1)
            own[(4, 2, 3)](x, y, out, 48, 0.25, None, BLOCK=64, num_warps=1)
            own[lambda given: (given["n"],)](x, y, n=17, out=out, scale=2.0, bias=None, num_warps=1, BLOCK=64)
            own[[0]](x, y, out, 64, 0.5, None, BLOCK=64, num_warps=1)
            own[(2,)](x, y, out, 64, 0.5, None, BLOCK=64, num_warps=1)

        with collect() as wants:
            steps()
        assert len(wants) == 2 and not fake.launched
        device = torch.device("cuda", 0)
        summary = compile_all(wants, device)
        assert (summary.total, summary.compiled, summary.ready_before) == (2, 2, 0) and fake.loads == 2
        assert compile_all(wants, device).ready_before == 2 and fake.loads == monitor.count == 2
        with forbid_compiles("after ready"):
            assert compile_all(wants, device).ready_before == 2
            steps()
        assert fake.launched == [
            ((4, 1, 1), 7, *addresses, 64, 0.5),
            ((4, 2, 3), 7, *addresses, 48, 0.25),
            ((17, 1, 1), 7, *addresses, 17, 2.0),
            ((2, 1, 1), 7, *addresses, 64, 0.5),
        ], fake.launched
        assert monitor.count == 2 and fake.loads == 2
        refused(own, x, y, out, monitor)


def refused(own: Kernel, x: torch.Tensor, y: torch.Tensor, out: torch.Tensor, monitor: CompileMonitor) -> None:
    """Other classes of arguments need other binaries, also after a first launch; pageable memory is never passed on."""
    shifted, halves = x[1:], gpu(torch.zeros(64, dtype=torch.float16))
    others = [(shifted, y, out, 64), (halves, y, out, 64), (x, y, out, 1), (x, y, out, 2**40), (x, y, out, True)]
    mark = monitor.count
    for number, arguments in enumerate(others):
        call = own[(1,)]
        with forbid_compiles("after ready"):
            failing(CompileError, "was not compiled before ready: add_body(", call, *arguments)
        failing(DeviceError, "pin it", call, torch.zeros(64), *arguments[1:])
        assert monitor.count == mark + number
        make = own._specialise((*arguments, 0.5, None), {"BLOCK": 64, "num_warps": 1}, True)
        assert own.make_ready(make, 0) is not None and own.make_ready(make, 0) is None
        assert monitor.count == mark + number + 1


def failing(error: type[Exception], text: str, call: Any, *arguments: Any) -> None:
    try:
        call(*arguments, 0.5, None, BLOCK=64, num_warps=1)
    except error as caught:
        assert text in str(caught), caught
    else:
        raise AssertionError(f"{text}: not refused")


def case_launch_keys() -> None:
    """A launch never takes the binary of another class of arguments, however the two are interleaved."""
    with fake_gpu() as fake:
        own, used = Kernel(types_body, CompileMonitor()), []
        x = gpu(torch.zeros(64, dtype=torch.int64))
        kinds = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "u64": ctypes.c_uint64, "fp32": ctypes.c_float}
        kinds |= {"u1": ctypes.c_bool}
        calls = [(x, 3, 2**40, 2**63, 0.5, True), (x, 16, 2**40, 2**63, 0.5, True), (x, 2**40, 5, 2**63, 0.5, False)]
        calls += [(x[1:], 3, 2**40, 2**63, 0.5, True), (x, 3, 2**40 + 1, 2**63, 2, True), (x, -1, -(2**40), 7, 0.5, 0)]
        calls += [(x, True, 2**40, 2**63, 0.5, True), (x, None, 2**40, 2**63, 0.5, True)]
        for arguments in calls * 2:
            spec = own._specialise(arguments, {}, True)
            try:
                made = own.make_ready(spec, 0)
            except CompileError:
                continue  # None is no number to this body; only its class matters here
            used.append(made is not None)
            types = spec.argument_types
            fake.layout = tuple(ctypes.c_uint64 if kind.startswith("*") else kinds[kind] for kind in types)
            own[(1,)](*arguments)
            passed = [value for value in arguments if value is not None]
            values = tuple(v.data_ptr() if isinstance(v, torch.Tensor) else v for v in passed)
            assert fake.launched[-1][2:] == values, (fake.launched[-1], values)
            assert fake.functions[-1] is own._loaded[0, spec.key]._function, "the binary of another class"
        assert used == [True] * 7 + [False] * 7 and own.monitor.count == 7


def constant_body(out, FLAG: tl.constexpr, OTHER: tl.constexpr = 0):
    tl.store(out, FLAG)


def case_constant_keys() -> None:
    """Constants that are equal but of another type have another binary; how a call is spelled makes no difference."""
    with fake_gpu() as fake:
        own = Kernel(constant_body, CompileMonitor())
        x = gpu(torch.zeros(64))
        for _ in range(2):
            for number, flag in enumerate((1, True, 1.0, 0, False), 1):
                spec = own._specialise((x,), {"FLAG": flag}, True)
                own[(1,)](x, flag)
                own[(1,)](x, FLAG=flag)
                own[(1,)](x, OTHER=0, FLAG=flag)
                own[(1,)](FLAG=flag, out=x)
                assert all(used is own._loaded[0, spec.key]._function for used in fake.functions[-4:])
                assert own.monitor.count == max(number, own.monitor.count) <= 5
        for warps in (2, 8):
            own[(1,)](x, 1, num_warps=warps)
        assert own.monitor.count == len(set(map(id, fake.functions))) == 7


def case_threads() -> None:
    """Threads that launch one kernel at once compile it once, and each passes its own arguments."""
    with fake_gpu() as fake:
        own = Kernel(add_body, CompileMonitor())
        x = gpu(torch.zeros(64))
        start = threading.Barrier(4)

        def work(number: int) -> None:
            start.wait(60)
            for turn in range(200):
                own[(number,)](x, x, x, 1000 * number + turn | 1, 0.5, None, BLOCK=64, num_warps=1)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wanted_calls = {(number, 1000 * number + turn | 1) for number in range(1, 5) for turn in range(200)}
        assert len(fake.launched) == 800 and {(call[0][0], call[5]) for call in fake.launched} == wanted_calls
        assert own.monitor.count == fake.loads == 1


def case_driver_errors() -> None:
    """A thread new to CUDA gets its context at its first launch; a launch that is refused says why."""
    with fake_gpu() as fake:
        own = Kernel(add_body, CompileMonitor())
        x = gpu(torch.zeros(64))
        arguments = (x, x, x, 64)
        own[(1,)](*arguments, 0.5, None, BLOCK=64)
        fake.contexts.clear()
        fake.failures = [201]
        own[(1,)](*arguments, 0.5, None, BLOCK=64)
        assert fake.contexts == {threading.get_ident(): 1000} and len(fake.launched) == 2
        fake.failures = [700]
        try:
            own[(1,)](*arguments, 0.5, None, BLOCK=64)
        except DeviceError as error:
            assert "error 700" in str(error) and "add_body" in str(error)
        else:
            raise AssertionError("not refused")
        assert driver.load_function(b"\x7fELF tick", "tick", 0) == b"tick"
        failing_load()


def failing_load() -> None:
    try:
        driver.load_function(b"\x7fELF tick", "tock", 0)
    except DeviceError as error:
        assert "tock" in str(error) and "error 500" in str(error)
    else:
        raise AssertionError("not refused")


if __name__ == "__main__":
    for case in sys.argv[2:]:
        os.environ["JITGRAPH_CACHE"] = os.path.join(sys.argv[1], case)
        os.makedirs(os.environ["JITGRAPH_CACHE"], exist_ok=True)
        globals()["case_" + case]()
