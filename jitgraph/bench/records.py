"""The raw record of a run: samples as JSON lines while measuring, facts as small JSON files. No torch.

A run's folder has ``raw/<case>.jsonl`` (samples and blocks), ``raw/<case>.json`` (how the case went), and once
``raw/study.json`` (model and prompts), ``raw/gate.json`` and ``raw/ceiling.json``. Every table is made from these.
A ``.jsonl`` is written by its case's process alone, in append order; a line is whole or, after a crash, the last one.

A line's ``kind`` is ``sample`` (one measured value), ``block`` (what holds for all samples of a row) or ``event``:
something that the runtime did while a sample was taken. Events are optional; a record without any says nothing about
whether there were some.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from jitgraph.errors import OutputError

RAW = "raw"
EVENTS = ("capture", "eviction", "collection")
"""What an event can be: a graph captured, a graph destroyed, a garbage collection of Python's."""


@dataclass(frozen=True)
class BlockKey:
    """The conditions that the samples of one row share."""

    case: str
    protocol: str
    metric: str
    pacing: str
    prompt_tokens: int

    def to_json(self) -> dict[str, Any]:
        """As the fields of a line."""
        return dict(vars(self))


@dataclass(frozen=True)
class Event:
    """One of ``EVENTS``, beside the samples of a row."""

    name: str
    iteration: int
    """Of the sample that was being taken."""
    time_s: float
    """On the wall clock, as in a sample's ``timestamp``."""


@dataclass
class Block:
    """The samples of one row and what its process noted about them."""

    values_ms: list[float] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    paths: dict[str, int] = field(default_factory=dict)
    peak_memory_gib: float | None = None


class RawWriter:
    """Writes ``raw/<case>.jsonl`` line by line. Lines reach the file at ``flush``, which stays out of timed code."""

    def __init__(self, folder: Path, case: str) -> None:
        self._file: TextIO = raw_path(folder, f"{case}.jsonl").open("w", encoding="utf-8")

    def sample(self, key: BlockKey, iteration: int, value_ms: float, time_s: float) -> None:
        """One measured value; ``time_s`` is the wall clock, for the reader of the file."""
        line = {"kind": "sample", **key.to_json(), "iteration": iteration, "value_ms": value_ms, "timestamp": time_s}
        self._file.write(json.dumps(line) + "\n")

    def event(self, key: BlockKey, event: Event) -> None:
        """Something the runtime did while the row's sample ``event.iteration`` was taken."""
        assert event.name in EVENTS, f"{event.name} is none of {EVENTS}"
        about = {"event": event.name, "iteration": event.iteration, "timestamp": event.time_s}
        self._file.write(json.dumps({"kind": "event", **key.to_json(), **about}) + "\n")

    def block(self, key: BlockKey, paths: Mapping[str, int], peak_memory_gib: float | None) -> None:
        """What holds for all samples of a row: the path counters over them, and the memory so far."""
        line = {"kind": "block", **key.to_json(), "paths": dict(paths), "peak_memory_gib": peak_memory_gib}
        self._file.write(json.dumps(line) + "\n")

    def flush(self) -> None:
        """Hands the lines to the system."""
        self._file.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self._file.close()


def raw_path(folder: Path, name: str) -> Path:
    """A file of the raw record."""
    return folder / RAW / name


def read_blocks(path: Path) -> dict[BlockKey, Block]:
    """All rows' samples of one ``.jsonl``, in file order; a torn last line (a killed process) is left out.

    Raises:
        OutputError: a line in the middle that is no record.
    """
    blocks: dict[BlockKey, Block] = {}
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            key = BlockKey(*(line[name] for name in ("case", "protocol", "metric", "pacing", "prompt_tokens")))
            block = blocks.setdefault(key, Block())
            if line["kind"] == "sample":
                block.values_ms.append(float(line["value_ms"]))
            elif line["kind"] == "event":
                block.events.append(_event(line))
            else:
                block.paths = {name: block.paths.get(name, 0) + count for name, count in line["paths"].items()}
                block.peak_memory_gib = line["peak_memory_gib"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise OutputError(
                f"line {number} of {path} is no benchmark record: remove the file and run its case again"
            ) from error
    return blocks


def _event(line: Mapping[str, Any]) -> Event:
    if line["event"] not in EVENTS:
        raise ValueError(f"no event: {line['event']}")
    return Event(line["event"], int(line["iteration"]), float(line["timestamp"]))


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where the file does not exist.

    Raises:
        OutputError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError("not an object")
        return record
    except (ValueError, OSError) as error:
        raise OutputError(
            f"{path} cannot be read as a benchmark record: remove it or choose another --output"
        ) from error


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a JSON object whole: a reader sees the old file or the new one."""
    write_text(path, json.dumps(record, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file whole.

    Raises:
        OutputError: the folder cannot be written.
    """
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_text(text, encoding="utf-8", newline="")
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written ({error.strerror}): free space or choose another --output"
        ) from error


def prepare_folder(folder: Path) -> None:
    """Makes the output folder and proves that it can be written.

    Raises:
        OutputError: it cannot.
    """
    try:
        (folder / RAW).mkdir(parents=True, exist_ok=True)
        for place in (folder, folder / RAW):
            with tempfile.TemporaryFile(dir=place):
                pass
    except OSError as error:
        raise OutputError(
            f"the output folder {folder} cannot be written ({error.strerror}): choose another --output"
        ) from error
