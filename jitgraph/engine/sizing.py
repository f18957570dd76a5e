"""Turns wishes into figures: context length, pages, arena sizes. Pure arithmetic over a spec and a config."""

from __future__ import annotations

from dataclasses import dataclass

from jitgraph.config import EngineConfig, parse_size
from jitgraph.errors import CapacityError, ConfigError
from jitgraph.model.spec import ModelSpec

DEFAULT_MAX_MODEL_LEN = 4096


@dataclass(frozen=True)
class Sizing:
    """Definite figures of one engine."""

    max_model_len: int
    page_size: int
    pages_per_slot: int
    pages: int
    """Pages of the cache, the dummy page included."""
    page_bytes: int
    buckets: tuple[int, ...]
    """Prompt buckets that the context can fill, ascending; the last is the chunk of longer prompts."""
    arena_tokens: int
    """Most tokens of one step."""

    @property
    def chunk_tokens(self) -> int:
        """Most prompt tokens of one step."""
        return self.buckets[-1]

    def pages_for(self, tokens: int) -> int:
        """Pages of a sequence that ends at ``tokens``; its last token is never fed, so never cached."""
        return max(1, -(-(tokens - 1) // self.page_size))


def resolve_sizing(config: EngineConfig, spec: ModelSpec, element_bytes: int) -> Sizing:
    """Figures for a config and a model.

    Raises:
        ConfigError: ``max_model_len`` over the model's limit, or an exact length over the context.
        CapacityError: a KV budget that cannot hold two pages, with the figures that would do.
    """
    limit = spec.max_position_embeddings
    if spec.rope.kind == "dynamic":
        limit = int(limit * spec.rope.factor)
    max_model_len = config.max_model_len or min(limit, DEFAULT_MAX_MODEL_LEN)
    if max_model_len > limit:
        raise ConfigError(f"max_model_len {max_model_len} is over the model's limit of {limit} tokens")
    page_bytes = spec.kv_bytes_per_token(element_bytes) * config.page_size
    pages_per_slot = -(-(max_model_len - 1) // config.page_size)
    pages = config.max_streams * pages_per_slot + 1
    if config.kv_cache_memory is not None:
        budget = parse_size(config.kv_cache_memory, "kv_cache_memory")
        pages = min(pages, budget // page_bytes)
        if pages < 2:
            raise CapacityError(
                f"kv_cache_memory of {budget} bytes is too small: two pages of {config.page_size} tokens are the least "
                f"and take {2 * page_bytes} bytes; one sequence of {max_model_len} tokens takes "
                f"{(pages_per_slot + 1) * page_bytes} bytes"
            )
    longest = max_model_len - 1  # a prompt must leave room for one new token
    too_long = [n for n in config.precapture_lengths if n > longest]
    if too_long:
        raise ConfigError(
            f"precapture_lengths has {too_long[0]} but prompts end at {longest} tokens: raise max_model_len"
        )
    buckets = tuple(dict.fromkeys(min(bucket, longest) for bucket in config.prefill_buckets))
    return Sizing(
        max_model_len=max_model_len,
        page_size=config.page_size,
        pages_per_slot=pages_per_slot,
        pages=pages,
        page_bytes=page_bytes,
        buckets=buckets,
        arena_tokens=max(buckets[-1], config.max_streams),
    )
