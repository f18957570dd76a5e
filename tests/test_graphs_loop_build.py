"""The graph that is built for the decode loop, and why there may be none: on a driver that records its calls.

What the real driver makes of it is in ``test_graphs_loop.py`` and ``test_gpu_loop.py``, on a machine with a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from loop_cases import LoopBench

from jitgraph.errors import CompileError, DeviceError
from jitgraph.graphs import loop as loop_module
from jitgraph.graphs.loop import LoopControl, LoopReason, LoopUnavailable, build_cuda_loop
from jitgraph.graphs.loop_source import loop_source
from jitgraph.ops.slots import SlotTable


class RecordingDriver:
    """Stands in for ``cuda.bindings.driver``: graphs are lists of (kind, detail, nodes before)."""

    CUresult = SimpleNamespace(CUDA_ERROR_INVALID_CONTEXT=201)
    CUgraphNodeType = SimpleNamespace(CU_GRAPH_NODE_TYPE_CONDITIONAL="conditional")
    CUgraphConditionalNodeType = SimpleNamespace(CU_GRAPH_COND_TYPE_WHILE="while")

    def __init__(self, version: int = 13000, fail: str = "", edge_data: bool = True) -> None:
        self.version = version
        self.fail = fail
        self.edge_data = edge_data
        self.graphs: dict[int, list[tuple[str, Any, list[str]]]] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.context = 0

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cu") and name == self.fail:
            return lambda *args: (801, None)
        return super().__getattribute__(name)

    CUgraph = CUstream = staticmethod(int)
    CUDA_KERNEL_NODE_PARAMS = SimpleNamespace

    def CUgraphNodeParams(self) -> SimpleNamespace:
        return SimpleNamespace(conditional=SimpleNamespace())

    def cuDriverGetVersion(self) -> tuple[int, int]:
        return 0, self.version

    def cuGetErrorString(self, error: int) -> tuple[int, bytes]:
        return 0, f"error {error}".encode()

    def cuCtxGetCurrent(self) -> tuple[int, int]:
        return 0, self.context

    def cuDeviceGet(self, index: int) -> tuple[int, int]:
        return 0, index

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[int, int]:
        return 0, 77 + device

    def cuCtxSetCurrent(self, context: int) -> tuple[int]:
        self.context = context
        return (0,)

    def cuGraphCreate(self, flags: int) -> tuple[int, int]:
        self.graphs[graph := 100 + len(self.graphs)] = []
        return 0, graph

    def cuGraphConditionalHandleCreate(self, graph: int, context: int, default: int, flags: int) -> tuple[int, int]:
        self.calls.append(("handle", graph, context, default, flags))
        return 0, 2**40

    def cuGraphAddChildGraphNode(self, graph: int, after: list[str], count: int, child: int) -> tuple[int, str]:
        return self._add(graph, after, count, ("child", child))

    def cuGraphAddKernelNode(self, graph: int, after: list[str], count: int, params: Any) -> tuple[int, str]:
        sizes = (
            params.gridDimX,
            params.gridDimY,
            params.gridDimZ,
            params.blockDimX,
            params.blockDimY,
            params.blockDimZ,
        )
        assert sizes == (1,) * 6
        return self._add(graph, after, count, (params.func, params.kernelParams))

    def cuGraphAddNode(self, graph: int, after: list[str], *rest: Any) -> tuple[int, str]:
        if len(rest) != (3 if self.edge_data else 2):
            raise TypeError("wrong number of arguments")
        count, params = rest[-2:]
        assert params.type == "conditional"
        self.graphs[body := 100 + len(self.graphs)] = []
        params.conditional.phGraph_out = [body]
        settings = {name: value for name, value in vars(params.conditional).items() if name != "phGraph_out"}
        return self._add(graph, after, count, ("conditional", settings))

    def _add(self, graph: int, after: list[str], count: int, what: tuple[str, Any]) -> tuple[int, str]:
        assert count == len(after)
        self.graphs[graph].append((*what, list(after)))
        return 0, f"{graph}:{len(self.graphs[graph]) - 1}"

    def cuGraphInstantiate(self, graph: int, flags: int) -> tuple[int, int]:
        self.calls.append(("instantiate", graph, flags))
        return 0, 9000 + graph

    def cuGraphUpload(self, executable: int, stream: int) -> tuple[int]:
        self.calls.append(("upload", executable, stream))
        return (0,)

    def cuGraphLaunch(self, executable: int, stream: int) -> tuple[int]:
        self.calls.append(("launch", executable, stream))
        return (0 if self.context else 201,)

    def cuStreamSynchronize(self, stream: int) -> tuple[int]:
        self.calls.append(("wait", stream))
        return (0,)

    def cuGraphExecDestroy(self, executable: int) -> tuple[int]:
        self.calls.append(("destroy executable", executable))
        return (0,)

    def cuGraphDestroy(self, graph: int) -> tuple[int]:
        self.calls.append(("destroy graph", graph))
        return (0,)


ENTER, BODY, STREAM = 11, 12, 13


def compile_source(source: str, name: str, arch: int) -> bytes:
    assert source == loop_source() and arch == 90
    return b"cubin"


def load_function(cubin: bytes, symbol: str, device: int) -> str:
    assert cubin == b"cubin" and device == 0
    return symbol


def broken(*args: object) -> Any:
    raise CompileError("broken on purpose")


def build(
    monkeypatch: pytest.MonkeyPatch,
    driver: RecordingDriver | None,
    steps: int = 64,
    compile_source: Any = compile_source,
    load_function: Any = load_function,
) -> tuple[Any, list[Any]]:
    """A loop built on a recording driver, and the addresses (row_slot, slots, counter, control, state) it was given."""
    cpu = torch.device("cpu")
    slots, control = SlotTable.allocate(2, 4, cpu), LoopControl(cpu)
    row_slot, counter = torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int64)
    loop_module._driver.cache_clear()
    monkeypatch.setattr(loop_module, "bindings", lambda: driver)
    monkeypatch.setattr(loop_module, "device_arch", lambda index: 90)
    monkeypatch.setattr(loop_module, "compile_source", compile_source)
    monkeypatch.setattr(loop_module, "load_function", load_function)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    stream: Any = SimpleNamespace(cuda_stream=STREAM, device_index=0)
    try:
        loop = build_cuda_loop(
            ENTER, BODY, row_slot, slots, counter, control, stream, torch.device("cuda", 0), steps, keep=(slots,)
        )
    finally:
        loop_module._driver.cache_clear()
    return loop, [t.data_ptr() for t in (row_slot, slots.words, counter, control.words, control.state)]


@pytest.mark.parametrize("edge_data", [True, False], ids=["bindings of CUDA 13", "bindings of CUDA 12"])
def test_the_graph_has_the_documented_shape(monkeypatch: pytest.MonkeyPatch, edge_data: bool) -> None:
    driver = RecordingDriver(edge_data=edge_data)
    _, (row_slot, words, counter, control, state) = build(monkeypatch, driver, steps=5)
    pointer, stride = ctypes.c_void_p, SlotTable.allocate(2, 4, torch.device("cpu")).stride
    values = (2**40, row_slot, words, stride, control, state)
    kinds = (ctypes.c_uint64, pointer, pointer, ctypes.c_int32, pointer, pointer)
    settings = {"handle": 2**40, "type": "while", "size": 1, "ctx": 77}
    assert driver.graphs == {
        100: [
            ("child", ENTER, []),
            ("loop_arm", ((*values, 5), (*kinds, ctypes.c_int32)), ["100:0"]),
            ("conditional", settings, ["100:1"]),
            ("loop_leave", ((counter, state, control), (pointer,) * 3), ["100:2"]),
        ],
        101: [("child", BODY, []), ("loop_tick", (values, kinds), ["101:0"])],
    }
    assert driver.calls == [("handle", 100, 77, 0, 1), ("instantiate", 100, 0), ("upload", 9100, STREAM)]


def test_launch_and_destroy_reach_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = RecordingDriver()
    loop, _ = build(monkeypatch, driver)
    del driver.calls[:]
    loop.launch()
    driver.context = 0  # as on a thread that has not used CUDA
    loop.launch()
    assert driver.calls == [("launch", 9100, STREAM)] * 3 and driver.context == 77
    driver.fail = "cuGraphLaunch"
    with pytest.raises(DeviceError, match="error 801"):
        loop.launch()
    del driver.calls[:]
    loop.destroy()
    loop.destroy()
    assert driver.calls == [("wait", STREAM), ("destroy executable", 9100), ("destroy graph", 100)]


@pytest.mark.parametrize(
    ("driver", "settings", "reason"),
    [
        (None, {}, LoopReason.NO_BINDINGS),
        (RecordingDriver(version=12030), {}, LoopReason.NO_CONDITIONALS),
        (RecordingDriver(), {"compile_source": broken}, LoopReason.NVRTC_FAILED),
        (RecordingDriver(), {"load_function": broken}, LoopReason.REFUSED),
    ],
    ids=["no bindings", "an old driver", "nothing compiles", "nothing loads"],
)
def test_why_there_is_no_loop(
    monkeypatch: pytest.MonkeyPatch, driver: RecordingDriver | None, settings: dict[str, Any], reason: LoopReason
) -> None:
    with pytest.raises(LoopUnavailable) as caught:
        build(monkeypatch, driver, **settings)
    assert caught.value.reason is reason and str(caught.value).startswith(reason.value)


def test_old_drivers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LoopUnavailable, match=r"CUDA 12\.3$"):
        build(monkeypatch, RecordingDriver(version=12030))


@pytest.mark.parametrize("call", ["cuGraphAddChildGraphNode", "cuGraphAddNode", "cuGraphInstantiate", "cuGraphUpload"])
def test_a_refused_graph_is_freed(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    driver = RecordingDriver(fail=call)
    with pytest.raises(LoopUnavailable, match=f"{call}: error 801") as caught:
        build(monkeypatch, driver)
    assert caught.value.reason is LoopReason.REFUSED
    assert driver.calls[-1] == ("destroy graph", 100)
    assert (("destroy executable", 9100) in driver.calls) == (call == "cuGraphUpload")


def test_no_cuda_device_is_a_reason() -> None:
    bench = LoopBench(torch.device("cpu"))
    stream: Any = None
    with pytest.raises(LoopUnavailable) as caught:
        build_cuda_loop(1, 2, bench.row_slot, bench.slots, bench.counter, bench.control, stream, bench.device)
    assert caught.value.reason is LoopReason.EMULATED
