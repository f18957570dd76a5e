"""``jitgraph bench serve`` over a network: a server of known schedule, one that misbehaves, and the project's own.

Schedules are slow beside what a busy machine adds, so that noise does not decide.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from load_parts.fixed_server import MODEL, Schedule, running
from typer.testing import CliRunner

from jitgraph.bench.load.records import Record, read_records
from jitgraph.cli import app
from jitgraph.errors import ConfigError, JitgraphError, OutputError

ROOT = Path(__file__).resolve().parent.parent


class Load:
    """Runs the command in this process and reads what it left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.text = ""

    def __call__(self, url: str, *options: str, fails: type[JitgraphError] | None = None) -> int:
        words = ["bench", "serve", url, "--output", str(self.folder), "--warmup", "0", *options]
        result = CliRunner().invoke(app, words)
        self.text = result.output
        if fails is not None:
            assert isinstance(result.exception, fails), result
            self.text = str(result.exception)
        else:
            assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return found

    @property
    def records(self) -> list[Record]:
        return sorted(read_records(self.folder / "requests.jsonl"), key=lambda record: record.index)


@pytest.fixture
def load(tmp_path: Path) -> Load:
    return Load(tmp_path / "out")


@pytest.mark.parametrize(("concurrency", "chat"), [(1, False), (4, True)])
def test_figures_follow_from_the_schedule(load: Load, concurrency: int, chat: bool) -> None:
    """No figure is below what the server's schedule allows, and each is what its definition makes of the raw times. How
    close they come to the schedule is measured by ``benchmarks/load_agreement.py``: here the machine has other work."""
    tokens, schedule = 41, Schedule(ttft_s=0.2, gap_s=0.01)
    options = ("--requests", str(3 * concurrency), "--concurrency", str(concurrency), "--output-tokens", str(tokens))
    with running(schedule) as server:
        assert load(server.url, *options, *(["--chat"] if chat else [])) == 0
    found, records = load.summary, load.records
    assert found["requests"] == {"sent": 3 * concurrency, "ok": 3 * concurrency, "cancelled": 0, "errors": 0}
    assert found["queue_ms"] is None and found["model"] == MODEL
    assert all(len(record.token_ms) == tokens == record.tokens for record in records)
    ttft = sorted(record.token_ms[0] for record in records)
    last = sorted(record.token_ms[-1] for record in records)
    tpot = sorted((record.token_ms[-1] - record.token_ms[0]) / (tokens - 1) for record in records)
    assert ttft[0] >= 200 and last[0] >= 200 + 40 * 10, "sooner than the server sends"
    assert found["ttft_ms"]["p50"] == pytest.approx(statistics.median(ttft), abs=0.01)
    assert found["tpot_ms"]["p50"] == pytest.approx(statistics.median(tpot), rel=0.05)
    assert found["itl_ms"]["n"] == len(records) * (tokens - 1)
    assert found["itl_ms"]["mean"] == pytest.approx(statistics.mean(tpot), rel=0.001)
    assert found["e2e_ms"]["p50"] >= statistics.median(last) - 0.01
    assert 0 < found["output_tokens_per_s"] <= concurrency * tokens / 0.6


def test_what_is_asked(load: Load) -> None:
    schedule = Schedule(ttft_s=0.0, gap_s=0.0)
    key = load.folder.parent / "key"
    key.write_text("secret\nmore\n")
    options = ("--requests", "3", "--prompt-tokens", "7", "--output-tokens", "2:5", "--seed", "4", "--warmup", "1")
    with running(schedule) as server:
        assert load(f"{server.url}/v1/", *options, "--api-key-file", str(key), "--model", "mine") == 0
    assert len(schedule.asked) == 4 and len(load.records) == 3, "the warm-up is not recorded"
    assert all(headers["authorization"] == "bearer secret" for headers in schedule.headers)
    for body, record in zip(schedule.asked[1:], load.records, strict=True):
        assert body["model"] == "mine" and body["stream"] is True and body["ignore_eos"] is True
        assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
        assert len(body["prompt"]) == 7 and all(100 <= i <= 999 for i in body["prompt"])
        assert body["max_tokens"] == record.asked_tokens == record.tokens and 2 <= record.tokens <= 5
    assert schedule.asked[0]["prompt"] not in [body["prompt"] for body in schedule.asked[1:]]


