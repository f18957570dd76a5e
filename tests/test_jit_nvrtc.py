"""CUDA C through NVRTC: the disk cache with a compiler of our own, errors with an interface of our own, and the real
thing on a GPU."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jitgraph.errors import CompileError, DeviceError
from jitgraph.jit import driver, nvrtc
from jitgraph.jit.disk_cache import DiskCache
from jitgraph.jit.monitor import CompileMonitor
from jitgraph.jit.nvrtc import Nvrtc, compile_source
from jitgraph.jit.strict import forbid_compiles

SOURCE = 'extern "C" __global__ void answer(int* out) { *out = 42; }'


class FakeCompiler:
    """Counts; the cubin says what it was made of."""

    def __init__(self, version: str = "13.0") -> None:
        self.version = version
        self.calls = 0

    def compile(self, source: str, name: str, options: tuple[str, ...]) -> bytes:
        self.calls += 1
        if "broken" in source:
            raise CompileError("broken does not compile")
        return b"\x7fELF" + repr((self.version, source, name, options)).encode()


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path)


def test_a_source_is_compiled_once(cache: DiskCache) -> None:
    compiler, monitor = FakeCompiler(), CompileMonitor()
    first = compile_source(SOURCE, "answer", 90, compiler, cache, monitor)
    assert b"--gpu-architecture=sm_90" in first and b"-default-device" in first and b"answer" in first
    assert compile_source(SOURCE, "answer", 90, compiler, cache, monitor) == first
    assert compiler.calls == 1
    assert [(entry.kernel, entry.arch, entry.cached) for entry in monitor.since()] == [
        ("answer", 90, False),
        ("answer", 90, True),
    ]


def test_whatever_decides_about_the_result_is_in_the_key(cache: DiskCache) -> None:
    calls = [
        (SOURCE, "answer", 90, "13.0"),
        (SOURCE + " ", "answer", 90, "13.0"),
        (SOURCE, "other", 90, "13.0"),
        (SOURCE, "answer", 80, "13.0"),
        (SOURCE, "answer", 90, "12.9"),
    ]
    for _ in range(2):
        results = [
            compile_source(source, name, arch, FakeCompiler(version), cache, CompileMonitor())
            for source, name, arch, version in calls
        ]
        assert len(set(results)) == len(calls)
    assert len(list(cache.folder.iterdir())) == len(calls)


@pytest.mark.parametrize("damage", ["cut", "foreign", "no cubin"])
def test_a_damaged_entry_is_compiled_again(cache: DiskCache, damage: str) -> None:
    compiler = FakeCompiler()
    good = compile_source(SOURCE, "answer", 90, compiler, cache)
    (entry,) = cache.folder.iterdir()
    if damage == "no cubin":
        cache.put(bytes.fromhex(entry.name.split(".")[0]), b"text")
    else:
        entry.write_bytes(entry.read_bytes()[:-1] if damage == "cut" else b"something else")
    assert compile_source(SOURCE, "answer", 90, compiler, cache) == good and compiler.calls == 2
    assert compile_source(SOURCE, "answer", 90, compiler, cache) == good and compiler.calls == 2


def test_failures_are_not_kept(cache: DiskCache) -> None:
    compiler, monitor = FakeCompiler(), CompileMonitor()
    for _ in range(2):
        with pytest.raises(CompileError, match="broken"):
            compile_source("broken", "broken", 90, compiler, cache, monitor)
    assert compiler.calls == 2 and monitor.count == 0 and not list(cache.folder.iterdir())


def test_an_unwritable_cache_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    compiler, cache = FakeCompiler(), DiskCache(tmp_path / "file" / "kernels")
    assert compile_source(SOURCE, "answer", 90, compiler, cache) == compile_source(
        SOURCE, "answer", 90, compiler, cache
    )
    assert compiler.calls == 2


def test_strictness_holds_here_too(cache: DiskCache) -> None:
    with forbid_compiles("after ready"), pytest.raises(CompileError, match="answer"):
        compile_source(SOURCE, "answer", 90, FakeCompiler(), cache)


# ------------------------------------------------------------------------------------------------------- the interface


class FakeApi:
    """``cuda.bindings.nvrtc`` with one program at a time; ``failing`` names the call that fails."""

    def __init__(self, log: bytes = b"", failing: str = "") -> None:
        self.log = log
        self.failing = failing
        self.programs = 0
        self.seen: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvrtc"):
            raise AttributeError(name)
        if name == self.failing:
            return lambda *args: (6, None)
        return getattr(self, f"_{name.removeprefix('nvrtc')}")

    def _Version(self) -> tuple[int, int, int]:
        return 0, 13, 1

    def _GetErrorString(self, error: int) -> tuple[int, bytes]:
        return 0, b"NVRTC_ERROR_%d" % error

    def _CreateProgram(self, source: bytes, name: bytes, count: int, headers: list[bytes], names: list[bytes]) -> Any:
        assert isinstance(source, bytes) and count == len(headers) == len(names) == 0
        self.seen |= {"source": source, "name": name}
        self.programs += 1
        return 0, "program"

    def _CompileProgram(self, program: str, count: int, options: list[bytes]) -> tuple[int]:
        assert program == "program" and count == len(options)
        self.seen["options"] = options
        return (6,) if self.log else (0,)

    def _GetCUBINSize(self, program: str) -> tuple[int, int]:
        return 0, 6

    def _GetCUBIN(self, program: str, into: bytes) -> tuple[int]:
        return self._fill(into, b"\x7fELF!!")

    def _GetProgramLogSize(self, program: str) -> tuple[int, int]:
        return 0, len(self.log)

    def _GetProgramLog(self, program: str, into: bytes) -> tuple[int]:
        return self._fill(into, self.log)

    def _DestroyProgram(self, program: str) -> tuple[int]:
        self.programs -= 1
        return (0,)

    @staticmethod
    def _fill(into: bytes, content: bytes) -> tuple[int]:
        """Writes into a bytes object, as the driver does."""
        import ctypes

        assert len(into) == len(content)
        header = sys.getsizeof(b"") - 1
        ctypes.memmove(id(into) + header, content, len(content))
        return (0,)


def test_the_interface_is_called_as_it_wants_to_be() -> None:
    api = FakeApi()
    compiler = Nvrtc(api)
    assert compiler.version == "13.1"
    assert compiler.compile("void f() {}", "f", ("--gpu-architecture=sm_80", "-default-device")) == b"\x7fELF!!"
    assert api.seen == {
        "source": b"void f() {}",
        "name": b"f.cu",
        "options": [b"--gpu-architecture=sm_80", b"-default-device"],
    }
    assert api.programs == 0, "the program is destroyed"


def test_an_error_shows_the_first_lines_of_the_log() -> None:
    lines = [f"f.cu({number}): error: line {number}" for number in range(40)]
    api = FakeApi(log="\n\n".join(lines).encode() + b"\0")
    with pytest.raises(CompileError) as caught:
        Nvrtc(api).compile("source", "f", ("--gpu-architecture=sm_80",))
    text = str(caught.value)
    assert text.startswith("f does not compile") and "sm_80" in text and "NVRTC 13.1" in text
    assert "line 0" in text and "line 5" in text and "line 9" not in text and "\n" not in text and "\0" not in text
    assert api.programs == 0


@pytest.mark.parametrize("log", [b"\0"])
def test_an_error_without_a_log_is_an_error(log: bytes) -> None:
    with pytest.raises(CompileError, match="says nothing"):
        Nvrtc(FakeApi(log=log)).compile("source", "f", ("--gpu-architecture=sm_80",))
    assert bytes(1) == b"\0", "bytes that Python shares must not have been written to"


@pytest.mark.parametrize("call", ["nvrtcVersion", "nvrtcCreateProgram", "nvrtcGetCUBINSize", "nvrtcGetCUBIN"])
def test_a_call_that_fails_names_its_error(call: str) -> None:
    api = FakeApi(failing=call)
    with pytest.raises(CompileError, match="NVRTC_ERROR_6"):
        Nvrtc(api).compile("source", "f", ("--gpu-architecture=sm_80",))
    assert api.programs == 0


def test_a_missing_library_names_the_remedy() -> None:
    def missing() -> None:
        raise RuntimeError('Failure finding "libnvrtc.so"\nsearched: everywhere')

    with pytest.raises(CompileError, match=r"pip install cuda-bindings nvidia-cuda-nvrtc.*libnvrtc") as caught:
        Nvrtc(SimpleNamespace(nvrtcVersion=missing))  # type: ignore[arg-type]
    assert "everywhere" not in str(caught.value)


def test_missing_bindings_name_the_remedy(monkeypatch: pytest.MonkeyPatch, cache: DiskCache) -> None:
    real = builtins.__import__

    def without_bindings(name: str, *rest: Any) -> Any:
        if name.startswith("cuda"):
            raise ImportError("No module named 'cuda'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_bindings)
    nvrtc.nvrtc_compiler.cache_clear()
    with pytest.raises(CompileError, match="pip install cuda-bindings"):
        compile_source(SOURCE, "answer", 90, cache=cache)
    monkeypatch.setattr(driver, "bindings", lambda: None)
    with pytest.raises(DeviceError, match="pip install cuda-bindings"):
        driver.load_function(b"\x7fELF", "answer", 0)


@pytest.mark.gpu
def test_nvrtc_compiles_and_the_driver_runs_it(cache: DiskCache) -> None:
    import ctypes

    from cuda.bindings import driver as cuda

    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    major, minor = torch.cuda.get_device_capability(0)
    arch = major * 10 + minor
    cubin = compile_source(SOURCE, "answer", arch, cache=cache)
    assert cubin.startswith(b"\x7fELF") and b"answer" in cubin
    assert compile_source(SOURCE, "answer", arch, cache=cache) == cubin
    function = driver.load_function(cubin, "answer", 0)
    stream = torch.cuda.current_stream().cuda_stream
    arguments = ((out.data_ptr(),), (ctypes.c_void_p,))
    (result,) = cuda.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, stream, arguments, 0)
    assert result == 0
    assert out.item() == 42
    with pytest.raises(DeviceError, match="CUDA refused kernel nowhere"):
        driver.load_function(cubin, "nowhere", 0)
    with pytest.raises(CompileError, match=r"bad\.cu\(1\)"):
        compile_source("int x = ;", "bad", arch, cache=cache)
