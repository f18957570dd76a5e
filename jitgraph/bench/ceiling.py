"""What the machine itself can do, measured before any case: read and copy bandwidth, the rate of matrix products, and
the model's matrix products alone as one graph (``linears``).

Runs in a process of its own, on its main thread. Each rate is the best of several kernels, each kernel's figure the
median of its repeats, under the pacing of the requests: a device that has rested clocks higher than a busy one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from jitgraph.bench.plan import INTERACTIVE, LINEARS, PAUSE_S, Plan
from jitgraph.bench.records import BlockKey, RawWriter
from jitgraph.graphs.capture import CapturedGraph, capture_callable
from jitgraph.model.device import torch_dtype
from jitgraph.model.hf_spec import ForeignSpec
from jitgraph.model.spec import ModelSpec
from jitgraph.model.weights import ModelWeights

Work = Callable[[], Any]
LINEARS_ITERATIONS = 20
HEAD_START_CYCLES = 400_000
"""The device spins this long (0.2 ms at 2 GHz) before a timed interval begins, while the host launches what is timed:
otherwise the interval would begin on an idle device and contain the launch."""


def measure_rates(plan: Plan, progress: Callable[[], None]) -> dict[str, Any]:
    """The raw record of the ceilings: read, copy and product rates under each pacing (``floors.ceilings`` reads it)."""
    device = torch.device(plan.device)
    by_pacing = {}
    for pacing in plan.pacings:
        by_pacing[pacing] = _rates(device, torch_dtype(plan.dtype), pacing)
        progress()
    return {"by_pacing": by_pacing}


def _rates(device: torch.device, dtype: torch.dtype, pacing: str) -> dict[str, float]:
    gemm = max(2 * m * n * k / _gemm_ms(m, n, k, device, dtype, pacing) for m, n, k in _gemm_shapes(device))
    return {**_stream_rates(device, dtype, pacing), "gemm_tflops": gemm / 1e9}


def _stream_rates(device: torch.device, dtype: torch.dtype, pacing: str) -> dict[str, float]:
    data = torch.ones(_buffer_bytes(device) // dtype.itemsize, dtype=dtype, device=device)
    other = torch.empty_like(data)
    total = data.numel() * dtype.itemsize
    read_ms = min(_median_ms(work, device, pacing) for work in _read_works(data))
    copy_ms = _median_ms(lambda: other.copy_(data), device, pacing)
    return {"read_tb_s": total / read_ms / 1e9, "copy_tb_s": 2 * total / copy_ms / 1e9}


def _buffer_bytes(device: torch.device) -> int:
    """Far larger than any cache, and a multiple of what the read kernels take."""
    if device.type != "cuda":
        return 256 * 2**20
    free, _ = torch.cuda.mem_get_info(device)
    return max(2**28, min(2**32, free // 8 // 2**28 * 2**28))


def _read_works(data: torch.Tensor) -> list[Work]:
    if data.device.type != "cuda":
        return [data.sum, data.max]
    from jitgraph.bench.ceiling_kernels import READ_SHAPES, read_all

    sums = torch.empty(data.numel() // min(b * n for b, n in READ_SHAPES), dtype=torch.float32, device=data.device)
    return [partial(read_all, data, sums, block, loads) for block, loads in READ_SHAPES]


def _gemm_shapes(device: torch.device) -> tuple[tuple[int, int, int], ...]:
    return ((8192, 8192, 8192), (4096, 8192, 8192)) if device.type == "cuda" else ((512, 512, 512), (1024, 1024, 1024))


def _gemm_ms(m: int, n: int, k: int, device: torch.device, dtype: torch.dtype, pacing: str) -> float:
    a = torch.randn(m, k, device=device).to(dtype)
    b = torch.randn(n, k, device=device).to(dtype)
    out = torch.empty(m, n, device=device, dtype=dtype)
    return _median_ms(lambda: torch.mm(a, b.t(), out=out), device, pacing)


def _median_ms(work: Work, device: torch.device, pacing: str) -> float:
    """Median time of one call after two that do not count; the device's own clock on CUDA."""
    for _ in range(2):
        work()
    repeats = 20 if device.type == "cuda" else 5
    if device.type != "cuda":
        return statistics.median(_cpu_ms(work, pacing) for _ in range(repeats))
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times: list[float] = []
    for _ in range(repeats if pacing == INTERACTIVE else 5 * repeats):
        if pacing == INTERACTIVE:
            torch.cuda.synchronize(device)
            time.sleep(PAUSE_S)
        torch.cuda._sleep(HEAD_START_CYCLES)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    # Back to back, the first fifth still rides on a rested device.
    return statistics.median(times if pacing == INTERACTIVE else times[repeats:])


