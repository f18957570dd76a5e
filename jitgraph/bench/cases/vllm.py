"""Peer: vLLM's ``AsyncLLM`` in this process, with its own CUDA graphs; its engine core has a process of its own.

It pins its own torch, so it usually lives in an environment of its own (``--python vllm=PATH``). A running server is
measured over HTTP instead (``--url vllm=URL``, ``cases/url.py``). Its cache of earlier prompts is off: the same prompt
is served many times, and a hit would time something else. All else is as users get it, but for the share of the GPU's
memory, which is what the weights and a few gigabytes take: one request at a time needs no more. Its limit of requests
at once stays, since the sizes that it captures graphs for, and so those of prompts, follow from it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import time
from typing import Any

from jitgraph.bench.cases.checkpoint import Checkpoint
from jitgraph.bench.cases.common import Case, CaseUnavailable, Decoded, FirstToken, Paths
from jitgraph.bench.nvml import NvmlError, gpu_facts
from jitgraph.bench.plan import Plan

HOW_TO_INSTALL = (
    "not installed: run scripts/make_venv_vllm.sh and pass --python vllm=.venv-vllm/bin/python (needs an NVIDIA GPU), "
    "or --url vllm=URL for a running server"
)
BESIDE_WEIGHTS_GIB = 8.0
"""For the KV cache, activations, graphs and the context of CUDA."""
USUAL_SHARE = 0.9
"""Of the GPU's memory: vLLM's own default."""


def check_available(device: str) -> None:
    """Nothing where the case can run.

    Raises:
        CaseUnavailable: the package or the device is missing.
    """
    if importlib.util.find_spec("vllm") is None:
        raise CaseUnavailable("not installed", HOW_TO_INSTALL)
    if not device.startswith("cuda"):
        raise CaseUnavailable("no CUDA device", "no CUDA device: the vllm case runs on NVIDIA GPUs only")


def memory_share(weights_gib: float, total_gib: float | None) -> float:
    """Share of the GPU's memory that vLLM is given."""
    if not total_gib:
        return USUAL_SHARE
    return min(USUAL_SHARE, (weights_gib + BESIDE_WEIGHTS_GIB) / total_gib)


class VLLMCase:
    """vLLM on one GPU, from a checkpoint folder; a random preset is written to one first, and removed last."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._checkpoint = Checkpoint()
        self._requests = 0
        self._share = USUAL_SHARE

    def load(self, plan: Plan) -> None:
        """See ``Case``."""
        check_available(plan.device)
        path = self._checkpoint.path(plan)
        self._share = memory_share(self._checkpoint.weights_gib(path), _gpu_memory_gib(plan.device))
        self._loop = asyncio.new_event_loop()
        self._engine = self._run(self._open(path, plan))

    async def _open(self, path: str, plan: Plan) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = AsyncEngineArgs(
            model=path,
            dtype=plan.dtype,
            skip_tokenizer_init=True,
            max_model_len=plan.max_model_len,
            enable_prefix_caching=False,
            gpu_memory_utilization=self._share,
        )
        return AsyncLLM.from_engine_args(arguments)

    def _run(self, work: Any) -> Any:
        assert self._loop is not None, "the case is not loaded"
        return self._loop.run_until_complete(work)

    async def _serve(self, token_ids: list[int], tokens: int) -> tuple[int, list[int], list[int], Any]:
        """Start, the clock at each token, the tokens, and vLLM's own figures of the request."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=tokens,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._requests += 1
        name, prompt = f"request-{self._requests}", {"prompt_token_ids": token_ids}
        times: list[int] = []
        ids: list[int] = []
        figures = None
        start = time.perf_counter_ns()
        async for message in self._engine.generate(prompt, params, name):
            now = time.perf_counter_ns()
            new = message.outputs[0].token_ids
            times += [now] * len(new)
            ids += new
            figures = message.metrics if message.metrics is not None else figures
        return start, times, ids, figures

    def first_token(self, token_ids: list[int]) -> FirstToken:
        """See ``Case``. The engine's figure is vLLM's own, from the arrival of a request; it may leave it out."""
        start, times, ids, figures = self._run(self._serve(token_ids, 1))
        decoded = Decoded.from_times(start, times, 1)
        told = getattr(figures, "first_token_latency", 0.0) or 0.0
        return FirstToken(int(ids[0]), decoded.ttft_ms, told * 1e3 if told > 0 else None)

    def decode(self, token_ids: list[int], tokens: int) -> Decoded:
        """See ``Case``. Tokens that arrive in one message share its time."""
        start, times, _, _ = self._run(self._serve(token_ids, tokens))
        return Decoded.from_times(start, times, tokens)

    def paths(self) -> Paths:
        """See ``Case``: it does not tell."""
        return {}

    def counters(self) -> dict[str, int]:
        """See ``Case``: it does not tell."""
        return {}

    def peak_memory_bytes(self) -> int:
        """See ``Case``. Its engine is another process, so this is what the whole device has in use."""
        import torch

        free, total = torch.cuda.mem_get_info()
        return int(total - free)

    def describe(self) -> dict[str, Any]:
        """See ``Case``."""
        import vllm

        about = {"engine": "vllm", "version": vllm.__version__, "block_reuse": False, "emulated": False}
        return {**about, "memory_share": round(self._share, 3)}

    def attribution(self, token_ids: list[int]) -> dict[str, float]:
        """See ``Case``. Its engine is another process, out of the profiler's sight."""
        return {}

    def close(self) -> None:
        """See ``Case``."""
        if self._engine is not None:
            self._engine.shutdown()
        if self._loop is not None:
            self._loop.close()
        self._checkpoint.close()


def _gpu_memory_gib(device: str) -> float | None:
    """The GPU's whole memory, asked for without a CUDA context: vLLM forks a process that must not inherit one."""
    number = device.partition(":")[2]
    try:
        gpus = gpu_facts()["gpus"]
    except NvmlError:
        return None
    return gpus[int(number or 0)].get("memory_gib") if int(number or 0) < len(gpus) else None


def make() -> Case:
    """The case, not loaded yet."""
    return VLLMCase()
