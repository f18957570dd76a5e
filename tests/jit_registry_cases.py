"""Cases of the compile registry that need Triton's compiler: ``python jit_registry_cases.py FOLDER CASE...``.

A script of their own because ``triton.jit`` decides at import whether to interpret. In ``FOLDER`` each
case has a cache folder of its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from jit_cases import add_body, dot_body, write_body

from jitgraph.errors import CompileError
from jitgraph.jit import registry
from jitgraph.jit.binary import Binary, encode_binary
from jitgraph.jit.collect import Wanted, collect
from jitgraph.jit.compile_only import compile_only
from jitgraph.jit.compiler import make_binary
from jitgraph.jit.disk_cache import DiskCache, Lookup, open_cache
from jitgraph.jit.kernel import Kernel
from jitgraph.jit.monitor import CompileMonitor
from jitgraph.jit.registry import CompileSummary, compile_all

MONITOR = CompileMonitor()
ARCH = 90


def broken_body(x, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK < 32, "the block is too large")
    tl.store(x + tl.arange(0, BLOCK), 1)


add, dot, write, broken = (Kernel(body, MONITOR) for body in (add_body, dot_body, write_body, broken_body))


def launches() -> None:
    """Launches that need eight specialisations, some of them more than once."""
    x = torch.zeros(1, dtype=torch.float32, device="meta")
    half = torch.zeros(1, dtype=torch.float16, device="meta")
    for n in (1, 16, 17, 32, 33):
        add[(1,)](x, x, x, n, 0.5, None, BLOCK=64, num_warps=1)
    add[(1,)](x, x, x, 16, 0.5, x, BLOCK=64, num_warps=1)
    for warps in (1, 2, 1):
        write[(1,)](x, half, BLOCK=64, num_warps=warps)
    for block in (32, 16):
        dot[(1,)](half, half, x, 64, BLOCK=32, BLOCK_K=block)


def wanted() -> Wanted:
    with collect(ARCH) as wants:
        launches()
    return wants


def binaries(wants: Wanted, cache: DiskCache) -> list[Binary]:
    """What a launch of each would load, the time it took left out."""
    made = [make_binary(want.kernel.jit_function, want.spec, ARCH, CompileMonitor(), cache).binary for want in wants]
    return [dataclasses.replace(binary, ms=0.0) for binary in made]


def counts(summary: CompileSummary) -> tuple[int, ...]:
    return summary.total, summary.hits, summary.compiled, summary.damaged, summary.unwritable, summary.bypassed


def case_collects_what_runs() -> None:
    """The list is what ``compile_only`` compiles in the same launches, in the same order."""
    with compile_only(ARCH) as report:
        launches()
    names = [(want.kernel.jit_function.__qualname__, want.spec.describe()) for want in wanted()]
    assert names == [(binary.kernel.rsplit(".", 1)[-1], binary.signature) for binary in report.binaries]
    assert len(names) == 8


def case_parallel_is_serial() -> None:
    """Four threads make the same binaries as one; the second process reads all of them back, unchanged."""
    results = []
    for workers in (1, 4):
        cache = DiskCache(open_cache().folder / str(workers))
        steps: list[tuple[str, int, int, int]] = []

        def progress(*step: Any, steps: list[Any] = steps) -> None:
            steps.append((*step, threading.get_ident()))

        mark = MONITOR.count
        summary = compile_all(wanted(), ARCH, workers, progress, cache)
        assert counts(summary) == (8, 0, 8, 0, 0, 0) and summary.workers == workers, summary
        assert steps == [("compile", done, 8, threading.get_ident()) for done in range(1, 9)]
        assert MONITOR.totals(mark).count == 8 and MONITOR.totals(mark).cached == 0
        fresh = [compile_directly(want) for want in wanted()] if workers == 1 else []
        mark = MONITOR.count
        again = compile_all(wanted(), ARCH, workers, None, cache)
        assert counts(again) == (8, 8, 0, 0, 0, 0), again
        assert MONITOR.totals(mark).count == MONITOR.totals(mark).cached == 8
        results.append(binaries(wanted(), cache))
        assert not fresh or fresh == results[0], "a binary from the disk is the one that was compiled"
    assert results[0] == results[1]


def compile_directly(want: Any) -> Binary:
    """Compiled past the cache."""
    triton.knobs.compilation.always_compile = True
    made = make_binary(want.kernel.jit_function, want.spec, ARCH, CompileMonitor())
    triton.knobs.compilation.always_compile = False
    assert made.lookup is Lookup.BYPASSED and not made.stored
    return dataclasses.replace(made.binary, ms=0.0)


def case_write() -> None:
    """Fills the cache, for another process to read."""
    summary = compile_all(wanted(), ARCH)
    print(json.dumps(counts(summary)))


def case_heals() -> None:
    """Whatever is wrong with an entry, the kernel is compiled again, is right, and is stored again."""
    cache = open_cache()
    compile_all(wanted(), ARCH)
    good = binaries(wanted(), cache)
    sound = encode_binary(good[0])
    keys = [bytes.fromhex(path.name.split(".")[0]) for path in sorted(cache.folder.iterdir())]
    keys = [key for key in keys if cache.get(key)[1].startswith(sound[:3]) or b"\x7fELF" in cache.get(key)[1]]
    assert len(keys) == 8
    facts = json.loads(sound[8 : 8 + int.from_bytes(sound[:8], "little")])
    wrongs = [b"", b"not a kernel", sound[:-1], sound + b"\0", sound.replace(b"\x7fELF", b"\x7fELG", 1)]
    wrongs += [reworded(sound, facts | change) for change in ({"num_warps": -1}, {"symbol": 3}, {"launch_pdl": 1})]
    for key, wrong in zip(keys, wrongs, strict=True):
        assert cache.put(key, wrong)  # every check sum is right: only the content is not a kernel
    assert counts(compile_all(wanted(), ARCH)) == (8, 0, 8, 8, 0, 0)
    assert counts(compile_all(wanted(), ARCH)) == (8, 8, 0, 0, 0, 0)
    assert binaries(wanted(), cache) == good
    for key in keys[:3]:
        entry = cache.path(key).read_bytes()
        cache.path(key).write_bytes(entry[: len(entry) // 2])
    assert counts(compile_all(wanted(), ARCH)) == (8, 5, 3, 3, 0, 0)
    assert binaries(wanted(), cache) == good


def reworded(payload: bytes, facts: dict[str, Any]) -> bytes:
    """A stored binary with other facts."""
    rest = payload[8 + int.from_bytes(payload[:8], "little") :]
    text = json.dumps(facts).encode()
    return len(text).to_bytes(8, "little") + text + rest


def case_unwritable() -> None:
    """A cache folder that cannot be made costs compilations, and nothing else."""
    in_the_way = Path(os.environ["JITGRAPH_CACHE"]) / "file"
    in_the_way.write_text("")
    os.environ["JITGRAPH_CACHE"] = str(in_the_way)
    for _ in range(2):
        assert counts(compile_all(wanted(), ARCH)) == (8, 0, 8, 0, 8, 0)
    with compile_only(ARCH) as report:
        launches()
    assert len(report.binaries) == 8


def case_triton_is_left_alone() -> None:
    """Triton's settings and cache are neither used nor changed, whatever lies in it."""
    mine = Path(os.environ["JITGRAPH_CACHE"]) / "users_triton"
    mine.write_text("a file where a folder is expected: Triton itself could not compile here")
    triton.knobs.cache.dir = str(mine)
    settings, environment = dict(triton.knobs.cache.__dict__), dict(os.environ)
    assert counts(compile_all(wanted(), ARCH))[2] == 8
    assert dict(triton.knobs.cache.__dict__) == settings and dict(os.environ) == environment
    assert mine.is_file()


