"""Turns wishes into figures: context length, pages, arena sizes. Pure arithmetic over a spec and a config."""

from __future__ import annotations

from dataclasses import dataclass

from jitgraph.config import EngineConfig, parse_size
from jitgraph.errors import CapacityError, ConfigError
from jitgraph.lengths import parse_lengths
from jitgraph.model.decoder import KVWindow
from jitgraph.model.spec import ModelSpec
from jitgraph.types import MAX_TOKENS

DEFAULT_MAX_MODEL_LEN = 4096


@dataclass(frozen=True)
class Sizing:
    """Definite figures of one engine."""

    max_model_len: int
    """Tokens of prompt and output at which a sequence ends."""
    page_size: int
    pages_per_slot: int
    pages: int
    """Pages of the cache, the dummy page included."""
    page_bytes: int
    buckets: tuple[int, ...]
    """Prompt buckets that the context can fill, ascending; the last is the chunk of longer prompts."""
    exact_lengths: tuple[int, ...]
    """Prompt lengths that get a graph of their own at start."""
    arena_tokens: int
    """Most tokens of one step."""
    running_chunk_tokens: int
    """Most prompt tokens of one step while other streams decode: a bucket."""
    window: KVWindow | None = None
    """Where the KV cache rolls."""

    @property
    def chunk_tokens(self) -> int:
        """Most prompt tokens of one step."""
        return self.buckets[-1]

    @property
    def positions(self) -> int:
        """Rotary positions that can occur."""
        return self.max_model_len if self.window is None else self.window.cells

    def pages_for(self, tokens: int) -> int:
        """Pages of a sequence that ends at ``tokens``; its last token is never fed, so never cached."""
        cached = tokens - 1 if self.window is None else min(tokens - 1, self.window.cells)
        return max(1, -(-cached // self.page_size))


def resolve_sizing(config: EngineConfig, spec: ModelSpec, element_bytes: int) -> Sizing:
    """Figures for a config and a model.

    Raises:
        ConfigError: ``max_model_len`` or ``kv_window`` over the model's limit, an exact length over the context, or a
            model that a rolling window does not suit.
        CapacityError: a KV budget that cannot hold two pages, with the figures that would do.
    """
    limit = spec.max_position_embeddings
    if spec.rope.kind == "dynamic":
        limit = int(limit * spec.rope.factor)
    window = _window(config, spec, limit)
    max_model_len = MAX_TOKENS if window else config.max_model_len or min(limit, DEFAULT_MAX_MODEL_LEN)
    if window is None and max_model_len > limit:
        raise ConfigError(f"max_model_len {max_model_len} is over the model's limit of {limit} tokens")
    page_bytes = spec.kv_bytes_per_token(element_bytes) * config.page_size
    cached = window.cells if window else max_model_len - 1
    pages_per_slot = -(-cached // config.page_size)
    pages = config.max_streams * pages_per_slot + 1
    if config.kv_cache_memory is not None:
        budget = parse_size(config.kv_cache_memory, "kv_cache_memory")
        pages = min(pages, budget // page_bytes)
        if pages < 2:
            raise CapacityError(
                f"kv_cache_memory of {budget} bytes is too small: two pages of {config.page_size} tokens are the least "
                f"and take {2 * page_bytes} bytes; one sequence of {cached} tokens takes "
                f"{(pages_per_slot + 1) * page_bytes} bytes"
            )
    # A prompt must leave room for one new token, and a chunk must not pass the window it is read through.
    longest = window.recent if window else max_model_len - 1
    buckets = tuple(dict.fromkeys(min(bucket, longest) for bucket in config.prefill_buckets))
    return Sizing(
        max_model_len=max_model_len,
        page_size=config.page_size,
        pages_per_slot=pages_per_slot,
        pages=pages,
        page_bytes=page_bytes,
        buckets=buckets,
        exact_lengths=parse_lengths(config.precapture_lengths, buckets, "precapture_lengths"),
        arena_tokens=max(buckets[-1], config.max_streams),
        running_chunk_tokens=max((b for b in buckets if b <= config.prefill_chunk_running), default=buckets[0]),
        window=window,
    )


def _window(config: EngineConfig, spec: ModelSpec, limit: int) -> KVWindow | None:
    if config.kv_window is None:
        return None
    if config.kv_window > limit:
        raise ConfigError(f"kv_window {config.kv_window} is over the model's limit of {limit} tokens")
    if any(spec.layer_windows):
        raise ConfigError(f"kv_window does not go together with this model's own sliding window ({spec.family})")
    if spec.rope.kind == "dynamic":
        raise ConfigError("kv_window does not go together with dynamic RoPE scaling, which follows the whole length")
    return KVWindow(config.kv_sinks, config.kv_window - config.kv_sinks)
