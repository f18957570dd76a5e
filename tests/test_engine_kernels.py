"""The whole engine on its Triton kernels, through the interpreter where there is no GPU: same tokens as plain
PyTorch."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from engine_cases import Bits, bits, finish, make_engine, tokens, with_changes
from test_correctness import poison

from jitgraph.graphs.key import Path, Phase
from jitgraph.jit.collect import collect
from jitgraph.types import Request, SamplingParams, TokenChunk

SPEC = with_changes(
    family="qwen3", vocab_size=96, intermediate_size=40, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16,
    qk_norm=True, layer_windows=(0, 0),
)  # fmt: skip
PROMPTS = ((5, 9, 14), (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6))
PARAMS = (
    SamplingParams(max_tokens=2),
    SamplingParams(
        max_tokens=3, temperature=0.9, top_k=30, top_p=0.95, min_p=0.01, seed=9, logprobs=3, presence_penalty=0.5
    ),
)


def answer(device: torch.device, ops: str, **settings: Any) -> tuple[list[Bits], set[tuple[Phase, Path]]]:
    """What both prompts get together, and the paths that their steps took."""
    chosen = {"max_model_len": 48, "max_streams": 2, "prefill_buckets": (4, 8), "max_graphs": 40, "dtype": "float32"}
    engine = make_engine(device, SPEC, ops=ops, **chosen, **settings)
    poison(engine)
    for identity, (ids, params) in enumerate(zip(PROMPTS, PARAMS, strict=True)):
        engine.submit(Request(identity, ids, params))
    chunks: dict[int, list[TokenChunk]] = {}
    finish(engine, chunks)
    return [bits(chunks[identity]) for identity in range(2)], set(engine.dispatcher.paths)


@pytest.mark.parametrize(
    ("ops", "settings"),
    [
        ("jit", {}),
        ("jit", {"batch_invariant": True}),
        ("mixed", {"kv_window": 18, "kv_sinks": 2}),
        ("mixed", {"fused_sampling": False}),
    ],
    ids=["jit", "batch invariant", "rolling window", "mixed"],
)
def test_same_tokens_as_plain_pytorch(device: torch.device, ops: str, settings: dict[str, Any]) -> None:
    """A chunked prompt, a batch of two, a stream left alone; greedy and fully sampled, with log-probabilities. The
    rolling window is shorter than the longer prompt and its tokens."""
    window = {name: settings[name] for name in settings if name.startswith("kv_")}
    expected, _ = answer(device, "torch", fused_sampling=device.type == "cpu", graphs=device.type == "cpu", **window)
    found, paths = answer(device, ops, **settings)
    for wanted, got in zip(expected, found, strict=True):
        assert tokens(got) == tokens(wanted)
        for (_, value, top, reason), (_, other, others, same) in zip(wanted, got, strict=True):
            assert reason is same
            if value is not None:
                assert other == pytest.approx(value, abs=1e-4)
                assert [i for i, _ in others] == [i for i, _ in top]
    whole = settings.get("fused_sampling", True)
    assert ((Phase.DECODE, Path.LOOP) in paths) == whole, "the last token comes out of a loop, if there are any"
    assert (Phase.PREFILL, Path.PADDED) in paths


@pytest.mark.parametrize("settings", [{}, {"kv_window": 18, "kv_sinks": 2}, {"batch_invariant": True}], ids=str)
def test_a_brief_walk_needs_every_kernel_of_a_whole_one(device: torch.device, settings: dict[str, Any]) -> None:
    """Layers whose windows differ, so that there are several kinds, and some of each."""
    windows = (0,) * 5 if "kv_window" in settings else (0, 8, 0, 8, 0)
    spec = dataclasses.replace(SPEC, num_layers=5, layer_windows=windows)
    chosen = {"max_model_len": 48, "max_streams": 2, "prefill_buckets": (4, 8), "max_graphs": 40, "dtype": "float32"}
    engine = make_engine(device, spec, ops="jit", **chosen, **settings)
    program, needed = engine.runner._program, 0
    for key in sorted(engine.store.ready_keys, key=str):
        found, ran = [], []
        for brief in (False, True):
            with collect(90) as wanted, torch.inference_mode():
                ran.append(sum(1 for _ in program.graph_stages(key, brief=brief)))
            found.append({(want.kernel.__name__, want.spec.key) for want in wanted})
        assert found[0] == found[1] and found[0], key
        assert ran[1] < ran[0], "nothing was left out"
        needed += len(found[0])
    assert needed > 20
