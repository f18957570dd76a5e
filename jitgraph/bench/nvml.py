"""What NVIDIA's management library says of the GPUs: identity, power limit, clocks, ECC, MIG. Not for use while timing.

Calls the library of the installed driver (``libnvidia-ml.so.1``) by its C interface, so nothing has to be installed,
and makes no CUDA context. What a GPU or a driver does not tell is left out.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

_SM, _MEMORY = 1, 2  # nvmlClockType_t
_TEMPERATURE_GPU = 0
_TEXT_BYTES = 96
_SLOWED_BY = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
    0x100: "display clocks",
}
"""Bits of ``nvmlDeviceGetCurrentClocksThrottleReasons``."""
_ERRORS = {
    3: "not supported",
    4: "no permission",
    9: "the driver is not loaded",
    13: "the driver is too old for this call",
    15: "a GPU has fallen off the bus",
    18: "driver and library are of different versions",
}


class NvmlError(Exception):
    """The library is missing, or a call failed; the message says which."""


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def load_library() -> Any:
    """The driver's library.

    Raises:
        NvmlError: there is none, so that there is no NVIDIA driver.
    """
    try:
        return ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        raise NvmlError(f"no NVIDIA driver here ({error})") from error


def gpu_facts(load: Callable[[], Any] = load_library) -> dict[str, Any]:
    """``driver``, ``cuda_driver`` (the newest CUDA it serves) and ``gpus``, in the order of NVML, which
    ``CUDA_VISIBLE_DEVICES`` does not change.

    Raises:
        NvmlError: no driver, or it does not answer.
    """
    nvml = _Nvml(load())
    nvml.call("nvmlInit_v2")
    try:
        version = nvml.number("nvmlSystemGetCudaDriverVersion_v2", kind=ctypes.c_int)
        return {
            "driver": nvml.text("nvmlSystemGetDriverVersion"),
            "cuda_driver": None if version is None else f"{version // 1000}.{version % 1000 // 10}",
            "gpus": [nvml.gpu(index) for index in range(nvml.count())],
        }
    finally:
        nvml.call("nvmlShutdown")


class _Nvml:
    """Calls of the library; those of ``text`` and ``number`` give None where the answer is refused."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def call(self, name: str, *args: Any) -> None:
        try:
            function = getattr(self._library, name)
        except AttributeError as error:
            raise NvmlError(f"{name}: the driver is too old for this call") from error
        code = function(*args)
        if code != 0:
            raise NvmlError(f"{name}: {_ERRORS.get(code, f'error {code}')}")

    def text(self, name: str, *args: Any) -> str | None:
        buffer = ctypes.create_string_buffer(_TEXT_BYTES)
        try:
            self.call(name, *args, buffer, ctypes.c_uint(_TEXT_BYTES))
        except NvmlError:
            return None
        return buffer.value.decode("utf-8", "replace")

    def number(self, name: str, *args: Any, kind: Any = ctypes.c_uint) -> int | None:
        value = kind()
        try:
            self.call(name, *args, ctypes.byref(value))
        except NvmlError:
            return None
        return int(value.value)

    def mode(self, name: str, device: Any) -> str | None:
        """A switch that has a present state and one after the next reset."""
        now, pending = ctypes.c_uint(), ctypes.c_uint()
        try:
            self.call(name, device, ctypes.byref(now), ctypes.byref(pending))
        except NvmlError:
            return None
        words = ["on" if state.value else "off" for state in (now, pending)]
        return words[0] if words[0] == words[1] else f"{words[0]}, {words[1]} after the next reset"

    def count(self) -> int:
        found = ctypes.c_uint()
        self.call("nvmlDeviceGetCount_v2", ctypes.byref(found))
        return found.value

    def gpu(self, index: int) -> dict[str, Any]:
        """All that one GPU tells."""
        device = ctypes.c_void_p()
        try:
            self.call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(device))
        except NvmlError as error:
            return {"error": str(error)}
        memory, slowed = (
            _Memory(),
            self.number("nvmlDeviceGetCurrentClocksThrottleReasons", device, kind=ctypes.c_ulonglong),
        )
        try:
            self.call("nvmlDeviceGetMemoryInfo", device, ctypes.byref(memory))
        except NvmlError:
            memory = _Memory()
        persistence = self.number("nvmlDeviceGetPersistenceMode", device)
        limit = self.number("nvmlDeviceGetEnforcedPowerLimit", device)
        usual = self.number("nvmlDeviceGetPowerManagementDefaultLimit", device)
        found = {
            "name": self.text("nvmlDeviceGetName", device),
            "uuid": self.text("nvmlDeviceGetUUID", device),
            "memory_gib": round(memory.total / 2**30, 1) or None,
            "memory_used_gib": round(memory.used / 2**30, 1) if memory.total else None,
            "power_limit_w": None if limit is None else limit / 1000,
            "power_limit_default_w": None if usual is None else usual / 1000,
            "sm_clock_mhz": self.number("nvmlDeviceGetClockInfo", device, _SM),
            "sm_clock_max_mhz": self.number("nvmlDeviceGetMaxClockInfo", device, _SM),
            "memory_clock_mhz": self.number("nvmlDeviceGetClockInfo", device, _MEMORY),
            "memory_clock_max_mhz": self.number("nvmlDeviceGetMaxClockInfo", device, _MEMORY),
            "clocks_held_by": None if slowed is None else _reasons(slowed),
            "temperature_c": self.number("nvmlDeviceGetTemperature", device, _TEMPERATURE_GPU),
            "ecc": self.mode("nvmlDeviceGetEccMode", device),
            "mig": self.mode("nvmlDeviceGetMigMode", device),
            "persistence": None if persistence is None else ("on" if persistence else "off"),
        }
        return {name: value for name, value in found.items() if value is not None}


def _reasons(bits: int) -> str:
    """Why clocks are below their limit, in words."""
    return ", ".join(words for bit, words in _SLOWED_BY.items() if bits & bit) or "nothing"
