"""The whole engine on its Triton kernels, through the interpreter where there is no GPU: same tokens as plain
PyTorch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_correctness import SHAPE, VOCABULARY, poison

from jitgraph.config import EngineConfig
from jitgraph.engine.engine import Engine
from jitgraph.model.loader import load_model
from jitgraph.types import Request, SamplingParams, TokenChunk

PROMPTS = ((5, 9, 14), (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5))
PARAMS = (
    SamplingParams(max_tokens=4),
    SamplingParams(max_tokens=4, temperature=0.9, top_k=30, top_p=0.95, min_p=0.01, seed=9, logprobs=3),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("qwen3")
    config = transformers.Qwen3Config(**{**SHAPE, "head_dim": 16, "num_hidden_layers": 2})
    transformers.Qwen3ForCausalLM(config).save_pretrained(path)
    return path


def answer(folder: Path, device: torch.device, ops: str) -> list[list[TokenChunk]]:
    loaded = load_model(str(folder), device=device, dtype="float32")
    config = EngineConfig(
        max_model_len=48, max_streams=2, prefill_buckets=(4, 8), ops=ops, fused_sampling=ops == "jit", max_graphs=40
    )
    engine = Engine(loaded.spec, loaded.weights, config, ())
    poison(engine)
    for identity, (ids, params) in enumerate(zip(PROMPTS, PARAMS, strict=True)):
        engine.submit(Request(identity, ids, params))
    chunks: list[list[TokenChunk]] = [[], []]
    while engine.busy:
        for chunk in engine.step():
            chunks[chunk.request_id].append(chunk)
    return chunks


@pytest.mark.parametrize("ops", ["jit", "mixed"])
def test_same_tokens_as_plain_pytorch(folder: Path, device: torch.device, ops: str) -> None:
    """A chunked prompt, a batch of two, greedy and fully sampled, with log-probabilities."""
    expected, found = answer(folder, device, "torch"), answer(folder, device, ops)
    for wanted, got in zip(expected, found, strict=True):
        assert [chunk.token_id for chunk in got] == [chunk.token_id for chunk in wanted]
        for a, b in zip(wanted, got, strict=True):
            if a.logprobs is not None:
                assert b.logprobs is not None
                assert b.logprobs.logprob == pytest.approx(a.logprobs.logprob, abs=1e-4)
                assert [i for i, _ in b.logprobs.top] == [i for i, _ in a.logprobs.top]
    assert all(0 <= chunk.token_id < VOCABULARY for chunks in found for chunk in chunks if chunk.token_id is not None)