def plain_function(x: int) -> int:
    return x


def calling_body(x, BLOCK: tl.constexpr):
    tl.store(x, plain_function(BLOCK))


def case_failure() -> None:
    """A kernel that does not compile names itself, and what had not begun is given up."""
    x = torch.zeros(1, device="meta")
    with collect(ARCH) as wants:
        add[(1,)](x, x, x, 16, 0.5, None, BLOCK=64, num_warps=1)
        broken[(1,)](x, BLOCK=64)
        for block in (64, 128, 256, 512, 1024):
            write[(1,)](x, x, BLOCK=block)
    mark = MONITOR.count
    assert "too large" in failure(wants, "broken_body(x=*fp32:16, BLOCK=64; )", workers=1)
    compiled = [record.kernel.rsplit(".", 1)[-1] for record in MONITOR.since(mark)]
    assert compiled[0] == "add_body" and len(compiled) < 4, compiled
    with collect(ARCH) as wants:
        Kernel(calling_body, MONITOR)[(1,)](x, BLOCK=64)
    assert "plain_function" in failure(wants, "calling_body(x=*fp32:16, BLOCK=64; )")
    with collect(ARCH) as wants:
        write[(1,)](x, x, BLOCK=64, num_warps=3)
    assert "power of 2" in failure(wants, "num_warps=3")
    try:
        compile_all(wanted(), ARCH, progress=lambda *step: 1 // 0)
    except ZeroDivisionError:
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("jitgraph-compile")]
    else:
        raise AssertionError("the caller's own error must reach the caller")


def failure(wants: Wanted, text: str, workers: int | None = None) -> str:
    """What ``compile_all`` says about a kernel that does not compile."""
    try:
        compile_all(wants, ARCH, workers)
    except CompileError as error:
        assert text in str(error) and "sm_90" in str(error), error
        return str(error)
    raise AssertionError(f"{text}: not refused")


def case_without_bindings() -> None:
    """Where only Triton's own launcher can launch, everything is left to it."""
    registry.bindings = lambda: None
    registry.device_arch = lambda device: ARCH
    mark = MONITOR.count
    summary = compile_all(wanted(), torch.device("cuda", 0))
    assert (summary.total, summary.left, summary.compiled, MONITOR.count) == (8, 8, 0, mark)


if __name__ == "__main__":
    for case in sys.argv[2:]:
        os.environ["JITGRAPH_CACHE"] = os.path.join(sys.argv[1], case)
        os.makedirs(os.environ["JITGRAPH_CACHE"], exist_ok=True)
        globals()["case_" + case]()
