"""The record of one request, and the JSONL file that keeps one on each line. Written by the run's own thread.

Times are milliseconds of the client's monotonic clock. Those of tokens count from the send of their request, others
from the start of the run.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from jitgraph.errors import OutputError

RECORDS = "requests.jsonl"
SUMMARY = "summary.json"
OK, CANCELLED, ERROR = "ok", "cancelled", "error"


@dataclass(frozen=True)
class Record:
    """What became of one request."""

    index: int
    outcome: str
    """``ok``, ``cancelled`` (by this client, as planned) or ``error``."""
    due_ms: float | None
    """Scheduled arrival; None in a closed loop."""
    send_ms: float
    """When it was sent. What follows counts from here."""
    end_ms: float
    """When its stream was over, from the start of the run."""
    prompt_tokens: int
    """As the server counted them, else as asked."""
    asked_tokens: int
    """Most output tokens that were asked for."""
    tokens: int
    """Output tokens as the server counted them, else the tokens that came."""
    token_ms: tuple[float, ...]
    """When each token came: the time of the bytes that completed its event, from the send. An event with several tokens
    has its time several times; a server that does not say how many it holds counts one."""
    finish_reason: str | None = None
    cancel_after: int | None = None
    error: str | None = None
    """Kind of error, such as ``http 429`` or ``timeout``."""
    message: str | None = None

    @property
    def queue_ms(self) -> float | None:
        """From the scheduled arrival to the send; None in a closed loop."""
        return None if self.due_ms is None else self.send_ms - self.due_ms

    @property
    def ttft_ms(self) -> float | None:
        """From the send to the first token; None where none came."""
        return self.token_ms[0] if self.token_ms else None

    @property
    def e2e_ms(self) -> float | None:
        """From the send to the last token; None where none came."""
        return self.token_ms[-1] if self.token_ms else None

    @property
    def tpot_ms(self) -> float | None:
        """(e2e - TTFT) / (tokens - 1); None under two tokens."""
        if not self.token_ms or self.tokens < 2:
            return None
        return (self.token_ms[-1] - self.token_ms[0]) / (self.tokens - 1)

    def as_json(self) -> dict[str, Any]:
        """The fields, with the metrics that follow from them."""
        metrics = {name: getattr(self, name) for name in ("queue_ms", "ttft_ms", "tpot_ms", "e2e_ms")}
        return {**asdict(self), **metrics}


def from_json(document: dict[str, Any]) -> Record:
    """The record that ``as_json`` made a document of."""
    kept = {field.name: document[field.name] for field in fields(Record)}
    return Record(**{**kept, "token_ms": tuple(kept["token_ms"])})


def read_records(path: Path) -> list[Record]:
    """All records of a file."""
    return [from_json(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


class Writer:
    """Appends records to a new file, each flushed, so that nothing measured is lost to an interrupt. A run that fails
    before its first record leaves nothing behind.

    Raises:
        OutputError: the folder holds a run already, or cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / RECORDS
        self._written = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: TextIO = self._path.open("x", encoding="utf-8")
        except FileExistsError:
            raise OutputError(f"{folder} holds a load run already or is a file: choose another --output") from None
        except OSError as error:
            raise _not_written(folder, error) from error

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is not None and not self._written:
            self._path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it holds something else
                self._path.parent.rmdir()

    def add(self, record: Record) -> None:
        """Writes one record."""
        try:
            self._file.write(json.dumps(record.as_json()) + "\n")
            self._file.flush()
            self._written += 1
        except OSError as error:
            raise _not_written(self._path, error) from error


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Writes ``summary.json``.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise _not_written(folder, error) from error


def gaps_ms(records: Sequence[Record]) -> list[float]:
    """Times between consecutive tokens of all records; 0 between tokens of one event."""
    return [
        later - earlier
        for record in records
        for earlier, later in zip(record.token_ms, record.token_ms[1:], strict=False)
    ]


def _not_written(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path} cannot be written ({error.strerror}): choose another --output or free the disk")
