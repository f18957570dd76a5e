"""Small engines and what the engine's tests ask of them: answers, compared bit for bit, and nothing left behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any
from unittest.mock import patch

import torch

from jitgraph.config import EngineConfig
from jitgraph.engine.engine import Engine
from jitgraph.graphs.key import Path, Phase
from jitgraph.graphs.loop_control import LOOP_STEPS
from jitgraph.model.packing import allocate_weights
from jitgraph.model.spec import ModelSpec, RopeSpec
from jitgraph.model.weights import ModelWeights
from jitgraph.types import FinishReason, Request, SamplingParams, TokenChunk

SPEC = ModelSpec(
    family="llama",
    vocab_size=509,
    hidden_size=32,
    intermediate_size=56,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    max_position_embeddings=512,
    rope=RopeSpec(),
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    tie_embeddings=False,
    layer_windows=(0,),
    dtype="float32",
    bos_token_id=None,
    eos_token_ids=(),
    pad_token_id=None,
)
SETTINGS: dict[str, Any] = {"max_model_len": 256, "prefill_buckets": (4, 16, 48), "rolling": False}
"""No graph comes or goes while a test runs, unless the test asks for it."""
TURNS = 5000
"""Steps after which an engine that has not ended its requests never will."""

Bits = list[tuple[int | None, float | None, tuple[tuple[int, float], ...], FinishReason | None]]
"""Everything that a request's chunks say, but their times."""


def random_weights(spec: ModelSpec, device: torch.device, dtype: torch.dtype, seed: int = 0) -> ModelWeights:
    """Weights whose logits spread over a few units, so that greedy decoding wanders and no token is a near tie."""
    generator = torch.Generator().manual_seed(seed)
    weights = allocate_weights(spec, device, dtype)
    for tensor in weights.tensors():
        draft = torch.empty(tensor.shape).normal_(generator=generator)
        tensor.copy_(draft * 0.1 + 1.0 if tensor.dim() == 1 else draft * 2.0 / tensor.shape[-1] ** 0.5)
    return weights


def make_engine(
    device: torch.device, spec: ModelSpec = SPEC, seed: int = 0, loop_steps: int = LOOP_STEPS, **settings: Any
) -> Engine:
    """An engine over random weights: float32 on the CPU, float16 on a GPU, unless ``dtype`` says otherwise."""
    chosen = {**SETTINGS, **settings}
    if chosen.get("kv_window") is not None:
        chosen["max_model_len"] = None
    config = EngineConfig(**chosen)
    default = torch.float16 if device.type == "cuda" else torch.float32
    dtype = default if config.dtype == "auto" else getattr(torch, config.dtype)
    with patch("jitgraph.engine.ready.LOOP_STEPS", loop_steps):
        return Engine(spec, random_weights(spec, device, dtype, seed), config, spec.eos_token_ids)


def prompt(length: int, salt: int = 0, vocabulary: int = SPEC.vocab_size) -> tuple[int, ...]:
    """Ids without a pattern."""
    generator = torch.Generator().manual_seed(1000 * salt + length)
    return tuple(torch.randint(0, vocabulary, (length,), generator=generator).tolist())


def finish(engine: Engine, chunks: dict[int, list[TokenChunk]]) -> None:
    """Steps until nothing is left to do, adding what comes to ``chunks``."""
    for _ in range(TURNS):
        if not engine.busy:
            return
        take(engine, chunks)
    raise AssertionError("the engine does not come to an end")


def take(engine: Engine, chunks: dict[int, list[TokenChunk]]) -> None:
    """One step; what it gives is added to ``chunks``."""
    for chunk in engine.step():
        chunks.setdefault(chunk.request_id, []).append(chunk)


def steps_until(engine: Engine, chunks: dict[int, list[TokenChunk]], identity: int, tokens: int) -> None:
    """Steps until a request has given so many tokens."""
    for _ in range(TURNS):
        if len(chunks.get(identity, ())) >= tokens:
            return
        assert engine.busy, f"request {identity} ended after {len(chunks.get(identity, ()))} tokens"
        take(engine, chunks)
    raise AssertionError("the tokens do not come")


def run_ahead(engine: Engine, pieces: int) -> None:
    """Lets the emulated device get ahead of the host, as a GPU does by itself."""
    with torch.inference_mode():
        for _ in range(pieces):
            if engine.runner.emulated is None or not engine.runner.emulated.pump():
                break


def answers(engine: Engine, wanted: Iterable[tuple[tuple[int, ...], SamplingParams]]) -> list[Bits]:
    """What each (prompt, params) gets, all submitted at once; then nothing must be left."""
    requests = [Request(identity, ids, params) for identity, (ids, params) in enumerate(wanted)]
    for request in requests:
        engine.submit(request)
    chunks: dict[int, list[TokenChunk]] = {}
    finish(engine, chunks)
    assert_nothing_left(engine)
    return [bits(chunks[request.request_id]) for request in requests]


def answer(engine: Engine, ids: tuple[int, ...], params: SamplingParams) -> Bits:
    """What one request gets alone."""
    return answers(engine, [(ids, params)])[0]


def bits(chunks: list[TokenChunk]) -> Bits:
    """Chunks without their times; floats compare bit for bit, none of them being NaN."""
    found: Bits = []
    for chunk in chunks:
        entry = chunk.logprobs
        assert entry is None or entry.token_id == chunk.token_id
        value = (None, ()) if entry is None else (entry.logprob, entry.top)
        assert value[0] is None or value[0] == value[0]
        found.append((chunk.token_id, *value, chunk.finish_reason))
    return found


def tokens(found: Bits) -> list[int | None]:
    """Of an answer, its tokens."""
    return [entry[0] for entry in found]


def assert_nothing_left(engine: Engine) -> None:
    """Every page and slot has come back, nothing is in flight, nobody waits."""
    engine.drain()
    assert not engine.busy and not engine._sequences and engine.scheduler.idle
    assert engine.pages.free == engine.pages.total
    assert sorted(engine.scheduler._free_slots) == list(range(engine.config.max_streams))


def decode_paths(engine: Engine) -> dict[Path, int]:
    """How the decode steps since ready ran."""
    return {path: count for (phase, path), count in engine.dispatcher.paths.items() if phase is Phase.DECODE}


def with_changes(spec: ModelSpec = SPEC, **changes: Any) -> ModelSpec:
    """A spec that differs in some figures."""
    return dataclasses.replace(spec, **changes)
