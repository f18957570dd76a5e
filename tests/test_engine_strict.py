"""Nothing is compiled after ready: in strict mode a compilation is an error, and no shape, no sampling and no batch
meets one. On the CPU there is nothing to compile, so there the sweep shows that the mode lets everything through.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_cases import answer, answers, assert_nothing_left, finish, make_engine, prompt, with_changes

from jitgraph.engine.engine import Engine
from jitgraph.errors import CompileError
from jitgraph.jit.monitor import MONITOR
from jitgraph.ops import elementwise
from jitgraph.types import FinishReason, Request, SamplingParams, TokenChunk

SPEC = with_changes(vocab_size=211, num_layers=2, layer_windows=(0, 0), intermediate_size=80, qkv_bias=True)
KINDS = (
    {},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 1},
    {"repetition_penalty": 1.2, "presence_penalty": 0.1, "frequency_penalty": 0.1},
    {"logprobs": 20},
    {"logit_bias": {5: 1.0}, "stop_token_ids": (9,), "min_tokens": 2, "temperature": 1.0, "logprobs": 1},
)
LONGEST = 80


def sweep(device: torch.device, lengths: range, **settings: Any) -> Engine:
    """Every prompt length with one of the kinds in turn, alone; then every batch size with each kind and with all of
    them mixed; then the graphs that this asked for, and some lengths again."""
    chosen = {"prefill_buckets": (8, 16, 48), "max_model_len": 128, "max_graphs": 40, "rolling": True, **settings}
    engine = make_engine(device, SPEC, strict=True, **chosen)
    before = MONITOR.count
    for length in lengths:
        one = SamplingParams(max_tokens=3, **KINDS[length % len(KINDS)])
        answer(engine, prompt(length, vocabulary=SPEC.vocab_size), one)
    for rows in range(1, 9):
        kinds = [SamplingParams(max_tokens=3, **kind) for kind in KINDS]
        for batch in [[kind] * rows for kind in kinds] + [[kinds[i % len(kinds)] for i in range(rows)]]:
            ids = prompt(7 + rows, vocabulary=SPEC.vocab_size)
            found = answers(engine, [(ids[: 5 + row], one) for row, one in enumerate(batch)])
            assert len(found) == rows
    while engine.idle_work:
        engine.work_while_idle()
    for length in lengths[:: len(lengths) // 8]:
        answer(engine, prompt(length, vocabulary=SPEC.vocab_size), SamplingParams(max_tokens=2))
    assert engine.runner.compiles == 0
    assert MONITOR.count == before, [record.signature for record in MONITOR.since(before)]
    return engine


@pytest.mark.parametrize("settings", [{}, {"graphs": False}, {"kv_window": 40}], ids=str)
def test_every_shape_on_the_cpu(settings: dict[str, Any]) -> None:
    sweep(torch.device("cpu"), range(1, LONGEST + 1, 3), **settings)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"graphs": False},
        {"max_graphs": 3},
        {"batch_invariant": True},
        {"batch_invariant": True, "graphs": False},
        {"fused_sampling": False},
        {"graph_scope": "static"},
        {"kv_window": 40},
        {"kv_window": 40, "graphs": False},
        {"ops": "jit-all", "graphs": False},
        {"ops": "mixed", "graphs": False},
        {"dtype": "bfloat16", "graphs": False},
    ],
    ids=str,
)
def test_every_shape_on_the_device(device: torch.device, settings: dict[str, Any]) -> None:
    """Eager steps compile whatever was forgotten, graphs only where they are captured later."""
    engine = sweep(device, range(1, LONGEST + 1), **settings)
    engine.close()


@pytest.mark.gpu
@pytest.mark.parametrize("strict", [True, False])
def test_a_forgotten_kernel_is_noticed(device: torch.device, monkeypatch: pytest.MonkeyPatch, strict: bool) -> None:
    """A specialisation that nobody made ready: an error in strict mode, and the engine goes on; else it is counted."""
    engine = make_engine(device, SPEC, strict=strict, graphs=False)
    ids = prompt(5, vocabulary=SPEC.vocab_size)
    expected = answer(engine, ids, SamplingParams(max_tokens=4))
    program = engine.runner._program
    prepare = program.prepare
    table, rows = torch.zeros(3, 1237, device=device), torch.zeros(2, dtype=torch.int32, device=device)
    out = torch.zeros(2, 1237, device=device)

    def forgetful(key: Any) -> None:
        elementwise.embed(rows, table, out)
        prepare(key)

    chunks: dict[int, list[TokenChunk]] = {}
    engine.reset_counters()
    with monkeypatch.context() as patch:
        patch.setattr(program, "prepare", forgetful)
        engine.submit(Request(0, ids, SamplingParams(max_tokens=4)))
        if strict:
            with pytest.raises(CompileError, match="strict"):
                finish(engine, chunks)
        finish(engine, chunks)
    if strict:
        assert [chunk.finish_reason for chunk in chunks[0]] == [FinishReason.CANCELLED]
    else:
        assert len(chunks[0]) == 4 and engine.runner.compiles == 1
    assert_nothing_left(engine)
    assert answer(engine, ids, SamplingParams(max_tokens=4)) == expected
