"""Request records and the request log: what a line says, what hostile names and broken disks cannot do."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jitgraph.errors import OutputError
from jitgraph.ipc.messages import Tokens
from jitgraph.server.records import MAX_TEXT, RequestRecord
from jitgraph.server.request_log import RequestLog, log_line

MS = 1_000_000
ROOT = Path(__file__).resolve().parent.parent


def record(name: str = "r", **fields: Any) -> RequestRecord:
    """A finished request without sequences."""
    made = RequestRecord(name, "/v1/completions", **fields)
    made.finish(200)
    return made


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


def until(condition: Callable[[], bool]) -> None:
    """Waits for another thread; the limit is for hangs."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# ------------------------------------------------------------------------------------------------------------- a line


def test_what_a_line_says() -> None:
    """Two sequences: the one that is first gives the TTFT, the slowest the rest."""
    made = RequestRecord("req-1", "/v1/completions", "tiny", "key-a", True, received_ns=10 * MS, received_at=1e9)
    for at, gap, reason in ((20, 3, "stop"), (30, 5, None)):
        sequence = made.begin(7)
        first = Tokens(1, (5,), (at * MS,), cached_tokens=4, received_ns=11 * MS, launched_ns=(at - 6) * MS)
        sequence.take(first, at * MS)
        sequence.take(Tokens(1, (5,), ((at + gap) * MS,)), (at + gap) * MS)
        sequence.take(Tokens(1, (), (), finish_reason=reason), (at + 50) * MS)
    made.finish(200, "engine_lost")
    made.finished_ns = 60 * MS
    assert made.as_document() == {
        "time": datetime.fromtimestamp(1e9, timezone.utc).isoformat(timespec="milliseconds"),
        "request_id": "req-1",
        "client": "key-a",
        "route": "/v1/completions",
        "model": "tiny",
        "streamed": True,
        "status": 200,
        "error_kind": "engine_lost",
        "finish_reasons": ["stop", None],
        "prompt_tokens": 14,
        "cached_tokens": 8,
        "completion_tokens": 4,
        "ttft_ms": 10.0,
        "tpot_ms": 5.0,
        "itl_max_ms": 5.0,
        "queue_ms": 13.0,
        "prefill_ms": 6.0,
        "latency_ms": 25.0,
        "response_ms": 50.0,
    }


def test_what_did_not_happen_is_null() -> None:
    made = RequestRecord("r", "/v1/completions")
    made.begin(7)
    made.finish(0)
    document = json.loads(log_line(made))
    assert document["status"] == 499, "nobody waited for one"
    for name in ("ttft_ms", "tpot_ms", "itl_max_ms", "queue_ms", "prefill_ms", "latency_ms"):
        assert document[name] is None
    assert document["response_ms"] >= 0 and document["completion_tokens"] == 0


def test_a_stop_string_ends_a_sequence_before_the_engine_knows() -> None:
    made = RequestRecord("r", "/v1/completions")
    sequence = made.begin(7)
    sequence.take(Tokens(1, (5,), (1 * MS,)), 2 * MS)
    sequence.finish_reason = "stop"
    sequence.take(Tokens(1, (6,), (3 * MS,), finish_reason="cancelled"), 4 * MS)
    made.finish(200)
    assert sequence.finish_reason == "stop" and sequence.completion_tokens == 1 and sequence.completed


