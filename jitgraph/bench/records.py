"""The raw record of a run: samples as JSON lines while measuring, facts as small JSON files. No torch.

A run's folder has ``raw/<case>.jsonl`` (samples and blocks), ``raw/<case>.json`` (how the case went), and once
``raw/study.json`` (model and prompts), ``raw/gate.json`` and ``raw/ceiling.json``. Every table is made from these.
A ``.jsonl`` is written by its case's process alone, in append order; a line is whole or, after a crash, the last one.

A line's ``kind`` is ``sample`` (one measured value), ``block`` (what holds for all samples of a row that one process
took without a break) or ``event``: something that the runtime did while a sample was taken. Events are optional; a
record without any says nothing about whether there were some. ``restart`` counts the processes of a case from 0; a line
without one is of the only process.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

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
    """The samples of one row and what its processes noted about them."""

    values_ms: list[float] = field(default_factory=list)
    restarts: list[int] = field(default_factory=list)
    """Of each value, which process took it."""
    times_s: list[float] = field(default_factory=list)
    """Of each value, the wall clock after it."""
    events: list[Event] = field(default_factory=list)
    paths: dict[str, int] = field(default_factory=dict)
    peak_memory_gib: float | None = None
    host_memory_gib: float | None = None
    energy_j: float | None = None
    """What the device took while the row was measured, its pauses included; None where nothing told."""
    tokens: int = 0
    """Generated while ``energy_j`` was counted."""


@dataclass(frozen=True)
class BlockFacts:
    """What a process notes at the end of a row."""

    paths: Mapping[str, int] = field(default_factory=dict)
    """Counters of steps over the row's samples."""
    peak_memory_gib: float | None = None
    """Most so far, as the case tells it."""
    host_memory_gib: float | None = None
    """Most so far of the case's processes, in the host's memory."""
    energy_j: float | None = None
    tokens: int = 0


class RawWriter:
    """Writes ``raw/<case>.jsonl`` line by line. Lines reach the file at ``flush``, which stays out of timed code."""

    def __init__(self, folder: Path, case: str, restart: int | None = None) -> None:
        """``restart``: the process's number, to add to what earlier ones wrote; None begins anew.

        Raises:
            OSError: the file cannot be opened.
        """
        self._restart = {} if restart is None else {"restart": restart}
        mode = "w" if restart is None else "a"
        self._file: IO[str] = raw_path(folder, f"{case}.jsonl").open(mode, encoding="utf-8")

    def sample(self, key: BlockKey, iteration: int, value_ms: float, time_s: float) -> None:
        """One measured value; ``time_s`` is the wall clock, for the reader of the file."""
        self._write("sample", key, iteration=iteration, value_ms=value_ms, timestamp=time_s)

    def event(self, key: BlockKey, event: Event) -> None:
        """Something the runtime did while the row's sample ``event.iteration`` was taken."""
        assert event.name in EVENTS, f"{event.name} is none of {EVENTS}"
        self._write("event", key, event=event.name, iteration=event.iteration, timestamp=event.time_s)

    def block(self, key: BlockKey, facts: BlockFacts) -> None:
        """What holds for all samples of a row."""
        self._write("block", key, **{**vars(facts), "paths": dict(facts.paths)})

    def _write(self, kind: str, key: BlockKey, **about: Any) -> None:
        self._file.write(json.dumps({"kind": kind, **key.to_json(), **self._restart, **about}) + "\n")

    def flush(self) -> None:
        """Hands the lines to the system.

        Raises:
            OSError: they cannot be written, as when the disk is full.
        """
        self._file.flush()

    def close(self) -> None:
        """Flushes and closes.

        Raises:
            OSError: as ``flush``; the file is closed nevertheless.
        """
        self._file.close()


def raw_path(folder: Path, name: str) -> Path:
    """A file of the raw record."""
    return folder / RAW / name


def read_blocks(path: Path) -> dict[BlockKey, Block]:
    """All rows' samples of one ``.jsonl``, in file order; a torn last line (a killed process) is left out.

    Raises:
        OutputError: a line in the middle that is no record, or that is another case's.
    """
    blocks: dict[BlockKey, Block] = {}
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            key = key_of(line)
            if key.case != path.stem:
                raise ValueError(f"a line of {key.case}")
            _take(line, blocks.setdefault(key, Block()))
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise OutputError(
                f"line {number} of {path} is no benchmark record: remove the file and run its case again"
            ) from error
    return blocks


def key_of(line: Mapping[str, Any]) -> BlockKey:
    """The conditions that a line's fields tell.

    Raises:
        KeyError: one of them is missing.
    """
    return BlockKey(*(line[name] for name in ("case", "protocol", "metric", "pacing", "prompt_tokens")))


def _take(line: Mapping[str, Any], block: Block) -> None:
    if line["kind"] == "sample":
        value = float(line["value_ms"])
        block.restarts.append(int(line.get("restart", 0)))
        block.times_s.append(float(line["timestamp"]))
        block.values_ms.append(value)
    elif line["kind"] == "event":
        block.events.append(_event(line))
    else:
        block.paths = {name: block.paths.get(name, 0) + count for name, count in line["paths"].items()}
        block.peak_memory_gib = _most(block.peak_memory_gib, line["peak_memory_gib"])
        block.host_memory_gib = _most(block.host_memory_gib, line.get("host_memory_gib"))
        if line.get("energy_j") is not None:
            block.energy_j = (block.energy_j or 0.0) + float(line["energy_j"])
            block.tokens += int(line["tokens"])


def _most(one: float | None, other: float | None) -> float | None:
    known = [value for value in (one, other) if value is not None]
    return max(known) if known else None


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
