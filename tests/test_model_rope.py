"""The rotary table against transformers' rotary embedding module, for every supported kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from jitgraph.model.hf_config import spec_from_config
from jitgraph.model.rope import build_rope
from jitgraph.model.spec import ModelSpec

CPU = torch.device("cpu")
POSITIONS = 300
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn, exact bounds": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "truncate": False,
        "beta_fast": 16,
        "beta_slow": 2,
    },
    "yarn, given factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "attention_factor": 0.7,
    },
    "yarn, mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "mscale": 0.9,
        "mscale_all_dim": 0.4,
    },
    "yarn, no ramp": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 4,
        "beta_fast": 1,
        "beta_slow": 1,
    },
}


def both(scaling: dict[str, Any], theta: float, head_dim: int) -> tuple[transformers.LlamaConfig, ModelSpec]:
    values: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 4 * head_dim,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
    }
    theirs = transformers.LlamaConfig(**values, rope_parameters={**scaling, "rope_theta": theta})
    ours = spec_from_config({**values, "model_type": "llama", "rope_theta": theta, "rope_scaling": scaling}, "here")
    return theirs, ours


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("kind", SCALINGS)
def test_table_is_that_of_transformers(kind: str, head_dim: int, theta: float) -> None:
    theirs, ours = both(SCALINGS[kind], theta, head_dim)
    positions = torch.arange(POSITIONS)[None]
    cos, sin = LlamaRotaryEmbedding(theirs)(torch.zeros(1, dtype=torch.float32), positions)
    rope = build_rope(ours, POSITIONS, CPU)
    assert rope.cos_sin.shape == (POSITIONS, head_dim) and rope.cos_sin.dtype == torch.float32
    assert rope.dynamic_original == 0
    half = head_dim // 2
    torch.testing.assert_close(rope.cos_sin[:, :half], cos[0, :, :half], rtol=0, atol=1e-7)
    torch.testing.assert_close(rope.cos_sin[:, half:], sin[0, :, :half], rtol=0, atol=1e-7)


def test_scaled_tables_differ_from_the_plain_one() -> None:
    plain = build_rope(both(SCALINGS["default"], 10000.0, 64)[1], POSITIONS, CPU).cos_sin
    for kind, scaling in SCALINGS.items():
        if kind != "default":
            assert not torch.allclose(build_rope(both(scaling, 10000.0, 64)[1], POSITIONS, CPU).cos_sin, plain), kind


@pytest.mark.parametrize("length", [1, 512, 513, 800, 2048])
def test_dynamic_carries_what_the_op_needs(length: int) -> None:
    theirs, ours = both({"rope_type": "dynamic", "factor": 2.0}, 10000.0, 64)
    rope = build_rope(ours, POSITIONS, CPU)
    assert (rope.dynamic_original, rope.dynamic_factor) == (512, 2.0)
    expected, _ = ROPE_INIT_FUNCTIONS["dynamic"](theirs, CPU, seq_len=length)
    stretch = rope.dynamic_factor * max(length, 512) / rope.dynamic_original - (rope.dynamic_factor - 1)
    base = rope.dynamic_base * stretch ** (64 / 62)
    torch.testing.assert_close(1.0 / base ** (torch.arange(0, 64, 2).float() / 64), expected, rtol=1e-6, atol=0)


def test_dynamic_table_is_the_unstretched_one() -> None:
    dynamic = build_rope(both({"rope_type": "dynamic", "factor": 2.0}, 10000.0, 64)[1], POSITIONS, CPU)
    plain = build_rope(both(SCALINGS["default"], 10000.0, 64)[1], POSITIONS, CPU)
    assert torch.equal(dynamic.cos_sin, plain.cos_sin)
