"""The command behind ``benchmarks/runtime.py``: which parts run, in which order, and what becomes of them."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jitgraph.bench.environment import collect_environment
from jitgraph.bench.model_facts import model_facts
from jitgraph.bench.protocol import still_collector
from jitgraph.bench.records import prepare_folder
from jitgraph.errors import ConfigError, JitgraphError
from runtime_parts import host, isolated, latency, long, ready, record, rolling, show, steady
from runtime_parts.lab import Lab, Result
from runtime_parts.scale import FULL, QUICK, Scale

ABOUT = "Measures the runtime: latency against the machine's own, tails, rolling graphs, soak, readiness, host time."


class Part(NamedTuple):
    """One part: what measures it, and about how long that takes on an H200."""

    measure: Callable[[Lab], Result]
    expected_s: int


PARTS = {
    "ceiling": Part(latency.ceiling, 8),
    "ttft": Part(latency.ttft, 38),
    "decode": Part(latency.decode, 13),
    "tails": Part(latency.tails, 95),
    "capturing": Part(rolling.capturing, 20),
    "unseen": Part(rolling.unseen, 17),
    "sweep": Part(steady.sweep, 30),
    "soak": Part(steady.soak, 110),
    "window": Part(long.window, 80),
    "invariant": Part(long.invariant, 15),
    "isolated": Part(isolated.isolated, 200),
    "ready": Part(ready.ready, 70),
    "host": Part(host.host, 30),
}
"""In the order in which they run; *host* slows down what comes after it, so it is the last."""


def main(arguments: list[str] | None = None) -> int:
    """Command entry: 0 where everything asked for was measured, 1 where a part failed, 2 for a mistake."""
    options = _parser().parse_args(arguments)
    folder = Path(options.output)
    try:
        if options.merge:
            _show(folder)
            return 0
        return _run(folder, _parts(options.parts), options)
    except JitgraphError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="runtime.py", description=ABOUT)
    parser.add_argument("--output", required=True, help="folder of runtime.json and raw/")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}; all where not given")
    parser.add_argument("--merge", action="store_true", help="measure nothing, make runtime.json of what is there")
    parser.add_argument("--model", help="preset or checkpoint folder (default: llama-2-7b on CUDA, tiny on the CPU)")
    parser.add_argument("--weights", default="random", choices=("random", "checkpoint"))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--quick", action="store_true", help="few samples: that it runs, not how fast")
    parser.add_argument("--soak-layers", type=int, help="layers of the model that soaks, if not all")
    return parser


def _parts(text: str) -> list[str]:
    """The parts named, in the order of ``PARTS``.

    Raises:
        ConfigError: an unknown one.
    """
    wanted = {name.strip() for name in text.split(",") if name.strip()}
    unknown = sorted(wanted - set(PARTS))
    if unknown or not wanted:
        raise ConfigError(f"--parts: {', '.join(unknown) or 'nothing'} is no part; choose from {', '.join(PARTS)}")
    return [name for name in PARTS if name in wanted]


def _run(folder: Path, parts: list[str], options: argparse.Namespace) -> int:
    scale: Scale = QUICK if options.quick else FULL
    prepare_folder(folder)
    lab = Lab(options.model, options.weights, options.device, scale, options.soak_layers, _say)
    identity = {
        "environment": collect_environment(str(lab.device)),
        "model": model_facts(lab.plan, lab.source.spec),
        "emulated": not lab.cuda,
        "quick": options.quick,
    }
    record.check_same(folder, identity)
    expected = sum(PARTS[part].expected_s for part in parts)
    about = "" if options.quick else f", about {expected} s on an H200"
    _say(f"{lab.plan.model} on {identity['environment']['device_name']}: {len(parts)} parts{about}")
    failed = []
    try:
        for part in parts:
            if not _measure(folder, part, lab, identity, options.quick):
                failed.append(part)
    finally:
        lab.close()
    if record.read_raw(folder):
        _show(folder)
    if failed:
        _say(f"Failed: {', '.join(failed)}")
    return 1 if failed else 0


def _measure(folder: Path, part: str, lab: Lab, identity: dict[str, Any], quick: bool) -> bool:
    """Runs one part and writes its raw file; False where it failed, which others need not."""
    about = "" if quick else f", about {PARTS[part].expected_s} s"
    _say(f"{part}{about}")
    begin = time.monotonic()
    try:
        with still_collector():
            result = PARTS[part].measure(lab)
    except Exception:
        traceback.print_exc()
        return False
    seconds = time.monotonic() - begin
    conditions = {"pause_ms": lab.scale.pause_s * 1e3, **result.conditions}
    found = {"samples": result.samples, "counters": result.counters, "conditions": conditions}
    record.write_raw(folder, part, {"part": part, **identity, "seconds": seconds, **found})
    _say(f"{part}: done in {seconds:.0f} s")
    return True


def _show(folder: Path) -> None:
    """Makes ``runtime.json`` and shows it."""
    for line in show.lines(record.merge(folder)):
        print(line)
    print(f"Written to {folder / 'runtime.json'}")


def _say(text: str) -> None:
    print(text, flush=True)
