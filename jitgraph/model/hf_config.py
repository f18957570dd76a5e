"""Hugging Face ``config.json`` and ``generation_config.json`` to ``ModelSpec``: dictionaries in, records out. No torch.

Absent keys take the defaults that transformers 5.17's configuration classes give them; a key whose default would be a
guess about the weights' shapes must be there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jitgraph.errors import UnsupportedModelError
from jitgraph.model.config_reader import ConfigReader
from jitgraph.model.hf_rope import rope_from_config
from jitgraph.model.spec import ModelSpec

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""Family (``model_type``) to architecture."""
SUPPORTED = "supported are llama (Llama 2 and 3.x), mistral, qwen2 (and Qwen2.5) and qwen3"
DEFAULT_SLIDING_WINDOW = 4096
"""Of an absent ``sliding_window`` where windows are in use (Mistral always, Qwen with ``use_sliding_window``)."""
DEFAULT_MAX_WINDOW_LAYERS = 28
DEFAULT_QWEN3_HEAD_DIM = 128


def spec_from_config(config: Mapping[str, Any], where: str) -> ModelSpec:
    """A model's figures.

    Args:
        config: the content of ``config.json``.
        where: what to call it in messages: the file's path, or a preset's name.

    Raises:
        UnsupportedModelError: another family, a quantised checkpoint, another activation or rope kind.
        CheckpointError: a key that is missing, of the wrong type or senseless, by its name.
    """
    keys = ConfigReader(config, where)
    family = _family(keys)
    _refuse_unsupported(keys)
    layers, hidden = keys.integer("num_hidden_layers"), keys.integer("hidden_size")
    heads = keys.integer("num_attention_heads")
    kv_heads = _kv_heads(keys, heads, family)
    positions = keys.integer("max_position_embeddings")
    attention_bias = family in ("llama", "qwen3") and keys.flag("attention_bias", False)
    return ModelSpec(
        family=family,
        vocab_size=keys.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=keys.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_head_dim(keys, family, hidden, heads),
        rms_norm_eps=keys.number("rms_norm_eps"),
        max_position_embeddings=positions,
        rope=rope_from_config(keys, positions),
        qkv_bias=attention_bias or family == "qwen2",
        o_bias=attention_bias,
        mlp_bias=family == "llama" and keys.flag("mlp_bias", False),
        qk_norm=family == "qwen3",
        tie_embeddings=keys.flag("tie_word_embeddings", False),
        layer_windows=_layer_windows(keys, family, layers),
        dtype=config_dtype(config, where) or "float32",
        bos_token_id=next(iter(keys.token_ids("bos_token_id")), None),
        eos_token_ids=keys.token_ids("eos_token_id"),
        pad_token_id=next(iter(keys.token_ids("pad_token_id")), None),
    )


def eos_ids(
    spec: ModelSpec, generation_config: Mapping[str, Any], where: str = "generation_config.json"
) -> tuple[int, ...]:
    """The ids that end a text: those of ``generation_config.json`` where it names any, else the model's own.

    Raises:
        CheckpointError: not an id or a list of ids.
    """
    return ConfigReader(generation_config, where).token_ids("eos_token_id") or spec.eos_token_ids


def config_dtype(config: Mapping[str, Any], where: str) -> str | None:
    """``float16``, ``bfloat16`` or ``float32``, from ``dtype``, else ``torch_dtype``; None where there is neither.

    Raises:
        UnsupportedModelError: any other dtype.
    """
    keys = ConfigReader(config, where)
    key = "dtype" if keys.has("dtype") else "torch_dtype"
    if not keys.has(key):
        return None
    name = keys.text(key).removeprefix("torch.")
    if name not in ("float16", "bfloat16", "float32"):
        raise UnsupportedModelError(
            f"{where}: {key} {name!r} is not supported; use float16, bfloat16 or float32 weights"
        )
    return name


