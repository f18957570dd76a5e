"""The JIT floor: specialisation as Triton does it, compiling without a GPU, and launches against Triton's own."""

from __future__ import annotations

import ctypes
import inspect
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from jitgraph.errors import DeviceError
from jitgraph.jit import driver
from jitgraph.jit.compile_only import compile_only
from jitgraph.jit.driver import ParameterBlock
from jitgraph.jit.monitor import CompileMonitor, CompileRecord
from jitgraph.jit.specialise import Parameters, integer_token, scan, specialise


def body(a, b, c, FLAG: tl.constexpr, SIZE: tl.constexpr = 32):
    pass


def _tensor(dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
    return torch.zeros(64, dtype=dtype)[offset:]


_INTEGERS = [0, 1, 2, 15, 16, 17, -1, -16, 2**31 - 1, 2**31 - 16, 2**31, 2**31 + 1, -(2**31), -(2**31) - 1]
_INTEGERS += [2**40, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1, -(2**63)]
_DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
]
_DTYPES += [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]
_VALUES = [*_INTEGERS, True, False, 0.0, 1.0, -2.5, None]
_ARGUMENTS = [pytest.param(value, id=repr(value)) for value in _VALUES]
_ARGUMENTS += [pytest.param(_tensor(dtype), id=f"{dtype}") for dtype in _DTYPES]
_ARGUMENTS += [pytest.param(_tensor(dtype, 1), id=f"{dtype}-unaligned") for dtype in _DTYPES]


def _ours(*args, **kwargs):
    params = Parameters.of(body)
    args, kwargs = params.positional(args, kwargs)
    tokens: list = []
    values: list = []
    scan(args, params.constexpr, False, tokens, values)
    return specialise(params, tokens, kwargs), values


@pytest.mark.parametrize("argument", _ARGUMENTS)
def test_specialisation_is_tritons_own(argument) -> None:
    backend = make_backend(GPUTarget("cuda", 90, 32))
    stock = JITFunction(body)
    binder = create_function_from_signature(inspect.signature(body), stock.params, backend)
    call = ((argument, 7, argument), {"FLAG": True, "num_warps": 8})
    bound, specialization, options = binder(*call[0], **call[1])
    _, signature, constants, attributes = stock._pack_args(backend, call[1], bound, specialization, options)

    spec, values = _ours(*call[0], **call[1])
    assert dict(spec.types) == signature
    assert {(index,): value for index, value in spec.constants} == constants
    wanted = {path: attribute for path, attribute in attributes.items() if attribute}
    assert {(index,): backend.parse_attr("D") for index in spec.divisible} == wanted
    assert dict(spec.options) == {"num_warps": 8}
    assert len(values) == len(spec.argument_types)


def test_equal_constants_of_unequal_type_are_apart() -> None:
    keys = {_ours(2, 2, 2, FLAG=flag)[0].key for flag in (1, True, 1.0)}
    assert len(keys) == 3
    assert _ours(2, 2, 2, FLAG=0)[0].key == _ours(2, c=2, b=2, FLAG=0, SIZE=32)[0].key


def test_integers_outside_64_bits_are_refused() -> None:
    for value in (2**64, -(2**63) - 1):
        with pytest.raises(OverflowError, match="64 bits"):
            integer_token(value)


def test_parameters_refuse_what_a_launch_cannot_pass() -> None:
    def starred(*args):
        pass

    def annotated(x: int):
        pass

    with pytest.raises(TypeError, match="by name"):
        Parameters.of(starred)
    with pytest.raises(TypeError, match="annotate x"):
        Parameters.of(annotated)


