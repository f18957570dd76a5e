"""Log-probabilities of prompts: those of transformers, whatever the chunks, and no trace in anything else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from engine_cases import (
    Bits,
    answer,
    assert_nothing_left,
    bits,
    finish,
    make_engine,
    prompt,
    steps_until,
    with_changes,
)
from test_correctness import poison

from jitgraph import LLM
from jitgraph.config import EngineConfig
from jitgraph.engine.engine import Engine
from jitgraph.errors import RequestError
from jitgraph.graphs.buffers import SCORE_ROWS
from jitgraph.graphs.dispatch import Reason
from jitgraph.graphs.key import Path as StepPath
from jitgraph.graphs.key import Phase
from jitgraph.model.loader import load_model
from jitgraph.types import FinishReason, Grammar, PromptLogprobs, Request, SamplingParams, TokenChunk

SHAPE: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "tied, with biases": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 40}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}
LENGTHS = (1, 2, 16, 17, SCORE_ROWS, SCORE_ROWS + 1, 100, 101, 331)
"""Around buckets, blocks of the head, and chunks; the last takes several of each."""


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """(transformers model in float32, folder of the same checkpoint)."""
    name, changes = FAMILIES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.2)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def engine(device: torch.device) -> Iterator[Engine]:
    made = make_engine(device, loop_steps=4, dtype="float32")
    yield made
    assert_nothing_left(made)
    made.close()


def run(engine: Engine, requests: list[Request]) -> dict[int, list[TokenChunk]]:
    for request in requests:
        engine.submit(request)
    chunks: dict[int, list[TokenChunk]] = {}
    finish(engine, chunks)
    assert_nothing_left(engine)
    assert not engine.runner.scorer.pending and not engine.runner.scorer._found
    return chunks


def scores_of(engine: Engine, ids: tuple[int, ...], count: int = 3, **params: Any) -> PromptLogprobs:
    """What one prompt's first token brings along; later tokens bring nothing."""
    wanted = SamplingParams(**{"max_tokens": 2, "ignore_eos": True, **params})
    chunks = run(engine, [Request(0, ids, wanted, prompt_logprobs=count)])[0]
    assert all(chunk.prompt_logprobs is None for chunk in chunks[1:])
    assert chunks[0].prompt_logprobs is not None
    return chunks[0].prompt_logprobs


def check(scores: PromptLogprobs, ids: tuple[int, ...], raw: torch.Tensor, count: int, atol: float = 1e-4) -> None:
    """``raw``: log-probabilities ``[T, V]`` after each token of the prompt."""
    assert len(scores) == len(ids) and scores[0] is None
    for position, one in enumerate(scores[1:], start=1):
        row = raw[position - 1].double().cpu()
        assert one is not None and one.token_id == ids[position]
        assert one.logprob == pytest.approx(float(row[ids[position]]), abs=atol)
        assert len(one.top) == min(count, row.shape[0])
        assert [p for _, p in one.top] == pytest.approx(row.sort(descending=True).values[:count].tolist(), abs=atol)
        assert [p for _, p in one.top] == pytest.approx([float(row[i]) for i, _ in one.top], abs=atol)
        assert len({i for i, _ in one.top}) == len(one.top)


# ------------------------------------------------------------------------------------------------ against transformers


@pytest.mark.parametrize("settings", [{}, {"fused_sampling": False}, {"graphs": False}], ids=str)
def test_against_transformers(pair: tuple[Any, Path], device: torch.device, settings: dict[str, Any]) -> None:
    """Chunks of 100 tokens, whose blocks of the head do not come out even; unused memory is poison before each."""
    model, folder = pair
    loaded = load_model(str(folder), device=device, dtype="float32")
    config = EngineConfig(max_model_len=400, prefill_buckets=(16, 100), max_streams=2, rolling=False, **settings)
    engine = Engine(loaded.spec, loaded.weights, config, ())
    for length in LENGTHS if not settings else LENGTHS[-1:]:
        ids = prompt(length, vocabulary=211)
        poison(engine)
        with torch.inference_mode():
            raw = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
        check(scores_of(engine, ids, 5), ids, raw, 5)


# --------------------------------------------------------------------------------------------------------- what is said


def test_how_many_alternatives(engine: Engine, device: torch.device) -> None:
    ids = prompt(60)
    most = scores_of(engine, ids, 20)
    for count in (0, 1, 7):
        fewer = scores_of(engine, ids, count)
        for one, other in zip(fewer[1:], most[1:], strict=True):
            assert one is not None and other is not None
            assert one.top == other.top[:count] and one.logprob == other.logprob
    small = make_engine(device, with_changes(vocab_size=7))
    scores = scores_of(small, (1, 2, 3, 6, 0), 20)
    assert scores[4] is not None and sorted(i for i, _ in scores[4].top) == list(range(7))


