"""A folder's raw record read back as rows: everything that is shown or written later is computed from this alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jitgraph.bench import jobs
from jitgraph.bench.floors import Floors, ceilings
from jitgraph.bench.plan import ALL_CASES, DECODE_TOKENS, LINEARS, PACINGS, PROTOCOLS, WARMUP
from jitgraph.bench.records import Block, BlockKey, Event, raw_path, read_blocks, read_json
from jitgraph.bench.stats import Summary, summarise
from jitgraph.bench.watch import NOT_WATCHED, WATCH, Machine, Watched, beside, read_watch
from jitgraph.errors import OutputError

METRICS = (
    *("ttft_ms", "engine_ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"),
    *("ready_s", "ready_cold_s", "ready_warm_s", "first_token_cold_s", "first_token_warm_s"),
)
"""In the order of tables. Those in seconds are of a process's start."""


@dataclass(frozen=True)
class Row:
    """One line of a table: the conditions, the statistics (in the metric's unit), the ceiling, and reservations."""

    key: BlockKey
    summary: Summary
    ceiling_ms: float | None
    ratio: float | None
    """Mean over ceiling."""
    peak_memory_gib: float | None
    paths: Mapping[str, int]
    device: str
    emulated: bool
    notes: tuple[str, ...]
    """``emulated``, ``ungated``, and how its case was cut short, where that holds."""
    values: tuple[float, ...]
    """The samples in the order in which they were taken, in the metric's unit."""
    events: tuple[Event, ...]
    """What the runtime did meanwhile, where the record has it."""
    restarts: tuple[int, ...] = ()
    """Of each value, which process took it."""
    host_memory_gib: float | None = None
    energy_j_per_token: float | None = None
    """What the device took, pauses included, by the tokens made meanwhile."""
    machine: Machine = NOT_WATCHED
    """Clocks, power and heat beside the samples."""


@dataclass(frozen=True)
class Study:
    """A run's folder."""

    environment: Mapping[str, Any]
    model: Mapping[str, Any]
    ceiling: Mapping[str, Any]
    """Empty where none was measured."""
    cases: Mapping[str, Mapping[str, Any]]
    """How each case that was asked for went: ``status``, ``reason`` and what it told about itself."""
    rows: tuple[Row, ...]

    @property
    def device(self) -> str:
        """The device's name."""
        return str(self.environment.get("device_name", "unknown device"))

    def select(self, protocol: str, metric: str, pacing: str) -> dict[tuple[str, int], Row]:
        """(case, prompt tokens) to row."""
        wanted = (protocol, metric, pacing)
        return {
            (row.key.case, row.key.prompt_tokens): row
            for row in self.rows
            if (row.key.protocol, row.key.metric, row.key.pacing) == wanted
        }

    def emulated(self, case: str) -> bool:
        """Whether a case's graphs are emulated."""
        return bool(self.cases.get(case, {}).get("emulated", False))


def load_study(folder: Path) -> Study:
    """Reads a run's folder.

    Raises:
        OutputError: it holds no run, or a damaged one.
    """
    environment = read_json(folder / "environment.json")
    study = read_json(raw_path(folder, "study.json"))
    if environment is None or study is None:
        raise OutputError(f"{folder} holds no benchmark run: jitgraph bench --output {folder} makes one")
    model, device = study["model"], str(environment["device_name"])
    floors = Floors.from_model(model)
    measured = read_json(raw_path(folder, "ceiling.json")) or {}
    ceiling = ceilings(measured, floors, _linears_ms(raw_path(folder, f"{LINEARS}.jsonl")), device)
    watched = read_watch(raw_path(folder, WATCH))
    cases: dict[str, Mapping[str, Any]] = {}
    rows: list[Row] = []
    for name in (*ALL_CASES, LINEARS):
        facts = read_json(raw_path(folder, f"{name}.json"))
        samples = raw_path(folder, f"{name}.jsonl")
        if facts is None and not samples.exists():
            continue
        cases[name] = facts or {"status": jobs.RUNNING}
        if samples.exists():
            try:
                blocks = read_blocks(samples)
            except OutputError as error:  # one case's record costs no other's
                cases[name] = {**cases[name], "status": jobs.DAMAGED, "reason": str(error)}
                continue
            rows += [
                _row(key, block, cases[name], device, floors, ceiling, watched)
                for key, block in blocks.items()
                if block.values_ms
            ]
    return Study(environment, model, ceiling, cases, tuple(sorted(rows, key=_order)))


