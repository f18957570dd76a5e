"""The device-side loop: up to ``steps`` decode steps of one sequence from a single launch.

Built before ready and launched on the engine's thread, on the engine's stream. One CUDA graph:

    enter -> arm -> WHILE { body -> tick } -> leave

``enter`` (a captured graph) takes the host's inputs over, ``body`` (a captured graph) is a decode step of one row. The
three small kernels round them, in ``loop_source.py``, decide on the device: another step runs while the slot in
``row_slot[0]`` is not finished, the budget lasts and the host has not cancelled. Tokens reach the host through the
ring, step by step, as from any other step; the end reaches it through ``LoopControl``. The device never waits for the
host, so neither garbage collection nor a busy interpreter can delay a token.

What holds, and what callers must keep to:

- Loops and other launches of the stream run in the order of their launch. A loop queued behind another one finds out
  on the device whether there is anything left to do: zero steps are as good as sixty-four.
- While a loop runs, loading a module, or the first product of a new matrix shape, blocks the host until the loop ends
  (measured; replays, captures and instantiations of what has run before do not). Hence loops are short, and all that
  may be launched beside one has run before.
- A body may hold kernels (also with programmatic dependent launch), copies and fills of device or pinned memory, and
  child graphs. The driver refuses event waits, host functions, allocations and kernels that launch kernels; grid-wide
  (cooperative) launches fail where MPS is in use, so no step of ours uses them.
- No more steps may be unread than the ring holds, all queued loops counted.
- The graph keeps addresses, not tensors: whatever it reads or writes lives as long as the ``DeviceLoop``.

Source: CUDA Programming Guide, "Conditional Graph Nodes".
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

from jitgraph.errors import CompileError, DeviceError
from jitgraph.graphs.loop_control import LOOP_STEPS, DeviceLoop, LoopControl, LoopReason, LoopUnavailable
from jitgraph.graphs.loop_source import ARM, LEAVE, TICK, loop_source
from jitgraph.jit.driver import bindings, load_function
from jitgraph.jit.nvrtc import compile_source
from jitgraph.jit.target import device_arch
from jitgraph.ops.slots import SlotTable

__all__ = [
    "LOOP_STEPS",
    "CudaLoop",
    "DeviceLoop",
    "LoopControl",
    "LoopReason",
    "LoopUnavailable",
    "build_cuda_loop",
    "why_no_loops",
]

_FIRST_DRIVER = 12040
"""CUDA 12.4, as the driver writes it: the first whose WHILE bodies may hold all that a step holds."""
_ASSIGN_DEFAULT = 1  # CU_GRAPH_COND_ASSIGN_DEFAULT, which the bindings do not name


def build_cuda_loop(
    enter_raw: int,
    body_raw: int,
    row_slot: torch.Tensor,
    slots: SlotTable,
    counter: torch.Tensor,
    control: LoopControl,
    stream: torch.cuda.Stream,
    device: torch.device,
    steps: int = LOOP_STEPS,
    keep: tuple[object, ...] = (),
) -> DeviceLoop:
    """Builds, instantiates and uploads the loop's graph; takes milliseconds and belongs before ready.

    Args:
        enter_raw, body_raw: ``CUgraph`` handles of captured graphs (see the module's docstring for what a body may
            hold). They are cloned; the memory they work on is not.
        row_slot: int32 ``[R]`` on the device; its first word is the slot the loop decodes.
        slots: the slot table.
        counter: int64 ``[1]`` on the device: the number of the next step, which each body increments.
        control: shared by all loops of the engine, which run one at a time.
        stream: the engine's own.
        device: its CUDA device.
        steps: the budget of one launch; with what else may be unread it must fit the ring.
        keep: what must live as long as the loop, such as the owners of the captured graphs.

    Raises:
        LoopUnavailable: there is no such loop on this machine, and why.
    """
    if device.type != "cuda":
        raise LoopUnavailable(LoopReason.EMULATED)
    assert steps >= 1 and row_slot.dtype == torch.int32 and counter.dtype == torch.int64
    assert slots.words.dtype == torch.int32 and slots.words.stride(1) == 1
    with torch.cuda.stream(stream):  # also makes the device current
        driver = _driver(stream.device_index)
        graph = driver("cuGraphCreate", 0)
        try:
            _assemble(driver, graph, (enter_raw, body_raw), row_slot, slots, counter, control, steps)
            executable = driver("cuGraphInstantiate", graph, 0)
        except BaseException:
            driver.api.cuGraphDestroy(graph)
            raise
        loop = CudaLoop(driver, graph, executable, stream, steps, (row_slot, slots, counter, control, *keep))
        try:
            driver("cuGraphUpload", executable, loop.queue)  # or the first launch would pay for it
        except BaseException:
            loop.destroy()
            raise
    return loop


def why_no_loops(device: torch.device) -> str | None:
    """Why a device has no such loops, in one sentence; None where it has. Compiles and loads their kernels."""
    try:
        if device.type != "cuda":
            raise LoopUnavailable(LoopReason.EMULATED)
        with torch.cuda.device(device):
            _driver(device.index or 0)
    except LoopUnavailable as error:
        return str(error)
    return None


class CudaLoop:
    """A ``DeviceLoop`` on CUDA: an executable graph with a WHILE node."""

    def __init__(
        self,
        driver: _Driver,
        graph: Any,
        executable: Any,
        stream: torch.cuda.Stream,
        steps: int,
        keep: tuple[object, ...],
    ) -> None:
        self.steps = steps
        self.queue = driver.api.CUstream(stream.cuda_stream)
        self._driver = driver
        self._graph = graph  # owns the condition and the body
        self._executable: Any = executable
        self._keep = (stream, *keep)

    def launch(self) -> None:
        """Enqueues the loop on the engine's stream and returns at once.

        Raises:
            DeviceError: the driver refuses.
        """
        assert self._executable is not None, "the loop has been destroyed"
        driver = self._driver
        result = driver.api.cuGraphLaunch(self._executable, self.queue)
        if result[0] == driver.api.CUresult.CUDA_ERROR_INVALID_CONTEXT:  # a thread that has not used CUDA yet
            driver.bind_context()
            result = driver.api.cuGraphLaunch(self._executable, self.queue)
        if result[0] != 0:
            raise DeviceError(f"CUDA refused to launch the decode loop: {driver.words(result[0])}")

    def destroy(self) -> None:
        """Waits for the stream and frees the graph; not for the token path."""
        if self._executable is None:
            return
        executable, self._executable = self._executable, None
        api = self._driver.api  # errors are of no interest: a device that has failed holds nothing to free
        api.cuStreamSynchronize(self.queue)  # a running launch may still set the condition, which the graph owns
        api.cuGraphExecDestroy(executable)
        api.cuGraphDestroy(self._graph)


_Argument = tuple[int, Any]
"""A kernel's argument and its type in ``ctypes``."""


