"""Toy kernels for the tests of ``jitgraph.jit``, and the cases that need Triton's compiler instead of its interpreter.

``triton.jit`` decides at import whether to interpret, so ``test_jit_kernel.py`` runs these cases as a script of their
own: ``python jit_cases.py CASE``. On a machine with a GPU the kernels are also imported in process.
"""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl

from jitgraph.errors import DeviceError
from jitgraph.jit.compile_only import compile_only
from jitgraph.jit.kernel import Kernel, kernel
from jitgraph.jit.monitor import CompileMonitor


def add_body(x, y, out, n, scale, bias, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < n
    total = tl.load(x + index, mask=mask) + tl.load(y + index, mask=mask) * scale
    if bias is not None:
        total += tl.load(bias + index, mask=mask)
    tl.store(out + index, total, mask=mask)


def dot_body(a, b, out, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    inner = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, BLOCK_K):
        left = tl.load(a + rows[:, None] * K + start + inner[None, :])
        right = tl.load(b + (start + inner)[:, None] * BLOCK + rows[None, :])
        total = tl.dot(left, right, total)
    tl.store(out + rows[:, None] * BLOCK + rows[None, :], total)


def types_body(out, small, large, unsigned, real, flag):
    tl.store(out, small.to(tl.int64))
    tl.store(out + 1, large)
    tl.store(out + 2, unsigned.to(tl.int64))
    tl.store(out + 3, (real * 4).to(tl.int64))
    tl.store(out + 4, flag.to(tl.int64))


def write_body(out, value, BLOCK: tl.constexpr):
    tl.store(out + tl.arange(0, BLOCK), tl.load(value + tl.arange(0, BLOCK)))


add = kernel(add_body)
add_stock = triton.jit(add_body)
dot = kernel(dot_body)
dot_stock = triton.jit(dot_body)
types = kernel(types_body)
write = kernel(write_body)


def case_targets() -> None:
    """A kernel is compiled for the architecture asked for, and its resources are known."""
    x = torch.zeros(64)
    for arch in (80, 90):
        with compile_only(arch) as report:
            add[(1,)](x, x, x, 64, 0.5, None, BLOCK=64, num_warps=1)
        (binary,) = report.binaries
        assert f".target sm_{arch}" in binary.ptx and binary.cubin.startswith(b"\x7fELF"), binary.ptx[:200]
        assert binary.registers is not None and 0 < binary.registers <= 255, binary
        assert binary.local_bytes == 0 and binary.shared_bytes == 0 and binary.threads == 32, binary
        assert binary.argument_types == ("*fp32", "*fp32", "*fp32", "i32", "fp32"), binary
        assert not x.any(), "a compile-only launch must not run"
        assert f"sm_{arch}" in report.table() and "add_body" in report.table()


def case_counts() -> None:
    """One compilation a specialisation, however often and in whatever spelling it is launched."""
    monitor = CompileMonitor()
    own = Kernel(add_body, monitor)
    x = torch.zeros(64)
    with compile_only(90) as report:
        for n in (16, 32, 64):
            own[(1,)](x, x, x, n, 0.5, None, BLOCK=64, num_warps=1)
        own[(1,)](x, x, out=x, num_warps=1, BLOCK=64, bias=None, scale=2.0, n=48)
        assert monitor.count == 1, monitor.since()
        mark = monitor.count
        own[(1,)](x, x, x, 17, 0.5, None, BLOCK=64, num_warps=1)
        own[(1,)](x, x, x, 1, 0.5, None, BLOCK=64, num_warps=1)
        own[(1,)](x[1:], x, x, 17, 0.5, None, BLOCK=64, num_warps=1)
        own[(1,)](x.half(), x, x, 17, 0.5, x, BLOCK=64, num_warps=1)
        own[(1,)](x.to("meta"), x, x, 17, 0.5, None, BLOCK=32, num_warps=1)
    assert len(report.binaries) == monitor.count == 6, report.table()
    assert monitor.totals(mark).count == 5 and monitor.totals().ms > 0
    assert report.kernels == {f"{__name__}.add_body"}


def case_spills() -> None:
    """Spilled registers are seen in the cubin."""
    x = torch.zeros(1, dtype=torch.float16, device="meta")
    with compile_only(90) as report:
        dot[(1,)](x, x, x, 256, BLOCK=128, BLOCK_K=64, num_warps=4, num_stages=3, maxnreg=96)
        dot[(1,)](x, x, x, 256, BLOCK=128, BLOCK_K=64, num_warps=8, num_stages=3)
    spilling, clean = report.binaries
    assert spilling.local_bytes is not None and spilling.local_bytes > 0, report.table()
    assert clean.local_bytes == 0 and clean.shared_bytes > 48 * 1024, report.table()


def case_refusals() -> None:
    """Wrong calls are refused by name; without CUDA a launch says what it needs."""
    x = torch.zeros(64)

    def fails(error: type[Exception], text: str, *args: object, **kwargs: object) -> None:
        try:
            add[(1,)](*args, **kwargs)
        except error as caught:
            assert text in str(caught), caught
        else:
            raise AssertionError(f"{text}: not refused")

    with compile_only(90):
        fails(TypeError, "num_wraps", x, x, x, 64, 0.5, None, BLOCK=64, num_wraps=1)
        fails(TypeError, "BLOCK", x, x, x, 64, 0.5, None)
        fails(TypeError, "str", x, x, "x", 64, 0.5, None, BLOCK=64)
        fails(TypeError, "complex64", x, x, x.to(torch.complex64), 64, 0.5, None, BLOCK=64)
    wanted = "pin it" if torch.cuda.is_available() else "CUDA device"
    fails(DeviceError, wanted, x, x, x, 64, 0.5, None, BLOCK=64)


if __name__ == "__main__":
    globals()["case_" + sys.argv[1]]()
