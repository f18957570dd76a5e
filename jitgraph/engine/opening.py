"""From a model's name to an engine that is ready: what ``LLM`` and the engine process share. The thread that will own
the engine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from jitgraph.config import EngineConfig
from jitgraph.engine.engine import Engine
from jitgraph.engine.fitting import check_fit, check_tokenizer, free_bytes
from jitgraph.engine.memory import used_bytes
from jitgraph.engine.ready import Progress
from jitgraph.engine.report import describe
from jitgraph.engine.sizing import resolve_sizing
from jitgraph.ipc.messages import EngineFacts
from jitgraph.model.device import resolve_device
from jitgraph.model.generation import generation_defaults
from jitgraph.model.hf import refuse_native_settings
from jitgraph.model.hf_spec import ForeignSpec
from jitgraph.model.loader import LoadedModel, ModelSource, load_model
from jitgraph.model.spec import ModelSpec
from jitgraph.text.tokenizer import find_tokenizer
from jitgraph.types import SamplingParams

_PACKAGES = ("jitgraph", "torch", "triton", "cuda-bindings", "transformers")
"""Whose versions may change what is computed."""
_FINGERPRINT_DIGITS = 12


@dataclass(frozen=True)
class OpenedEngine:
    """An engine that is ready, and what its owner must know of the model."""

    engine: Engine
    name: str
    """The preset, the hub id or the folder's name."""
    folder: Path | None
    """Where tokenizer and chat template lie; None for a preset."""
    spec: ModelSpec
    device: torch.device
    default_params: SamplingParams
    """The model's own sampling settings; greedy where it has none."""
    unsupported_defaults: tuple[str, ...]
    """Settings of ``generation_config.json`` that this engine does not have, as ``name value``."""
    fingerprint: str
    """Changes with model, settings, kernels and versions."""
    phases_ms: dict[str, float]
    """Loading and the engine's own phases."""
    phases_mib: dict[str, float]
    """By how much the device's memory in use grew in each of them."""

    def facts(self) -> EngineFacts:
        """What clients of this process are told."""
        engine = self.engine
        sizing = engine.sizing
        return EngineFacts(
            pid=os.getpid(),
            model=self.name,
            folder=None if self.folder is None else str(self.folder.resolve()),
            vocab_size=self.spec.vocab_size,
            max_model_len=sizing.max_model_len if sizing.window is None else None,
            max_streams=engine.config.max_streams,
            eos_token_ids=tuple(self.spec.eos_token_ids),
            default_params=self.default_params,
            device=str(self.device),
            dtype=str(engine.dtype).removeprefix("torch."),
            fingerprint=self.fingerprint,
            emulated=engine.emulated,
            about={
                **describe(self.name, engine),
                "unsupported_defaults": list(self.unsupported_defaults),
                "graphs_left_out": [str(key) for key in engine.ready.left_out],
            },
        )


def open_engine(
    model: str | Path,
    *,
    config: EngineConfig,
    weights: str = "checkpoint",
    seed: int = 0,
    progress: Progress | None = None,
    on_loaded: Callable[[LoadedModel], None] | None = None,
) -> OpenedEngine:
    """Loads a model and builds its engine. ``weights`` and ``seed`` are those of ``load_model``; ``on_loaded`` is
    called between the two, and what it raises comes out here.

    Raises:
        CheckpointError, ConfigError, CapacityError, DeviceError, CompileError: one sentence that says what to do.
    """
    device = resolve_device(config.device)
    started, before = time.perf_counter(), used_bytes(device)
    how: dict[str, Any] = {"weights": weights, "seed": seed, "progress": progress, "before": partial(_check, config)}
    loaded = load_model(str(model), device=device, dtype=config.dtype, **how)
    load_ms = (time.perf_counter() - started) * 1e3
    load_mib = (used_bytes(device) - before) / 2**20
    defaults = generation_defaults(loaded.generation_config, f"{loaded.name}: generation_config.json")
    if on_loaded is not None:
        on_loaded(loaded)
    engine = Engine(loaded.spec, loaded.weights, config, loaded.spec.eos_token_ids, progress, loaded.folder)
    return OpenedEngine(
        engine=engine,
        name=loaded.name,
        folder=loaded.folder,
        spec=loaded.spec,
        device=device,
        default_params=defaults.params,
        unsupported_defaults=defaults.unsupported,
        fingerprint=_fingerprint(loaded, engine, weights, seed),
        phases_ms={"load": load_ms, **engine.ready.phases_ms},
        phases_mib={"load": load_mib, **engine.ready.phases_mib},
    )


def _check(config: EngineConfig, source: ModelSource, dtype: torch.dtype, device: torch.device) -> None:
    """Refuses what cannot work before any weight is read.

    Raises:
        ConfigError, CheckpointError, CapacityError: settings, tokenizer or memory that do not suit the model.
    """
    spec = source.spec
    if isinstance(spec, ForeignSpec):
        refuse_native_settings(spec, config)
    resolve_sizing(config, spec, dtype.itemsize)
    if source.folder is not None:
        check_tokenizer(source.name, find_tokenizer(source.folder), spec)
    check_fit(source.name, spec, config, dtype.itemsize, device, free_bytes(device))


def _fingerprint(loaded: LoadedModel, engine: Engine, weights: str, seed: int) -> str:
    """A short hash: equal where the same ids and seeds can be expected to give the same tokens."""
    parts: dict[str, Any] = {
        "engine": describe(loaded.name, engine),
        "spec": dataclasses.asdict(loaded.spec),
        "settings": dataclasses.asdict(engine.config),
        "weights": seed if weights == "random" or loaded.folder is None else _weight_files(loaded.folder),
        "versions": {name: _version(name) for name in _PACKAGES},
    }
    text = json.dumps(parts, sort_keys=True, default=str)
    return f"jg-{hashlib.sha256(text.encode()).hexdigest()[:_FINGERPRINT_DIGITS]}"


def _weight_files(folder: Path) -> list[tuple[str, int]]:
    """Names and sizes: enough to tell one checkpoint from another of the same shape, without reading it."""
    return sorted((path.name, path.stat().st_size) for path in folder.glob("*.safetensors"))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
