"""Llama-2-7B shapes in fp16 on a GPU, against ``LlamaForCausalLM`` on the same seeded weights.

The yardstick is transformers in float32 on the same fp16 values: logits by relative error, and the top-1 token wherever
the reference's own lead over the runner-up exceeds the error measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_cases import answer

from jitgraph.config import EngineConfig
from jitgraph.engine.engine import Engine
from jitgraph.graphs.key import Path, Phase
from jitgraph.model.loader import load_model
from jitgraph.types import Request, SamplingParams

pytestmark = pytest.mark.gpu

PRESET = "llama-2-7b"
NEW_TOKENS = 24
LENGTHS = (1, 7, 64, 300, 700)
"""The last is over the largest bucket, so it runs in chunks."""


@pytest.fixture(scope="module")
def models(device: torch.device) -> Iterator[tuple[Any, Any, Engine]]:
    """(transformers in float32, transformers in float16, engine), all on the same weights."""
    import transformers

    from jitgraph.model.presets import preset_config
    from jitgraph.model.random_weights import random_state_dict

    loaded = load_model(PRESET, device=device, dtype="float16", weights="random")
    config = transformers.LlamaConfig(**preset_config(PRESET))
    state = random_state_dict(loaded.spec, 0, device, torch.float16)
    with torch.device("meta"):
        half, full = transformers.LlamaForCausalLM(config), transformers.LlamaForCausalLM(config)
    half.load_state_dict(state, assign=True)
    full.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    for model in (half, full):
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
        model.eval()
    engine = Engine(
        loaded.spec, loaded.weights, EngineConfig(max_model_len=1024, max_streams=4, prefix_cache=False), ()
    )
    yield full, half, engine


def prompt(length: int, vocabulary: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(length)
    return tuple(torch.randint(0, vocabulary, (length,), generator=generator).tolist())


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@torch.inference_mode()
def check_tokens(
    full: Any, half: Any, ids: tuple[int, ...], tokens: list[int], device: torch.device
) -> tuple[int, int]:
    """Asserts every token that the reference decides clearly; returns (clear ones, all)."""
    whole = torch.tensor([ids + tuple(tokens[:-1])], device=device)
    logits = full(whole).logits[0, len(ids) - 1 :]
    error = (half(whole).logits[0, len(ids) - 1 :].float() - logits).abs().amax(-1) * 2
    top = logits.topk(2)
    clear = (top.values[:, 0] - top.values[:, 1]) > error
    for i, token in enumerate(tokens):
        if clear[i]:
            assert token == top.indices[i, 0].item(), f"prompt of {len(ids)}, token {i}"
    return int(clear.sum()), len(tokens)


def test_logits_and_tokens(models: tuple[Any, Any, Engine], device: torch.device) -> None:
    """Each prompt alone: error no larger than transformers' own in fp16, tokens as the reference decides."""
    full, half, engine = models
    clear = total = 0
    for length in LENGTHS:
        ids = prompt(length, engine.spec.vocab_size)
        given = torch.tensor([ids], device=device)
        with torch.inference_mode():
            wanted = full(given).logits[0, -1]
            theirs = relative(half(given).logits[0, -1], wanted)
        engine.submit(Request(0, ids, SamplingParams(max_tokens=1)))
        while engine.busy:
            engine.step()
        ours = relative(engine.buffers["logits"][0], wanted)
        print(f"{length} tokens: relative error ours {ours:.2e}, transformers fp16 {theirs:.2e}")
        assert ours <= 1.5 * theirs + 1e-4
        tokens: list[int] = []
        engine.submit(Request(0, ids, SamplingParams(max_tokens=NEW_TOKENS)))
        while engine.busy:
            tokens += [chunk.token_id for chunk in engine.step() if chunk.token_id is not None]
        a, b = check_tokens(full, half, ids, tokens, device)
        clear, total = clear + a, total + b
    assert clear > total // 2, "most tokens must be clear ones, or this test proves little"


def test_batch_of_four(models: tuple[Any, Any, Engine], device: torch.device) -> None:
    """Four prompts of unequal lengths at once, on pages that others have used."""
    full, half, engine = models
    wanted = [prompt(length, engine.spec.vocab_size) for length in LENGTHS[:4]]
    for identity, ids in enumerate(wanted):
        engine.submit(Request(identity, ids, SamplingParams(max_tokens=NEW_TOKENS)))
    found: list[list[int]] = [[] for _ in wanted]
    while engine.busy:
        for chunk in engine.step():
            assert chunk.token_id is not None
            found[chunk.request_id].append(chunk.token_id)
    for ids, tokens in zip(wanted, found, strict=True):
        assert len(tokens) == NEW_TOKENS
        check_tokens(full, half, ids, tokens, device)


def test_capturing_reserves_nothing(models: tuple[Any, Any, Engine]) -> None:
    """The arena is static: capturing every graph leaves the allocator's reserve as it was, and nothing compiles
    later."""
    engine = models[2]
    assert len(engine.ready.captured) == 2 * engine.config.max_streams + len(engine.sizing.buckets)
    assert engine.ready.reserved_growth_bytes == 0
    assert engine.compiles_after_ready == 0


def test_lengths_captured_later_reserve_nothing(models: tuple[Any, Any, Engine]) -> None:
    """What prompts ask for is captured when idle, out of the same memory; then it is exact."""
    engine = models[2]
    drawn = [prompt(length, engine.spec.vocab_size) for length in (11, 23, 37)]
    for ids in drawn:
        answer(engine, ids, SamplingParams(max_tokens=2))
    torch.cuda.synchronize()
    reserved, captures = torch.cuda.memory_reserved(), engine.store.counters.captures
    while engine.idle_work:
        engine.work_while_idle()
    assert engine.store.counters.captures > captures and torch.cuda.memory_reserved() == reserved
    engine.reset_counters()
    for ids in drawn:
        answer(engine, ids, SamplingParams(max_tokens=2))
    assert engine.dispatcher.paths[Phase.PREFILL, Path.EXACT] == 3
    assert engine.compiles_after_ready == 0


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=150),
        SamplingParams(max_tokens=150, temperature=0.8, top_p=0.95, seed=5, logprobs=3, repetition_penalty=1.1),
    ],
    ids=["greedy", "everything"],
)
def test_loops_give_the_bits_of_steps(
    models: tuple[Any, Any, Engine], monkeypatch: pytest.MonkeyPatch, params: SamplingParams
) -> None:
    engine = models[2]
    ids = prompt(64, engine.spec.vocab_size)
    engine.reset_counters()
    looped = answer(engine, ids, params)
    assert engine.dispatcher.paths[Phase.DECODE, Path.LOOP] == len(looped) - 1
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner.loops, "_loops", {})
        assert answer(engine, ids, params) == looped
