"""Cases that are servers: the streaming client and the case over it, against servers of several shapes and our own."""

from __future__ import annotations

import json
import os
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peer_fakes import completions_server, piece, usage
from server_fakes import FakeEngine, served
from test_serve_process import Server
from typer.testing import CliRunner

from jitgraph.bench.cases.common import CaseUnavailable
from jitgraph.bench.cases.http_stream import ServerError, StreamClient
from jitgraph.bench.cases.url import UrlCase
from jitgraph.bench.plan import Options, Plan
from jitgraph.cli import app
from jitgraph.errors import ConfigError, JitgraphError

PROMPT = [11, 12, 13]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Options(model="tiny", weights="random").plan("cpu")


def counting(fields: dict[str, Any]) -> tuple[int, Any]:
    """Ids from 7 up, one an event, with usage: as a server that takes every field."""
    ids = range(7, 7 + fields["max_tokens"])
    events = [piece(f"<{one}>", [one]) for one in ids]
    return 200, [*events, usage(len(fields["prompt"]), len(events)), b"[DONE]"]


def test_prompts_go_as_ids_and_tokens_come_back(plan: Plan) -> None:
    with completions_server(counting) as (url, asked):
        case = UrlCase("vllm", url)
        case.load(plan)
        assert case.first_token(PROMPT).token_id == 7
        answer = case.decode(PROMPT, 5)
        assert len(answer.gaps_ms) == 4 and 0 < answer.ttft_ms <= answer.e2e_ms
        case.close()
    request = asked[-1]
    assert request["prompt"] == PROMPT and request["model"] == "served" and request["temperature"] == 0.0
    assert request["ignore_eos"] is True and request["min_tokens"] == 5 and request["stream"] is True
    assert len({one["cache_salt"] for one in asked}) == len(asked), "no request may find what an earlier one left"
    about = case.describe()
    assert about["transport"] == "http" and about["fields_refused"] == [] and about["tells_token_ids"]
    assert case.peak_memory_bytes() is None and case.attribution(PROMPT) == {}


@pytest.mark.parametrize("names_it", [True, False])
def test_a_server_that_refuses_fields_is_asked_without_them(plan: Plan, names_it: bool) -> None:
    """Whether it says which field it does not know or not."""

    def strict(fields: dict[str, Any]) -> tuple[int, Any]:
        unknown = sorted({"cache_salt", "return_token_ids", "min_tokens", "ignore_eos"} & {*fields})
        if unknown:
            return 400, {"message": f"Extra inputs are not permitted: {unknown[0]}" if names_it else "no"}
        events = [piece("a") for _ in range(fields["max_tokens"])]
        told = [usage(3, fields["max_tokens"])] if "stream_options" in fields else []
        return 200, [*events, *told, b"[DONE]"]

    with completions_server(strict) as (url, _):
        case = UrlCase("openai", url)
        case.load(plan)
        assert case.first_token(PROMPT).token_id is None, "the gate cannot check what is not told"
        assert len(case.decode(PROMPT, 4).gaps_ms) == 3
        refused = {"cache_salt", "return_token_ids", "min_tokens", "ignore_eos"}
        refused |= set() if names_it else {"stream_options"}  # left out in turn, before those that it was about
        assert set(case.describe()["fields_refused"]) == refused


def test_trtllm_serve_is_asked_for_ids_in_its_own_way(plan: Plan) -> None:
    """It refuses what it does not know, and tells ids where it need not make text."""

    def trt(fields: dict[str, Any]) -> tuple[int, Any]:
        for name in ("return_token_ids", "cache_salt"):
            if name in fields:
                return 400, {"message": f"extra_forbidden: {name}"}
        assert fields["detokenize"] is False
        return counting(fields)

    with completions_server(trt) as (url, _):
        case = UrlCase("tensorrt-llm", f"{url}/v1")
        case.load(plan)
        assert case.first_token(PROMPT).token_id == 7


def test_events_that_carry_several_tokens_share_their_time(plan: Plan) -> None:
    def bursts(fields: dict[str, Any]) -> tuple[int, Any]:
        ids = [7, 8, 9, 10][: fields["max_tokens"]]
        return 200, [piece("a", ids[:1]), piece("b", ids[1:]), usage(3, len(ids)), b"[DONE]"]

    def silent_about_ids(fields: dict[str, Any]) -> tuple[int, Any]:
        return 200, [piece("a"), piece("bcd"), usage(3, fields["max_tokens"]), b"[DONE]"]

    for answer in (bursts, silent_about_ids):
        with completions_server(answer) as (url, _):
            case = UrlCase("openai", url)
            case.load(plan)
            assert case.decode(PROMPT, 4).gaps_ms[1:] == (0.0, 0.0)