def _family(keys: ConfigReader) -> str:
    architectures = keys.texts("architectures")
    known = {architecture: family for family, architecture in ARCHITECTURES.items()}
    if architectures and not set(architectures) & set(known):
        raise UnsupportedModelError(f"{keys.where}: architecture {architectures[0]} is not supported; {SUPPORTED}")
    named = next((known[name] for name in architectures if name in known), None)
    family = keys.text("model_type", named or "")
    if not family:
        raise UnsupportedModelError(f"{keys.where}: neither model_type nor architectures names the family; {SUPPORTED}")
    if family not in ARCHITECTURES:
        raise UnsupportedModelError(f"{keys.where}: model family {family!r} is not supported; {SUPPORTED}")
    if named is not None and named != family:
        raise keys.fail("model_type", f"{family!r} contradicts architectures {list(architectures)}")
    return family


def _refuse_unsupported(keys: ConfigReader) -> None:
    if keys.has("quantization_config"):
        method = keys.table("quantization_config").get("quant_method", "by an unnamed method")
        raise UnsupportedModelError(
            f"{keys.where}: quantised checkpoints are not supported, and this is one (quantization_config: {method}); "
            "use the float16, bfloat16 or float32 original"
        )
    activation = keys.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModelError(f"{keys.where}: hidden_act {activation!r} is not supported; only silu is")


def _kv_heads(keys: ConfigReader, heads: int, family: str) -> int:
    # A null always means "as many as heads"; an absent key does so in Llama alone, older than grouped heads.
    absent_is_heads = family == "llama" or "num_key_value_heads" in keys.values
    kv_heads = keys.integer("num_key_value_heads", heads) if absent_is_heads else keys.integer("num_key_value_heads")
    if heads % kv_heads:
        raise keys.fail("num_key_value_heads", f"({kv_heads}) must divide num_attention_heads ({heads})")
    return kv_heads


def _head_dim(keys: ConfigReader, family: str, hidden: int, heads: int) -> int:
    if keys.has("head_dim"):
        size = keys.integer("head_dim")
    elif family == "qwen3":
        size = DEFAULT_QWEN3_HEAD_DIM
    elif hidden % heads:
        raise keys.fail(
            "num_attention_heads", f"({heads}) must divide hidden_size ({hidden}) where head_dim is not given"
        )
    else:
        size = hidden // heads
    if size % 2:
        raise keys.fail("head_dim", f"({size}) must be even for rotary embedding")
    return size


def _layer_windows(keys: ConfigReader, family: str, layers: int) -> tuple[int, ...]:
    """Window of each layer, 0 for none: of all layers in Mistral, of those that ``layer_types`` names in Qwen."""
    window = 0
    if family == "mistral" or (family != "llama" and keys.flag("use_sliding_window", False)):
        window = _window(keys)
    first = 0
    if family in ("qwen2", "qwen3"):
        first = keys.integer("max_window_layers", DEFAULT_MAX_WINDOW_LAYERS, minimum=0)
    computed = tuple("sliding_attention" if window and i >= first else "full_attention" for i in range(layers))
    kinds = keys.texts("layer_types") or computed
    if len(kinds) != layers:
        raise keys.fail("layer_types", f"must name {layers} layers (num_hidden_layers), not {len(kinds)}")
    other = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if other or (family in ("llama", "mistral") and kinds != computed):
        raise UnsupportedModelError(
            f"{keys.where}: layer_types {other or sorted(set(kinds))} is not supported in a {family} model"
        )
    if "sliding_attention" in kinds and not window:
        raise keys.fail("layer_types", "has sliding_attention, but use_sliding_window or sliding_window is off")
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _window(keys: ConfigReader) -> int:
    """0 where ``sliding_window`` is null; where absent, transformers' default."""
    if "sliding_window" in keys.values and not keys.has("sliding_window"):
        return 0
    return keys.integer("sliding_window", DEFAULT_SLIDING_WINDOW)
