"""What a checkpoint is and what it will take, without loading a weight: configuration, safetensors headers, tokenizer.

Behind ``jitgraph inspect``. Nothing is allocated on a device; of a hub id only the small files are fetched.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

from jitgraph.config import EngineConfig
from jitgraph.engine.fitting import check_tokenizer, needed, parameter_count
from jitgraph.errors import CheckpointError
from jitgraph.model.checkpoint import INDEX_FILE, SINGLE_FILE, is_downloaded, open_checkpoint
from jitgraph.model.device import resolve_device, resolve_dtype
from jitgraph.model.hf_spec import ForeignSpec
from jitgraph.model.loader import ModelSource, find_model
from jitgraph.model.spec import ModelSpec
from jitgraph.text.tokenizer import find_tokenizer

SHORT_CONTEXT = 4096
MOST_STREAMS = 8
READ_TB_S = {
    "B200": 8.0,
    "GH200": 4.9,
    "H200": 4.8,
    "H100 NVL": 3.9,
    "H100 PCIe": 2.0,
    "H100": 3.35,
    "A100-SXM4-80GB": 2.04,
    "A100 80GB PCIe": 1.94,
    "A100": 1.56,
    "RTX 5090": 1.79,
    "RTX 4090": 1.01,
    "RTX 3090": 0.94,
    "RTX 6000 Ada": 0.96,
    "RTX A6000": 0.77,
    "L40S": 0.86,
    "A10G": 0.6,
    "A10": 0.6,
    "L4": 0.3,
    "T4": 0.32,
}
"""Nominal memory bandwidth by what a device's name contains, the makers' figures; the first that is found counts."""


def nominal_read_tb_s(device_name: str) -> float | None:
    """A GPU's nominal bandwidth in 10^12 bytes a second; None for one that is not in the table."""
    words = device_name.replace("-", " ").split()
    for name, rate in READ_TB_S.items():
        if name in device_name or (" " not in name and "-" not in name and name in words):
            return rate
    return None


def inspect_model(model: str, device: str = "auto", dtype: str = "auto") -> dict[str, Any]:
    """Figures of a model as a JSON object; bytes are bytes, times milliseconds.

    Raises:
        CheckpointError, UnsupportedModelError: a missing shard, tensors that contradict the configuration, a tokenizer
            that does not match, a gated or unknown model: one sentence.
        ConfigError, DeviceError: a wrong ``dtype`` or ``device``.
    """
    target = resolve_device(device)
    source = find_model(model, weights="random")  # the configuration alone
    spec, stored = source.spec, _stored(source)
    if stored is not None and source.config.get("dtype", source.config.get("torch_dtype")) is None:
        spec = dataclasses.replace(spec, dtype=stored["main_dtype"] or spec.dtype)
    chosen = resolve_dtype(dtype, spec.dtype, target)
    parameters = parameter_count(spec)
    return {
        "name": source.name,
        "folder": None if source.folder is None else str(source.folder.resolve()),
        "family": spec.family,
        "runs": "transformers" if isinstance(spec, ForeignSpec) else "native",
        "why_not_native": spec.why if isinstance(spec, ForeignSpec) else None,
        "parameters": parameters,
        "dtype": str(chosen).removeprefix("torch."),
        "own_dtype": spec.dtype,
        "weight_bytes": parameters * chosen.itemsize,
        "stored": stored,
        "quantisation": _quantisation(source),
        "context": spec.max_position_embeddings,
        "vocab_size": spec.vocab_size,
        "layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "heads": spec.num_heads,
        "kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "kv_bytes_per_token": spec.kv_bytes_per_token(chosen.itemsize),
        "tokenizer": _tokenizer(source),
        "memory": _memory(spec, chosen.itemsize, target.type == "cuda"),
        "floor": _floor(spec, chosen.itemsize, target),
    }


def _stored(source: ModelSource) -> dict[str, Any] | None:
    """What the safetensors headers say; None where the folder has no weights, as of a preset or a hub id that was never
    downloaded as a whole."""
    folder = source.folder
    if folder is None or not (is_downloaded(folder) if source.from_hub else _has_weights(folder)):
        return None
    checkpoint = open_checkpoint(folder)
    if not isinstance(source.spec, ForeignSpec):
        checkpoint.check(source.spec)
    elements: dict[str, int] = {}
    for tensor in checkpoint.stored.values():
        elements[tensor.dtype] = elements.get(tensor.dtype, 0) + math.prod(tensor.shape)
    files = sorted({tensor.file for tensor in checkpoint.stored.values()})
    return {
        "files": len(files),
        "file_bytes": sum(path.stat().st_size for path in files),
        "tensors": len(checkpoint.stored),
        "elements_by_dtype": elements,
        "main_dtype": checkpoint.dtype,
    }


def _has_weights(folder: Path) -> bool:
    if (folder / SINGLE_FILE).exists() or (folder / INDEX_FILE).exists():
        return True
    if any(True for pattern in ("*.bin", "*.pt", "*.pth") for _ in folder.glob(pattern)):
        raise CheckpointError(
            f"{folder} holds only pickled weights, which can run code when read: convert them with transformers' "
            "save_pretrained, which writes safetensors"
        )
    return False


def _quantisation(source: ModelSource) -> dict[str, Any] | None:
    """The checkpoint's own, as its configuration names it."""
    table = source.config.get("quantization_config")
    if not isinstance(table, dict):
        return None
    return {name: table[name] for name in ("quant_method", "bits", "group_size", "quant_type") if name in table}


def _tokenizer(source: ModelSource) -> dict[str, Any] | None:
    found = find_tokenizer(source.folder)
    if found is None:
        return None
    if source.folder is not None:
        check_tokenizer(source.name, found, source.spec)
    return {
        "entries": found.vocab_size,
        "bos": found.bos_token,
        "eos": found.eos_token,
        "eos_ids": list(source.spec.eos_token_ids),
        "chat_template": found.chat_template is not None,
    }


def _memory(spec: ModelSpec, element_bytes: int, cuda: bool) -> list[dict[str, int]]:
    """What 1 to 8 streams take, at the short context and at the model's own."""
    limit = spec.max_position_embeddings
    if spec.rope.kind == "dynamic":
        limit = int(limit * spec.rope.factor)
    rows = []
    for context in dict.fromkeys((min(SHORT_CONTEXT, limit), limit)):
        for streams in range(1, MOST_STREAMS + 1):
            config = EngineConfig(max_streams=streams, max_model_len=context)
            need = needed(spec, config, element_bytes, cuda)
            rows.append({"streams": streams, "context": context, **dataclasses.asdict(need), "total": need.total})
    return rows


def _floor(spec: ModelSpec, element_bytes: int, device: torch.device) -> dict[str, Any]:
    """The least time of a token of one stream: what a step must read, by the memory's nominal bandwidth."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    rate = None if name is None else nominal_read_tb_s(name)
    streamed = spec.linear_parameters() * element_bytes
    return {
        "device": name or "cpu",
        "read_tb_s": rate,
        "bytes_per_token": streamed,
        "token_ms": None if rate is None else streamed / (rate * 1e9),
    }
