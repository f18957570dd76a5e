"""Runs with known times for the tests of reports: written straight into a folder's raw record, nothing is measured."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_fakes import MODEL, RATES

from jitgraph.bench.plan import LINEARS
from jitgraph.bench.records import BlockFacts, BlockKey, Event, RawWriter, prepare_folder, raw_path, write_json
from jitgraph.bench.study import Study, load_study

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
NO_MATPLOTLIB = "matplotlib is not installed (the extra [bench] brings it)"
NASTY = '</title><script>window.hacked=1</script><img src=x onerror="window.hacked=2"> & "so on"'
BASES_MS = {"baseline": 24.0, "cuda-graph": 12.0, "jit": 18.0, "hybrid": 6.0}
LENGTHS = (10, 100)
PHASES_MS = {"load": 500.0, "capture": 250.0}
READY_MS = 1500.0


def write_run(
    folder: Path,
    bases_ms: Mapping[str, float] = BASES_MS,
    *,
    emulated: bool = False,
    lengths: Sequence[int] = LENGTHS,
    pacings: Sequence[str] = ("interactive", "sustained"),
    events: Sequence[Event] = (),
    spread: float = 0.01,
    device: str = "Fake GPU",
    facts: Mapping[str, Mapping[str, Any]] | None = None,
) -> Study:
    """A folder with a record: sample ``i`` of ``n`` takes ``base * (1 + length / 1000) * (1 + spread * i / n)``; a gap
    between tokens is a tenth of that. TensorRT-LLM is not installed. ``events`` are in the hybrid's first ITL row."""
    prepare_folder(folder)
    write_json(folder / "environment.json", {"device_name": device, "torch": "2.13", "driver": None})
    write_json(raw_path(folder, "study.json"), {"model": MODEL, "prompts": {}})
    write_json(raw_path(folder, "ceiling.json"), {"by_pacing": dict.fromkeys(pacings, RATES)})
    for case, base in bases_ms.items():
        told = {"status": "complete", "reason": "", "emulated": emulated, **(facts or {}).get(case, {})}
        if case != "baseline":
            told.setdefault("ready_ms", PHASES_MS)
        write_json(raw_path(folder, f"{case}.json"), told)
        _write_samples(folder, case, base, lengths, pacings, events if case == "hybrid" else (), spread)
    refused = {"status": "not installed", "reason": "not installed: run the script"}
    write_json(raw_path(folder, "tensorrt-llm.json"), refused | dict((facts or {}).get("tensorrt-llm", {})))
    writer = RawWriter(folder, LINEARS)
    for pacing in pacings:
        for length in (1, *lengths):
            writer.sample(BlockKey(LINEARS, "ttft", "ttft_ms", pacing, length), 0, 4.0, 0.0)
    writer.close()
    return load_study(folder)


def _write_samples(
    folder: Path,
    case: str,
    base: float,
    lengths: Sequence[int],
    pacings: Sequence[str],
    events: Sequence[Event],
    spread: float,
) -> None:
    writer = RawWriter(folder, case)

    def row(protocol: str, metric: str, pacing: str, length: int, scale: float, n: int) -> BlockKey:
        key = BlockKey(case, protocol, metric, pacing, length)
        for i in range(n):
            writer.sample(key, i, scale * (1 + length / 1000) * (1 + spread * i / n), 0.0)
        writer.block(key, BlockFacts({"exact": n}, 3.0))
        return key

    ready = BlockKey(case, "warmup", "ready_s", "interactive", 0)
    writer.sample(ready, 0, READY_MS, 0.0)
    row("warmup", "ttft_ms", "interactive", lengths[0], 3 * base, 1)
    for pacing in pacings:
        for length in lengths:
            row("ttft", "ttft_ms", pacing, length, base, 5)
            row("p99", "ttft_ms", pacing, length, base, 100)
            key = row("p99", "itl_ms", pacing, length, base / 10, 126)
            if (pacing, length) == (pacings[0], lengths[0]):
                for event in events:
                    writer.event(key, event)
    writer.close()


def write_runtime(folder: Path, part: str, samples: Mapping[str, Any], emulated: bool = False) -> None:
    """A part of the runtime's own record beside a run, as ``benchmarks/runtime.py`` writes it."""
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    record = {"samples": samples, "environment": environment, "model": {"name": "fake"}, "emulated": emulated}
    write_json(raw_path(folder, f"runtime-{part}.json"), record)
