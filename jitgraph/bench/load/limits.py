"""Limits of latency that a request meets or misses, for goodput. Pure, owns nothing.

Presets are the interactive limits of MLPerf Inference: ``LLM_LATENCY_LIMITS`` in its submission checker
(``tools/submission/submission_checker`` of mlcommons/inference), scenario *Interactive*. There the 99th percentiles of
TTFT and TPOT over a run must keep them; here each request is held against them too.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from jitgraph.errors import ConfigError

METRICS = ("ttft", "tpot", "e2e")
_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
PRESETS = {
    "mlperf-llama2-70b-interactive": "ttft<=450ms,tpot<=40ms",
    "mlperf-llama3.1-8b-interactive": "ttft<=500ms,tpot<=30ms",
}


@dataclass(frozen=True)
class Limit:
    """The most that one metric of a request may be."""

    metric: str
    """``ttft``, ``tpot`` or ``e2e``."""
    most_ms: float

    def __str__(self) -> str:
        return f"{self.metric}<={self.most_ms:g}ms"


def parse_limits(text: str) -> tuple[Limit, ...]:
    """``ttft<=0.45s,tpot<=40ms`` or the name of a preset.

    Raises:
        ConfigError: a part is not a metric, ``<=``, a number over 0 and a unit, or a metric is named twice.
    """
    found = []
    for part in PRESETS.get(text, text).split(","):
        match = re.fullmatch(r"\s*(\w+)\s*<=\s*(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*(us|ms|s)\s*", part)
        most_ms = float(match[2]) * _MS[match[3]] if match else 0.0
        if match is None or match[1] not in METRICS or not 0 < most_ms < math.inf:
            raise ConfigError(
                f"--limit {text}: each part must be like ttft<=0.45s or tpot<=40ms (of {', '.join(METRICS)}, in s, ms "
                f"or us), or the whole {' or '.join(PRESETS)}"
            )
        found.append(Limit(match[1], most_ms))
    if len({limit.metric for limit in found}) < len(found):
        raise ConfigError(f"--limit {text} names a metric twice: give one limit for each")
    return tuple(found)
