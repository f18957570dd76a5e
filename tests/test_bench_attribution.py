"""What a decode step costs the host: calls are told apart by name, the first token's are subtracted, the engine is left
as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jitgraph import LLM
from jitgraph.bench import attribution
from jitgraph.bench.attribution import COPY_CALL, KERNEL_CALL, calls_per_step, host_calls, host_time, step_clock

PROMPT = list(range(5, 15))


@pytest.fixture
def engine() -> Iterator[Callable[..., LLM]]:
    """Makes tiny engines on the CPU and closes them."""
    made: list[LLM] = []

    def make(**settings: Any) -> LLM:
        made.append(LLM("tiny", device="cpu", max_streams=1, max_model_len=256, **settings))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


@pytest.mark.parametrize(
    ("settings", "launches"),
    [
        ({}, 1 / 64),
        ({"device_loop": False}, 1),
        ({"graph_scope": "static", "device_loop": False}, 5),
        ({"graphs": False}, 0),
        ({"fused_sampling": False}, 1),
    ],
)
def test_graphs_of_a_step(engine: Callable[..., LLM], settings: dict[str, Any], launches: float) -> None:
    """Four layers: five graphs of static ops with four dynamic ones between them."""
    found = attribution.launch_figures(engine(**settings), PROMPT, cuda=False)
    assert found["launches_per_step"] == found["graphs_per_step"] == launches and found["kernels_per_step"] == 0


def test_kernels_of_a_step_are_those_beside_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def calls(work: Callable[[], object]) -> Counter[str]:
        work()
        steps = asked[-1] - 1
        return Counter(
            {"cudaLaunchKernel": 100 + 3 * steps, "cuLaunchKernelEx": 7 + steps, "cudaMemcpyAsync": 2 + steps}
        )

    monkeypatch.setattr(attribution, "host_calls", calls)
    assert calls_per_step(asked.append, steps=8) == {"kernels_per_step": 4.0, "copies_per_step": 1.0}
    assert asked == [1, 9, 1, 9], "each is run once before it counts"


def test_calls_are_told_apart_by_name() -> None:
    kernels = (
        "cudaLaunchKernel",
        "cudaLaunchKernelExC",
        "cuLaunchKernel",
        "cuLaunchKernelEx",
        "cudaLaunchCooperativeKernel",
    )
    copies = ("cudaMemcpyAsync", "cudaMemsetAsync", "cuMemcpyHtoDAsync_v2")
    others = (
        "cudaGraphLaunch",
        "cuGraphLaunch",
        "cudaStreamSynchronize",
        "aten::mm",
        "cudaLaunchHostFunc",
        "cudaMalloc",
    )
    for name in (*kernels, *copies, *others):
        found = bool(KERNEL_CALL.fullmatch(name)), bool(COPY_CALL.fullmatch(name))
        assert found == (name in kernels, name in copies), name


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_the_profiler_runs_the_work_once() -> None:
    ran: list[int] = []
    assert sum(host_calls(lambda: ran.append(1)).values()) == 0, "the work starts nothing on a device"
    assert ran == [1]


def test_host_time_leaves_the_engine_as_it_was(engine: Callable[..., LLM]) -> None:
    llm = engine()
    took = host_time(llm, PROMPT, 64)
    assert took.tokens == 64 and took.client_us > 0
    inner, reader = llm._engine, llm._engine.runner.reader
    assert not {"step", "launch"} & vars(inner).keys() and "wait" not in vars(reader)
    with pytest.raises(ZeroDivisionError), step_clock(llm) as times:
        assert {"step", "launch"} <= vars(inner).keys() and "wait" in vars(reader)
        next(llm.stream(PROMPT))
        assert 0 < times.waiting < times.inside and times.depth == 0
        raise ZeroDivisionError
    assert not {"step", "launch"} & vars(inner).keys() and "wait" not in vars(reader)
