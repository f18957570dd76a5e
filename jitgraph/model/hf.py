"""Any other model: loading what is outside the native families through transformers, and choosing how to run it.

Runs once, before the engine starts, on the thread that builds it. A model is never trusted to be what its
configuration suggests: before it serves, a few tokens run through its forward as transformers meant it and as the
engine will call it, and where the two differ the engine does not use that way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jitgraph.config import EngineConfig
from jitgraph.errors import CapacityError, CheckpointError, ConfigError, UnsupportedModelError
from jitgraph.model.checkpoint import DTYPES, open_checkpoint
from jitgraph.model.device import check_memory
from jitgraph.model.hf_attention import NAME, register
from jitgraph.model.hf_check import grows_alike, pages_alike, survey, turning_length
from jitgraph.model.hf_decoder import HfDecoder, OwnCacheDecoder
from jitgraph.model.hf_spec import ForeignSpec, foreign_config, quiet_transformers
from jitgraph.ops.select import Ops

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class HfModel:
    """A model of transformers, in the place of ``ModelWeights``."""

    model: Any
    """The ``PreTrainedModel``, in evaluation mode, without gradients."""
    spec: ForeignSpec
    """With the cache's real figures."""
    layers: dict[int, int]
    """A layer's own index to its place in the paged cache; empty where the model grows a cache of its own."""
    why_own_cache: str = ""
    """Why its attention cannot work on the engine's pages; empty where it does."""

    @property
    def embedding(self) -> torch.Tensor:
        """The table of token embeddings ``[V, D]``: its device and dtype are the model's."""
        table: torch.Tensor = self.model.get_input_embeddings().weight
        return table

    def tensors(self) -> list[torch.Tensor]:
        """Every parameter and buffer, tied ones once."""
        return [*self.model.parameters(), *self.model.buffers()]

    def nbytes(self) -> int:
        """Bytes of distinct storage."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors()}
        return sum(storages.values())

    def workspace(self) -> ForeignSpec:
        """The spec with which the arena is laid out: of what only native layers use, one element a token."""
        if self.layers:
            return dataclasses.replace(self.spec, hidden_size=1, intermediate_size=1)
        return dataclasses.replace(self.spec, hidden_size=1, intermediate_size=1, num_heads=1)

    def decoder(self, ops: Ops) -> HfDecoder | OwnCacheDecoder:
        """What runs its steps."""
        if self.layers:
            return HfDecoder(self.spec, self.model, ops, self.layers)
        return OwnCacheDecoder(self.spec, self.model, ops, turning_length(self.model))

    def settle(self, config: EngineConfig) -> tuple[EngineConfig, tuple[str, ...]]:
        """The settings that hold for this model, and what its user must be told, a sentence each.

        Raises:
            ConfigError: a setting that only native models have.
        """
        refuse_native_settings(self.spec, config)
        family = self.spec.family
        told = f"{family} is no native family: it runs through its own forward in transformers"
        if self.layers:
            return config, (f"{told}, on the engine's KV cache",)
        told += (
            f", one stream after another with a KV cache of its own ({self.why_own_cache}); "
            "nothing is kept for prompts that begin alike"
        )
        return dataclasses.replace(config, prefix_cache=False), (told,)


def refuse_native_settings(spec: ForeignSpec, config: EngineConfig) -> None:
    """Refuses what a model outside the native families cannot have.

    Raises:
        ConfigError: a setting that only native models have, by its name.
    """
    refused = {
        "kv_window": config.kv_window is not None,
        "batch_invariant": config.batch_invariant,
        "graph_scope='static'": config.graph_scope == "static",
        "ops='jit-all'": config.ops == "jit-all",
    }
    for name, asked in refused.items():
        if asked:
            raise ConfigError(
                f"{name} is for native models; a {spec.family} model runs through transformers: leave it out"
            )


def load_hf_model(
    spec: ForeignSpec,
    config: Mapping[str, Any],
    folder: Path | None,
    where: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    seed: int | None = None,
    progress: Progress | None = None,
) -> HfModel:
    """Reads a checkpoint through transformers, or with a ``seed`` makes random weights, and settles how it runs.

    Raises:
        CheckpointError: files that are missing, damaged or do not fit the configuration.
        UnsupportedModelError: a model that does not go on with a sequence as a causal language model does.
        CapacityError: more memory than there is.
    """
    need = spec.parameters * dtype.itemsize
    check_memory(need, device, "the weights", "use a smaller model or dtype (float16 takes half of float32)")
    made = foreign_config(config, where)
    if progress is not None:
        progress("load", 0, max(1, need >> 20))
    with quiet_transformers() as transformers:
        register(transformers)
        try:
            if seed is None:
                assert folder is not None
                model = _read(transformers, made, folder, dtype)
            else:
                model = random_model(made, device, dtype, seed)
            model = model.to(device).eval().requires_grad_(False)
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"the weights need {need / 2**30:.2f} GiB, more than {device} can give: use a smaller model or dtype"
            ) from error
        if progress is not None:
            progress("load", max(1, need >> 20), max(1, need >> 20))
        return _settled(model, spec, where)


def _read(transformers: Any, made: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The checkpoint's model, on the CPU."""
    headers = open_checkpoint(folder)
    other = sorted({tensor.dtype for tensor in headers.stored.values()} - {*DTYPES, "I64", "I32", "U8", "BOOL"})
    if other:
        raise UnsupportedModelError(
            f"{folder} holds tensors of type {', '.join(other)}: quantised checkpoints of this family are not "
            "supported; use the float16, bfloat16 or float32 original"
        )
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=made,
            dtype=dtype,
            attn_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are refused below, by their names
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"transformers cannot read {folder} ({line}): download it again") from error
    missing = sorted(found["missing_keys"])
    misshapen = sorted(one if isinstance(one, str) else str(one[0]) for one in found["mismatched_keys"])
    kinds = {"missing": missing, "of another shape": misshapen}
    wrong = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in kinds.items() if names]
    if wrong:
        raise CheckpointError(
            f"the tensors in {folder} do not fit its config.json (use files that belong together); " + "; ".join(wrong)
        )
    return model


