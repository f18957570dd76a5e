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
from jitgraph.jit.compiler import Binary

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


class LoadedKernel:
    """A binary on one device, ready to launch."""

    def __init__(self, binary: Binary, device: int) -> None:
        """Loads ``binary`` into the primary context of ``device``.

        Raises:
            DeviceError: the device lacks the shared memory, the kernel needs scratch memory, or the driver refuses.
        """
        driver = bindings()
        assert driver is not None, "the caller chooses the stock launcher where cuda.bindings is missing"
        if binary.scratch_bytes:
            raise DeviceError(
                f"kernel {binary.kernel} needs global scratch memory; use no on-device tensor descriptors"
            )
        self.binary = binary
        self._driver = driver
        self._device = device
        self._lock = threading.Lock()  # the driver copies the arguments, but only once the GIL is gone
        self._block = ParameterBlock(binary.argument_types)
        self._bind_context()
        self._module = self._check(driver.cuModuleLoadData(binary.cubin))
        self._function = self._check(driver.cuModuleGetFunction(self._module, binary.symbol.encode()))
        self._allow_shared_memory()
        self._config = self._launch_config()
        self._stream = 0
        self._launch = driver.cuLaunchKernelEx

    def launch(self, x: int, y: int, z: int, stream: int, values: Sequence[int | float]) -> None:
        """Enqueues ``x * y * z`` blocks on ``stream``, if any; ``values`` are the arguments that are not constants.

        Raises:
            DeviceError: the driver refuses the launch.
        """
        if x * y * z <= 0:
            return
        config = self._config
        block = self._block
        with self._lock:
            block.pack_into(block.buffer, 0, *values)
            config.gridDimX = x * self.binary.num_ctas
            config.gridDimY = y
            config.gridDimZ = z
            if stream != self._stream:
                config.hStream = stream
                self._stream = stream
            result = self._launch(config, self._function, block.pointer, 0)
            if result[0] == self._driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:  # a thread that has not used CUDA yet
                self._bind_context()
                result = self._launch(config, self._function, block.pointer, 0)
        if result[0] != 0:
            self._check(result)

    def _bind_context(self) -> None:
        """Makes the device's primary context current on this thread, unless it has a context."""
        driver = self._driver
        if int(self._check(driver.cuCtxGetCurrent())) == 0:
            context = self._check(driver.cuDevicePrimaryCtxRetain(self._check(driver.cuDeviceGet(self._device))))
            self._check(driver.cuCtxSetCurrent(context))

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
        """The value of a driver call, or its error in words."""
        if result[0] != 0:
            name = self._driver.cuGetErrorString(result[0])[1] or str(result[0]).encode()
            raise DeviceError(f"CUDA refused kernel {self.binary.kernel}: {name.decode()}")
        return result[1] if len(result) > 1 else None