def test_parameter_block_points_at_each_value() -> None:
    block = ParameterBlock(("*fp16", "u1", "i32", "fp32", "u1", "i64", "u64"))
    values = (2**47 + 16, True, -5, 0.5, False, -(2**40), 2**64 - 1)
    block.pack_into(block.buffer, 0, *values)
    kinds = (
        ctypes.c_uint64,
        ctypes.c_bool,
        ctypes.c_int32,
        ctypes.c_float,
        ctypes.c_bool,
        ctypes.c_int64,
        ctypes.c_uint64,
    )
    assert tuple(kind.from_address(block.addresses[i]).value for i, kind in enumerate(kinds)) == values
    hidden = [ctypes.c_uint64.from_address(address).value for address in block.addresses[len(kinds) :]]
    assert len(hidden) >= 2 and not any(hidden)
    assert all(block.addresses[i] % ctypes.sizeof(kind) == 0 for i, kind in enumerate(kinds))


def test_monitor_reports_what_came_after_a_mark() -> None:
    monitor = CompileMonitor()
    monitor.record(CompileRecord("a", 90, "", 2.0))
    mark = monitor.count
    assert monitor.totals(mark).count == 0
    monitor.record(CompileRecord("b", 90, "", 3.0))
    assert [entry.kernel for entry in monitor.since(mark)] == ["b"]
    assert monitor.totals().count == 2 and monitor.totals().ms == 5.0
    monitor.record(CompileRecord("c", 90, "", 1.0, cached=True))
    assert monitor.totals().count == 3 and monitor.totals().cached == 1


def test_compile_only_refuses_old_architectures() -> None:
    with pytest.raises(DeviceError, match="80 or newer"), compile_only(75):
        pass


def test_no_way_to_launch_names_the_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        @property
        def runtime(self) -> None:
            raise RuntimeError("no C compiler")

    monkeypatch.setattr(driver, "triton", Broken())
    driver.require_stock_launcher.cache_clear()
    with pytest.raises(DeviceError, match=r"install cuda-bindings .*\(no C compiler\)"):
        driver.require_stock_launcher()


@pytest.mark.parametrize("case", ["targets", "counts", "spills", "refusals"])
def test_compiles_without_a_gpu(case: str, tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "JITGRAPH_CACHE": str(tmp_path)}
    environment.pop("TRITON_CACHE_DIR", None)
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent.parent), environment.get("PYTHONPATH", "")])
    script = Path(__file__).with_name("jit_cases.py")
    done = subprocess.run([sys.executable, str(script), case], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    if case != "refusals":
        assert any((tmp_path / "kernels").iterdir()), "compiled kernels must lie under JITGRAPH_CACHE"


def _operands(n: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(7)
    return tuple(torch.randn(n, device="cuda", generator=generator) for _ in range(3))


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 16, 1000, 4096])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("offset", [0, 1])
def test_launch_matches_the_stock_launcher(n: int, with_bias: bool, offset: int) -> None:
    import jit_cases

    x, y, bias = (t[offset:] for t in _operands(n + offset))
    results = []
    for launcher in (jit_cases.add, jit_cases.add_stock):
        out = torch.full((n + 1,), -1.0, device="cuda")
        launcher[(triton_cdiv(n, 256),)](x, y, out, n, 0.3, bias if with_bias else None, BLOCK=256)
        results.append(out)
    expected = x + y * 0.3 + (bias if with_bias else 0)
    assert torch.equal(*results) and results[0][n] == -1.0
    torch.testing.assert_close(results[0][:n], expected)


