"""jitgraph against transformers: same checkpoint, fp32 logits within 1e-4, the same 64 greedy tokens, every family.

Checkpoints are made here with ``save_pretrained``; both sides read the same files. Unused KV pages and the arena are
poisoned, so reading what no step wrote shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from jitgraph.config import EngineConfig
from jitgraph.engine.engine import Engine
from jitgraph.model.loader import load_model
from jitgraph.types import Request, SamplingParams

VOCABULARY = 384
BUCKETS = (8, 16, 64, 128)
LENGTHS = (1, 7, 64, 300)
NEW_TOKENS = 64
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-mha": ("Llama", {"num_key_value_heads": 4}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("Llama", rope("linear", factor=4.0)),
    "llama-dynamic": ("Llama", {**rope("dynamic", factor=4.0), "max_position_embeddings": 128}),
    "llama-llama3": ("Llama", rope("llama3", factor=8.0, **LLAMA3)),
    "llama-yarn": ("Llama", rope("yarn", factor=4.0, original_max_position_embeddings=128)),
    "mistral": ("Mistral", {"sliding_window": 40}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """(transformers model in float32, folder of the same checkpoint)."""
    name, changes = FAMILIES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, or a forgotten one would not show
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)
        for tensor_name, parameter in model.named_parameters():
            if tensor_name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    yield model, folder


def prompts() -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(5)
    return [tuple(torch.randint(0, VOCABULARY, (n,), generator=generator).tolist()) for n in LENGTHS]


def make_engine(folder: Path, device: torch.device, **settings: Any) -> Engine:
    loaded = load_model(str(folder), device=device, dtype="float32")
    config = EngineConfig(**{"max_model_len": 400, "prefill_buckets": BUCKETS, "max_streams": 4, **settings})
    engine = Engine(loaded.spec, loaded.weights, config, ())
    poison(engine)
    return engine


def poison(engine: Engine) -> None:
    """Nonsense wherever no step may read: the whole arena, and the pages nobody owns and that are not kept."""
    engine.drain()
    engine.buffers.poison()
    owned = [page for sequence in engine.scheduler.running for page in sequence.pages]
    engine.pages.settle()
    if engine.pages.prefixes is not None:
        owned += [page.page for page in engine.pages.prefixes._known.values()]
    free = [page for page in range(1, engine.cache.data.shape[2]) if page not in owned]
    # Plain PyTorch attention multiplies masked values by 0, so its poison must be finite; kernels must not read at all.
    engine.cache.data[:, :, free] = 1e6 if engine.ops.flavour == "torch" else float("nan")
    if engine.device.type == "cuda":
        torch.cuda.synchronize()  # the engine works on a stream of its own


def run(engine: Engine, wanted: list[tuple[int, ...]], tokens: int = NEW_TOKENS) -> list[list[int]]:
    """Greedy tokens of every prompt, all submitted at once."""
    for identity, ids in enumerate(wanted):
        engine.submit(Request(identity, ids, SamplingParams(max_tokens=tokens)))
    found: list[list[int]] = [[] for _ in wanted]
    while engine.busy:
        for chunk in engine.step():
            assert chunk.token_id is not None
            found[chunk.request_id].append(chunk.token_id)
    assert engine.pages.free == engine.pages.total
    return found


def reference(model: Any, ids: tuple[int, ...]) -> tuple[torch.Tensor, list[int]]:
    """transformers' logits after the prompt ``[V]`` and its greedy tokens."""
    given = torch.tensor([ids])
    with torch.inference_mode():
        logits = model(given).logits[0, -1]
        made = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
    return logits, made[0, len(ids) :].tolist()


def assert_close(engine: Engine, logits: torch.Tensor, where: str) -> None:
    """The engine's last logits ``[V]`` are those of transformers."""
    difference = (engine.buffers["logits"][0].cpu() - logits).abs().max().item()
    assert difference < 1e-4, f"{where}: logits differ by {difference}"


def test_alone_and_in_a_batch(pair: tuple[Any, Path], device: torch.device) -> None:
    """Prompts of 1, 7, 64 and 300 tokens (the last in chunks), alone and as a batch of 4, on fresh and on reused
    pages."""
    model, folder = pair
    engine = make_engine(folder, device)
    expected = []
    for ids in prompts():
        logits, tokens = reference(model, ids)
        expected.append(tokens)
        assert len(run(engine, [ids], tokens=1)[0]) == 1
        assert_close(engine, logits, f"after the prompt of {len(ids)} tokens")
        poison(engine)
        assert run(engine, [ids]) == [tokens], f"alone, {len(ids)} tokens"
        with torch.inference_mode():
            last = model(torch.tensor([[*ids, *tokens[:-1]]])).logits[0, -1]
        if "dynamic" not in str(model.config.rope_parameters):  # there, one pass rotates all keys for the final length
            assert_close(engine, last, f"{NEW_TOKENS} tokens after the prompt of {len(ids)}")
    poison(engine)
    assert run(engine, prompts()) == expected, "in a batch of 4"
    assert run(engine, prompts()[::-1]) == expected[::-1], "on pages that are kept for prompts that begin alike"
    forgetful = make_engine(folder, device, prefix_cache=False)
    assert run(forgetful, prompts()) == expected
    assert run(forgetful, prompts()[::-1]) == expected[::-1], "on reused pages that still hold the last batch"
    poison(forgetful)
    assert run(forgetful, prompts()) == expected, "on reused pages that hold poison"


def test_graphs_do_not_change_tokens(pair: tuple[Any, Path], device: torch.device) -> None:
    """Eager steps, graphs with sampling outside, and exact graphs give the tokens that padded graphs give."""
    _, folder = pair
    wanted = prompts()[:3]
    expected = run(make_engine(folder, device), wanted, tokens=24)
    for settings in (
        {"graphs": False},
        {"fused_sampling": False},
        {"precapture_lengths": (1, 7)},
        {"max_graphs": 2},
        {"graph_scope": "static"},
        {"batch_invariant": True},
    ):
        assert run(make_engine(folder, device, **settings), wanted, tokens=24) == expected, settings
