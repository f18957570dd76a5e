"""Peer: ``generate`` of Hugging Face transformers with a static KV cache and ``torch.compile(mode="reduce-overhead")``.

transformers' own way to JIT and CUDA graphs: it runs the prompt eagerly and decodes through the compiled forward pass,
which PyTorch captures in CUDA graphs on an NVIDIA GPU. One cache serves all requests, so that no shape ever changes and
nothing is compiled again. On the CPU the forward pass is compiled as well; graphs do not exist there.
"""

from __future__ import annotations

from typing import Any

from jitgraph.bench.cases.baseline import BaselineCase, Clock
from jitgraph.bench.cases.common import Case, Decoded, FirstToken
from jitgraph.bench.plan import Plan

MODE = "reduce-overhead"
SETTLING_REQUESTS = 3
"""Compile, record the graphs, replay them."""
SETTLING_TOKENS = 4


class CompiledCase(BaselineCase):
    """transformers, compiled, on one device."""

    def load(self, plan: Plan) -> None:
        """See ``Case``. Ready means that a step has been compiled and replayed."""
        super().load(plan)
        from transformers import CompileConfig, StaticCache

        compile_config = CompileConfig(mode=MODE)
        if not plan.device.startswith("cuda"):
            # Left alone, it compiles on accelerators only.
            compile_config._compile_all_devices = True  # type: ignore[assignment]
        cache = StaticCache(config=self._model.config, max_cache_len=plan.max_model_len)
        self._settings = {"past_key_values": cache, "compile_config": compile_config}
        for _ in range(SETTLING_REQUESTS):
            self._fresh()
            self._generate([1, 2, 3], SETTLING_TOKENS, Clock())
        self._compiled = _graphs_compiled()

    def _fresh(self) -> None:
        """Empties the cache, between two requests and outside of what is timed."""
        self._settings["past_key_values"].reset()

    def first_token(self, token_ids: list[int]) -> FirstToken:
        """See ``Case``."""
        self._fresh()
        return super().first_token(token_ids)

    def decode(self, token_ids: list[int], tokens: int) -> Decoded:
        """See ``Case``."""
        self._fresh()
        return super().decode(token_ids, tokens)

    def describe(self) -> dict[str, Any]:
        """See ``Case``."""
        more = {"cache": "static", "compile_mode": MODE, "cuda_graphs": self._device.startswith("cuda")}
        return {**super().describe(), **more, "compiles_after_ready": _graphs_compiled() - self._compiled}

    def attribution(self, token_ids: list[int]) -> dict[str, float]:
        """See ``Case``. Its graphs are PyTorch's, which does not tell how many it launches."""
        return {}


def _graphs_compiled() -> int:
    """Pieces of Python that ``torch.compile`` has turned into graphs in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def make() -> Case:
    """The case, not loaded yet."""
    return CompiledCase()
