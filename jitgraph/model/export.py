"""Writes a preset with seeded random weights as a Hugging Face folder, for other engines to load.

The folder appears whole or not at all: it is written beside its place under another name and renamed at the end.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from jitgraph.config import DTYPES
from jitgraph.errors import ConfigError, OutputError
from jitgraph.model.checkpoint import INDEX_FILE, SINGLE_FILE
from jitgraph.model.device import resolve_device, torch_dtype
from jitgraph.model.hf_config import spec_from_config
from jitgraph.model.packing import Progress, hf_shapes
from jitgraph.model.presets import preset_config
from jitgraph.model.random_weights import iter_random_tensors
from jitgraph.model.spec import ModelSpec
from jitgraph.text.tokenizer import bundled_tokenizer_folder

MAX_SHARD_BYTES = 4_000_000_000
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def export_model(
    preset: str,
    folder: str | Path,
    *,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Writes ``config.json``, ``generation_config.json``, safetensors and the bundled tokenizer; returns the folder.

    On one kind of device the tensors are those that ``load_model(preset, weights="random")`` makes of the same seed and
    dtype, bit for bit. ``dtype="auto"`` is the preset's own.

    Raises:
        ConfigError: no such preset or dtype.
        OutputError: the folder is in use, its parent is missing or not writable, or the disk is too small.
    """
    config = preset_config(preset)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    if dtype != "auto":
        config["dtype"] = dtype
    spec = spec_from_config(config, preset)
    generator = resolve_device(device)
    target = Path(os.path.expanduser(folder)).absolute()
    plan = plan_shards(spec, max_shard_bytes)
    _check_target(target)
    partial = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        partial.mkdir()
        _check_room(target.parent, _weight_bytes(spec))
        _write_json(partial / "config.json", config)
        _write_json(partial / "generation_config.json", {key: config[key] for key in SPECIAL_IDS})
        for file in sorted(bundled_tokenizer_folder().iterdir()):
            shutil.copyfile(file, partial / file.name)
        _write_shards(partial, plan, spec, seed, generator, progress)
        os.rename(partial, target)  # replaces nothing but an empty folder
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{target} cannot be written ({error}): choose another folder or free the disk") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # after the rename it is gone already
    return target


def plan_shards(spec: ModelSpec, max_shard_bytes: int) -> list[list[str]]:
    """Tensor names file by file, in checkpoint order; a file passes the limit only where one tensor does."""
    item = torch_dtype(spec.dtype).itemsize
    shards: list[list[str]] = []
    room = 0
    for name, shape in hf_shapes(spec).items():
        size = math.prod(shape) * item
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _weight_bytes(spec: ModelSpec) -> int:
    return sum(math.prod(shape) for shape in hf_shapes(spec).values()) * torch_dtype(spec.dtype).itemsize


def _check_target(target: Path) -> None:
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise OutputError(f"{target} exists and is not an empty folder: choose another or remove it")
        if not target.parent.is_dir():
            raise OutputError(f"{target.parent} is not an existing folder: create it first")
    except OSError as error:
        raise OutputError(f"{target} cannot be written ({error}): choose another folder") from error


def _check_room(parent: Path, weight_bytes: int) -> None:
    free = shutil.disk_usage(parent).free
    if free < weight_bytes:
        have, need = free / 2**30, weight_bytes / 2**30
        raise OutputError(f"{parent} has {have:.1f} GiB free and the weights need {need:.1f} GiB: free some space")


def _write_shards(
    folder: Path,
    plan: list[list[str]],
    spec: ModelSpec,
    seed: int,
    device: torch.device,
    progress: Progress | None,
) -> None:
    """Fills ``folder``; at most one shard is in host memory at a time."""
    tensors = iter_random_tensors(spec, seed, device, torch_dtype(spec.dtype))
    weight_map: dict[str, str] = {}
    total, done = _weight_bytes(spec), 0
    for number, names in enumerate(plan, start=1):
        file = SINGLE_FILE if len(plan) == 1 else f"model-{number:05d}-of-{len(plan):05d}.safetensors"
        shard = {}
        for expected in names:
            name, tensor = next(tensors)
            assert name == expected, f"{name} came where the plan has {expected}"
            shard[name] = tensor.cpu()
            weight_map[name] = file
            done += tensor.nbytes
            if progress is not None:
                progress("writing weights (MiB)", done >> 20, total >> 20)
        save_file(shard, folder / file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / file)  # safetensors lets the owner alone read
    if len(plan) > 1:
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
