"""Runs load generators against one server and reads the same figures from each. Each runs in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jitgraph.bench.load.figures import figures
from jitgraph.bench.load.records import OK, Record
from jitgraph.text.tokenizer import bundled_tokenizer_folder
from load_parts.fixed_server import MODEL, Schedule, running

MEDIANS = ("ttft_ms", "tpot_ms", "e2e_ms")
FIGURES = (*MEDIANS, "output_tokens_per_s")
PROMPT_TOKENS = 32
LIMIT_S = 300.0
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


@dataclass(frozen=True)
class Condition:
    """A schedule and the load on it."""

    ttft_ms: float
    gap_ms: float
    tokens: int
    concurrency: int
    requests: int
    chat: bool = False

    def truth(self) -> dict[str, float]:
        """The figures of a client that takes no time."""
        e2e_ms = self.ttft_ms + self.gap_ms * (self.tokens - 1)
        rate = 1e3 * self.concurrency * self.tokens / e2e_ms
        return dict(zip(FIGURES, (self.ttft_ms, self.gap_ms, e2e_ms, rate), strict=True))


def measure(condition: Condition, aiperf: str, folder: Path) -> dict[str, dict[str, float]]:
    """Figures of both tools, one after the other: ``jitgraph`` and ``aiperf`` (the command's path), and as
    ``aiperf_samples`` this project's figures of AIPerf's requests. Each has a fresh server, its files go to ``folder``.

    Raises:
        RuntimeError: a tool failed.
    """
    schedule = (condition.ttft_ms / 1e3, condition.gap_ms / 1e3)
    with running(Schedule(*schedule)) as server:
        ours = run_ours(condition, server.url, folder / "jitgraph")
    with running(Schedule(*schedule)) as server:
        theirs = run_aiperf(condition, server.url, aiperf, folder / "aiperf")
    samples = (folder / "aiperf" / "profile_export.jsonl").read_text(encoding="utf-8").splitlines()
    return {"jitgraph": ours, "aiperf": theirs, "aiperf_samples": of_samples([json.loads(line) for line in samples])}


def run_ours(condition: Condition, url: str, folder: Path) -> dict[str, float]:
    """Medians and rate of ``jitgraph bench serve``."""
    words = [sys.executable, "-m", "jitgraph", "bench", "serve", url, "--warmup", "0", "--output", str(folder)]
    words += ["--requests", str(condition.requests), "--concurrency", str(condition.concurrency)]
    words += ["--prompt-tokens", str(PROMPT_TOKENS), "--output-tokens", str(condition.tokens)]
    _run([*words, *(["--chat"] if condition.chat else [])])
    found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    _expect(found["requests"]["ok"], condition)
    return _read(found)


def run_aiperf(condition: Condition, url: str, aiperf: str, folder: Path) -> dict[str, float]:
    """Medians and rate of NVIDIA's AIPerf, tokens as the server counts them."""
    words = [aiperf, "profile", "--model", MODEL, "--url", url, "--streaming", "--ui", "none", "--random-seed", "0"]
    words += ["--endpoint-type", "chat" if condition.chat else "completions", "--use-server-token-count"]
    words += ["--tokenizer", str(bundled_tokenizer_folder()), "--isl", str(PROMPT_TOKENS), "--use-legacy-max-tokens"]
    words += ["--osl", str(condition.tokens), "--request-count", str(condition.requests)]
    words += ["--concurrency", str(condition.concurrency), "--no-gpu-telemetry", "--no-server-metrics"]
    _run([*words, "--output-artifact-dir", str(folder)])
    found = json.loads((folder / "profile_export_aiperf.json").read_text(encoding="utf-8"))
    _expect(found["request_count"]["avg"], condition)
    return read_aiperf(found)


def read_aiperf(document: dict[str, Any]) -> dict[str, float]:
    """This project's names of the figures in AIPerf's JSON export."""
    names = ("time_to_first_token", "inter_token_latency", "request_latency")
    medians = [float(document[name]["p50"]) for name in names]
    return dict(zip(FIGURES, (*medians, float(document["output_token_throughput"]["avg"])), strict=True))


def of_samples(requests: list[dict[str, Any]]) -> dict[str, float]:
    """This project's figures of AIPerf's own requests (lines of its JSONL export): definitions alone, without the
    difference between two runs."""
    records = []
    begun_ns = min(int(request["metadata"]["request_start_ns"]) for request in requests)
    for index, request in enumerate(requests):
        metrics, times = request["metrics"], request["metadata"]
        token_ms = [float(metrics["time_to_first_token"]["value"])]
        for gap in metrics["inter_chunk_latency"]["value"]:
            token_ms.append(token_ms[-1] + gap)
        start_ms, end_ms = ((times[name] - begun_ns) / 1e6 for name in ("request_start_ns", "request_end_ns"))
        tokens = int(metrics["output_sequence_length"]["value"])
        records.append(Record(index, OK, None, start_ms, end_ms, PROMPT_TOKENS, tokens, tokens, tuple(token_ms)))
    return _read(figures(records))


def deviations(found: dict[str, dict[str, float]], truth: dict[str, float]) -> dict[str, dict[str, float]]:
    """How far figures are apart, as shares: this project's from AIPerf's, of two runs and of the same samples, and each
    tool's from the schedule."""
    ours, theirs, same = found["jitgraph"], found["aiperf"], found["aiperf_samples"]
    return {
        "of_same_samples": {name: same[name] / theirs[name] - 1 for name in FIGURES},
        "jitgraph_from_aiperf": {name: ours[name] / theirs[name] - 1 for name in FIGURES},
        "jitgraph_from_schedule": {name: ours[name] / truth[name] - 1 for name in FIGURES},
        "aiperf_from_schedule": {name: theirs[name] / truth[name] - 1 for name in FIGURES},
    }


def _read(found: dict[str, Any]) -> dict[str, float]:
    return {name: found[name]["p50"] if name in MEDIANS else found[name] for name in FIGURES}


def _run(words: list[str]) -> None:
    # Told to stay offline, AIPerf 0.13 takes a tokenizer's folder for a repository's name. A folder needs no network.
    environment = {name: value for name, value in os.environ.items() if name not in OFFLINE}
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
        env=environment,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout[-3000:]}")


def _expect(requests: float, condition: Condition) -> None:
    if requests != condition.requests:
        raise RuntimeError(f"{requests} of {condition.requests} requests were answered")