HOSTILE = [
    '"}\n{"status":200',
    "\x1b[31mred\x07",
    "\r\nX: y",
    "\u2028\u2029\x85",
    "\x00\x7f",
    "\ud800",
    "漢字 🙂",
    "\\",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_stay_inside_one_line_of_ascii(text: str) -> None:
    made = RequestRecord(text, text, text, text)
    made.finish(400, text)
    line = log_line(made)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert all(32 <= byte < 127 for byte in line[:-1])
    found = json.loads(line)
    assert [found[name] for name in ("request_id", "route", "model", "client", "error_kind")] == [text] * 5


@given(st.text(max_size=2 * MAX_TEXT))
def test_any_name_gives_valid_json_of_bounded_length(text: str) -> None:
    line = log_line(record(text, model=text, client=text))
    assert line.count(b"\n") == 1 and len(line) < 3 * 12 * MAX_TEXT + 1000
    assert json.loads(line)["request_id"][:MAX_TEXT] == text[:MAX_TEXT]


# ------------------------------------------------------------------------------------------------------------ the log


def test_lines_come_in_order_and_only_for_their_owner(tmp_path: Path) -> None:
    path = tmp_path / "requests.log"
    path.write_text(log_line(record("before")).decode())
    log = RequestLog(path)
    for index in range(100):
        log(record(str(index)))
    log.close()
    assert [line["request_id"] for line in lines(path)] == ["before", *(str(index) for index in range(100))]
    assert log.dropped == 0
    fresh = RequestLog(tmp_path / "fresh.log")
    fresh.close()
    assert (tmp_path / "fresh.log").stat().st_mode & 0o777 == 0o600


def test_standard_error() -> None:
    code = (
        "from jitgraph.server.request_log import RequestLog; from jitgraph.server.records import RequestRecord\n"
        "log = RequestLog('-'); record = RequestRecord('r', '/x'); record.finish(200); log(record); log.close()\n"
        "import sys; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60, check=True)
    assert json.loads(done.stderr)["request_id"] == "r" and done.stdout == b""


def test_a_log_that_cannot_be_opened_is_said_at_once(tmp_path: Path) -> None:
    for wrong in (tmp_path, tmp_path / "no folder" / "requests.log", "/proc/nowhere/requests.log"):
        with pytest.raises(OutputError, match=r"the request log .* cannot be written"):
            RequestLog(wrong)


def test_a_file_that_was_moved_away_is_made_anew(tmp_path: Path) -> None:
    path, moved = tmp_path / "requests.log", tmp_path / "requests.log.1"
    log = RequestLog(path)
    log(record("first"))
    until(lambda: path.stat().st_size > 0)
    path.rename(moved)
    log(record("second"))
    log.close()
    assert [line["request_id"] for line in lines(moved)] == ["first"]
    assert [line["request_id"] for line in lines(path)] == ["second"] and log.dropped == 0


def test_a_disk_that_fails_costs_lines_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    path = folder / "requests.log"
    log = RequestLog(path)
    log(record("first"))
    until(lambda: path.stat().st_size > 0)
    away = tmp_path / "away"
    folder.rename(away)
    log(record("lost"))
    until(lambda: log.dropped == 1)
    away.rename(folder)
    log(record("second"))
    log.close()
    assert [line["request_id"] for line in lines(path)] == ["first", "second"] and log.dropped == 1


def test_a_full_disk_tears_one_line_only(tmp_path: Path) -> None:
    """The limit of a file's size is what a test can have of a full disk: a write that takes part of a line."""
    path = tmp_path / "requests.log"
    log = RequestLog(path)
    log(record("first"))
    until(lambda: path.stat().st_size > 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))  # Python ignores the signal of it
    try:
        log(record("torn"))
        log(record("lost"))
        until(lambda: log.dropped == 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log(record("second"))
    log.close()
    found = path.read_text().splitlines()
    assert [json.loads(found[index])["request_id"] for index in (0, 2)] == ["first", "second"] and len(found) == 3
    assert log.dropped == 2


def test_a_pipe_that_nobody_reads_makes_nobody_wait(tmp_path: Path) -> None:
    """The pipe is full after some lines: they are dropped, and so are those that no longer fit the queue."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        log = RequestLog(path, most_waiting=10)
        made = record()
        for _ in range(5000):
            log(made)
        until(lambda: log.dropped > 0)
        log.close()
    finally:
        os.close(reader)
    assert log.dropped < 5000


def test_a_record_that_cannot_be_told_does_not_end_the_log(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "requests.log")
    broken = record()
    broken.received_at = float("nan")
    log(broken)
    log(record("second"))
    log.close()
    assert [line["request_id"] for line in lines(tmp_path / "requests.log")] == ["second"] and log.dropped == 1


def test_threads_may_share_it(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "requests.log")
    threads = [threading.Thread(target=lambda: [log(record()) for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert len(lines(tmp_path / "requests.log")) == 800