def test_the_first_tokens_of_the_output_are_scored_alike(engine: Engine) -> None:
    """A prompt that ends with what the model said: both ways give that token the same log-probability."""
    ids = prompt(20)
    said = run(engine, [Request(0, ids, SamplingParams(max_tokens=3, logprobs=4))])[0]
    longer = ids + tuple(chunk.token_id for chunk in said if chunk.token_id is not None)
    scores = scores_of(engine, longer, 4)
    for chunk, one in zip(said, scores[20:], strict=True):
        assert chunk.logprobs is not None and one is not None
        assert one.token_id == chunk.logprobs.token_id
        assert one.logprob == pytest.approx(chunk.logprobs.logprob, abs=1e-4)
        assert [i for i, _ in one.top] == [i for i, _ in chunk.logprobs.top]


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 4, "logprobs": 2}, {"presence_penalty": 1.0}])
def test_the_output_is_what_it_would_be(device: torch.device, params: dict[str, Any]) -> None:
    """Bit for bit in the batch-invariant mode, whatever path its prompt took."""
    engine = make_engine(device, batch_invariant=True, ops="jit" if device.type == "cuda" else "torch")
    for length in (5, 48, 130):
        wanted = SamplingParams(max_tokens=9, **params)
        plain: Bits = answer(engine, prompt(length), wanted)
        chunks = run(engine, [Request(0, prompt(length), wanted, prompt_logprobs=1)])[0]
        assert bits(chunks) == plain


def test_the_same_whoever_is_beside_it(device: torch.device) -> None:
    """Eight streams, three of them scored, one with a grammar's mask beside them: bit for bit what each gets alone."""
    spec = with_changes(vocab_size=2048, eos_token_ids=(1,))
    engine = make_engine(device, spec, batch_invariant=True, ops="jit" if device.type == "cuda" else "torch")
    scored = {i: prompt(60 + 40 * i, i, 2048) for i in range(3)}
    alone = {i: scores_of(engine, ids) for i, ids in scored.items()}
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=1)
    requests = [Request(10 + i, prompt(70, 9 + i, 2048), params) for i in range(4)]
    requests += [Request(i, ids, params, prompt_logprobs=3) for i, ids in scored.items()]
    requests.append(Request(20, prompt(9), params, grammar=Grammar("regex", "[a-c]{4}"), prompt_logprobs=0))
    chunks = run(engine, requests)
    for i in scored:
        assert chunks[i][0].prompt_logprobs == alone[i]
    for i in range(10, 14):
        assert all(chunk.prompt_logprobs is None for chunk in chunks[i])
    both = chunks[20][0].prompt_logprobs
    assert both is not None and len(both) == 9 and chunks[20][-1].finish_reason is FinishReason.STOP


def test_cached_beginnings_are_not_used(engine: Engine) -> None:
    """Each token must be computed to be scored; what it leaves in the cache serves others."""
    ids = prompt(90, 7)
    first = scores_of(engine, ids)
    chunks = run(engine, [Request(0, ids, SamplingParams(max_tokens=1), prompt_logprobs=3)])[0]
    assert chunks[0].cached_tokens == 0 and chunks[0].prompt_logprobs == first
    assert run(engine, [Request(0, ids, SamplingParams(max_tokens=1))])[0][0].cached_tokens > 0


# ------------------------------------------------------------------------------------------------------------ its path


def test_its_steps_are_eager_and_ask_for_no_graph(device: torch.device) -> None:
    """Also where graphs come and go with what prompts ask for; and nothing is compiled for it."""
    engine = make_engine(device, rolling=True, ops="auto")
    engine.reset_counters()
    captures, ready = engine.store.counters.captures, set(engine.store.ready_keys)
    for _ in range(6):
        scores_of(engine, prompt(101), max_tokens=1)
    for _ in range(200):
        if not engine.idle_work:
            break
        engine.work_while_idle()
    assert engine.dispatcher.reasons == {Reason.SCORED: 18}
    assert engine.dispatcher.paths == {(Phase.PREFILL, StepPath.EAGER): 18}
    assert engine.store.counters.captures == captures and set(engine.store.ready_keys) == ready
    assert engine.compiles_after_ready == 0
    assert_nothing_left(engine)
    engine.close()


def test_on_kernels(device: torch.device) -> None:
    """The Triton kernels give what plain PyTorch gives, in blocks that do not come out even."""
    spec = with_changes(vocab_size=96, hidden_size=16, intermediate_size=24, num_heads=2, num_kv_heads=1)
    small = {"max_model_len": 64, "max_streams": 2, "prefill_buckets": (4, 6), "dtype": "float32", "max_graphs": 0}
    ids = prompt(8, vocabulary=96)
    on_gpu = {"fused_sampling": False, "graphs": False} if device.type == "cuda" else {}
    expected = scores_of(make_engine(device, spec, ops="torch", **small, **on_gpu), ids, 4, max_tokens=1)
    for settings in ({}, {"batch_invariant": True}):
        found = scores_of(make_engine(device, spec, ops="jit", **small, **settings), ids, 4, max_tokens=1)
        for one, other in zip(found[1:], expected[1:], strict=True):
            assert one is not None and other is not None and one.token_id == other.token_id
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [i for i, _ in one.top] == [i for i, _ in other.top]