def _assemble(
    driver: _Driver,
    graph: Any,
    captured: tuple[int, int],
    row_slot: torch.Tensor,
    slots: SlotTable,
    counter: torch.Tensor,
    control: LoopControl,
    steps: int,
) -> None:
    """Puts enter, arm, WHILE { body, tick } and leave into an empty graph, one after the other."""
    enter_raw, body_raw = captured
    condition = driver("cuGraphConditionalHandleCreate", graph, driver.context, 0, _ASSIGN_DEFAULT)
    words, state = _address(control.words), _address(control.state)
    shared: list[_Argument] = [
        (int(condition), ctypes.c_uint64),
        _address(row_slot),
        _address(slots.words),
        (slots.stride, ctypes.c_int32),
        words,
        state,
    ]
    entered = driver.add_child(graph, [], enter_raw)
    armed = driver.add_kernel(graph, [entered], ARM, [*shared, (steps, ctypes.c_int32)])
    looped, body = driver.add_while(graph, [armed], condition)
    stepped = driver.add_child(body, [], body_raw)
    driver.add_kernel(body, [stepped], TICK, shared)
    driver.add_kernel(graph, [looped], LEAVE, [_address(counter), state, words])


def _address(tensor: torch.Tensor) -> _Argument:
    return tensor.data_ptr(), ctypes.c_void_p