def test_several_tokens_in_an_event_are_counted_where_the_server_counts(load: Load) -> None:
    options = ("--requests", "1", "--output-tokens", "5")
    with running(Schedule(ttft_s=0.0, burst=2)) as server:
        assert load(server.url, *options) == 0
        (record,) = load.records
        assert record.tokens == len(record.token_ms) == 5 and len(set(record.token_ms)) == 3
        load.folder = load.folder.with_name("uncounted")
        assert load(server.url, *options, "--no-running-count") == 0
        (record,) = load.records
        assert record.tokens == 5 and len(record.token_ms) == 3, "the count at the end is the server's"


def test_requests_wait_for_a_stream_and_the_wait_is_told_apart(load: Load) -> None:
    """Arrivals every 50 ms, 200 ms of work, one stream: request i waits at least i times 150 ms, the last longer than
    its latency, which would hold the wait if the two were one."""
    options = ("--requests", "4", "--rate", "20", "--arrivals", "fixed", "--output-tokens", "1")
    with running(Schedule(ttft_s=0.2)) as server:
        assert load(server.url, *options) == 0
    for i, record in enumerate(load.records):
        assert record.due_ms == 50 * i and record.queue_ms is not None and record.queue_ms >= 150 * i
        assert record.ttft_ms is not None and record.ttft_ms >= 200
    last = load.records[-1]
    assert load.summary["queue_ms"]["max"] == last.queue_ms > last.ttft_ms


def test_requests_go_out_when_they_arrive(load: Load) -> None:
    options = ("--requests", "8", "--rate", "20", "--concurrency", "8", "--output-tokens", "1", "--seed", "3")
    with running(Schedule(ttft_s=0.3)) as server:
        assert load(server.url, *options) == 0
    records = load.records
    assert records[-1].due_ms is not None and records[-1].due_ms > 100, "a schedule worth the name"
    assert all(0 <= (record.queue_ms or 0.0) < 300 for record in records), "nobody waits for another's answer"


def test_some_readers_go_away(load: Load) -> None:
    schedule = Schedule(ttft_s=0.05, gap_s=0.01)
    options = ("--requests", "12", "--concurrency", "4", "--output-tokens", "30", "--cancel", "0.5")
    with running(schedule) as server:
        assert load(server.url, *options) == 0
        deadline = time.monotonic() + 10
        left = [record for record in load.records if record.outcome == "cancelled"]
        while schedule.left < len(left) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert 0 < len(left) < 12 and schedule.left == len(left), "the server sees them leave"
    assert all(record.cancel_after is not None and record.tokens == record.cancel_after for record in left)
    found = load.summary
    assert found["requests"]["cancelled"] == len(left) and found["ttft_ms"]["n"] == 12 - len(left)
    assert found["cancelled"]["ttft_ms"]["n"] == len(left) and "cancelled as planned" in load.text


@pytest.mark.parametrize(
    ("schedule", "options", "kind"),
    [
        (Schedule(status=429), (), "http 429"),
        (Schedule(ttft_s=0.0, die_after=2), (), "connection lost"),
        (Schedule(ttft_s=0.0, fail_after=2), (), "stream error"),
        (Schedule(ttft_s=30.0), ("--timeout", "0.2"), "timeout"),
        (Schedule(ttft_s=0.0, gap_s=0.0, content_type="text/plain"), (), "not a stream"),
    ],
)
def test_errors_are_counted_by_kind_and_end_with_1(
    load: Load, schedule: Schedule, options: tuple[str, ...], kind: str
) -> None:
    with running(schedule) as server:
        assert load(server.url, "--requests", "2", "--output-tokens", "4", *options) == 1
    found = load.summary
    assert found["errors_by_kind"] == {kind: 2} and found["ttft_ms"] is None
    assert f"2 failed: {kind}" in load.text
    assert all(record.outcome == "error" and record.message for record in load.records)


def test_goodput_is_shown(load: Load) -> None:
    with running(Schedule(ttft_s=0.2, gap_s=0.0)) as server:
        options = ("--requests", "3", "--output-tokens", "2", "--limit")
        assert load(server.url, *options, "ttft<=0.1s") == 0
        assert load.summary["goodput"]["share"] == 0.0 and "goodput" in load.text
        load.folder = load.folder.with_name("second")
        assert load(server.url, *options, "mlperf-llama3.1-8b-interactive") == 0
        assert load.summary["goodput"]["share"] == 1.0 and load.summary["goodput"]["p99_within"]["ttft<=500ms"]


