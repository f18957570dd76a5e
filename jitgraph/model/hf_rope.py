"""Rotary embedding settings of a Hugging Face config to ``RopeSpec``. No torch.

Two spellings: ``rope_theta`` beside ``rope_scaling`` {"type" or "rope_type"}, and the ``rope_parameters`` object of
transformers 5. Where both stand, the order of precedence is that of transformers 5.17.
"""

from __future__ import annotations

from jitgraph.errors import UnsupportedModelError
from jitgraph.model.config_reader import ConfigReader
from jitgraph.model.spec import RopeSpec

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
DEFAULT_THETA = 10000.0


def rope_from_config(config: ConfigReader, max_position_embeddings: int) -> RopeSpec:
    """The rotary embedding of a config.

    Raises:
        UnsupportedModelError: a kind outside ``ROPE_KINDS``, rotation of a part of the head, or settings per layer.
        CheckpointError: a missing or senseless value, by its key.
    """
    key = "rope_scaling" if config.has("rope_scaling") and config.table("rope_scaling") else "rope_parameters"
    table = ConfigReader(config.table(key), f"{config.where}: {key}")
    theta = table.number("rope_theta", config.number("rope_theta", DEFAULT_THETA))
    kind = table.text("rope_type", table.text("type", "default"))
    if any(isinstance(value, dict) for value in table.values.values()):
        raise UnsupportedModelError(
            f"{config.where}: {key} differs by layer, which the native decoder does not support"
        )
    if kind not in ROPE_KINDS:
        raise UnsupportedModelError(
            f"{config.where}: rope type {kind!r} is not supported; supported are {', '.join(ROPE_KINDS)}"
        )
    for reader in (config, table):
        if reader.number("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedModelError(f"{reader.where}: partial_rotary_factor must be 1: the whole head is rotated")
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind == "linear":
        return RopeSpec(kind=kind, theta=theta, factor=table.number("factor"))
    if (
        kind == "dynamic"
    ):  # by transformers' rule the trained context is max_position_embeddings, whatever else is given
        return RopeSpec(kind, theta, table.number("factor"), max_position_embeddings)
    inner = table.integer("original_max_position_embeddings", max_position_embeddings)
    original = config.integer("original_max_position_embeddings", inner)
    return (
        _llama3(table, theta, original) if kind == "llama3" else _yarn(table, theta, original, max_position_embeddings)
    )


def _llama3(table: ConfigReader, theta: float, original: int) -> RopeSpec:
    low, high = table.number("low_freq_factor"), table.number("high_freq_factor")
    if high <= low:
        raise table.fail("high_freq_factor", f"({high}) must be above low_freq_factor ({low})")
    return RopeSpec("llama3", theta, table.number("factor"), original, low_freq_factor=low, high_freq_factor=high)


def _yarn(table: ConfigReader, theta: float, original: int, max_position_embeddings: int) -> RopeSpec:
    return RopeSpec(
        kind="yarn",
        theta=theta,
        factor=table.number("factor", max_position_embeddings / original),
        original_max_position=original,
        beta_fast=table.number("beta_fast", 32.0),
        beta_slow=table.number("beta_slow", 1.0),
        attention_factor=table.optional_number("attention_factor"),
        mscale=table.optional_number("mscale"),
        mscale_all_dim=table.optional_number("mscale_all_dim"),
        truncate=table.flag("truncate", True),
    )
