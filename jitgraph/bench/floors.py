"""The lowest latency a machine allows a model: pure arithmetic over measured rates. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

H200_READ_TB_S = 4.4
"""An H200 that reads more slowly than this is not in order, or not alone."""


@dataclass(frozen=True)
class Floors:
    """What a step cannot beat.

    A prompt of L tokens takes at least ``max(weight bytes / B, FLOPs(L) / R)`` and a decode step after C cached tokens
    at least ``(weight bytes + C * KV bytes) / B``, with B the read bandwidth and R the rate of matrix products.
    """

    weight_bytes: int
    """Streamed per step: every matrix, the LM head included, the embedding table not."""
    kv_bytes_per_token: int
    flops_per_token: int
    flops_once: int
    """The LM head, which sees the last token alone."""

    @classmethod
    def from_model(cls, model: Mapping[str, Any]) -> Floors:
        """From the ``model`` object of the study."""
        return cls(
            *(int(model[name]) for name in ("weight_bytes", "kv_bytes_per_token", "flops_per_token", "flops_once"))
        )

    def prompt_ms(self, tokens: int, read_tb_s: float, gemm_tflops: float) -> float:
        """Floor of the first token's latency, in milliseconds."""
        flops = tokens * self.flops_per_token + self.flops_once
        return max(self.weight_bytes / (read_tb_s * 1e9), flops / (gemm_tflops * 1e9))

    def decode_ms(self, cached_tokens: int, read_tb_s: float) -> float:
        """Floor of the time between tokens, in milliseconds."""
        return (self.weight_bytes + cached_tokens * self.kv_bytes_per_token) / (read_tb_s * 1e9)


def ceilings(
    measured: Mapping[str, Any], floors: Floors, linears_ms: Mapping[tuple[str, int], float], device_name: str
) -> dict[str, Any]:
    """The ``ceiling`` object of a study: the best rates that anything reached, under each pacing and over all.

    Args:
        measured: ``raw/ceiling.json``: rates of the stream and product kernels by pacing. Empty gives an empty
        object. linears_ms: (pacing, tokens) to the mean time of the model's matrix products. They are kernels as
        well: what they
            reach is reachable.
        device_name: for the flags.

    What a device does back to back it can do after a pause, when it is cooler: the interactive rates are at least the
    sustained ones.
    """
    if not measured:
        return {}
    by_pacing: dict[str, dict[str, float]] = {}
    for pacing in sorted(measured["by_pacing"], reverse=True):  # sustained before interactive
        rates = {name: float(rate) for name, rate in measured["by_pacing"][pacing].items()}
        for (where, tokens), ms in linears_ms.items():
            if where == pacing:
                flops = tokens * floors.flops_per_token + floors.flops_once
                rates["read_tb_s"] = max(rates["read_tb_s"], floors.weight_bytes / (ms * 1e9))
                rates["gemm_tflops"] = max(rates["gemm_tflops"], flops / (ms * 1e9))
        hot = by_pacing.get("sustained", {}) if pacing == "interactive" else {}
        by_pacing[pacing] = {name: max(rate, hot.get(name, 0.0)) for name, rate in rates.items()}
    names = next(iter(by_pacing.values()))
    best = {name: max(rates[name] for rates in by_pacing.values()) for name in names}
    flags = [
        f"read rate {rates['read_tb_s']:.2f} TB/s ({pacing}) is implausible for an H200 (at least {H200_READ_TB_S}): "
        "no run of record"
        for pacing, rates in by_pacing.items()
        if "H200" in device_name and rates["read_tb_s"] < H200_READ_TB_S
    ]
    return {**best, "by_pacing": by_pacing, "flags": flags}
