"""The metrics of a server: gathers them from requests, the engine's records and the supervisor, and renders them.

Owned by the event loop of the front-end. A request is looked at once, when it has ended. Rendering everything costs
some milliseconds, which ``scrape`` spreads so that tokens pass in between.
"""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from jitgraph.errors import ConfigError
from jitgraph.ipc.messages import Beat
from jitgraph.metrics import (
    COMPILE_KEYS,
    GC_PAUSES_KEY,
    METRICS,
    REPLAY_KEYS,
    Counter,
    Histogram,
    Labels,
    LastingTotals,
    Metric,
    labelled_numbers,
)
from jitgraph.server.backend import EngineLink
from jitgraph.server.records import RequestRecord, SequenceRecord
from jitgraph.types import FinishReason

DEFAULT_PREFIX = "jitgraph"
STATS_TIMEOUT_S = 0.5
"""How long a scrape waits for an engine's counters; those of the scrape before then stand."""
_PREFIX = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_FINISHED = {FinishReason.CANCELLED.value: "abort", FinishReason.FAILED.value: "error", None: "error"}
"""Finish reasons by the names that vLLM has for them, where they differ."""
_BY_NAME = {metric.name: metric for metric in METRICS}
_STATS = tuple(metric for metric in METRICS if metric.stats_key)
_LABELLED = {"ipc_latency_seconds": ("to_engine", "from_engine"), "gc_pause_seconds": ("frontend",)}
"""Labels of histograms that are there from the start."""
_EAGER = "eager"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""The one format that is served. Every Prometheus reads it; in the OpenMetrics format, ``prometheus_client`` (0.26)
writes the colon in the names of samples as an underscore, and the name of their metric with the colon."""


class ServerMetrics:
    """All metrics of one server. Where several engines stand behind it, ``engine`` says which one is meant, and their
    figures are added up."""

    def __init__(
        self, model_name: str, prefix: str = DEFAULT_PREFIX, log_dropped: Callable[[], int] = lambda: 0
    ) -> None:
        """``model_name`` is the value of the label: the server's own name for its model, never a client's.
        ``prefix="vllm"`` gives the metrics that vLLM has too the names its dashboards ask for.

        Raises:
            ConfigError: a prefix that Prometheus would not take.
        """
        if not _PREFIX.fullmatch(prefix):
            raise ConfigError(f"the metrics prefix must be letters, digits and underscores, not {prefix!r}")
        self._model_name = model_name
        self._prefix = prefix
        self._log_dropped = log_dropped
        self._counters: dict[str, Counter] = defaultdict(Counter)
        self._histograms: dict[tuple[str, Labels], Histogram] = {}
        for metric in METRICS:
            if metric.kind == "histogram" and not metric.labels:
                self._histograms[metric.name, ()] = Histogram(metric.edges)
            elif metric.kind == "counter" and not metric.labels:
                self._counters[metric.name].add(by=0)
        for reason in ("stop", "length", "abort", "error"):  # from the start, or the first of each would not show
            self._counters["request_success_total"].add((reason,), by=0)
        for name, values in (
            ("ipc_latency_seconds", ("to_engine", "from_engine")),
            ("gc_pause_seconds", ("frontend",)),
        ):
            for value in values:
                self._histograms[name, (value,)] = Histogram(_BY_NAME[name].edges)
        self._engine = LastingTotals()
        self._gauges: dict[int, dict[str, float]] = {}
        self._beats: dict[int, Beat] = {}
        self._scraped: set[int] = set()
        """Process ids of the engines of the latest scrape."""

    # ------------------------------------------------------------------------------------------------------- recording

    def observe(self, record: RequestRecord) -> None:
        """A request has ended."""
        self._counters["http_requests_total"].add((record.route, str(record.status)))
        if record.error_kind is not None:
            self._counters["http_errors_total"].add((record.error_kind,))
        for sequence in record.sequences:
            self._observe_times(record, sequence)
            if sequence.completion_tokens:
                self._counters["prompt_tokens_total"].add(by=sequence.prompt_tokens)
                self._counters["prefix_cache_queries_total"].add(by=sequence.prompt_tokens)
                self._counters["prefix_cache_hits_total"].add(by=sequence.cached_tokens)
                self._counters["generation_tokens_total"].add(by=sequence.completion_tokens)
            reason = sequence.finish_reason
            if reason is None and not sequence.completion_tokens and record.status >= 400:
                continue  # refused: it never ran, and the HTTP status says so
            self._counters["request_success_total"].add((_FINISHED.get(reason) or str(reason),))
        for first in range(0, len(record.sequences), record.n):
            answers = record.sequences[first : first + record.n]
            if all(answer.completed for answer in answers):
                longest = max(answer.completion_tokens for answer in answers)
                self._observe("request_max_num_generation_tokens", longest)

    def _observe_times(self, record: RequestRecord, sequence: SequenceRecord) -> None:
        histograms = self._histograms
        histograms["inter_token_latency_seconds", ()].add(sequence.itl)
        histograms["ipc_latency_seconds", ("from_engine",)].add(sequence.from_engine)
        self._observe("ipc_latency_seconds", sequence.to_engine_s, "to_engine")
        self._observe("time_to_first_token_seconds", record.ttft_s(sequence))
        self._observe("request_queue_time_seconds", sequence.queue_s)
        self._observe("request_prefill_time_seconds", sequence.prefill_s)
        if sequence.completed:
            self._observe("e2e_request_latency_seconds", record.latency_s(sequence))
            self._observe("request_decode_time_seconds", sequence.decode_s)
            self._observe("request_time_per_output_token_seconds", sequence.tpot_s)
            self._observe("request_prompt_tokens", sequence.prompt_tokens)
            self._observe("request_generation_tokens", sequence.completion_tokens)

    def _observe(self, name: str, value: float | None, *labels: str) -> None:
        if value is not None:
            self._histograms[name, labels].observe(value)

    def engine_seen(self, beat: Beat, engine: int = 0) -> None:
        """A sign of life has come."""
        self._beats[engine] = beat
        self._engine.see(engine, "engine_steps_total", (), beat.steps)

    def engine_stats(self, values: Mapping[str, Any], engine: int = 0) -> None:
        """The engine has told its counters (``Stats.values``). Keys that are no metric are passed over."""
        gauges = self._gauges.setdefault(engine, {})
        for metric in _STATS:
            for labels, number in labelled_numbers(values.get(metric.stats_key)):
                if len(labels) != len(metric.labels):
                    continue
                if metric.kind == "gauge":
                    gauges[metric.name] = number
                else:
                    self._engine.see(engine, metric.name, labels, number)
        for key, phase in REPLAY_KEYS.items():
            for labels, number in labelled_numbers(values.get(key)):
                if labels and labels != (_EAGER,):
                    self._engine.see(engine, "graph_replays_total", (phase, *labels), number)
        for key, phase in COMPILE_KEYS.items():
            for labels, number in labelled_numbers(values.get(key)):
                if not labels:
                    self._engine.see(engine, "jit_compiles_total", (phase,), number)
        for labels, number in labelled_numbers(values.get(GC_PAUSES_KEY)):
            if labels:
                self._engine.see(engine, GC_PAUSES_KEY, labels, number)

    def gc_pause(self, seconds: float, process: str = "frontend") -> None:
        """Garbage was collected for so long, in this process or another one that tells it."""
        key = ("gc_pause_seconds", (process,))
        if key not in self._histograms:
            self._histograms[key] = Histogram(_BY_NAME["gc_pause_seconds"].edges)
        self._histograms[key].observe(seconds)

    def engine_gone(self, engine: int = 0) -> None:
        """The engine has ended: it runs nothing and holds nothing, and its counters begin at zero again."""
        self._beats.pop(engine, None)
        self._gauges.pop(engine, None)
        self._engine.restarted(engine)

    def restarted(self, engine: int = 0) -> None:
        """The supervisor has started the engine again."""
        self.engine_gone(engine)
        self._counters["engine_restarts_total"].add()

    # ------------------------------------------------------------------------------------------------------- rendering

    def render(self) -> tuple[bytes, str]:
        """(body, content type) for ``/metrics``."""
        return generate_latest(_registry(self.families())), CONTENT_TYPE

    async def scrape(self, clients: Sequence[EngineLink] = (), restarts: int = 0) -> tuple[bytes, str]:
        """``render``, after asking each engine that is there for its counters, one metric at a time so that the event
        loop turns in between.

        Whoever scrapes need not call ``engine_seen``, ``engine_stats``, ``engine_gone`` and ``restarted``; ``restarts``
        is the supervisor's own count.
        """
        present = {client.facts.pid for client in clients}
        for engine in self._scraped - present:
            self.engine_gone(engine)
        self._scraped = present
        await asyncio.gather(*(self._ask(client) for client in clients))
        known = self._counters["engine_restarts_total"].values
        known[()] = max(known[()], restarts)
        parts = []
        for family in self.families():
            parts.append(generate_latest(_registry([family])))
            await asyncio.sleep(0)
        return b"".join(parts), CONTENT_TYPE

    async def _ask(self, client: EngineLink) -> None:
        engine = client.facts.pid
        try:
            values = await asyncio.wait_for(client.stats(), STATS_TIMEOUT_S)
        except Exception:  # busy, or gone a moment ago: the next scrape will see
            values = {}
        if engine in self._scraped:  # else another scrape has seen meanwhile that it is gone
            self.engine_stats(values, engine)
            if client.last_beat is not None:
                self.engine_seen(client.last_beat, engine)

    def families(self) -> Iterator[Family]:
        """Every metric with its present values, in the order of ``METRICS``."""
        totals = self._engine.totals()
        gauges = self._gauge_values()
        self._counters["request_log_dropped_total"].values[()] = self._log_dropped()
        for metric in METRICS:
            if metric.kind == "histogram":
                yield self._histogram_family(metric, totals)
            elif metric.kind == "gauge":
                yield self._gauge_family(metric, gauges.get(metric.name, 0.0))
            else:
                yield self._counter_family(metric, totals.get(metric.name) or self._counters[metric.name])

    def _gauge_values(self) -> dict[str, float]:
        beats = self._beats.values()
        pages = sum(beat.total_pages for beat in beats)
        found = {
            "num_requests_running": float(sum(beat.running for beat in beats)),
            "num_requests_waiting": float(sum(beat.waiting for beat in beats)),
            "kv_cache_usage_perc": 1.0 - sum(beat.free_pages for beat in beats) / pages if pages else 0.0,
            "engine_up": float(len(self._beats)),
        }
        for told in self._gauges.values():
            for name, number in told.items():
                found[name] = found.get(name, 0.0) + number
        return found

    def _full_name(self, metric: Metric) -> str:
        return f"{self._prefix}:{metric.name}"

    def _label_names(self, metric: Metric) -> list[str]:
        return ["model_name", *metric.labels]

    def _label_values(self, labels: Labels) -> list[str]:
        return [self._model_name, *labels]

    def _counter_family(self, metric: Metric, counter: Counter) -> Family:
        family = CounterMetricFamily(self._full_name(metric), metric.meaning, labels=self._label_names(metric))
        for labels, value in counter.values.items():
            family.add_metric(self._label_values(labels), value)
        return family

    def _gauge_family(self, metric: Metric, value: float) -> Family:
        family = GaugeMetricFamily(self._full_name(metric), metric.meaning, labels=self._label_names(metric))
        family.add_metric(self._label_values(()), value)
        return family

    def _histogram_family(self, metric: Metric, totals: Mapping[str, Counter]) -> Family:
        family = HistogramMetricFamily(self._full_name(metric), metric.meaning, labels=self._label_names(metric))
        by_labels = {labels: found for (name, labels), found in self._histograms.items() if name == metric.name}
        if metric.name == "gc_pause_seconds" and GC_PAUSES_KEY in totals:
            by_labels["engine",] = Histogram(metric.edges)
            by_labels["engine",].add_values({key: value for (key,), value in totals[GC_PAUSES_KEY].values.items()})
        names = [*(repr(edge) for edge in metric.edges), "+Inf"]
        for labels, histogram in by_labels.items():
            buckets = list(zip(names, accumulate(histogram.counts), strict=True))
            family.add_metric(self._label_values(labels), buckets, histogram.sum)
        return family


class _Families(Collector):
    """Hands finished families to an encoder of ``prometheus_client``."""

    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterable[Family]:
        return self._families


def _registry(families: Iterable[Family]) -> CollectorRegistry:
    """A registry of its own, so that nothing which a library registers globally is shown, and nothing else is seen."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(families))
    return registry