def _cpu_ms(work: Work, pacing: str) -> float:
    if pacing == INTERACTIVE:
        time.sleep(PAUSE_S)
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def measure_linears(plan: Plan, spec: ModelSpec, writer: RawWriter, progress: Callable[[], None]) -> None:
    """Times the model's matrix products at one token and at each prompt length, as ``linears`` rows. Of a model that
    is not native nobody knows them: the rates of reading and of plain products are then the whole ceiling."""
    if isinstance(spec, ForeignSpec):
        return
    device = torch.device(plan.device)
    weights = linear_weights(spec, device, torch_dtype(plan.dtype))
    for tokens in sorted({1, *plan.prompt_lengths}):
        graph = LinearsGraph(weights, tokens)
        for pacing in plan.pacings:
            key = BlockKey(LINEARS, "ttft", "ttft_ms", pacing, tokens)
            for iteration in range(LINEARS_ITERATIONS):
                if pacing == INTERACTIVE:
                    time.sleep(PAUSE_S)
                writer.sample(key, iteration, graph.replay_ms(), time.time())
            writer.flush()
        graph.close()
        progress()


def _replay_ms(graph: CapturedGraph, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        graph.replay()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START_CYCLES)
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


class LinearsGraph:
    """The matrix products of a prompt of ``tokens`` as one captured graph, with random inputs of their own.

    It keeps what the graph reads and writes; ``weights`` are its caller's, in the order of ``linear_weights``.
    """

    def __init__(self, weights: Sequence[torch.Tensor], tokens: int) -> None:
        self._device = weights[0].device
        self._work = linears(weights, tokens)
        self._work()
        self._graph = capture_callable(self._work, self._device)
        self._graph.replay()

    def replay_ms(self) -> float:
        """Milliseconds of one replay: on CUDA on the device's own clock, so that no launch or wait of the host is in
        it."""
        return _replay_ms(self._graph, self._device)

    def close(self) -> None:
        """Waits for the last replay and frees the graph."""
        if self._device.type == "cuda":  # the stream alone: a capture elsewhere does not survive a wait for the device
            torch.cuda.current_stream(self._device).synchronize()
        self._graph.destroy()


def model_linears(weights: ModelWeights) -> list[torch.Tensor]:
    """A loaded model's own matrices, in the order of ``linear_weights``."""
    return [*(m for one in weights.layers for m in (one.qkv, one.o, one.gate_up, one.down)), weights.lm_head]


def linear_weights(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Matrices ``[out, in]`` in the order of a step, each layer its own: no cache is warmer than in a model."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    layer = ((spec.qkv_size, hidden), (hidden, spec.q_size), (2 * inner, hidden), (hidden, inner))
    shapes = [shape for _ in range(spec.num_layers) for shape in layer] + [(spec.vocab_size, hidden)]
    return [torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.02) for shape in shapes]


def linears(weights: Sequence[torch.Tensor], tokens: int) -> Callable[[], None]:
    """The products of a prompt of ``tokens`` (LM head: one token); outputs exist before, a capture takes none.

    Random inputs: constant ones switch fewer bits, draw less power, and run faster than any real step.
    """
    like, head = weights[0], weights[-1]
    inputs = {k: torch.randn(tokens, k, device=like.device).to(like.dtype) for k in {w.shape[1] for w in weights}}
    outputs = {
        n: torch.empty(tokens, n, dtype=like.dtype, device=like.device) for n in {w.shape[0] for w in weights[:-1]}
    }
    logits = torch.empty(1, head.shape[0], dtype=like.dtype, device=like.device)

    def work() -> None:
        for weight in weights[:-1]:
            torch.mm(inputs[weight.shape[1]], weight.t(), out=outputs[weight.shape[0]])
        torch.mm(inputs[head.shape[1]][:1], head.t(), out=logits)

    return work
