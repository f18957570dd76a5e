"""Loads a binary into the CUDA driver and launches it, through ``cuda.bindings``.

A loaded kernel belongs to one device of this process; any thread may launch it, on any stream of that device. Launches
are legal under stream capture; loading is not, so a kernel runs once before it is captured.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
import triton

from jitgraph.errors import DeviceError
from jitgraph.jit.binary import Binary

_STATIC_SHARED_LIMIT = 48 * 1024  # above this a kernel must ask the driver for dynamic shared memory
_HIDDEN_POINTERS = 4
"""Null pointers after the arguments. Triton adds one for global scratch and one for profiling; the driver reads only as
many as the kernel declares, so spare ones do no harm and leave room for other versions of Triton."""

_FORMATS = {"i32": "i", "i64": "q", "u64": "Q", "u1": "?", "fp32": "f"}


@lru_cache(maxsize=1)
def bindings() -> ModuleType | None:
    """``cuda.bindings.driver``, or None where it is not installed."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return None
    return driver  # type: ignore[no-any-return]


@lru_cache(maxsize=1)
def raw_stream() -> Callable[[int], int]:
    """Device index to the handle of torch's current stream there.

    The function that Triton itself launches with costs a tenth of the public one, which stands in where it is missing.
    """
    fast: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return fast or (lambda device: int(torch.cuda.current_stream(device).cuda_stream))


@lru_cache(maxsize=1)
def device_index() -> Callable[[], int]:
    """A function that returns the index of torch's current CUDA device.

    Where torch has one, it is the function below the public one, at half the price. That one also initialises CUDA,
    which has happened wherever there is a CUDA tensor to launch a kernel with.
    """
    fast: Callable[[], int] | None = getattr(torch._C, "_cuda_getDevice", None)
    return fast or torch.cuda.current_device


@lru_cache(maxsize=1)
def require_stock_launcher() -> None:
    """Makes Triton's own launcher ready, where ``cuda.bindings`` is missing; it builds C with the machine's compiler.

    Raises:
        DeviceError: that failed, so that there is no way to launch a kernel.
    """
    try:
        triton.runtime.driver.active.utils  # noqa: B018 - built at the first access
    except Exception as error:  # a missing compiler, header or library each has its own type
        raise DeviceError(
            "kernels cannot be launched: install cuda-bindings (pip install cuda-bindings), or a C compiler and "
            f"Python headers for Triton's own launcher ({error})"
        ) from error


class ParameterBlock:
    """The arguments of one kernel as the driver wants them: an array of addresses into one packed buffer."""

    def __init__(self, types: Sequence[str]) -> None:
        formats = ["Q" if kind.startswith("*") else _FORMATS[kind] for kind in types]
        packer = struct.Struct("@" + "".join(formats))
        self.pack_into = packer.pack_into
        hidden = (packer.size + 7) // 8 * 8
        self.buffer = ctypes.create_string_buffer(hidden + 8)
        base = ctypes.addressof(self.buffer)
        offsets = [struct.calcsize("@" + "".join(formats[: i + 1])) - struct.calcsize(f) for i, f in enumerate(formats)]
        offsets += [hidden] * _HIDDEN_POINTERS
        self.addresses = (ctypes.c_void_p * len(offsets))(*(base + offset for offset in offsets))
        self.pointer = ctypes.addressof(self.addresses)


def load_function(cubin: bytes, symbol: str, device: int) -> Any:
    """A kernel of a cubin as a ``CUfunction``, in the primary context of ``device``; it stays loaded.

    The device must be this thread's, or the thread must not have used CUDA yet.

    Raises:
        DeviceError: ``cuda.bindings`` is missing, or the driver refuses.
    """
    driver = bindings()
    if driver is None:
        raise DeviceError(f"kernel {symbol} cannot be loaded: install cuda-bindings (pip install cuda-bindings)")
    _bind_context(driver, device, symbol)
    module = _check(driver, driver.cuModuleLoadData(cubin), symbol)
    return _check(driver, driver.cuModuleGetFunction(module, symbol.encode()), symbol)


def graph_launcher(executable: int, stream: int, device: int) -> Callable[[], None] | None:
    """A function that launches an instantiated graph (a ``CUgraphExec`` handle) on a stream, and nothing else: half the
    price of torch's way to a stream that is not current. None without ``cuda.bindings``."""
    driver = bindings()
    if driver is None:
        return None
    _bind_context(driver, device, "graph")
    graph, queue = driver.CUgraphExec(executable), driver.CUstream(stream)
    call, no_context = driver.cuGraphLaunch, driver.CUresult.CUDA_ERROR_INVALID_CONTEXT

    def launch() -> None:
        result = call(graph, queue)
        if result[0] == no_context:  # a thread that has not used CUDA yet
            _bind_context(driver, device, "graph")
            result = call(graph, queue)
        if result[0] != 0:
            _check(driver, result, "graph")

    return launch


def upload_graph(executable: int, stream: int, device: int) -> None:
    """Brings an instantiated graph to the device, so that its first launch need not. ``stream`` should be idle: an
    upload behind running work holds the driver up until that is done.

    Raises:
        DeviceError: the driver refuses.
    """
    driver = bindings()
    if driver is not None:
        _bind_context(driver, device, "graph")
        result = driver.cuGraphUpload(driver.CUgraphExec(executable), driver.CUstream(stream))
        _check(driver, result, "graph")


