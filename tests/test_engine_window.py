"""Streams without an end: a KV window that rolls, against attention computed from its definition.

``Definition`` is a second implementation that shares nothing with the engine but the weights: it keeps every token's
key and value for ever, in float64, and looks up by its own index what each token may see.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_cases import (
    answer,
    answers,
    assert_nothing_left,
    bits,
    finish,
    make_engine,
    prompt,
    random_weights,
    steps_until,
    tokens,
    with_changes,
)

from jitgraph import LLM, SamplingParams
from jitgraph.engine.engine import Engine
from jitgraph.errors import ConfigError
from jitgraph.graphs.key import Phase
from jitgraph.model.spec import ModelSpec, RopeSpec
from jitgraph.model.weights import LayerWeights
from jitgraph.types import Request, TokenChunk

SPEC = with_changes(num_layers=2, layer_windows=(0, 0), vocab_size=211)
SINKS, RECENT = 3, 17
WINDOW: dict[str, Any] = {"kv_window": SINKS + RECENT, "kv_sinks": SINKS, "page_size": 8, "prefill_buckets": (4, 12)}
CHUNK = 12


@pytest.fixture(scope="module")
def engine(device: torch.device) -> Engine:
    return make_engine(device, SPEC, **WINDOW)


# ------------------------------------------------------------------------------------------------------ the definition


class Definition:
    """One sequence, computed from the definition of the window."""

    def __init__(self, spec: ModelSpec, sinks: int, recent: int) -> None:
        self.spec, self.sinks, self.recent = spec, sinks, recent
        weights = random_weights(spec, torch.device("cpu"), torch.float32)
        self.embedding, self.final_norm = weights.embedding.double(), weights.final_norm.double()
        self.head, self.layers = weights.lm_head.double(), weights.layers
        self.keys: list[list[torch.Tensor]] = [[] for _ in self.layers]
        """Of each layer and token, ``[Hkv, Dh]``, as projected: not rotated."""
        self.values: list[list[torch.Tensor]] = [[] for _ in self.layers]

    def step(self, ids: tuple[int, ...]) -> torch.Tensor:
        """The next tokens of the sequence, all in one step; float64 logits ``[V]`` after the last of them."""
        first = len(self.keys[0])
        last = first + len(ids) - 1
        x = self.embedding[list(ids)]
        for index, layer in enumerate(self.layers):
            x = x + self.attention(index, layer, self.norm(x, layer.input_norm), first, last)
            gate, up = (self.norm(x, layer.post_norm) @ layer.gate_up.double().t()).chunk(2, dim=-1)
            x = x + (gate * torch.sigmoid(gate) * up) @ layer.down.double().t()
        return self.norm(x[-1:], self.final_norm)[0] @ self.head.t()

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.spec.rms_norm_eps).sqrt() * weight.double()

    def attention(self, index: int, layer: LayerWeights, x: torch.Tensor, first: int, last: int) -> torch.Tensor:
        spec = self.spec
        q, k, v = (x @ layer.qkv.double().t()).split((spec.q_size, spec.kv_size, spec.kv_size), dim=-1)
        self.keys[index] += k.view(-1, spec.num_kv_heads, spec.head_dim)
        self.values[index] += v.view(-1, spec.num_kv_heads, spec.head_dim)
        rows = []
        for t in range(first, last + 1):
            seen = [u for u in range(t + 1) if u < self.sinks or u > last - self.recent]
            heads = []
            for head in range(spec.num_heads):
                group = head * spec.num_kv_heads // spec.num_heads
                query = q[t - first].view(spec.num_heads, spec.head_dim)[head]
                query = self.rotated(query, self.position(t, last))
                keys = torch.stack([self.rotated(self.keys[index][u][group], self.position(u, last)) for u in seen])
                share = torch.softmax(keys @ query / spec.head_dim**0.5, dim=0)
                heads.append(share @ torch.stack([self.values[index][u][group] for u in seen]))
            rows.append(torch.cat(heads))
        return torch.stack(rows) @ layer.o.double().t()

    def position(self, token: int, last: int) -> int:
        """Where a token stands inside the window that ends with ``last``."""
        fallen_out = max(0, last + 1 - self.sinks - self.recent)
        return token if token < self.sinks else token - fallen_out

    def rotated(self, x: torch.Tensor, position: int) -> torch.Tensor:
        half = self.spec.head_dim // 2
        angle = position * self.spec.rope.theta ** -(torch.arange(half).double() / half)
        a, b = x[:half], x[half:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()))


@pytest.mark.parametrize(
    ("length", "loops"), [(1, True), (5, False), (12, True), (17, False), (20, True), (21, False), (47, True)]
)
def test_against_the_definition(device: torch.device, length: int, loops: bool) -> None:
    """Prompts under, at and over the window, and tokens until it has been replaced several times over."""
    engine = make_engine(device, SPEC, **WINDOW, device_loop=loops, dtype="float32")
    expected, ids = Definition(SPEC, SINKS, RECENT), prompt(length, vocabulary=SPEC.vocab_size)
    engine.submit(Request(0, ids, SamplingParams(max_tokens=70 - length)))
    given: list[int] = []
    wanted = torch.zeros(0)
    for start in range(0, length, CHUNK):
        wanted = expected.step(ids[start : start + CHUNK])
    while engine.busy:
        for chunk in engine.step():
            assert chunk.token_id is not None
            if engine.emulated:  # elsewhere the device may already be further on
                difference = (engine.buffers["logits"][0].double() - wanted).abs().max()
                assert difference < 1e-4 * wanted.abs().max(), f"token {len(given)}: logits differ by {difference}"
            assert chunk.token_id == int(wanted.argmax()), f"token {len(given)}"
            given.append(chunk.token_id)
            wanted = expected.step((chunk.token_id,))
    assert len(given) == 70 - length
    assert_nothing_left(engine)


# ------------------------------------------------------------------------------------------------------ what else holds


def test_before_the_window_is_full_it_is_not_there(engine: Engine, device: torch.device) -> None:
    plain = make_engine(device, SPEC, page_size=8, prefill_buckets=(4, 12))
    for length in (1, 5, 12, 15):
        ids = prompt(length, vocabulary=SPEC.vocab_size)
        for params in (
            SamplingParams(max_tokens=20 - length),
            SamplingParams(max_tokens=20 - length, temperature=1, seed=2),
        ):
            assert tokens(answer(engine, ids, params)) == tokens(answer(plain, ids, params))
    longer = SamplingParams(max_tokens=40)
    assert tokens(answer(engine, ids, longer)) != tokens(answer(plain, ids, longer)), "and then it is"


def test_a_stream_of_many_windows_keeps_its_pages(engine: Engine) -> None:
    """As many pages as the window has, whatever is asked for; no step takes another one or gives one back."""
    pages = -(-(SINKS + RECENT) // 8)
    assert engine.sizing.pages_per_slot == pages and engine.pages.total == engine.config.max_streams * pages
    chunks: dict[int, list[TokenChunk]] = {}
    engine.submit(Request(0, prompt(3, vocabulary=SPEC.vocab_size), SamplingParams(max_tokens=2**31 - 1)))
    for count in range(1, 8 * (SINKS + RECENT)):
        steps_until(engine, chunks, 0, count)
        assert engine.pages.total - engine.pages.free == pages
        assert len(set(engine.scheduler.running[0].pages)) == pages
    engine.cancel(0)
    assert_nothing_left(engine)
    engine.submit(Request(1, (5,), SamplingParams(max_tokens=4)))
    engine.launch()
    assert engine.pages.total - engine.pages.free == 1, "a short one takes what it needs"
    finish(engine, chunks)


def test_a_prompt_over_the_window_comes_in_chunks(engine: Engine) -> None:
    """Chunks no longer than the window that is read through; all lengths are served."""
    assert engine.sizing.chunk_tokens == CHUNK
    for length in (CHUNK, CHUNK + 1, SINKS + RECENT, 5 * (SINKS + RECENT) + 1):
        engine.reset_counters()
        answer(engine, prompt(length, vocabulary=SPEC.vocab_size), SamplingParams(max_tokens=2))
        steps = sum(count for (phase, _), count in engine.dispatcher.paths.items() if phase is Phase.PREFILL)
        assert steps == -(-length // CHUNK)


def test_buckets_are_cut_to_the_window(device: torch.device) -> None:
    engine = make_engine(device, SPEC, **{**WINDOW, "prefill_buckets": (8, 64, 256)})
    assert engine.sizing.buckets == (8, RECENT)
    ids = prompt(50, vocabulary=SPEC.vocab_size)
    assert len(answer(engine, ids, SamplingParams(max_tokens=9))) == 9


def test_company_and_path_change_nothing(device: torch.device) -> None:
    """Windows at different places in one batch, each with the bits that it has alone."""
    settings = {**WINDOW, "batch_invariant": True, "max_streams": 4}
    engine, alone = make_engine(device, SPEC, **settings), make_engine(device, SPEC, **settings, device_loop=False)
    wanted = [
        (
            prompt(length, vocabulary=SPEC.vocab_size),
            SamplingParams(max_tokens=25, temperature=0.8, seed=length, logprobs=2),
        )
        for length in (2, 15, 21, 40, 11)
    ]
    expected = [answer(alone, *one) for one in wanted]
    assert answers(engine, wanted) == expected
    assert [answer(engine, *one) for one in wanted] == expected


def test_a_cancelled_window_leaves_nothing_to_the_next(engine: Engine, device: torch.device) -> None:
    """A slot and its cells pass from one stream to the next without a trace."""
    ids, params = prompt(9, salt=4, vocabulary=SPEC.vocab_size), SamplingParams(max_tokens=30)
    expected = answer(make_engine(device, SPEC, **WINDOW), ids, params)
    for identity, moment in enumerate((1, 10, 30, 60)):
        chunks: dict[int, list[TokenChunk]] = {}
        engine.submit(Request(identity, prompt(13, vocabulary=SPEC.vocab_size), SamplingParams(max_tokens=200)))
        steps_until(engine, chunks, identity, moment)
        engine.cancel(identity)
        engine.submit(Request(100, ids, params))
        finish(engine, chunks)
        assert bits(chunks[100]) == expected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer_windows": (0, 40), "family": "mistral"}, "model's own sliding window \\(mistral\\)"),
        ({"rope": RopeSpec(kind="dynamic", factor=2.0, original_max_position=128)}, "dynamic RoPE scaling"),
        ({"max_position_embeddings": 19}, "kv_window 20 is over the model's limit of 19 tokens"),
    ],
)
def test_models_that_it_does_not_suit(device: torch.device, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        make_engine(device, with_changes(SPEC, **changes), **WINDOW)
    assert "\n" not in str(caught.value) and "kv_window" in str(caught.value)


def test_as_a_user_meets_it(device: torch.device) -> None:
    """A preset with a small window: the stream goes on past what the same cache could hold of it."""
    settings: dict[str, Any] = {"prefill_buckets": (8, 32), "max_streams": 1, "device": str(device), "max_graphs": 6}
    with LLM("tiny", kv_window=48, **settings) as llm:
        about = llm.describe()
        assert about["kv_window"] == 48 and about["max_model_len"] is None
        whole = llm.generate("The train leaves at nine.", SamplingParams(max_tokens=150, ignore_eos=True))[0]
        assert len(whole.token_ids) == 150
        with llm.stream("The train leaves at nine.", SamplingParams(max_tokens=10**9, ignore_eos=True)) as stream:
            found = [next(stream).token_id for _ in range(150)]
        assert tuple(found) == whole.token_ids
        assert llm.stats()["free_pages"] == llm._engine.pages.total
    with LLM("tiny", max_model_len=49, **settings) as plain:
        assert about["kv_cache_bytes"] == plain.describe()["kv_cache_bytes"]
