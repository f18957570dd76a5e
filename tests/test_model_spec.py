"""Hugging Face configs to ``ModelSpec``, against transformers' own configuration classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from jitgraph.errors import CheckpointError, UnsupportedModelError
from jitgraph.model.hf_config import SUPPORTED, eos_ids, spec_from_config

BASE: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}
ARCHITECTURES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def config(family: str = "llama", **changes: Any) -> dict[str, Any]:
    return {**BASE, "model_type": family, "architectures": [f"{ARCHITECTURES[family]}ForCausalLM"], **changes}


def without(key: str, family: str = "llama") -> dict[str, Any]:
    return {k: v for k, v in config(family).items() if k != key}


def test_llama_figures() -> None:
    spec = spec_from_config(
        config(bos_token_id=1, eos_token_id=[2, 5], pad_token_id=-1, torch_dtype="bfloat16", tie_word_embeddings=True),
        "here",
    )
    assert (spec.family, spec.vocab_size, spec.hidden_size, spec.intermediate_size) == ("llama", 100, 64, 96)
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (3, 4, 2, 16)
    assert (spec.max_position_embeddings, spec.rms_norm_eps, spec.dtype) == (256, 1e-6, "bfloat16")
    assert (spec.bos_token_id, spec.eos_token_ids, spec.pad_token_id) == (1, (2, 5), None)
    assert spec.tie_embeddings and spec.layer_windows == (0, 0, 0)
    assert not (spec.qkv_bias or spec.o_bias or spec.mlp_bias or spec.qk_norm)


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("llama", {}, (False, False, False, False)),
        ("llama", {"attention_bias": True, "mlp_bias": True}, (True, True, True, False)),
        ("mistral", {"attention_bias": True}, (False, False, False, False)),
        ("qwen2", {}, (True, False, False, False)),
        ("qwen2", {"attention_bias": False}, (True, False, False, False)),
        ("qwen3", {}, (False, False, False, True)),
        ("qwen3", {"attention_bias": True}, (True, True, False, True)),
    ],
)
def test_biases_and_norms(family: str, changes: dict[str, Any], expected: tuple[bool, ...]) -> None:
    spec = spec_from_config(config(family, **changes), "here")
    assert (spec.qkv_bias, spec.o_bias, spec.mlp_bias, spec.qk_norm) == expected


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("mistral", {"sliding_window": None}, (0, 0, 0)),
        ("mistral", {"sliding_window": 32}, (32, 32, 32)),
        ("mistral", {}, (4096, 4096, 4096)),
        ("llama", {"sliding_window": 32}, (0, 0, 0)),
        ("qwen2", {"sliding_window": 32}, (0, 0, 0)),
        ("qwen2", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 2}, (0, 0, 32)),
        ("qwen2", {"sliding_window": 32, "use_sliding_window": True}, (0, 0, 0)),
        ("qwen2", {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, (0, 0, 0)),
        (
            "qwen3",
            {
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
            (8, 0, 8),
        ),
    ],
)
def test_windows_are_those_of_transformers(family: str, changes: dict[str, Any], expected: tuple[int, ...]) -> None:
    values = config(family, **changes)
    assert spec_from_config(values, "here").layer_windows == expected
    theirs = transformers.AutoConfig.for_model(family, **{k: v for k, v in values.items() if k != "model_type"})
    window = getattr(theirs, "sliding_window", None) or 0
    if family == "mistral":
        assert expected == (window,) * 3
    elif family != "llama":
        assert expected == tuple(window if kind == "sliding_attention" else 0 for kind in theirs.layer_types)


def test_heads_and_head_size() -> None:
    assert spec_from_config(without("num_key_value_heads"), "here").num_kv_heads == 4
    assert spec_from_config(config("qwen2", num_key_value_heads=None), "here").num_kv_heads == 4
    assert spec_from_config(config("qwen3"), "here").head_dim == 128
    assert spec_from_config(config("qwen3", head_dim=32), "here").head_dim == 32
    assert spec_from_config(config(head_dim=None), "here").head_dim == 16
    with pytest.raises(CheckpointError, match="num_key_value_heads is missing"):
        spec_from_config(without("num_key_value_heads", "mistral"), "here")


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_what_transformers_writes_is_read(family: str, tmp_path: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 5e5}
    values = {k: v for k, v in config(family).items() if k not in ("model_type", "architectures")}
    theirs = transformers.AutoConfig.for_model(family, **values, rope_parameters=dict(scaling))
    theirs.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    spec = spec_from_config(written, "here")
    assert "rope_parameters" in written
    assert (spec.rope.kind, spec.rope.factor, spec.rope.original_max_position, spec.rope.theta) == ("yarn", 4, 64, 5e5)
    assert spec == spec_from_config(
        {**written, "rope_parameters": None, "rope_theta": 5e5, "rope_scaling": scaling}, "here"
    )


def test_rope_spellings() -> None:
    rope = spec_from_config(config(), "here").rope
    assert (rope.kind, rope.theta) == ("default", 10000.0)
    rope = spec_from_config(config(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2}), "here").rope
    assert (rope.kind, rope.theta, rope.factor) == ("linear", 5e5, 2.0)
    rope = spec_from_config(
        config(rope_theta=1.0, rope_parameters={"rope_type": "default", "rope_theta": 7.0}), "here"
    ).rope
    assert rope.theta == 7.0
    dynamic = {"rope_type": "dynamic", "factor": 3.0, "original_max_position_embeddings": 9}
    rope = spec_from_config(config(rope_scaling=dynamic), "here").rope
    assert (rope.kind, rope.factor, rope.original_max_position) == ("dynamic", 3.0, 256)
    yarn = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64}
    assert spec_from_config(config(rope_scaling=yarn), "here").rope.factor == 4.0
    llama3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    rope = spec_from_config(config(rope_scaling=llama3, original_max_position_embeddings=99), "here").rope
    assert rope.original_max_position == 99


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}, ["GPTNeoXForCausalLM", SUPPORTED]),
        ({"model_type": "gemma", "architectures": None}, ["gemma", SUPPORTED]),
        ({"model_type": None, "architectures": None}, ["model_type", SUPPORTED]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification", SUPPORTED]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config: awq"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "silu"]),
        ({"dtype": "float64"}, ["dtype", "float64", "bfloat16"]),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2}}, ["longrope", "linear", "dynamic", "llama3", "yarn"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["rope_parameters", "layer"]),
        ({"layer_types": ["chunked_attention"] * 3}, ["layer_types", "chunked_attention"]),
    ],
)
def test_unsupported_models_are_refused_by_name(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        spec_from_config({**config(), **changes}, "folder/config.json")
    message = str(caught.value)
    assert message.startswith("folder/config.json") and all(word in message for word in words), message


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
        "max_position_embeddings",
    ],
)
@pytest.mark.parametrize("value", [None, 0, -1, "12", True, float("nan"), [1]])
def test_missing_and_senseless_figures_name_their_key(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=f"here: {key} "):
        spec_from_config(config(**{key: value}), "here")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"model_type": "qwen2"}, "model_type"),
        ({"eos_token_id": "two"}, "eos_token_id"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": 1}}, "truncate"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4}},
            "high_freq_factor",
        ),
    ],
)
def test_contradictions_name_their_key(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(CheckpointError, match=f": {key} "):
        spec_from_config(config(**changes), "here")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window"),
    ],
)
def test_windows_that_contradict(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(CheckpointError, match=f": {key} "):
        spec_from_config(config("qwen2", **changes), "here")


def test_eos_ids_of_the_generation_config_win() -> None:
    spec = spec_from_config(config(eos_token_id=2), "here")
    assert eos_ids(spec, {}) == (2,)
    assert eos_ids(spec, {"eos_token_id": None}) == (2,)
    assert eos_ids(spec, {"eos_token_id": [7, 8, 7]}) == (7, 8)
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id"):
        eos_ids(spec, {"eos_token_id": 1.5})