class _Driver:
    """Driver calls on one device whose errors become ``LoopUnavailable``, and the loop's kernels there."""

    def __init__(self, device_index: int) -> None:
        api = bindings()
        if api is None:
            raise LoopUnavailable(LoopReason.NO_BINDINGS)
        self.api = api
        self._index = device_index
        version = self("cuDriverGetVersion")
        if version < _FIRST_DRIVER or not hasattr(api, "cuGraphConditionalHandleCreate"):
            found = f"{version // 1000}.{version % 1000 // 10}"
            raise LoopUnavailable(LoopReason.NO_CONDITIONALS, f"this driver is that of CUDA {found}")
        self.context = self.bind_context()
        self._kernels = _load_kernels(device_index)

    def __call__(self, name: str, *args: Any) -> Any:
        """The value of the driver call ``name``."""
        result = getattr(self.api, name)(*args)
        if result[0] != 0:
            raise LoopUnavailable(LoopReason.REFUSED, f"{name}: {self.words(result[0])}")
        return result[1] if len(result) > 1 else None

    def words(self, error: Any) -> str:
        """An error code in the driver's words."""
        text = self.api.cuGetErrorString(error)[1]
        return text.decode() if text else str(error)

    def bind_context(self) -> Any:
        """This thread's context; where it has none, the device's primary context becomes it."""
        context = self("cuCtxGetCurrent")
        if int(context) == 0:
            context = self("cuDevicePrimaryCtxRetain", self("cuDeviceGet", self._index))
            self("cuCtxSetCurrent", context)
        return context

    def add_child(self, graph: Any, after: list[Any], raw: int) -> Any:
        """A node that runs a copy of the graph ``raw``."""
        return self("cuGraphAddChildGraphNode", graph, after, len(after), self.api.CUgraph(raw))

    def add_kernel(self, graph: Any, after: list[Any], name: str, arguments: list[_Argument]) -> Any:
        """A node that runs one of the loop's kernels in one thread; the driver copies the arguments."""
        params = self.api.CUDA_KERNEL_NODE_PARAMS()
        params.func = self._kernels[name]
        params.gridDimX = params.gridDimY = params.gridDimZ = 1
        params.blockDimX = params.blockDimY = params.blockDimZ = 1
        params.kernelParams = tuple(value for value, _ in arguments), tuple(kind for _, kind in arguments)
        return self("cuGraphAddKernelNode", graph, after, len(after), params)

    def add_while(self, graph: Any, after: list[Any], condition: Any) -> tuple[Any, Any]:
        """A node that repeats a body while ``condition`` is not 0, and that body: an empty graph to be filled."""
        api = self.api
        params = api.CUgraphNodeParams()
        params.type = api.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        params.conditional.handle = condition
        params.conditional.type = api.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_WHILE
        params.conditional.size = 1
        params.conditional.ctx = self.context
        try:
            node = self("cuGraphAddNode", graph, after, None, len(after), params)
        except TypeError:  # bindings of CUDA 12, which do not pass edge data here
            node = self("cuGraphAddNode", graph, after, len(after), params)
        return node, params.conditional.phGraph_out[0]  # the driver owns that array and fills it in


@cache
def _driver(device_index: int) -> _Driver:
    """One for each device, so that the kernels are loaded once and stay, like all others of the process."""
    return _Driver(device_index)


def _load_kernels(device_index: int) -> dict[str, Any]:
    """The loop's kernels on a device, each a ``CUfunction``."""
    try:
        cubin = compile_source(loop_source(), "decode_loop", device_arch(device_index))
    except CompileError as error:
        raise LoopUnavailable(LoopReason.NVRTC_FAILED, str(error)) from error
    try:
        return {name: load_function(cubin, name, device_index) for name in (ARM, TICK, LEAVE)}
    except DeviceError as error:
        raise LoopUnavailable(LoopReason.REFUSED, str(error)) from error
