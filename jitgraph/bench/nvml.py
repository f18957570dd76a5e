"""What NVIDIA's management library says of the GPUs: identity, power limit, clocks, ECC, MIG; and, asked along
a run, clocks, power and heat.

Calls the library of the installed driver (``libnvidia-ml.so.1``) by its C interface, so nothing has to be installed,
and makes no CUDA context. What a GPU or a driver does not tell is left out.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
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
_INSUFFICIENT_SIZE = 7
_ERRORS = {
    3: "not supported",
    4: "no permission",
    6: "no such GPU",
    9: "the driver is not loaded",
    13: "the driver is too old for this call",
    15: "a GPU has fallen off the bus",
    18: "driver and library are of different versions",
}


@dataclass(frozen=True)
class Reading:
    """One look at a GPU; None where it does not tell."""

    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    power_w: float | None
    temperature_c: int | None
    held_by: str | None
    """Why clocks are below their limit, in words."""
    memory_used_gib: float | None

    def to_json(self) -> dict[str, Any]:
        """What is known."""
        return {name: value for name, value in vars(self).items() if value is not None}


class Gpu:
    """One GPU, asked again and again. The library stays initialised until ``close``; each call takes microseconds."""

    def __init__(self, uuid: str, load: Callable[[], Any] | None = None) -> None:
        """``uuid``: as the driver names it (``GPU-...``), whatever ``CUDA_VISIBLE_DEVICES`` says.

        Raises:
            NvmlError: no driver, or no such GPU.
        """
        self._nvml = _Nvml((load or load_library)())
        self._nvml.call("nvmlInit_v2")
        self._device = ctypes.c_void_p()
        name = ctypes.c_char_p(uuid.encode())
        self._nvml.call("nvmlDeviceGetHandleByUUID", name, ctypes.byref(self._device))

    def read(self) -> Reading:
        """Clocks, power, temperature, what holds the clocks back, and memory in use."""
        nvml, device = self._nvml, self._device
        power = nvml.number("nvmlDeviceGetPowerUsage", device)
        slowed = nvml.number("nvmlDeviceGetCurrentClocksThrottleReasons", device, kind=ctypes.c_ulonglong)
        used = nvml.memory(device).used
        return Reading(
            sm_clock_mhz=nvml.number("nvmlDeviceGetClockInfo", device, _SM),
            memory_clock_mhz=nvml.number("nvmlDeviceGetClockInfo", device, _MEMORY),
            power_w=None if power is None else power / 1000,
            temperature_c=nvml.number("nvmlDeviceGetTemperature", device, _TEMPERATURE_GPU),
            held_by=None if slowed is None else _reasons(slowed),
            memory_used_gib=round(used / 2**30, 2) if used else None,
        )

    def energy_j(self) -> float | None:
        """Joules since the driver was loaded."""
        found = self._nvml.number("nvmlDeviceGetTotalEnergyConsumption", self._device, kind=ctypes.c_ulonglong)
        return None if found is None else found / 1000

    def processes(self) -> int | None:
        """How many processes compute on it; those of other containers count too. None where it does not tell."""
        count = ctypes.c_uint(0)
        try:  # a buffer of no room: the answer is how many there are, and "insufficient size" where there are any
            self._nvml.call("nvmlDeviceGetComputeRunningProcesses_v3", self._device, ctypes.byref(count), None)
        except NvmlError as error:
            if error.code != _INSUFFICIENT_SIZE:
                return None
        return count.value

    def close(self) -> None:
        """Lets go of the library."""
        with suppress(NvmlError):
            self._nvml.call("nvmlShutdown")


class NvmlError(Exception):
    """The library is missing, or a call failed; the message says which, ``code`` how (0: not by a call)."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


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
            raise NvmlError(f"{name}: {_ERRORS.get(code, f'error {code}')}", code)

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

    def memory(self, device: Any) -> _Memory:
        """Zeros where it does not tell."""
        found = _Memory()
        try:
            self.call("nvmlDeviceGetMemoryInfo", device, ctypes.byref(found))
        except NvmlError:
            return _Memory()
        return found

    def gpu(self, index: int) -> dict[str, Any]:
        """All that one GPU tells."""
        device = ctypes.c_void_p()
        try:
            self.call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(device))
        except NvmlError as error:
            return {"error": str(error)}
        memory = self.memory(device)
        slowed = self.number("nvmlDeviceGetCurrentClocksThrottleReasons", device, kind=ctypes.c_ulonglong)
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
