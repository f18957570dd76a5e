"""One step's tensors, and the workspace its ops write into. Records only: ``graphs/buffers.py`` allocates them.

Letters as in ``ops/reference.py``. A step has T tokens and R rows that get a token: decode has T = R = rows of the
batch, a prompt chunk has R = 1. Every tensor is a view of a buffer sized for the largest step, so no step allocates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """What a step works on; written by the ``prepare_*`` ops on the device."""

    token_ids: torch.Tensor  # [T] int32
    positions: torch.Tensor  # [T] int32
    token_slot: torch.Tensor  # [T] int32, the dummy slot for padding
    sample_index: torch.Tensor  # [R] int32, the token whose logits row r wants
    sample_slot: torch.Tensor  # [R] int32, the slot that gets the token, or the dummy
    sample_position: torch.Tensor  # [R] int32, the position of the token to be drawn


@dataclass(frozen=True)
class Workspace:
    """Where the ops of a step write; every element is written before it is read, ``arrivals`` apart."""

    hidden: torch.Tensor  # [T, D]
    residual: torch.Tensor  # [T, D]
    normed: torch.Tensor  # [T, D]
    qkv: torch.Tensor  # [T, (Hq + 2 Hkv) Dh]
    q: torch.Tensor  # [T, Hq, Dh]
    attended: torch.Tensor  # [T, Hq, Dh]
    gate_up: torch.Tensor  # [T, 2 I]
    activated: torch.Tensor  # [T, I]
    partial: torch.Tensor  # [R, Hq, splits, Dh] float32
    partial_lse: torch.Tensor  # [R, Hq, splits] float32
    arrivals: torch.Tensor  # [R, Hkv] int32, zeros between any two ops
    split_sums: torch.Tensor  # [words] float32, shared by all sizes
    split_arrivals: torch.Tensor  # [words] int32, zero between launches, shared by all sizes
    last_hidden: torch.Tensor  # [R, D]
    last_normed: torch.Tensor  # [R, D]
    logits: torch.Tensor  # [R, V]
    scratch: torch.Tensor  # [R, sampling words] float32
    tokens: torch.Tensor  # [R] int32
    logprobs: torch.Tensor  # [R] float32
    top_ids: torch.Tensor  # [R, MAX_LOGPROBS] int32
    top_logprobs: torch.Tensor  # [R, MAX_LOGPROBS] float32
