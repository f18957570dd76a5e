"""``jitgraph inspect``: what a model is, what it takes and how it will run, before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from jitgraph import cli_options as options
from jitgraph.model.default import DEFAULT_MODEL

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Unit:
    """In which sizes are shown."""

    name: str
    size: int

    def __call__(self, count: int) -> str:
        return f"{count / self.size:.2f} {self.name}"


def inspect(
    model: options.Model = DEFAULT_MODEL,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document, in bytes and milliseconds.")] = False,
) -> None:
    """Show what a model is, what it needs and how it runs, without loading a weight."""
    from jitgraph.engine.inspection import inspect_model

    facts = inspect_model(model, device, dtype)
    typer.echo(json.dumps(facts, indent=2) if as_json else "\n".join(lines(facts)))


def lines(facts: dict[str, Any]) -> list[str]:
    """The figures for a reader, in MiB where the largest is below a GiB."""
    largest = max(row["total"] for row in facts["memory"])
    unit = Unit("GiB", GIB) if largest >= GIB else Unit("MiB", MIB)
    rows = [
        ("model", facts["name"]),
        ("family", f"{facts['family']}, {_runs(facts)}"),
        ("parameters", f"{facts['parameters'] / 1e6:,.1f} million, {unit(facts['weight_bytes'])}"),
        ("dtype", f"{facts['dtype']} (its own: {facts['own_dtype']})"),
        ("files", _files(facts["stored"], unit)),
        ("quantisation", _quantised(facts["quantisation"])),
        ("context", f"{facts['context']} tokens, {facts['kv_bytes_per_token'] / 1024:.1f} KiB of KV cache each"),
        ("tokenizer", _tokens(facts)),
        ("floor", _floor(facts["floor"], unit)),
    ]
    return [*(f"{name:<13}{text}" for name, text in rows), "", *_memory_table(facts["memory"], unit)]


def _runs(facts: dict[str, Any]) -> str:
    if facts["runs"] == "native":
        return "native"
    return f"through its own forward in transformers ({facts['why_not_native']})"


def _files(stored: dict[str, Any] | None, unit: Unit) -> str:
    if stored is None:
        return "no weights here; random ones can be made (--weights random), a hub id is downloaded when it is used"
    kinds = ", ".join(sorted(stored["elements_by_dtype"]))
    return f"{stored['files']} safetensors, {unit(stored['file_bytes'])}, {stored['tensors']} tensors of {kinds}"


def _quantised(table: dict[str, Any] | None) -> str:
    return "none" if table is None else ", ".join(f"{name} {value}" for name, value in table.items())


def _tokens(facts: dict[str, Any]) -> str:
    found = facts["tokenizer"]
    if found is None:
        return "none: prompts must be token ids"
    chat = "with" if found["chat_template"] else "without"
    return f"{found['entries']} entries (embedding: {facts['vocab_size']} rows), {chat} a chat template"


def _floor(floor: dict[str, Any], unit: Unit) -> str:
    read = f"{unit(floor['bytes_per_token'])} read a token"
    if floor["device"] == "cpu":
        return f"{read}; no GPU here to say how fast"
    if floor["token_ms"] is None:
        return f"{read}; the bandwidth of {floor['device']} is not known (jitgraph bench measures it)"
    return f"{floor['token_ms']:.3f} ms a token on {floor['device']} ({read} at a nominal {floor['read_tb_s']} TB/s)"


def _memory_table(rows: list[dict[str, int]], unit: Unit) -> list[str]:
    """Memory by streams and context: weights, KV cache and workspace, and their sum."""
    head = f"{'streams':>7} {'context':>8} {'weights':>9} {'KV cache':>9} {'workspace':>9} {f'{unit.name} in all':>11}"
    body = [
        f"{row['streams']:>7} {row['context']:>8} {row['weights'] / unit.size:>9.2f} {row['kv'] / unit.size:>9.2f} "
        f"{row['workspace'] / unit.size:>9.2f} {row['total'] / unit.size:>11.2f}"
        for row in rows
    ]
    return [head, *body]
