"""The rotary table: float32 cosines and sines of every position, by the formulas of transformers' rope types.

Made once per engine on the CPU, whose arithmetic is the same on every machine, and then moved: the bits of the table do
not depend on the device.

Sources: linear: Chen et al., "Extending Context Window of Large Language Models via Positional Interpolation" (2023);
yarn: Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models" (2023); llama3: the Llama 3.1
reference implementation; dynamic: NTK-aware scaling as transformers defines it.
"""

from __future__ import annotations

import math

import torch

from jitgraph.model.spec import ModelSpec, RopeSpec
from jitgraph.ops.reference import Rope


def build_rope(spec: ModelSpec, max_positions: int, device: torch.device) -> Rope:
    """The table ``[max_positions, Dh]`` and what dynamic scaling needs; the attention factor is in the table.

    The table of a dynamic model holds the unstretched frequencies: the op stretches them by each sequence's length.
    """
    rope = spec.rope
    angle = torch.outer(torch.arange(max_positions, dtype=torch.float32), inverse_frequencies(rope, spec.head_dim))
    factor = attention_factor(rope)
    table = torch.cat((angle.cos() * factor, angle.sin() * factor), dim=-1).to(device)
    if rope.kind == "dynamic":
        return Rope(table, rope.original_max_position, rope.theta, rope.factor)
    return Rope(table)


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """float32 ``[Dh / 2]`` on the CPU: radians per position of each pair of the head."""
    powers = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    plain: torch.Tensor = 1.0 / powers
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        return _yarn(rope, powers, head_dim)
    return plain


def attention_factor(rope: RopeSpec) -> float:
    """What cosines and sines are multiplied by: 1 except for yarn."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _temperature(rope.factor, rope.mscale) / _temperature(rope.factor, rope.mscale_all_dim)
    return _temperature(rope.factor, 1.0)


def _temperature(scale: float, mscale: float) -> float:
    return 1.0 if scale <= 1.0 else 0.1 * mscale * math.log(scale) + 1.0


def _llama3(rope: RopeSpec, plain: torch.Tensor) -> torch.Tensor:
    """Long waves are slowed by the factor, short ones kept, those between blended."""
    low, high, original = rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position
    wavelength = 2 * math.pi / plain
    stretched = torch.where(wavelength > original / low, plain / rope.factor, plain)
    share = (original / wavelength - low) / (high - low)
    blended = (1 - share) * stretched / rope.factor + share * stretched
    between = ~(wavelength < original / high) & ~(wavelength > original / low)
    return torch.where(between, blended, stretched)


def _yarn(rope: RopeSpec, powers: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Fast dimensions keep their frequency, slow ones are interpolated, a linear ramp lies between."""

    def dimension(rotations: float) -> float:
        """The dimension that turns this often over the trained context."""
        turns = rope.original_max_position / (rotations * 2 * math.pi)
        return (head_dim * math.log(turns)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # the ramp needs a width
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (rope.factor * powers) * (1 - kept) + 1.0 / powers * kept
