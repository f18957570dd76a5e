"""A model by name: checkpoint folder, hub id or preset, to packed weights on one device.

Runs once, before the engine starts, on the thread that builds it. A local folder opens no socket:
``huggingface_hub`` is imported for hub ids alone.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jitgraph.errors import CheckpointError, ConfigError, UnsupportedModelError
from jitgraph.model.checkpoint import Checkpoint, open_checkpoint
from jitgraph.model.config_reader import read_json
from jitgraph.model.default import DEFAULT_MODEL, STAND_IN, default_model_folder
from jitgraph.model.device import resolve_device, resolve_dtype
from jitgraph.model.hf import HfModel, load_hf_model
from jitgraph.model.hf_config import ARCHITECTURES, config_dtype, eos_ids, spec_from_config
from jitgraph.model.hf_spec import ForeignSpec, foreign_spec
from jitgraph.model.packing import Progress, allocate_weights, fill, hf_views
from jitgraph.model.presets import PRESETS, RANDOM_BY_NATURE, preset_config
from jitgraph.model.random_weights import iter_random_tensors
from jitgraph.model.spec import ModelSpec
from jitgraph.model.weights import ModelWeights
from jitgraph.types import MAX_STOP_TOKEN_IDS

WEIGHTS = ("checkpoint", "random")
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@([\w][\w./-]*))?")


@dataclass(frozen=True)
class LoadedModel:
    """A model ready for a decoder."""

    name: str
    """The preset, the hub id or the folder's name."""
    spec: ModelSpec
    weights: ModelWeights | HfModel
    folder: Path | None
    """Where its tokenizer and chat template lie; None for a preset, which uses the bundled ones."""
    generation_config: dict[str, Any]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class ModelSource:
    """What a name stands for, before any weight is read."""

    name: str
    folder: Path | None
    config: dict[str, Any]
    generation_config: dict[str, Any]
    spec: ModelSpec
    from_hub: bool = False
    """Whether the folder is a snapshot of the hub, which may hold the small files alone."""


def load_model(
    model: str,
    *,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    weights: str = "checkpoint",
    seed: int = 0,
    progress: Progress | None = None,
    before: Callable[[ModelSource, torch.dtype, torch.device], None] | None = None,
) -> LoadedModel:
    """Reads or makes a model's weights straight into their packed places on the device.

    Args:
        model: preset name, ``default`` (the bundled model), checkpoint folder or hub id. Of a preset and a folder of
            one name the preset is meant; ``./name`` is the folder.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``float16``, ``bfloat16``, ``float32``; ``auto`` is the checkpoint's own on CUDA and float32 on the CPU.
        weights: ``checkpoint`` reads safetensors; ``random`` makes seeded random ones (a folder then needs no weights).
        seed: of random weights.
        progress: told (phase, MiB done, MiB in all) after each tensor.
        before: called once everything is known of the model and before any weight is read, of a hub id also before any
            is downloaded; what it raises comes out.

    Raises:
        CheckpointError: nothing of that name, or a checkpoint that is damaged or contradicts its config.
        UnsupportedModelError: a model that neither the native decoder nor transformers can run, or quantised.
        ConfigError: a preset without ``weights="random"``, or an unknown ``weights`` or ``dtype``.
        DeviceError: the device is not there.
        CapacityError: the device's memory is too small.
    """
    target = resolve_device(device)

    def before_weights(source: ModelSource) -> None:
        if before is not None:
            before(source, resolve_dtype(dtype, source.spec.dtype, target), target)

    source = find_model(model, weights=weights, progress=progress, before_weights=before_weights)
    spec, random = source.spec, weights == "random" or source.folder is None
    checkpoint: Checkpoint | None = None
    if isinstance(spec, ForeignSpec):
        return _load_foreign(source, spec, target, dtype, seed if random else None, progress, before)
    if source.folder is not None and not random:
        checkpoint = open_checkpoint(source.folder)
        checkpoint.check(spec)
        if config_dtype(source.config, source.name) is None:
            spec = dataclasses.replace(spec, dtype=checkpoint.dtype or spec.dtype)
    chosen = resolve_dtype(dtype, spec.dtype, target)
    if before is not None:
        before(source, chosen, target)
    packed = allocate_weights(spec, target, chosen)
    if checkpoint is not None:
        checkpoint.read(spec, hf_views(spec, packed), progress)
    else:
        fill(hf_views(spec, packed), iter_random_tensors(spec, seed, target, chosen), progress)
    if target.type == "cuda":
        torch.cuda.empty_cache()  # the drafts of random tensors; what stays reserved is the model alone
    return LoadedModel(source.name, spec, packed, source.folder, source.generation_config, chosen, target)


