"""Case 1, the baseline: ``generate`` of Hugging Face transformers, eager, SDPA attention, its own dynamic KV cache."""

from __future__ import annotations

import time
from typing import Any

from jitgraph.bench.cases.common import Case, Decoded, FirstToken, Paths, process_peak_bytes
from jitgraph.bench.plan import Plan


class Clock:
    """A transformers streamer: told of each token once it is on the host, it notes the time."""

    def __init__(self) -> None:
        self.times_ns: list[int] = []

    def put(self, value: Any) -> None:
        """A token (or, first, the prompt)."""
        self.times_ns.append(time.perf_counter_ns())

    def end(self) -> None:
        """The sequence is over."""


class BaselineCase:
    """transformers on one device."""

    def __init__(self) -> None:
        self._model: Any = None
        self._device = "cpu"
        self._settings: dict[str, Any] = {}
        """Further arguments of ``generate``."""

    def load(self, plan: Plan) -> None:
        """See ``Case``."""
        from jitgraph.bench.hf_model import load_hf_model

        self._device = plan.device
        self._model = load_hf_model(plan)

    def _generate(self, token_ids: list[int], tokens: int, streamer: Clock | None) -> Any:
        import torch

        ids = torch.tensor([token_ids], device=self._device)
        return self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=streamer,
            **self._settings,
        )

    def first_token(self, token_ids: list[int]) -> FirstToken:
        """See ``Case``. ``generate`` has no figure of its own."""
        start = time.perf_counter_ns()
        token_id = int(self._generate(token_ids, 1, None)[0, -1])
        return FirstToken(token_id, (time.perf_counter_ns() - start) / 1e6, None)

    def decode(self, token_ids: list[int], tokens: int) -> Decoded:
        """See ``Case``."""
        clock = Clock()
        start = time.perf_counter_ns()
        self._generate(token_ids, tokens, clock)
        return Decoded.from_times(start, clock.times_ns[1:], tokens)  # the first call hands over the prompt

    def paths(self) -> Paths:
        """See ``Case``: it has none."""
        return {}

    def counters(self) -> dict[str, int]:
        """See ``Case``: it has none."""
        return {}

    def peak_memory_bytes(self) -> int:
        """See ``Case``."""
        import torch

        cuda = self._device.startswith("cuda")
        return int(torch.cuda.max_memory_allocated(self._device)) if cuda else process_peak_bytes()

    def describe(self) -> dict[str, Any]:
        """See ``Case``."""
        import transformers

        return {"engine": "transformers", "version": transformers.__version__, "attention": "sdpa", "emulated": False}

    def attribution(self, token_ids: list[int]) -> dict[str, float]:
        """See ``Case``. All it launches are kernels; its host has no time of its own to tell apart."""
        if not self._device.startswith("cuda"):
            return {}
        from jitgraph.bench.ablation import LAUNCHES
        from jitgraph.bench.attribution import calls_per_step

        found = calls_per_step(lambda tokens: self._generate(token_ids, tokens, None))
        return {**found, LAUNCHES: found["kernels_per_step"]}

    def close(self) -> None:
        """See ``Case``."""
        self._model = None


def make() -> Case:
    """The case, not loaded yet."""
    return BaselineCase()