def random_model(made: Any, device: torch.device, dtype: torch.dtype, seed: int, attention: str = "eager") -> Any:
    """The family's own initialisation of transformers' configuration ``made``, seeded, made on the device.
    ``attention`` is transformers' name of an implementation."""
    generators = [device.index] if device.type == "cuda" else []
    with quiet_transformers() as transformers, torch.random.fork_rng(devices=generators), torch.device(device):
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(made, dtype=dtype, attn_implementation=attention)


def _settled(model: Any, spec: ForeignSpec, where: str) -> HfModel:
    """The model in the first of its two ways that gives what its own forward gives."""
    with torch.inference_mode():
        found = survey(model, spec)
        spec = dataclasses.replace(spec, vocab_size=found.vocabulary)
        why = found.why_not_pages
        if not why:
            paged = dataclasses.replace(
                spec, num_layers=len(found.places), num_kv_heads=found.kv_heads, num_heads=found.heads,
                head_dim=found.head_size,
            )  # fmt: skip
            if pages_alike(model, paged, found):
                return HfModel(model, paged, found.places)
            why = "through it the logits differ from those of the model's own forward"
        model.set_attn_implementation("eager")
        if model.config._attn_implementation == NAME or not grows_alike(model, spec, found):
            raise UnsupportedModelError(
                f"{where}: a {spec.family} model does not go on with a sequence from a cache as causal language models "
                "do, neither the engine's nor its own: use another model"
            )
    small = dataclasses.replace(spec, num_layers=1, num_kv_heads=1, head_dim=1)
    return HfModel(model, small, {}, why)