class LoadedKernel:
    """A binary on one device, ready to launch."""

    def __init__(self, binary: Binary, device: int) -> None:
        """Loads ``binary`` into the primary context of ``device``.

        Raises:
            DeviceError: the device lacks the shared memory, the kernel needs scratch memory, or the driver refuses.
        """
        if binary.scratch_bytes:
            raise DeviceError(
                f"kernel {binary.kernel} needs global scratch memory; use no on-device tensor descriptors"
            )
        self.binary = binary
        self._device = device
        self._lock = threading.Lock()  # the driver copies the arguments, but only once the GIL is gone
        self._block = ParameterBlock(binary.argument_types)
        self._function = load_function(binary.cubin, binary.symbol, device)
        driver = bindings()
        assert driver is not None, "the function could not have been loaded without it"
        self._driver = driver
        self._allow_shared_memory()
        self._config = self._launch_config()
        self._grid: tuple[int, ...] = ()
        self._empty = True
        self._stream = 0
        self._launch = driver.cuLaunchKernelEx

    def launch(self, grid: tuple[int, ...], stream: int, values: Sequence[int | float]) -> None:
        """Enqueues a grid of one to three sizes on ``stream``, unless it is empty; ``values`` are the arguments that
        are not constants.

        Raises:
            DeviceError: the driver refuses the launch.
        """
        config = self._config
        block = self._block
        with self._lock:
            if grid != self._grid:  # mostly it is the grid of the last launch, and setting it costs more than looking
                self._take_grid(grid)
            if self._empty:
                return
            block.pack_into(block.buffer, 0, *values)
            if stream != self._stream:
                config.hStream = stream
                self._stream = stream
            result = self._launch(config, self._function, block.pointer, 0)
            if result[0]:
                if result[0] == self._driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:  # a thread new to CUDA
                    _bind_context(self._driver, self._device, self.binary.kernel)
                    result = self._launch(config, self._function, block.pointer, 0)
                self._check(result)

    def _take_grid(self, grid: tuple[int, ...]) -> None:
        x, y, z = (*grid, 1, 1)[:3]
        self._grid = ()
        self._empty = x * y * z <= 0
        if not self._empty:
            self._config.gridDimX, self._config.gridDimY, self._config.gridDimZ = x * self.binary.num_ctas, y, z
        self._grid = grid

    def _allow_shared_memory(self) -> None:
        needed = self.binary.shared_bytes
        if needed <= _STATIC_SHARED_LIMIT:
            return
        driver = self._driver
        most = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        limit = self._check(driver.cuDeviceGetAttribute(most, self._check(driver.cuDeviceGet(self._device))))
        if needed > limit:
            raise DeviceError(
                f"kernel {self.binary.kernel} needs {needed} bytes of shared memory and this device has {limit}; "
                "use smaller blocks or fewer stages"
            )
        self._check(driver.cuFuncSetCacheConfig(self._function, driver.CUfunc_cache.CU_FUNC_CACHE_PREFER_SHARED))
        dynamic = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._check(driver.cuFuncSetAttribute(self._function, dynamic, needed))

    def _launch_config(self) -> Any:
        binary = self.binary
        config = self._driver.CUlaunchConfig()
        config.blockDimX, config.blockDimY, config.blockDimZ = binary.threads, 1, 1
        config.sharedMemBytes = binary.shared_bytes
        config.hStream = 0
        attributes = self._attributes()
        if attributes:
            config.attrs = attributes
        config.numAttrs = len(attributes)
        return config

    def _attributes(self) -> list[Any]:
        """Launch attributes: programmatic dependent launch, cooperative grid, cluster size."""
        ids = self._driver.CUlaunchAttributeID
        attributes = []

        def attribute(identity: Any) -> Any:
            entry = self._driver.CUlaunchAttribute()
            entry.id = identity
            attributes.append(entry)
            return entry.value

        if self.binary.launch_pdl:
            value = attribute(ids.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
            value.programmaticStreamSerializationAllowed = 1
        if self.binary.cooperative:
            attribute(ids.CU_LAUNCH_ATTRIBUTE_COOPERATIVE).cooperative = 1
        if self.binary.num_ctas != 1:
            cluster = attribute(ids.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION).clusterDim
            cluster.x, cluster.y, cluster.z = self.binary.num_ctas, 1, 1
        return attributes

    def _check(self, result: tuple[Any, ...]) -> Any:
        return _check(self._driver, result, self.binary.kernel)


def _bind_context(driver: ModuleType, device: int, kernel: str) -> None:
    """Makes the device's primary context current on this thread, unless it has a context."""
    if int(_check(driver, driver.cuCtxGetCurrent(), kernel)) == 0:
        handle = _check(driver, driver.cuDeviceGet(device), kernel)
        _check(driver, driver.cuCtxSetCurrent(_check(driver, driver.cuDevicePrimaryCtxRetain(handle), kernel)), kernel)


def _check(driver: ModuleType, result: tuple[Any, ...], kernel: str) -> Any:
    """The value of a driver call, or its error in words."""
    if result[0] != 0:
        name = driver.cuGetErrorString(result[0])[1] or str(result[0]).encode()
        raise DeviceError(f"CUDA refused kernel {kernel}: {name.decode()}")
    return result[1] if len(result) > 1 else None
