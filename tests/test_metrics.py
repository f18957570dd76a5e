"""Metrics: edges, recorders, what is derived from a request, counters across restarts, Prometheus text."""

from __future__ import annotations

import asyncio
import gc
import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families as parse_text
from server_fakes import chat, make_site

from jitgraph.engine.report import counters
from jitgraph.errors import ConfigError
from jitgraph.graphs.dispatch import Dispatcher, Reason
from jitgraph.graphs.key import GraphKey, Phase, Sampling
from jitgraph.graphs.store import Store
from jitgraph.ipc.messages import Beat, EngineFacts, Tokens
from jitgraph.llm import LLM
from jitgraph.metrics import (
    LATENCY_EDGES_S,
    METRICS,
    MOST_LABELS,
    PAUSE_EDGES_S,
    TOKEN_EDGES,
    Counter,
    GcWatch,
    Histogram,
    LastingTotals,
)
from jitgraph.server.metrics import ServerMetrics
from jitgraph.server.records import RequestRecord
from jitgraph.types import SamplingParams

ROOT = Path(__file__).resolve().parent.parent
MS = 1_000_000
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(metrics: ServerMetrics) -> Samples:
    """Every sample of an exposition by name and labels, ``model_name`` checked and left out."""
    body, _ = metrics.render()
    found: Samples = {}
    for family in parse_text(body.decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "tiny"
            found[sample.name, tuple(sorted(labels.items()))] = sample.value
    return found


def value(metrics: ServerMetrics, name: str, **labels: str) -> float:
    return samples(metrics)[f"jitgraph:{name}", tuple(sorted(labels.items()))]


def total(metrics: ServerMetrics, name: str) -> tuple[float, float]:
    """Count and sum of a histogram without labels of its own."""
    return value(metrics, f"{name}_count"), value(metrics, f"{name}_sum")


def beat(running: int = 0, waiting: int = 0, free: int = 10, pages: int = 10, steps: int = 0) -> Beat:
    return Beat(0, running, waiting, free, pages, steps)


def answered(
    times_ms: tuple[float, ...] = (20, 24, 30), reason: str | None = "length", status: int = 200, cached: int = 0
) -> RequestRecord:
    """A request that arrived at 10 ms on a clock of its own; the engine had each token 100 µs before this process."""
    record = RequestRecord("r", "/v1/completions", received_ns=10 * MS)
    sequence = record.begin(7)
    sequence.submitted_ns = 11 * MS
    for index, at in enumerate(times_ms):
        now = round(at * MS)
        last = reason if index == len(times_ms) - 1 else None
        received, launched = (11_200_000, 12 * MS) if index == 0 else (0, 0)
        news = Tokens(1, (5,), (now - 100_000,), (), last, cached if index == 0 else 0, received, launched)
        sequence.take(news, now)
    record.finish(status)
    return record


# -------------------------------------------------------------------------------------------------------------- edges


def test_edges_go_from_a_quarter_of_a_millisecond_to_a_minute_in_small_steps() -> None:
    assert LATENCY_EDGES_S[0] == 0.00025 and LATENCY_EDGES_S[-1] == 60.0
    for edges in (LATENCY_EDGES_S, PAUSE_EDGES_S):
        ratios = [later / earlier for earlier, later in itertools.pairwise(edges)]
        assert all(1.2 < ratio < 1.7 for ratio in ratios)
    assert PAUSE_EDGES_S[-len(LATENCY_EDGES_S) :] == LATENCY_EDGES_S and PAUSE_EDGES_S[0] == 1e-5
    assert list(TOKEN_EDGES) == sorted(set(TOKEN_EDGES)) and TOKEN_EDGES[-1] >= 131_072


def test_latencies_have_the_same_edges_everywhere() -> None:
    for metric in METRICS:
        if metric.kind == "histogram":
            assert metric.edges in (LATENCY_EDGES_S, PAUSE_EDGES_S, TOKEN_EDGES)
            assert (metric.edges != TOKEN_EDGES) == metric.name.endswith("_seconds")


@given(st.lists(st.floats(-1.0, 100.0)), st.lists(st.floats(0.0, 1.0)))
def test_a_histogram_counts_each_value_once_at_its_place(one: list[float], other: list[float]) -> None:
    alone, bulk = Histogram(LATENCY_EDGES_S), Histogram(LATENCY_EDGES_S)
    for entry in one + other:
        alone.observe(entry)
    half = Histogram(LATENCY_EDGES_S)
    bulk.observe_many(one)
    half.observe_many(other)
    bulk.add(half)
    assert bulk.counts == alone.counts and bulk.sum == pytest.approx(alone.sum)
    for index, edge in enumerate(LATENCY_EDGES_S):
        assert sum(alone.counts[: index + 1]) == sum(entry <= edge for entry in one + other)
    assert alone.count == len(one) + len(other) and alone.sum >= 0
    carried = Histogram(LATENCY_EDGES_S)
    carried.add_values(alone.as_values())
    assert carried.counts == alone.counts and carried.sum == alone.sum


def test_labels_cannot_fill_the_memory() -> None:
    counter = Counter()
    for index in range(10 * MOST_LABELS):
        counter.add((f"route {index}", "404"))
    assert len(counter.values) == MOST_LABELS + 1
    assert counter.values["other", "other"] == 9 * MOST_LABELS
    assert sum(counter.values.values()) == 10 * MOST_LABELS


# ----------------------------------------------------------------------------------------------------- one request


def test_times_of_a_request() -> None:
    """Arrived at 10, handed over at 11, read at 11.2, launched at 12, tokens at 20, 24, 30 (the engine had them 0.1
    earlier)."""
    metrics = ServerMetrics("tiny")
    metrics.observe(answered())
    expected = {
        "time_to_first_token_seconds": (1, 0.010),
        "inter_token_latency_seconds": (2, 0.010),
        "request_time_per_output_token_seconds": (1, 0.005),
        "e2e_request_latency_seconds": (1, 0.020),
        "request_queue_time_seconds": (1, 0.0008),
        "request_prefill_time_seconds": (1, 0.0079),
        "request_decode_time_seconds": (1, 0.010),
        "request_prompt_tokens": (1, 7),
        "request_generation_tokens": (1, 3),
    }
    for name, (count, summed) in expected.items():
        assert total(metrics, name) == (count, pytest.approx(summed, abs=1e-9)), name
    assert value(metrics, "ipc_latency_seconds_sum", direction="to_engine") == pytest.approx(0.0002)
    assert value(metrics, "ipc_latency_seconds_count", direction="from_engine") == 3
    assert value(metrics, "ipc_latency_seconds_sum", direction="from_engine") == pytest.approx(0.0003)
    buckets = {
        edge: value(metrics, "inter_token_latency_seconds_bucket", le=str(edge)) for edge in (0.003, 0.005, 0.007)
    }
    assert buckets == {0.003: 0, 0.005: 1, 0.007: 2}, "gaps of 4 and 6 ms"


def test_a_single_token_has_no_gap() -> None:
    metrics = ServerMetrics("tiny")
    metrics.observe(answered((20,)))
    assert total(metrics, "inter_token_latency_seconds") == (0, 0)
    assert total(metrics, "request_time_per_output_token_seconds") == (0, 0)
    assert total(metrics, "request_decode_time_seconds") == (1, 0)
    assert total(metrics, "e2e_request_latency_seconds")[0] == 1


def test_tokens_that_come_together_count_each() -> None:
    record = RequestRecord("r", "/v1/completions", received_ns=10 * MS)
    sequence = record.begin(7)
    sequence.take(Tokens(1, (5,), (1 * MS,), received_ns=1, launched_ns=2), 20 * MS)
    sequence.take(Tokens(1, (5, 6, 7), (2 * MS, 3 * MS, 4 * MS), finish_reason="stop"), 26 * MS)
    sequence.take(Tokens(1, (5,), (5 * MS,)), 90 * MS)  # after the end: not noted
    record.finish(200)
    metrics = ServerMetrics("tiny")
    metrics.observe(record)
    assert value(metrics, "generation_tokens_total") == 4
    assert total(metrics, "inter_token_latency_seconds") == (3, pytest.approx(0.006))
    assert value(metrics, "inter_token_latency_seconds_bucket", le="0.00025") == 2
    assert total(metrics, "request_time_per_output_token_seconds") == (1, pytest.approx(0.002))
    assert record.as_document()["itl_max_ms"] == 6.0


@given(st.lists(st.integers(1, 10**8), min_size=1, max_size=200))
def test_counting_in_blocks_changes_nothing(gaps_ns: list[int]) -> None:
    record = RequestRecord("r", "/v1/completions", received_ns=1)
    sequence = record.begin(7)
    at = 10 * MS
    for gap in gaps_ns:
        at += gap
        sequence.take(Tokens(1, (5,), (at - 1000,)), at)
    record.finish(200)
    expected = Histogram(LATENCY_EDGES_S)
    expected.observe_many(gap / 1e9 for gap in gaps_ns[1:])
    assert sequence.itl.counts == expected.counts and sequence.itl.sum == pytest.approx(expected.sum)
    assert sequence.from_engine.count == sequence.completion_tokens == len(gaps_ns)
    assert sequence.last_token_ns == at
    assert sequence.longest_gap_s == (max(gaps_ns[1:]) / 1e9 if gaps_ns[1:] else None)


def test_the_size_of_a_record_does_not_grow_with_its_tokens() -> None:
    record = RequestRecord("r", "/v1/completions")
    sequence = record.begin(7)
    longest = 0
    for index in range(5000):
        sequence.take(Tokens(1, (5,), (index,)), index + 1)
        longest = max(longest, len(sequence._here))
    assert sequence.completion_tokens == 5000 and longest < 100


@pytest.mark.parametrize(
    ("reason", "named", "completed"),
    [
        ("stop", "stop", 1),
        ("length", "length", 1),
        ("cancelled", "abort", 0),
        ("failed", "error", 0),
        (None, "error", 0),
    ],
)
def test_how_sequences_end(reason: str | None, named: str, completed: int) -> None:
    metrics = ServerMetrics("tiny")
    metrics.observe(answered(reason=reason))
    for label in ("stop", "length", "abort", "error"):
        assert value(metrics, "request_success_total", finished_reason=label) == (label == named)
    assert total(metrics, "e2e_request_latency_seconds")[0] == completed
    assert total(metrics, "request_generation_tokens")[0] == completed
    assert total(metrics, "time_to_first_token_seconds")[0] == 1, "a token came all the same"
    assert value(metrics, "generation_tokens_total") == 3


def test_a_client_that_leaves_is_an_abort() -> None:
    record = answered(reason="cancelled", status=0)
    metrics = ServerMetrics("tiny")
    metrics.observe(record)
    assert value(metrics, "request_success_total", finished_reason="abort") == 1
    assert value(metrics, "http_requests_total", route="/v1/completions", status="499") == 1


def test_a_request_that_was_refused_is_no_sequence_that_ended() -> None:
    record = RequestRecord("r", "/v1/completions")
    record.begin(7)
    record.finish(429, "overloaded")
    metrics = ServerMetrics("tiny")
    metrics.observe(record)
    assert value(metrics, "http_errors_total", kind="overloaded") == 1
    assert value(metrics, "http_requests_total", route="/v1/completions", status="429") == 1
    assert value(metrics, "request_success_total", finished_reason="error") == 0
    assert value(metrics, "prompt_tokens_total") == 0


def test_the_longest_answer_to_a_prompt() -> None:
    metrics = ServerMetrics("tiny")
    for lengths in ((3,), (2, 5, 1), (4, 4, 9)):  # of the last one, an answer is cut off
        record = RequestRecord("r", "/v1/completions", n=len(lengths))
        for tokens in lengths * 2:  # two prompts
            news = Tokens(1, (5,) * tokens, (1,) * tokens, (), "cancelled" if tokens == 9 else "length")
            record.begin(7).take(news, 2)
        record.finish(200)
        metrics.observe(record)
    assert total(metrics, "request_max_num_generation_tokens") == (4, 2 * 3 + 2 * 5)
    records: list[RequestRecord] = []
    assert chat(make_site(on_request_done=records.append), n=3).status == 200
    assert [record.n for record in records] == [3]


def test_cached_tokens() -> None:
    metrics = ServerMetrics("tiny")
    metrics.observe(answered(cached=4))
    metrics.observe(answered())
    assert value(metrics, "prefix_cache_queries_total") == 14 and value(metrics, "prefix_cache_hits_total") == 4


# ------------------------------------------------------------------------------------------------------- the engine


def test_gauges_of_the_engine() -> None:
    metrics = ServerMetrics("tiny")
    assert value(metrics, "engine_up") == 0 and value(metrics, "kv_cache_usage_perc") == 0
    metrics.engine_seen(beat(running=2, waiting=3, free=30, pages=40))
    metrics.engine_seen(beat(running=1, free=10, pages=40), engine=1)
    assert value(metrics, "num_requests_running") == 3 and value(metrics, "num_requests_waiting") == 3
    assert value(metrics, "kv_cache_usage_perc") == 0.5 and value(metrics, "engine_up") == 2
    metrics.engine_gone()
    assert value(metrics, "num_requests_running") == 1 and value(metrics, "kv_cache_usage_perc") == 0.75


STATS: dict[str, Any] = {
    "prefill_paths": {"exact": 3, "padded": 2, "eager": 1},
    "decode_paths": {"loop": 100, "exact": 5},
    "eager_reasons": {"never_captured": 1},
    "reasons": {"captured": 8, "never_captured": 3, "lone_stream": 100},
    "loop_reasons": {"emulated": 2},
    "captures": 40,
    "evictions": 2,
    "capture_failures": {"out of memory": 1},
    "graph_bytes": 1 << 20,
    "ready_graphs": 38,
    "compiles_before_ready": 60,
    "compiles_after_ready": 1,
    "gc_pauses": {"0.001": 2, "+Inf": 1, "sum": 80.5},
}


def test_counters_of_the_engine() -> None:
    metrics = ServerMetrics("tiny")
    metrics.engine_stats(STATS)
    assert value(metrics, "graph_replays_total", phase="prefill", path="padded") == 2
    assert value(metrics, "graph_replays_total", phase="decode", path="loop") == 100
    assert ("jitgraph:graph_replays_total", (("path", "eager"), ("phase", "prefill"))) not in samples(metrics)
    assert value(metrics, "eager_fallback_total", reason="never_captured") == 1
    assert value(metrics, "step_reasons_total", reason="captured") == 8
    assert value(metrics, "loop_fallback_total", reason="emulated") == 2
    assert value(metrics, "graph_captures_total") == 40 and value(metrics, "graph_evictions_total") == 2
    assert value(metrics, "graph_capture_failures_total", reason="out of memory") == 1
    assert value(metrics, "graph_bytes") == 1 << 20 and value(metrics, "graphs_ready") == 38
    assert value(metrics, "jit_compiles_total", phase="start") == 60
    assert value(metrics, "jit_compiles_total", phase="serving") == 1
    assert value(metrics, "gc_pause_seconds_bucket", process="engine", le="0.001") == 2
    assert value(metrics, "gc_pause_seconds_count", process="engine") == 3
    assert value(metrics, "gc_pause_seconds_sum", process="engine") == 80.5


def test_what_a_real_engine_tells_is_understood() -> None:
    """Every key that a metric is taken from is one that the engine writes."""
    with LLM("tiny", device="cpu", max_model_len=64, max_streams=1) as llm:
        llm.generate([3, 4, 5], SamplingParams(max_tokens=4, ignore_eos=True))
        told = counters(llm._engine)
    assert {metric.stats_key for metric in METRICS if metric.stats_key} <= set(told)
    assert {"prefill_paths", "decode_paths", "compiles_before_ready", "compiles_after_ready"} <= set(told)
    metrics = ServerMetrics("tiny")
    metrics.engine_stats(told)
    assert value(metrics, "graph_captures_total") == told["captures"] > 0
    found = samples(metrics)
    prefills = sum(
        number
        for (name, labels), number in found.items()
        if name == "jitgraph:graph_replays_total" and ("phase", "prefill") in labels
    )
    eager = sum(number for (name, _), number in found.items() if name == "jitgraph:eager_fallback_total")
    assert prefills + eager == 1


def test_eager_steps_are_counted_by_reason() -> None:
    store: Store[Any] = Store()
    dispatcher = Dispatcher(False, store)
    dispatcher.decide(GraphKey(Phase.PREFILL, 8, Sampling.FULL))
    assert dispatcher.eager_reasons == {Reason.GRAPHS_OFF: 1} and dispatcher.reasons == {Reason.GRAPHS_OFF: 1}
    dispatcher.reset()
    assert not dispatcher.eager_reasons


@pytest.mark.parametrize(
    "values",
    [
        {"captures": "many", "graph_bytes": None, "reasons": 5, "eager_reasons": {"a": "b"}, "unknown": 3},
        {"captures": math.nan, "evictions": math.inf, "graph_bytes": math.nan, "recaptures": -4},
        {"captures": {"by": 1}, "decode_paths": 7, "compiles_after_ready": {"x": 1}, "gc_pauses": 4},
        {"gc_pauses": {"0.0017": 3, "sum": 1}, "captures": True},
    ],
)
def test_nonsense_in_stats_is_passed_over(values: dict[str, Any]) -> None:
    metrics = ServerMetrics("tiny")
    metrics.engine_stats(values)
    found = samples(metrics)
    for name in ("graph_captures_total", "graph_evictions_total", "graph_bytes", "graph_recaptures_total"):
        assert found.get((f"jitgraph:{name}", ()), 0.0) == 0.0
    assert not [name for name, _ in found if "eager" in name or "unknown" in name]


def test_counters_go_on_when_the_engine_restarts() -> None:
    metrics = ServerMetrics("tiny")
    metrics.engine_seen(beat(running=8, steps=500))
    metrics.engine_stats(STATS)
    metrics.restarted()
    assert value(metrics, "engine_restarts_total") == 1
    assert value(metrics, "graph_captures_total") == 40 and value(metrics, "engine_steps_total") == 500
    assert value(metrics, "num_requests_running") == 0 and value(metrics, "graph_bytes") == 0, "nothing is held"
    metrics.engine_stats({**STATS, "captures": 3})
    metrics.engine_seen(beat(steps=20))
    assert value(metrics, "graph_captures_total") == 43 and value(metrics, "engine_steps_total") == 520
    assert value(metrics, "gc_pause_seconds_count", process="engine") == 6
    metrics.engine_stats({"captures": 1})  # again from zero, and nobody said so
    assert value(metrics, "graph_captures_total") == 44


@given(st.lists(st.one_of(st.tuples(st.integers(0, 1), st.integers(0, 50)), st.sampled_from((0, 1)))))
def test_totals_never_go_back(events: list[Any]) -> None:
    """A pair is a source that stands at a value, a number a source that restarts."""
    totals = LastingTotals()
    before = 0.0
    for event in events:
        if isinstance(event, tuple):
            totals.see(event[0], "steps", (), event[1])
        else:
            totals.restarted(event)
        found = totals.totals().get("steps", Counter()).values.get((), 0.0)
        assert found >= before
        before = found


class FakeClient:
    """What a scrape asks of an engine's client."""

    def __init__(self, pid: int, values: dict[str, Any] | None, steps: int = 0) -> None:
        self.facts = EngineFacts(pid, "tiny", None, 9, 9, 1, (), SamplingParams(), "cpu", "float32", "f", True)
        self.last_beat: Beat | None = beat(running=1, steps=steps)
        self.last_seen_ns = 0
        self.values = values

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    async def stats(self) -> dict[str, Any]:
        if self.values is None:
            raise ConnectionError("gone")
        return self.values


def scraped(metrics: ServerMetrics, *clients: FakeClient, restarts: int = 0) -> None:
    """One scrape; its body is what ``render`` says afterwards."""
    assert asyncio.run(metrics.scrape(clients, restarts)) == metrics.render()


def test_a_scrape_asks_the_engines() -> None:
    metrics = ServerMetrics("tiny")
    first, other = FakeClient(100, {"captures": 5}, steps=10), FakeClient(101, {"captures": 7}, steps=1)
    scraped(metrics, first, other)
    assert value(metrics, "graph_captures_total") == 12 and value(metrics, "num_requests_running") == 2
    scraped(metrics, other, restarts=1)  # the first has died
    assert value(metrics, "graph_captures_total") == 12 and value(metrics, "num_requests_running") == 1
    assert value(metrics, "engine_restarts_total") == 1
    scraped(metrics, other, FakeClient(102, {"captures": 2}, steps=3), restarts=1)  # its successor, in another order
    assert value(metrics, "graph_captures_total") == 14 and value(metrics, "engine_steps_total") == 14
    scraped(metrics, other, FakeClient(102, None, steps=4), restarts=1)  # does not answer: its last figures stand
    assert value(metrics, "graph_captures_total") == 14 and value(metrics, "engine_steps_total") == 15
    scraped(metrics)
    assert value(metrics, "graph_captures_total") == 14 and value(metrics, "engine_up") == 0


def test_an_engine_that_does_not_answer_does_not_hold_a_scrape_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(FakeClient):
        async def stats(self) -> dict[str, Any]:
            await asyncio.Event().wait()
            raise AssertionError

    monkeypatch.setattr("jitgraph.server.metrics.STATS_TIMEOUT_S", 0.01)
    metrics = ServerMetrics("tiny")
    scraped(metrics, Silent(100, None, steps=6))
    assert value(metrics, "engine_steps_total") == 6


# --------------------------------------------------------------------------------------------- garbage collection


def test_pauses_of_garbage_collection_are_seen() -> None:
    metrics = ServerMetrics("tiny")
    watch = GcWatch(metrics.gc_pause)
    watch.start()
    watch.start()
    try:
        gc.collect()
    finally:
        watch.stop()
    seen = value(metrics, "gc_pause_seconds_count", process="frontend")
    gc.collect()
    assert seen >= 1 and value(metrics, "gc_pause_seconds_count", process="frontend") == seen
    assert value(metrics, "gc_pause_seconds_sum", process="frontend") > 0
    metrics.gc_pause(2.0, "engine")
    assert value(metrics, "gc_pause_seconds_bucket", process="engine", le="2.0") == 1


# -------------------------------------------------------------------------------------------------------- exposition


def full() -> ServerMetrics:
    """Metrics of which every one has a value."""
    metrics = ServerMetrics("tiny", log_dropped=lambda: 3)
    metrics.observe(answered())
    metrics.observe(answered(status=500))
    failed = RequestRecord("r", "/v1/completions")
    failed.finish(400, "invalid_request_error")
    metrics.observe(failed)
    metrics.engine_seen(beat(running=1, steps=5))
    metrics.engine_stats(STATS)
    return metrics


def test_every_metric_is_shown() -> None:
    body, kind = full().render()
    assert kind == "text/plain; version=0.0.4; charset=utf-8"
    families = {family.name: family for family in parse_text(body.decode())}
    for metric in METRICS:
        family = families.pop(f"jitgraph:{metric.name.removesuffix('_total')}")
        assert (family.type, family.documentation) == (metric.kind, metric.meaning)
        assert family.samples, metric.name
        for sample in family.samples:
            assert sample.name.startswith(f"jitgraph:{metric.name}")
            assert set(sample.labels) - {"le"} == {"model_name", *metric.labels}
    assert not families


def test_buckets_are_cumulative_and_end_with_the_count() -> None:
    found = samples(full())
    for (name, labels), count in found.items():
        if not name.endswith("_count"):
            continue
        buckets = [
            (float(dict(other)["le"]), number)
            for (bucket, other), number in found.items()
            if bucket == name.replace("_count", "_bucket") and set(labels) <= set(other)
        ]
        assert [number for _, number in sorted(buckets)] == sorted(number for _, number in buckets)
        assert max(buckets) == (math.inf, count)


def test_hostile_labels_stay_inside_their_quotes() -> None:
    metrics = ServerMetrics('a"b\\c\nd')
    record = RequestRecord("r", '/x"} 1\njitgraph:fake 7\n')
    record.finish(404, "a\nb")
    metrics.observe(record)
    families = {family.name: family for family in parse_text(metrics.render()[0].decode())}
    assert "jitgraph:fake" not in families
    (sample,) = families["jitgraph:http_requests"].samples
    assert sample.labels == {"model_name": 'a"b\\c\nd', "route": record.route, "status": "404"}


def test_the_prefix_of_vllm() -> None:
    names = {family.name for family in parse_text(ServerMetrics("tiny", prefix="vllm").render()[0].decode())}
    assert {"vllm:time_to_first_token_seconds", "vllm:request_success", "vllm:kv_cache_usage_perc"} <= names
    assert all(name.startswith("vllm:") for name in names)
    for wrong in ("", "a:b", "1a", "a-b", "a\n"):
        with pytest.raises(ConfigError, match="metrics prefix"):
            ServerMetrics("tiny", prefix=wrong)


def test_the_names_dashboards_of_vllm_ask_for() -> None:
    names = {metric.name for metric in METRICS}
    assert {
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prefix_cache_queries_total",
        "prefix_cache_hits_total",
        "prompt_tokens_total",
        "generation_tokens_total",
        "request_success_total",
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
        "request_max_num_generation_tokens",
    } <= names


def test_the_table_for_readers_is_the_code() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = [tuple(cell.strip() for cell in row.split("|")[1:-1]) for row in text.splitlines() if row.startswith("| `")]
    rows = [row for row in rows if len(row) == 5]
    expected = [
        (f"`{metric.name}`", metric.kind, ", ".join(metric.labels), metric.meaning, metric.source) for metric in METRICS
    ]
    assert rows == expected


def test_the_queries_for_readers_name_metrics_that_exist() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    queries = "\n".join(re.findall(r"```promql\n(.*?)```", text, re.DOTALL))
    named = set(re.findall(r"jitgraph:(\w+)", queries))
    suffixes = ("", "_bucket", "_sum", "_count")
    known = {f"{metric.name}{suffix}" for metric in METRICS for suffix in suffixes}
    assert len(named) > 6 and named <= known
