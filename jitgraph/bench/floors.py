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


def ceiling_flags(device_name: str, read_tb_s: float) -> list[str]:
    """Why the ceilings are implausible for the device; empty where they are not."""
    if "H200" in device_name and read_tb_s < H200_READ_TB_S:
        return [
            f"read rate {read_tb_s:.2f} TB/s is implausible for an H200 (at least {H200_READ_TB_S}): no run of record"
        ]
    return []