@pytest.mark.parametrize("settings", [{"kv_window": 60, "kv_sinks": 4}, {"graph_scope": "static"}], ids=str)
def test_under_other_settings(device: torch.device, settings: dict[str, Any]) -> None:
    """A rolling window scores with what it still holds: as long as it holds all, nothing differs."""
    engine, plain = make_engine(device, **settings), make_engine(device)
    expected = scores_of(plain, prompt(50))
    for one, other in zip(scores_of(engine, prompt(50))[1:], expected[1:], strict=True):
        assert one is not None and other is not None
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4 if device.type == "cpu" else 2e-2)
    assert len(scores_of(engine, prompt(180))) == 180


@pytest.mark.parametrize("when", ["waiting", "between chunks", "before its token"])
def test_cancelled(engine: Engine, when: str) -> None:
    """Its books are gone with it, and the next one in its slot gets its own."""
    chunks: dict[int, list[TokenChunk]] = {}
    engine.submit(Request(0, prompt(130, 1), SamplingParams(max_tokens=3), prompt_logprobs=2))
    if when != "waiting":
        engine.launch()
        if when == "before its token":
            engine.step()
    engine.cancel(0)
    engine.submit(Request(1, prompt(130, 2), SamplingParams(max_tokens=3), prompt_logprobs=2))
    finish(engine, chunks)
    found = chunks[1][0].prompt_logprobs
    assert 0 not in chunks and found is not None
    assert [one and one.token_id for one in found] == [None, *prompt(130, 2)[1:]]
    assert_nothing_left(engine)
    assert not engine.runner.scorer.pending and not engine.runner.scorer._found


def test_beside_a_loop(engine: Engine) -> None:
    """A lone stream loops; the scored prompt ends its loop, and it loops again afterwards."""
    chunks: dict[int, list[TokenChunk]] = {}
    engine.submit(Request(0, prompt(4), SamplingParams(max_tokens=60)))
    steps_until(engine, chunks, 0, 5)
    engine.submit(Request(1, prompt(130), SamplingParams(max_tokens=3), prompt_logprobs=2))
    finish(engine, chunks)
    assert len(chunks[0]) == 60
    found = chunks[1][0].prompt_logprobs
    assert found is not None and len(found) == 130
    assert found == scores_of(engine, prompt(130), 2)


def test_after_a_launch_that_failed(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("out of everything")

    engine.submit(Request(0, prompt(130), SamplingParams(max_tokens=3), prompt_logprobs=2))
    with monkeypatch.context() as patched:
        patched.setattr(engine.runner._program, "score", fail)
        with pytest.raises(MemoryError):
            engine.step()
    chunks: dict[int, list[TokenChunk]] = {}
    finish(engine, chunks)
    assert chunks[0][-1].finish_reason is FinishReason.CANCELLED
    assert len(scores_of(engine, prompt(130), 2)) == 130


@pytest.mark.parametrize("count", [-1, 21, 2.0, True, "3"])
def test_malformed(count: Any) -> None:
    with pytest.raises(RequestError, match="prompt_logprobs"):
        Request(0, (1,), SamplingParams(), prompt_logprobs=count)


def test_llm() -> None:
    """``generate`` and ``stream``; threads that share it included."""
    with LLM("tiny", device="cpu", max_model_len=128) as llm:
        plain = llm.generate("The train leaves at nine.", SamplingParams(max_tokens=4))[0]
        assert plain.prompt_logprobs is None
        params = SamplingParams(max_tokens=4)
        output = llm.generate("The train leaves at nine.", params, prompt_logprobs=2)[0]
        assert output.prompt_logprobs is not None and output.token_ids == plain.token_ids
        assert [one and one.token_id for one in output.prompt_logprobs] == [None, *plain.prompt_token_ids[1:]]
        assert llm.settle()
        chunks = list(llm.stream("The train leaves at nine.", params, prompt_logprobs=2))
        assert chunks[0].prompt_logprobs == output.prompt_logprobs
        assert all(chunk.prompt_logprobs is None for chunk in chunks[1:])
        found: list[PromptLogprobs | None] = []

        def ask() -> None:
            found.append(llm.generate("The train leaves at nine.", params, prompt_logprobs=2)[0].prompt_logprobs)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert found == [output.prompt_logprobs] * 4
