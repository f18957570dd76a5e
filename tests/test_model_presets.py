"""Presets and their seeded random weights."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers

from jitgraph.errors import CapacityError, ConfigError
from jitgraph.model import random_weights
from jitgraph.model.hf_config import spec_from_config
from jitgraph.model.loader import load_model
from jitgraph.model.packing import hf_shapes, hf_views
from jitgraph.model.presets import PRESETS, preset_config
from jitgraph.model.random_weights import iter_random_tensors, random_state_dict, random_tensor
from jitgraph.text.tokenizer import bundled_tokenizer_folder

CPU = torch.device("cpu")
PARAMETERS = {"llama-2-7b": 6_738_415_616, "llama-3.1-8b": 8_030_261_248, "qwen2.5-0.5b": 494_032_768}
"""As the model cards of the originals count them."""


@pytest.mark.parametrize("name", PRESETS)
def test_shapes_are_those_of_transformers(name: str) -> None:
    config = preset_config(name)
    shapes = hf_shapes(spec_from_config(config, name))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    theirs = {key: tuple(value.shape) for key, value in model.named_parameters()}
    assert shapes == theirs
    count = sum(math.prod(shape) for shape in shapes.values())
    assert count == PARAMETERS.get(name, count)


def test_streamed_parameters_of_llama_2() -> None:
    spec = spec_from_config(preset_config("llama-2-7b"), "llama-2-7b")
    assert spec.linear_parameters() == 6_738_415_616 - 32000 * 4096 - (2 * 32 + 1) * 4096
    assert spec.kv_bytes_per_token(2) == 524_288


def test_special_ids_are_the_bundled_tokenizers() -> None:
    content = json.loads((bundled_tokenizer_folder() / "tokenizer.json").read_text(encoding="utf-8"))
    names = json.loads((bundled_tokenizer_folder() / "tokenizer_config.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in content["added_tokens"]}
    for name in PRESETS:
        config = preset_config(name)
        for kind in ("bos", "eos", "pad"):
            assert config[f"{kind}_token_id"] == ids[names[f"{kind}_token"]], (name, kind)
        assert len(content["model"]["vocab"]) <= config["vocab_size"]


def test_a_copy_is_handed_out() -> None:
    preset_config("llama-3.1-8b")["rope_scaling"]["factor"] = 1
    assert preset_config("llama-3.1-8b")["rope_scaling"]["factor"] == 8.0
    with pytest.raises(ConfigError, match="tiny"):
        preset_config("llama-4")


def test_tiny_is_random_by_nature_and_seeded() -> None:
    first, again = load_model("tiny", device="cpu"), load_model("tiny", device="cpu", weights="random")
    other = load_model("tiny", device="cpu", seed=1)
    assert first.folder is None and first.dtype == torch.float32 and first.spec.dtype == "float16"
    for a, b, c in zip(first.weights.tensors(), again.weights.tensors(), other.weights.tensors(), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_values() -> None:
    spec = spec_from_config({**preset_config("tiny"), "attention_bias": True}, "tiny")
    for name, tensor in iter_random_tensors(spec, 0, CPU, torch.float32):
        norm = name.endswith("norm.weight")
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = 0.01 if norm else 0.02 / math.sqrt(8) if residual else 0.02
        many = tensor.numel() > 10000
        assert tensor.std().item() == pytest.approx(std, rel=0.02 if many else 0.3), name
        assert tensor.mean().item() == pytest.approx(1.0 if norm else 0.0, abs=std / 3), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_tensor_depends_on_name_and_seed_alone(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = random_tensor("a.weight", (300, 70), 4, 7, CPU, torch.float32)
    assert torch.equal(random_tensor("a.weight", (300, 70), 4, 7, CPU, dtype), wide.to(dtype))
    assert not torch.equal(random_tensor("b.weight", (300, 70), 4, 7, CPU, torch.float32), wide)
    assert not torch.equal(random_tensor("a.weight", (300, 70), 4, 8, CPU, torch.float32), wide)
    monkeypatch.setattr(random_weights, "_CHUNK", 1024)
    pieces = random_tensor("a.weight", (300, 70), 4, 7, CPU, torch.float32)
    assert pieces.std().item() == pytest.approx(0.02, rel=0.05) and pieces.unique().numel() > 20000


@pytest.mark.parametrize("tied", [False, True])
def test_state_dict_is_what_the_loader_packs(tied: bool) -> None:
    config = {**preset_config("tiny"), "tie_word_embeddings": tied}
    spec = spec_from_config(config, "tiny")
    state = random_state_dict(spec, 5, CPU, torch.float32)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    result = model.load_state_dict(state, strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert (state["lm_head.weight"] is state["model.embed_tokens.weight"]) == tied
    if not tied:
        views = hf_views(spec, load_model("tiny", device="cpu", seed=5).weights)
        assert all(torch.equal(views[name], tensor) for name, tensor in state.items())


def test_a_model_larger_than_the_memory_is_refused_with_the_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux would grant the memory and kill the process halfway."""
    from pathlib import Path

    real = Path.read_text
    fake = "MemTotal: 9 kB\nMemAvailable:    2097152 kB\n"
    monkeypatch.setattr(
        Path, "read_text", lambda path, *a, **k: fake if str(path) == "/proc/meminfo" else real(path, *a, **k)
    )
    with pytest.raises(CapacityError, match=r"the weights need 25\.\d\d GiB but only 2\.00 GiB of memory are free"):
        load_model("llama-2-7b", device="cpu", dtype="float32", weights="random")
    assert load_model("tiny", device="cpu").weights is not None