def _linears_ms(samples: Path) -> dict[tuple[str, int], float]:
    """(pacing, tokens) to the mean time of the matrix products; empty where they were not measured."""
    if not samples.exists():
        return {}
    blocks = read_blocks(samples)
    return {(k.pacing, k.prompt_tokens): sum(b.values_ms) / len(b.values_ms) for k, b in blocks.items() if b.values_ms}


def _order(row: Row) -> tuple[int, int, int, int, int]:
    key = row.key
    return (
        (*ALL_CASES, LINEARS).index(key.case),
        (*PROTOCOLS, WARMUP).index(key.protocol),
        METRICS.index(key.metric),
        PACINGS.index(key.pacing),
        key.prompt_tokens,
    )


def _row(
    key: BlockKey,
    block: Block,
    facts: Mapping[str, Any],
    device: str,
    floors: Floors,
    ceiling: Mapping[str, Any],
    watched: Sequence[Watched],
) -> Row:
    scale = 1e-3 if key.metric.endswith("_s") else 1.0
    values = tuple(value * scale for value in block.values_ms)
    summary = summarise(values, block.restarts)
    floor = _floor_ms(key, floors, ceiling)
    return Row(
        key=key,
        summary=summary,
        ceiling_ms=floor,
        ratio=None if floor is None else summary.mean / floor,
        peak_memory_gib=block.peak_memory_gib,
        paths=block.paths,
        device=device,
        emulated=bool(facts.get("emulated", False)),
        notes=tuple(_notes(facts)),
        values=values,
        events=tuple(block.events),
        restarts=tuple(block.restarts),
        host_memory_gib=block.host_memory_gib,
        energy_j_per_token=block.energy_j / block.tokens if block.energy_j is not None and block.tokens else None,
        machine=beside(watched, block.times_s, values if scale == 1.0 else ()),
    )


def _notes(facts: Mapping[str, Any]) -> Iterable[str]:
    if facts.get("emulated"):
        yield "emulated"
    if facts.get("ungated"):
        yield "ungated"
    elif facts.get("gate_checked") == []:
        yield "gate checked nothing"
    if facts.get("transport") == "http":
        yield "over HTTP"
    if facts.get("cached_tokens"):
        yield "cached prompts"
    if turns := (facts.get("plan") or {}).get("interleave"):
        yield f"interleaved by {turns}"
    if facts.get("shared_gpu"):
        yield "GPU in use by others"
    if facts.get("resumed"):
        yield "resumed"
    if facts.get("status") in jobs.CUT_SHORT:
        yield jobs.INTERRUPTED if facts["status"] == jobs.RUNNING else str(facts["status"])
    elif facts.get("status") == jobs.FAILED:
        yield "failed later"


def _floor_ms(key: BlockKey, floors: Floors, ceiling: Mapping[str, Any]) -> float | None:
    """The floor under the row's own pacing; none for a ready time, or where no ceiling was measured."""
    rates = ceiling.get("by_pacing", {}).get(key.pacing) or (ceiling if ceiling else None)
    if rates is None or key.metric.endswith("_s"):
        return None
    gap = floors.decode_ms(key.prompt_tokens + DECODE_TOKENS // 2, rates["read_tb_s"])
    if key.metric in ("itl_ms", "tpot_ms"):
        return gap
    first = floors.prompt_ms(key.prompt_tokens, rates["read_tb_s"], rates["gemm_tflops"])
    return first + (DECODE_TOKENS - 1) * gap if key.metric == "e2e_ms" else first
