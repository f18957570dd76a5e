"""Case 5: the real ``tensorrt_llm.LLM``, its PyTorch backend with its own CUDA graphs.

It pins its own torch, so it usually lives in an environment of its own (``--python tensorrt-llm=PATH``). A running
``trtllm-serve`` is measured over HTTP instead (``--url tensorrt-llm=URL``, ``cases/url.py``). Its cache of
earlier prompts is off: the same prompt is served many times, and a hit would time something else.
"""

from __future__ import annotations

import importlib.util
import time
from typing import Any

from jitgraph.bench.cases.checkpoint import Checkpoint
from jitgraph.bench.cases.common import Case, CaseUnavailable, Decoded, FirstToken, Paths
from jitgraph.bench.plan import Plan

HOW_TO_INSTALL = (
    "not installed: run scripts/make_venv_tensorrt_llm.sh and pass "
    "--python tensorrt-llm=.venv-tensorrt-llm/bin/python (needs an NVIDIA GPU)"
)


def check_available(device: str) -> None:
    """Nothing where the case can run.

    Raises:
        CaseUnavailable: the package or the device is missing.
    """
    if importlib.util.find_spec("tensorrt_llm") is None:
        raise CaseUnavailable("not installed", HOW_TO_INSTALL)
    if not device.startswith("cuda"):
        raise CaseUnavailable("no CUDA device", "no CUDA device: TensorRT-LLM runs on NVIDIA GPUs only")


class TensorRTLLMCase:
    """TensorRT-LLM on one GPU, from a checkpoint folder; a random preset is written to one first, and removed last."""

    def __init__(self) -> None:
        self._llm: Any = None
        self._checkpoint = Checkpoint()

    def load(self, plan: Plan) -> None:
        """See ``Case``."""
        check_available(plan.device)
        from tensorrt_llm import LLM
        from tensorrt_llm.llmapi import KvCacheConfig

        self._llm = LLM(
            model=self._checkpoint.path(plan),
            dtype=plan.dtype,
            skip_tokenizer_init=True,
            max_batch_size=1,
            max_seq_len=plan.max_model_len,
            kv_cache_config=KvCacheConfig(enable_block_reuse=False, max_tokens=2 * plan.max_model_len),
        )

    def _stream(self, token_ids: list[int], tokens: int) -> Any:
        from tensorrt_llm import SamplingParams

        # Without a tokenizer it asks for an end id of its own; ignore_eos makes that id mean nothing.
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, end_id=-1, detokenize=False)
        return self._llm.generate_async(token_ids, params, streaming=True)

    def first_token(self, token_ids: list[int]) -> FirstToken:
        """See ``Case``."""
        start = time.perf_counter_ns()
        stream = iter(self._stream(token_ids, 1))
        token_id = int(next(stream).outputs[0].token_ids[0])
        end = time.perf_counter_ns()
        for _ in stream:
            continue  # a closing message may follow the token
        return FirstToken(token_id, (end - start) / 1e6, None)

    def decode(self, token_ids: list[int], tokens: int) -> Decoded:
        """See ``Case``. Tokens that arrive in one message share its time."""
        start = time.perf_counter_ns()
        times: list[int] = []
        for message in self._stream(token_ids, tokens):
            now = time.perf_counter_ns()
            times += [now] * (len(message.outputs[0].token_ids) - len(times))
        return Decoded.from_times(start, times, tokens)

    def paths(self) -> Paths:
        """See ``Case``: it does not tell."""
        return {}

    def counters(self) -> dict[str, int]:
        """See ``Case``: it does not tell."""
        return {}

    def peak_memory_bytes(self) -> int:
        """See ``Case``. Its engine may be another process, so this is what the whole device has in use."""
        import torch

        free, total = torch.cuda.mem_get_info()
        return int(total - free)

    def describe(self) -> dict[str, Any]:
        """See ``Case``."""
        import tensorrt_llm

        return {"engine": "tensorrt_llm", "version": tensorrt_llm.__version__, "block_reuse": False, "emulated": False}

    def attribution(self, token_ids: list[int]) -> dict[str, float]:
        """See ``Case``. Its engine may be another process, out of the profiler's sight."""
        return {}

    def close(self) -> None:
        """See ``Case``."""
        if self._llm is not None:
            self._llm.shutdown()
        self._checkpoint.close()


def make() -> Case:
    """The case, not loaded yet."""
    return TensorRTLLMCase()
