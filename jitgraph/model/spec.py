"""What a model is, in definite figures: read from a Hugging Face ``config.json``, never from its weights. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding: frequencies theta^(-2i/Dh) and how they are stretched for longer contexts."""

    kind: str = "default"
    """``default``, ``linear``, ``dynamic``, ``llama3`` or ``yarn``."""
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int = 0
    """Context the frequencies were trained for (dynamic, llama3, yarn)."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class ModelSpec:
    """A decoder of the native families."""

    family: str
    """``llama``, ``mistral``, ``qwen2`` or ``qwen3``."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeSpec
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_embeddings: bool
    layer_windows: tuple[int, ...]
    """Sliding window of each layer in tokens; 0 sees everything."""
    dtype: str
    """The checkpoint's own: ``float16``, ``bfloat16`` or ``float32``."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        return self.q_size + 2 * self.kv_size

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes that one cached token takes over all layers."""
        return 2 * self.num_layers * self.kv_size * element_bytes

    def linear_parameters(self) -> int:
        """Elements of all matrices that a decode step streams (embedding table excluded, LM head included)."""
        layer = self.hidden_size * (self.qkv_size + self.q_size + 3 * self.intermediate_size)
        return self.num_layers * layer + self.vocab_size * self.hidden_size

    def prefill_flops(self, tokens: int) -> int:
        """Multiply-adds times two of the matrix products of a prompt (LM head for its last token alone)."""
        layer = self.hidden_size * (self.qkv_size + self.q_size + 3 * self.intermediate_size)
        return 2 * (tokens * self.num_layers * layer + self.vocab_size * self.hidden_size)