def triton_cdiv(a: int, b: int) -> int:
    return -(-a // b)


@pytest.mark.gpu
def test_large_shared_memory_matches_the_stock_launcher() -> None:
    import jit_cases

    a, b = (torch.randn(128, 256, device="cuda", dtype=torch.float16) for _ in range(2))
    results = []
    for launcher in (jit_cases.dot, jit_cases.dot_stock):
        out = torch.empty(128, 128, device="cuda")
        launcher[(1,)](a, b, out, 256, BLOCK=128, BLOCK_K=64, num_warps=8, num_stages=3)
        results.append(out)
    assert max(k.binary.shared_bytes for k in jit_cases.dot._loaded.values()) > 48 * 1024
    assert torch.equal(*results)
    torch.testing.assert_close(results[0], a.float() @ b.view(256, 128).float(), rtol=1e-2, atol=1e-1)


@pytest.mark.gpu
def test_every_argument_type_arrives() -> None:
    import jit_cases

    out = torch.zeros(5, dtype=torch.int64, device="cuda")
    for values in ((-7, 2**40 + 3, 2**63 + 5, 2.5, True), (64, -(2**45), 2**64 - 16, -1.25, False)):
        jit_cases.types[(1,)](out, *values)
        wanted = [values[0], values[1], values[2] - 2**64, int(values[3] * 4), int(values[4])]
        assert out.tolist() == wanted


@pytest.mark.gpu
def test_pinned_memory_and_graph_capture() -> None:
    import jit_cases

    value = torch.arange(64, device="cuda", dtype=torch.int32)
    ring = torch.zeros(64, dtype=torch.int32, pin_memory=True)
    jit_cases.write[(1,)](ring, value, BLOCK=64)
    torch.cuda.synchronize()
    assert ring.tolist() == list(range(64))

    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    ring.zero_()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="relaxed")
        jit_cases.write[(1,)](ring, value, BLOCK=64)
        graph.capture_end()
    torch.cuda.synchronize()
    assert not ring.any(), "a capture must not run"
    value += 100
    graph.replay()
    torch.cuda.synchronize()
    assert ring.tolist() == list(range(100, 164))


@pytest.mark.gpu
def test_compilations_are_counted_once() -> None:
    import jit_cases

    from jitgraph.jit.kernel import Kernel

    monitor = CompileMonitor()
    own = Kernel(jit_cases.add_body, monitor)
    x, y, out = _operands(64)
    for n in (64, 48, 32, 64):
        own[(1,)](x, y, out, n, 0.5, None, BLOCK=64)
    own[lambda meta: (triton_cdiv(meta["n"], meta["BLOCK"]),)](x, y, out, n=64, scale=0.5, bias=None, BLOCK=64)
    assert monitor.count == 1
    own[(1,)](x, y, out, 33, 0.5, None, BLOCK=64)
    assert monitor.count == 2


@pytest.mark.gpu
def test_without_cuda_bindings_the_stock_launcher_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    import jit_cases

    from jitgraph.jit import kernel

    monkeypatch.setattr(kernel, "bindings", lambda: None)
    monitor = CompileMonitor()
    own = kernel.Kernel(jit_cases.add_body, monitor)
    x, y, out = _operands(64)
    for _ in range(2):
        out.zero_()
        own[(1,)](x, y, out, 64, 0.5, None, BLOCK=64)
        torch.testing.assert_close(out, x + y * 0.5)
    assert monitor.count == 1 and monitor.totals().ms > 0


@pytest.mark.gpu
def test_a_fresh_thread_can_launch() -> None:
    import jit_cases

    x, y, out = _operands(64)
    jit_cases.add[(1,)](x, y, out, 64, 0.5, None, BLOCK=64)
    out.zero_()
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: jit_cases.add[(1,)](x, y, out, 64, 0.5, None, BLOCK=64)).result()
    torch.cuda.synchronize()
    torch.testing.assert_close(out, x + y * 0.5)


@pytest.mark.gpu
def test_launch_overhead(capsys: pytest.CaptureFixture[str]) -> None:
    import jit_cases

    x, y, out = _operands(64)

    def host_us(launcher) -> float:
        best = float("inf")
        for _ in range(20):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(200):
                launcher[(1,)](x, y, out, 64, 0.5, None, BLOCK=64, num_warps=1)
            best = min(best, (time.perf_counter() - start) / 200 * 1e6)
        return best

    ours, stock = host_us(jit_cases.add), host_us(jit_cases.add_stock)
    with capsys.disabled():
        print(f"\nhost time of a launch with 7 arguments: {ours:.1f} us, Triton's own launcher {stock:.1f} us")
    assert ours < 50.0, "a launch must not compile, synchronise or allocate"