def _load_foreign(
    source: ModelSource,
    spec: ForeignSpec,
    device: torch.device,
    dtype: str,
    seed: int | None,
    progress: Progress | None,
    before: Callable[[ModelSource, torch.dtype, torch.device], None] | None,
) -> LoadedModel:
    """A model outside the native families; random weights with a ``seed``."""
    if seed is None and config_dtype(source.config, source.name) is None:
        assert source.folder is not None
        spec = dataclasses.replace(spec, dtype=open_checkpoint(source.folder).dtype or spec.dtype)
    chosen = resolve_dtype(dtype, spec.dtype, device)
    if before is not None:
        before(source, chosen, device)
    how: dict[str, Any] = {"device": device, "dtype": chosen, "seed": seed, "progress": progress}
    held = load_hf_model(spec, source.config, source.folder, source.name, **how)
    return LoadedModel(source.name, held.spec, held, source.folder, source.generation_config, chosen, device)


def find_model(
    model: str,
    *,
    weights: str = "checkpoint",
    progress: Progress | None = None,
    before_weights: Callable[[ModelSource], None] | None = None,
) -> ModelSource:
    """Configuration of a model by name; a hub id is downloaded, with its weights unless they are to be random.

    ``owner/name@revision`` is a branch, tag or commit. Whatever a branch does meanwhile, configuration and weights are
    of one commit. ``before_weights`` is called between the two; what it raises comes out, and no weight is fetched.

    Raises:
        CheckpointError, UnsupportedModelError, ConfigError: as ``load_model``.
    """
    if weights not in WEIGHTS:
        raise ConfigError(f"weights must be one of {', '.join(WEIGHTS)}, not {weights!r}")
    if model == DEFAULT_MODEL:
        bundled = default_model_folder()
        return find_model(STAND_IN, weights=weights) if bundled is None else _read_folder(DEFAULT_MODEL, bundled)
    if model in PRESETS:
        if weights != "random" and model not in RANDOM_BY_NATURE:
            raise ConfigError(
                f"{model} is a preset, shapes without weights: add --weights random (weights='random'), "
                f"or name a checkpoint folder (./{model} for one of that name)"
            )
        config = preset_config(model)
        return ModelSource(model, None, config, {}, spec_from_config(config, model))
    folder = os.path.expanduser(model)  # os.path, not pathlib: it answers False to names that no file can have
    if os.path.isdir(folder):
        return _read_folder(Path(folder).resolve().name, Path(folder))
    if os.path.exists(folder):
        raise CheckpointError(f"{model} is a file: name the checkpoint folder that holds config.json and the weights")
    named = _HUB_ID.fullmatch(model)
    if named is None:
        raise CheckpointError(
            f"{model!r} is no existing folder, no preset ({', '.join(PRESETS)}) and no hub id (owner/name, "
            "or owner/name@revision)"
        )
    from jitgraph.model.hub import download

    repo, revision = named.groups()
    small = download(repo, revision, weights=False, progress=progress)
    source = _read_folder(model, small, from_hub=True)  # an unsupported family is refused before the long part
    if weights == "random":
        return source
    if before_weights is not None:
        before_weights(source)
    return _read_folder(model, download(repo, small.name, weights=True, progress=progress), from_hub=True)


def _check_eos(spec: ModelSpec, folder: Path) -> None:
    wrong = [token for token in spec.eos_token_ids if token >= spec.vocab_size]
    if wrong:
        raise CheckpointError(
            f"{folder}: eos_token_id {wrong[0]} is not in the vocabulary of {spec.vocab_size} entries; "
            "correct config.json or generation_config.json"
        )
    if len(spec.eos_token_ids) > MAX_STOP_TOKEN_IDS:
        raise CheckpointError(
            f"{folder}: eos_token_id lists {len(spec.eos_token_ids)} ids, more than the {MAX_STOP_TOKEN_IDS} possible; "
            "shorten the list in generation_config.json"
        )


def _read_folder(name: str, folder: Path, from_hub: bool = False) -> ModelSource:
    path = folder / "config.json"
    config = read_json(path, "name a Hugging Face checkpoint folder, the one that holds config.json")
    generation = folder / "generation_config.json"
    generation_config = read_json(generation, "") if generation.exists() else {}
    spec = _spec(config, str(path))
    spec = dataclasses.replace(spec, eos_token_ids=eos_ids(spec, generation_config, str(generation)))
    _check_eos(spec, folder)
    return ModelSource(name, folder, config, generation_config, spec, from_hub)


def _spec(config: dict[str, Any], where: str) -> ModelSpec:
    """The figures of a model, native or not. What no other way could help, a quantised checkpoint or an odd dtype, is
    refused as the native decoder refuses it."""
    try:
        return spec_from_config(config, where)
    except UnsupportedModelError as error:
        table = config.get("quantization_config")
        if table is not None and config.get("model_type") in ARCHITECTURES:
            raise
        if table is not None:
            method = table.get("quant_method", "unnamed") if isinstance(table, dict) else table
            raise UnsupportedModelError(
                f"{where}: a quantised checkpoint ({method}) of this family is not supported: "
                "use the float16, bfloat16 or float32 original"
            ) from error
        return foreign_spec(config, where, error)
