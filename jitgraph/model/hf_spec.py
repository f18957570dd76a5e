"""The figures of a model outside the native families, from its configuration as transformers reads it.

Runs before anything is loaded, on the thread that opens the model. transformers and torch are imported when called:
nothing else of this project needs the former. Only classes that transformers brings along are used; code that a
checkpoint carries is never run.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jitgraph.errors import CheckpointError, ConfigError, UnsupportedModelError
from jitgraph.model.config_reader import ConfigReader
from jitgraph.model.hf_config import config_dtype
from jitgraph.model.spec import ModelSpec, RopeSpec

UNSTATED_CONTEXT = 4096
"""Context of a model whose configuration names none, such as one with ALiBi."""


@dataclass(frozen=True)
class ForeignSpec(ModelSpec):
    """A model that runs through its own forward in transformers. ``num_kv_heads`` and ``head_dim`` are those of the KV
    cache, the largest of all layers; RoPE, norms and activations are the model's own affair."""

    why: str
    """Why the native decoder does not run it, in the words that refused it."""
    parameters: int
    """Elements of all distinct tensors."""
    streamed_parameters: int
    """Elements that a decode step reads: no embedding table, and of a mixture only the experts that a token uses."""

    def linear_parameters(self) -> int:
        """See ``ModelSpec``."""
        return self.streamed_parameters

    def prefill_flops(self, tokens: int) -> int:
        """See ``ModelSpec``; the LM head counts once."""
        head = self.vocab_size * self.hidden_size
        return 2 * (tokens * max(0, self.streamed_parameters - head) + head)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[Any]:
    """``transformers``, without its progress bars and advice while the block runs.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            "this model's family runs through transformers, which is not installed: pip install 'jitgraph[hf]'"
        )
    import transformers

    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield transformers
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def foreign_config(config: Mapping[str, Any], where: str) -> Any:
    """transformers' configuration object of a ``config.json``.

    Raises:
        UnsupportedModelError: a family that this transformers does not know, or no causal language model.
        CheckpointError: a configuration that it refuses.
        ConfigError: transformers is not installed.
    """
    keys = ConfigReader(config, where)
    family = keys.text("model_type", "")
    named = next(iter(keys.texts("architectures")), repr(family))
    with quiet_transformers() as transformers:
        if family not in transformers.CONFIG_MAPPING:
            known = f"transformers {transformers.__version__} does not know it either"
            code = ", and code that comes with a checkpoint is never run" if config.get("auto_map") else ""
            raise UnsupportedModelError(
                f"{where}: model family {family!r} is not native and {known}{code}: use another model, "
                "or a transformers release that has it"
            )
        fields = {key: value for key, value in config.items() if key not in ("auto_map", "transformers_version")}
        try:
            made = transformers.CONFIG_MAPPING[family].from_dict(fields)
        except Exception as error:  # whatever a family's own checks raise
            raise CheckpointError(
                f"{where}: transformers refuses this configuration ({_first_line(error)}): download it again"
            ) from error
        if not _writes_text(transformers, made, config):
            raise UnsupportedModelError(
                f"{where}: {named} is no causal language model that transformers has: use one that writes text"
            )
    return made


def _writes_text(transformers: Any, made: Any, config: Mapping[str, Any]) -> bool:
    """Whether this is a model that continues a text."""
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(made) not in mapping or getattr(made, "is_encoder_decoder", False):
        return False
    if type(made) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(made, "is_decoder", False):
        return False
    named = config.get("architectures")
    return not named or mapping[type(made)].__name__ in named


def foreign_spec(config: Mapping[str, Any], where: str, why: UnsupportedModelError) -> ForeignSpec:
    """The figures of a model that the native decoder refused with ``why``.

    Raises:
        UnsupportedModelError, CheckpointError, ConfigError: as ``foreign_config``.
    """
    made = foreign_config(config, where)
    text = made.get_text_config()
    reader = ConfigReader({name: getattr(text, name, None) for name in _FIGURES}, where)
    heads, hidden = reader.integer("num_attention_heads", 1), reader.integer("hidden_size")
    total, streamed = _parameters(made, where)
    return ForeignSpec(
        family=str(config["model_type"]),
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size", 4 * hidden),
        num_layers=reader.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=reader.integer("num_key_value_heads", heads),
        head_dim=reader.integer("head_dim", max(1, hidden // heads)),
        rms_norm_eps=1e-6,
        max_position_embeddings=reader.integer("max_position_embeddings", UNSTATED_CONTEXT),
        rope=RopeSpec(),
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tie_embeddings=bool(getattr(made, "tie_word_embeddings", False)),
        layer_windows=(),
        dtype=config_dtype(config, where) or "float32",
        bos_token_id=next(iter(reader.token_ids("bos_token_id")), None),
        eos_token_ids=_eos(config, reader),
        pad_token_id=next(iter(reader.token_ids("pad_token_id")), None),
        why=str(why).removeprefix(f"{where}: ").partition(";")[0],
        parameters=total,
        streamed_parameters=streamed,
    )


_FIGURES = (
    *("num_attention_heads", "hidden_size", "vocab_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)


def _eos(config: Mapping[str, Any], reader: ConfigReader) -> tuple[int, ...]:
    """The ids that end a text. One that only a family's default names, and that the vocabulary lacks, is none."""
    stated = config.get("eos_token_id") is not None
    vocabulary = reader.integer("vocab_size")
    return tuple(token for token in reader.token_ids("eos_token_id") if stated or token < vocabulary)


def _parameters(made: Any, where: str) -> tuple[int, int]:
    """(elements in all, elements that a decode step reads), from the model built without memory."""
    model = meta_model(made, where)
    distinct = dict(model.named_parameters())  # tied ones once
    total = sum(tensor.numel() for tensor in distinct.values())
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    idle = 0
    if table is not None and (head is None or head.weight is not table.weight):
        idle = table.weight.numel()
    text = made.get_text_config()
    used = getattr(text, "num_experts_per_tok", None)
    experts = next((n for name in _EXPERTS if isinstance(n := getattr(text, name, None), int) and n), None)
    if isinstance(used, int) and experts is not None and used < experts:
        of_experts = sum(tensor.numel() for name, tensor in distinct.items() if ".experts." in name)
        idle += of_experts * (experts - used) // experts
    return total, total - idle


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def meta_model(made: Any, where: str) -> Any:
    """The model without values, to count and to name its tensors.

    Raises:
        CheckpointError: the configuration contradicts itself.
    """
    import torch

    with quiet_transformers() as transformers, torch.device("meta"):
        try:
            return transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager")
        except Exception as error:
            raise CheckpointError(
                f"{where}: transformers cannot build this model ({_first_line(error)}): correct config.json"
            ) from error


def _first_line(error: Exception) -> str:
    """An error's own words, cut to one line."""
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return text if len(text) <= 200 else f"{text[:197]}..."
