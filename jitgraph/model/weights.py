"""A model's tensors on one device, packed the way the decoder reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. Matrices are ``[out, in]``, row-major and contiguous."""

    input_norm: torch.Tensor  # [D]
    qkv: torch.Tensor  # [(Hq + 2 Hkv) Dh, D], q rows, then k, then v
    qkv_bias: torch.Tensor | None  # [(Hq + 2 Hkv) Dh]
    q_norm: torch.Tensor | None  # [Dh]
    k_norm: torch.Tensor | None  # [Dh]
    o: torch.Tensor  # [D, Hq Dh]
    o_bias: torch.Tensor | None  # [D]
    post_norm: torch.Tensor  # [D]
    gate_up: torch.Tensor  # [2 I, D], gate rows first
    gate_up_bias: torch.Tensor | None  # [2 I]
    down: torch.Tensor  # [D, I]
    down_bias: torch.Tensor | None  # [D]


@dataclass(frozen=True)
class ModelWeights:
    """All tensors of a decoder."""

    embedding: torch.Tensor  # [V, D]
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor  # [D]
    lm_head: torch.Tensor  # [V, D]; the embedding itself where tied

    def nbytes(self) -> int:
        """Bytes of distinct storage."""
        storages = {}
        for tensor in self.tensors():
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return sum(storages.values())

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor, layer by layer."""
        found = [self.embedding, self.final_norm, self.lm_head]
        for layer in self.layers:
            found += [value for value in vars(layer).values() if value is not None]
        return found