def test_no_request_begins_after_its_time(load: Load) -> None:
    with running(Schedule(ttft_s=0.2)) as server:
        assert load(server.url, "--output-tokens", "1", "--max-seconds", "0.5") == 0
    assert 1 <= len(load.records) <= 3


# ----------------------------------------------------------------------------------------------- processes and mistakes


def test_an_interrupt_keeps_what_was_measured(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with running(Schedule(ttft_s=0.1, gap_s=0.0)) as server:
        words = [sys.executable, "-m", "jitgraph", "bench", "serve", server.url, "--output", str(folder)]
        process = subprocess.Popen(
            [*words, "--requests", "100000", "--output-tokens", "2"], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        assert re.match(r"\d+ s: \d+ of 100000 done, \d running; TTFT P50 ", line), line
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["interrupted"] and summary["broken_off"] <= 1 and summary["ttft_ms"]["p50"] > 100
    assert len(read_records(folder / "requests.jsonl")) == summary["requests"]["ok"] > 3
    assert "whole answers" in rest


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[str]:
    """The project's own front-end process before a fake engine."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    environment.pop("JITGRAPH_API_KEY", None)
    command = [sys.executable, str(Path(__file__).with_name("serve_fake.py")), "--hang-s", "30"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield found[0]
                break
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_the_projects_own_server(serving: str, load: Load) -> None:
    import httpx

    deadline = time.monotonic() + 60
    while httpx.get(f"{serving}/ready").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    options = ("--requests", "20", "--concurrency", "4", "--rate", "40", "--output-tokens", "3:12", "--cancel", "0.2")
    assert load(serving, *options, "--warmup", "1", "--prompt-tokens", "5:50") == 0
    found = load.summary
    assert found["requests"]["errors"] == 0 and found["requests"]["sent"] == 20 and found["shorter_than_asked"] == 0
    whole = [record for record in load.records if record.outcome == "ok"]
    assert whole and all(record.tokens == record.asked_tokens == len(record.token_ms) for record in whole)
    assert all(record.finish_reason == "length" for record in whole)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--concurrency", "9"), "--concurrency"),
        (("--concurrency", "0"), "--concurrency"),
        (("--requests", "0"), "--requests"),
        (("--rate", "0"), "--rate"),
        (("--arrivals", "fixed"), "--arrivals needs --rate"),
        (("--rate", "1", "--arrivals", "even"), "poisson or fixed"),
        (("--cancel", "1.5"), "--cancel"),
        (("--prompt-tokens", "many"), "--prompt-tokens"),
        (("--limit", "fast"), "--limit"),
        (("--token-ids", "9:3"), "--token-ids"),
        (("--token-ids", "9"), "--token-ids"),
        (("--lengths", "absent.jsonl"), "--lengths"),
        (("--lengths", "absent.jsonl", "--output-tokens", "3"), "leave out"),
        (("--api-key-file", "absent"), "--api-key-file"),
        (("--timeout", "0"), "--timeout"),
        (("--warmup", "-1"), "--warmup"),
        (("--seed", "-1"), "--seed"),
    ],
)
def test_mistakes_are_named(load: Load, options: tuple[str, ...], says: str) -> None:
    load("http://127.0.0.1:9", *options, fails=ConfigError)
    assert says in load.text and not load.folder.exists(), "nothing is left behind"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", "http://x:port", "nonsense"])
def test_addresses_that_are_none(load: Load, url: str) -> None:
    load(url, fails=ConfigError)
    assert "http://127.0.0.1:8000" in load.text


def test_nobody_there_and_a_folder_in_use(load: Load) -> None:
    load("http://127.0.0.1:9", fails=ConfigError)
    assert "does not answer" in load.text
    with running(Schedule(status=503)) as server:
        load.folder = load.folder.with_name("other")
        load(server.url, "--warmup", "1", fails=ConfigError)
        assert "warm-up failed (http 503" in load.text
        assert load(server.url, "--requests", "1") == 1, "an empty run leaves the folder free"
        load(server.url, fails=OutputError)
    assert "choose another --output" in load.text


def test_cases_of_the_benchmark_are_still_found() -> None:
    result = CliRunner().invoke(app, ["bench", "nonsense"])
    assert isinstance(result.exception, ConfigError) and "nonsense" in str(result.exception)
    result = CliRunner().invoke(app, ["bench", "serve"])
    assert result.exit_code == 2 and "url" in result.output.lower()
    assert "serve URL" in " ".join(CliRunner().invoke(app, ["bench", "-h"]).output.split())
