"""The quicker interpreter of the tests replaces what Triton's own does, and leaves the language as that leaves it."""

from __future__ import annotations

from typing import Any

import pytest
import quick_interpreter
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled"),
    pytest.mark.skipif(not quick_interpreter.SUITS, reason="another Triton's interpreter is left as it is"),
]

seen: list[list[list[str]]] = []


def look() -> None:
    seen.append([quick_interpreter.builtin_names(package) for package in quick_interpreter.PACKAGES])


@triton.jit
def inner(x):  # type: ignore[no-untyped-def]
    look()
    return tl.sum(x, 0) + tl.max(x, 0)


@triton.jit
def outer(x, out):  # type: ignore[no-untyped-def]
    look()
    values = tl.load(x + tl.arange(0, 4))
    tl.store(out, inner(values).to(tl.bfloat16).to(tl.float32))
    look()


def run() -> tuple[float, list[list[list[str]]]]:
    """What a kernel that calls others gives, and the built-in names before, during and after it."""
    seen.clear()
    x, out = torch.arange(4, dtype=torch.float32), torch.zeros(1)
    look()
    outer[(1,)](x, out)
    look()
    return float(out), [*seen]


def slow_patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    """Triton's own, which ``quick_interpreter`` has replaced in this process."""
    for name in quick_interpreter.builtin_names(package):
        interpreter._patch_attr(package, name, getattr(package, name), builder, scope)


def test_it_replaces_what_the_interpreter_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert interpreter._patch_builtin is quick_interpreter.patch_builtin
    run()  # what a first launch leaves replaced in ``tl.core`` stays so
    quick = run()
    monkeypatch.setattr(interpreter, "_patch_builtin", slow_patch_builtin)
    monkeypatch.setattr(interpreter, "_get_np_dtype", quick_interpreter._slow_numpy_type)
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", quick_interpreter._slow_call)
    assert quick == run() == (9.0, quick[1])
    assert any(quick[1][0]) and not any(quick[1][1]), "the language is replaced while the kernel runs"


def test_numpy_types_are_the_interpreters_own() -> None:
    scalars = [value for value in vars(tl).values() if type(value) is tl.dtype and value.name not in ("void",)]
    types = [one for scalar in scalars for one in (scalar, tl.block_type(scalar, [4]), tl.pointer_type(scalar))]
    assert len(types) > 30
    for one in [*types, tl.block_type(tl.pointer_type(tl.int8), [4])]:
        try:
            expected = quick_interpreter._slow_numpy_type(one)
        except KeyError:
            with pytest.raises(KeyError):
                quick_interpreter.numpy_type(one)
            continue
        assert quick_interpreter.numpy_type(one) == expected