def test_what_must_not_be_measured_is_refused(plan: Plan) -> None:
    short = lambda fields: (200, [piece("a", [7]), usage(3, 1), b"[DONE]"])  # noqa: E731
    other = lambda fields: (200, [piece("a", [7]), usage(4, 1), b"[DONE]"])  # noqa: E731
    broken = lambda fields: (200, [piece("a", [7]), {"error": {"message": "engine died"}}])  # noqa: E731
    with completions_server(short) as (url, _):
        case = UrlCase("openai", url)
        case.load(plan)
        with pytest.raises(JitgraphError, match="asked for 4 tokens, got 1"):
            case.decode(PROMPT, 4)
    with completions_server(other) as (url, _), pytest.raises(JitgraphError, match="read 4 prompt tokens, 3 were sent"):
        UrlCase("openai", url).load(plan)
    with completions_server(broken) as (url, _):
        with pytest.raises(CaseUnavailable, match="engine died"):
            UrlCase("openai", url).load(plan)
        with pytest.raises(ServerError, match="engine died"):
            StreamClient(url, None).stream({"prompt": PROMPT, "max_tokens": 1})


def test_hits_of_a_servers_prompt_cache_are_noticed(plan: Plan) -> None:
    cached = lambda fields: (200, [piece("a", [7]), usage(3, 1, cached=2), b"[DONE]"])  # noqa: E731
    with completions_server(cached) as (url, _):
        case = UrlCase("openai", url)
        case.load(plan)
        case.first_token(PROMPT)
        assert case.describe()["cached_tokens"] >= 2


def test_nobody_there_is_a_reason_and_no_crash(plan: Plan) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(CaseUnavailable, match=r"no server answers at http://127.0.0.1:\d+/v1") as error:
        UrlCase("vllm", url).load(plan)
    assert error.value.status == "no server"


def test_addresses_keys_and_names(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    assert StreamClient("http://user:secret@host:8000", None).place == "http://host:8000/v1"
    named = StreamClient("https://host/some/v2/#org/model", None)
    assert (named.place, named.model) == ("https://host/some/v2", "org/model")
    monkeypatch.setenv("JITGRAPH_BENCH_API_KEY", "secret")
    with completions_server(counting) as (url, asked):
        UrlCase("openai", f"{url}#org/model").load(plan)
    assert asked[0]["authorization"] == "Bearer secret" and asked[0]["model"] == "org/model"
    for urls in ({"hybrid": "http://x"}, {"vllm": "x:8000"}, {"vllm": "ftp://x"}):
        with pytest.raises(ConfigError, match="--url"):
            Options(urls=urls)


def test_ttft_ends_with_the_first_tokens_bytes(plan: Plan) -> None:
    """A pause before the first event is in it, one after it is not."""

    def slow(fields: dict[str, Any]) -> tuple[int, Any]:
        def events() -> Iterator[Any]:
            time.sleep(0.05)
            yield piece("a", [7])
            time.sleep(0.2)
            yield usage(3, 1)
            yield b"[DONE]"

        return 200, events()

    with completions_server(slow) as (url, _):
        case = UrlCase("openai", url)
        case.load(plan)
        assert 50.0 <= case.first_token(PROMPT).client_ms < 200.0


def test_our_own_server_takes_every_field(plan: Plan) -> None:
    engine = FakeEngine()
    with served(engine) as site:
        case = UrlCase("openai", site.url)
        case.load(plan)
        first = engine.answer(engine.asked[-1])[0]
        assert case.first_token(PROMPT).token_id == first
        assert len(case.decode(PROMPT, 20).gaps_ms) == 19
        assert case.describe()["fields_refused"] == [] and case.describe()["tells_token_ids"]
        assert engine.asked[-1].ids == tuple(PROMPT) and len({one.salt for one in engine.asked}) == len(engine.asked)
        case.close()


@pytest.mark.timeout(300)
def test_the_benchmark_measures_a_real_server_behind_the_gate(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="jg-") as folder:
        words = ("--device", "cpu", "--port", "0", "--max-model-len", "512")
        server = Server(Path(folder), "-m", "jitgraph", "serve", "tiny", *words)
        try:
            counts = ["--prompt-lengths", "5,16", "--ttft-iterations", "2", "--p99-iterations", "2"]
            where = ["--output", str(tmp_path / "out"), "--device", "cpu", "--model", "tiny", "--weights", "random"]
            command = ["bench", "openai", "--url", f"openai={server.url()}", *counts, *where]
            done = CliRunner().invoke(app, command)
            assert done.exit_code == 0, done.output
            os.kill(server.pid, signal.SIGTERM)
            assert server.ended() == 0
        finally:
            server.process.kill()
            server.process.wait()
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    facts = found["cases"]["openai"]
    assert facts["status"] == "complete" and facts["gate_checked"], "its first tokens are the reference's"
    assert facts["cached_tokens"] == 0
    rows = [row for row in found["rows"] if row["case"] == "openai"]
    assert all("over HTTP" in row["notes"] and row["peak_memory_gib"] is None for row in rows)
    assert not [row for row in rows if row["metric"] == "ready_s"], "it was ready before anybody looked"
    assert {row["metric"] for row in rows} == {"ttft_ms", "itl_ms", "tpot_ms", "e2e_ms"}
    assert (tmp_path / "out" / "peers_ttft_table.md").exists()
