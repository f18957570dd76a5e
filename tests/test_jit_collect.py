"""Collecting and strictness, on the launches themselves; ``jit_registry_cases.py`` has what needs the compiler."""

from __future__ import annotations

import threading

import pytest
import torch
import triton.language as tl

from jitgraph import cli
from jitgraph.config import EngineConfig
from jitgraph.errors import CompileError, ConfigError, DeviceError
from jitgraph.jit.collect import collect
from jitgraph.jit.compile_only import compile_only
from jitgraph.jit.kernel import Kernel
from jitgraph.jit.monitor import CompileMonitor
from jitgraph.jit.registry import compile_all, default_workers
from jitgraph.jit.strict import forbid_compiles, require_compiles_allowed
from jitgraph.jit.target import target_arch


def double_body(x, out, n, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + index, 2 * tl.load(x + index, mask=index < n), mask=index < n)


def negate_body(x, BLOCK: tl.constexpr = 16):
    tl.store(x + tl.arange(0, BLOCK), -tl.load(x + tl.arange(0, BLOCK)))


@pytest.fixture
def double() -> Kernel:
    return Kernel(double_body, CompileMonitor())


def launches(double: Kernel, negate: Kernel, x: torch.Tensor, out: torch.Tensor) -> None:
    """Five launches that need three specialisations."""
    double[(1,)](x, out, 16, BLOCK=16)
    negate[(1,)](x)
    double[(1,)](x, out, 32, BLOCK=16)
    double[lambda arguments: (arguments["n"],)](x, n=48, out=out, BLOCK=16)
    double[(1,)](x, out, 5, BLOCK=16)


@pytest.mark.parametrize("where", ["device", "cpu", "meta"])
def test_launches_are_written_down_instead_of_run(double: Kernel, device: torch.device, where: str) -> None:
    negate = Kernel(negate_body, CompileMonitor())
    x, out = (torch.ones(64, device=device if where == "device" else where) for _ in range(2))
    with collect() as wanted:
        launches(double, negate, x, out)
    assert [want.kernel for want in wanted] == [double, negate, double] and len(wanted) == 3
    assert [want.spec.describe() for want in wanted] == [
        "x=*fp32:16, out=*fp32:16, n=i32:16, BLOCK=16; ",
        "x=*fp32:16, BLOCK=16; ",
        "x=*fp32:16, out=*fp32:16, n=i32, BLOCK=16; ",
    ]
    assert where == "meta" or bool((x == 1).all() and (out == 1).all()), "nothing ran"
    assert double.monitor.count == negate.monitor.count == 0, "nothing was compiled"


def test_constants_of_unequal_type_are_collected_apart(double: Kernel) -> None:
    x = torch.zeros(1)
    with collect() as wanted:
        for block in (1, True, 1.0, 1):
            double[(1,)](x, x, 2, BLOCK=block)
    assert [repr(want.spec.constants[0][1]) for want in wanted] == ["1", "True", "1.0"]


def test_wrong_calls_are_refused_while_collecting(double: Kernel) -> None:
    x = torch.zeros(1)
    with collect() as wanted:
        for wrong in ((x, x), (x, x, 2), (x, x, 2, 16, 17)):
            with pytest.raises(TypeError):
                double[(1,)](*wrong)
        with pytest.raises(TypeError, match="multiple values"):
            double[(1,)](x, x, 2, x=x, BLOCK=16)
        with pytest.raises(TypeError, match="complex64"):
            double[(1,)](x.to(torch.complex64), x, 2, BLOCK=16)
    assert len(wanted) == 0


def test_modes_nest_and_belong_to_their_thread(double: Kernel, device: torch.device) -> None:
    x, out = torch.ones(16, device=device), torch.zeros(16, device=device)

    def launch() -> None:
        double[(1,)](x, out, 16, BLOCK=16)

    with collect() as outer:
        with collect() as inner:
            launch()
        assert (len(outer), len(inner)) == (0, 1)
        other = threading.Thread(target=launch)
        other.start()
        other.join()
        assert len(outer) == 0 and bool((out == 2).all()), "another thread's launch runs"
        launch()
    assert len(outer) == 1


def test_wrappers_hear_the_architecture() -> None:
    outside = target_arch()
    with collect(80):
        assert target_arch() == 80
        with collect():
            assert target_arch() == outside
        with compile_only(90):
            assert target_arch() == 90
    assert target_arch() == outside


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU, not in the interpreter")
def test_the_interpreter_needs_nothing_compiled(double: Kernel) -> None:
    x = torch.zeros(16)
    with collect() as wanted:
        double[(1,)](x, x, 16, BLOCK=16)
    assert len(wanted) == 1 and compile_all(wanted, 90).total == 0
    with forbid_compiles("strict"):
        double[(1,)](x, x, 16, BLOCK=16)
    with compile_only(90), pytest.raises(DeviceError, match="TRITON_INTERPRET"):
        double[(1,)](x, x, 16, BLOCK=16)


def test_what_cannot_run_kernels_is_refused() -> None:
    with pytest.raises(DeviceError, match="80 or newer"):
        compile_all((), 75)
    with pytest.raises(DeviceError, match="not for cpu"):
        compile_all((), torch.device("cpu"))


def test_there_is_a_worker_for_each_core() -> None:
    assert 1 <= default_workers() <= 16


def test_a_ban_names_itself_nests_and_belongs_to_its_thread() -> None:
    errors: list[Exception] = []

    def attempt() -> None:
        try:
            require_compiles_allowed("add(x=*fp16)")
        except CompileError as error:
            errors.append(error)

    attempt()
    with forbid_compiles("outer"):
        with forbid_compiles("step 7"):
            attempt()
        attempt()
        other = threading.Thread(target=attempt)
        other.start()
        other.join()
    attempt()
    assert ["step 7" in str(errors[0]), "outer" in str(errors[1]), len(errors)] == [True, True, 2]
    assert "add(x=*fp16)" in str(errors[0]) and "not compiled before ready" in str(errors[0])
    assert "strict" in str(errors[0])


def test_strict_is_a_setting() -> None:
    assert EngineConfig().strict is False and EngineConfig(strict=True).strict
    with pytest.raises(ConfigError, match="strict must be true or false"):
        EngineConfig(strict="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("words", [["generate", "--token-ids", "3"], ["chat"]])
@pytest.mark.parametrize("strict", [False, True])
def test_the_command_line_passes_strict_on(monkeypatch: pytest.MonkeyPatch, words: list[str], strict: bool) -> None:
    seen: list[object] = []

    def opening(*model: object, **settings: object) -> None:
        seen.append(settings["strict"])
        raise ConfigError("seen enough")

    monkeypatch.setattr(cli, "_open", opening)
    with pytest.raises(ConfigError, match="seen enough"):
        cli.app([*words, *["--strict"] * strict], standalone_mode=False)
    assert seen == [strict]
