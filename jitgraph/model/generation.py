"""The sampling settings that a checkpoint recommends in ``generation_config.json``. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jitgraph.errors import CheckpointError, RequestError
from jitgraph.model.config_reader import ConfigReader
from jitgraph.types import SamplingParams

NEUTRAL = {
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "length_penalty": 1.0,
    "top_h": None,
    "penalty_alpha": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": None,
}
"""Settings that change what is generated and that this engine does not have, with the value that changes nothing."""


@dataclass(frozen=True)
class GenerationDefaults:
    """What a checkpoint recommends."""

    params: SamplingParams = field(default_factory=SamplingParams)
    unsupported: tuple[str, ...] = ()
    """Recommended settings that cannot be followed, as ``name value``."""


def generation_defaults(config: Mapping[str, Any], where: str) -> GenerationDefaults:
    """Reads the recommendation; greedy where the file is empty or does not ask for sampling.

    The repetition penalty holds either way, as in transformers.

    Raises:
        CheckpointError: a value of the wrong type or out of its range, by its name.
    """
    keys = ConfigReader(config, where)
    unsupported = tuple(
        f"{name} {config[name]}" for name, neutral in NEUTRAL.items() if config.get(name) not in (None, neutral)
    )
    values: dict[str, Any] = {"repetition_penalty": keys.number("repetition_penalty", 1.0)}
    if keys.flag("do_sample", False):
        values["temperature"] = keys.number("temperature", 1.0)
        values["top_k"] = keys.integer("top_k", 0, minimum=0)
        values["top_p"] = keys.number("top_p", 1.0)
        if keys.has("min_p") and config["min_p"] != 0:
            values["min_p"] = keys.number("min_p")
    try:
        return GenerationDefaults(SamplingParams(**values), unsupported)
    except RequestError as error:
        raise CheckpointError(f"{where}: {error}") from error
