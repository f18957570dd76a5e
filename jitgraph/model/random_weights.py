"""Seeded random weights, made on the device they are for.

A tensor depends on the seed, its own name and shape and the kind of device alone: not on the order, the dtype asked for
(up to rounding) or the other tensors. Standard deviations follow GPT-2: 0.02, and 0.02 / sqrt(2 L) for the matrices
that write into the residual stream, which keeps activations of deep models inside float16.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch

from jitgraph.model.packing import hf_shapes
from jitgraph.model.spec import ModelSpec

STD = 0.02
NORM_STD = 0.01
_CHUNK = 2**24
"""Elements drawn at a time: the float32 draft of a big matrix never exists as a whole."""


def iter_random_tensors(
    spec: ModelSpec, seed: int, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, tensor) of every tensor of a checkpoint, one at a time."""
    for name, shape in hf_shapes(spec).items():
        yield name, random_tensor(name, shape, spec.num_layers, seed, device, dtype)


def random_state_dict(spec: ModelSpec, seed: int, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All of ``iter_random_tensors`` for ``load_state_dict``; a tied ``lm_head.weight`` is the embedding itself."""
    state = dict(iter_random_tensors(spec, seed, device, dtype))
    if spec.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def random_tensor(
    name: str, shape: tuple[int, ...], num_layers: int, seed: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """One tensor: normal(0, std) drawn in float32 and rounded to ``dtype``; norms are one plus a little noise."""
    mean, std = 0.0, STD
    if name.endswith("norm.weight"):
        mean, std = 1.0, NORM_STD
    elif name.endswith(("o_proj.weight", "down_proj.weight")):
        std = STD / math.sqrt(2 * num_layers)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    result = torch.empty(shape, dtype=dtype, device=device)
    flat = result.view(-1)
    draft = torch.empty(min(_CHUNK, flat.numel()), dtype=torch.float32, device=device)
    for start in range(0, flat.numel(), _CHUNK):
        piece = flat[start : start + _CHUNK]
        piece.copy_(draft[: piece.numel()].normal_(mean, std, generator=generator))
    return result
