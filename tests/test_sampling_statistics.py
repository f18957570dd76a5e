"""Draws follow the distribution that the parameters ask for: chi-square over 100,000 draws with fixed seeds.

The expected probabilities come from plain loops. Each condition is also held against the softmax of the unchanged
logits, which it must refute: a test that cannot tell the two apart would say nothing.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from ops_cases import draw_count, draws
from test_ops_penalties import plainly

from jitgraph.ops import reference_sampling as reference
from jitgraph.ops import sampling
from jitgraph.types import SamplingParams

LOGITS = (0.0, 1.0, -1.0, 0.5, 2.0, -2.0, 0.25, 1.5, -0.5, 1.0, 0.75, -3.0)
SEQUENCE = ([4, 1, 4, 2], [7, 7, 7, 3, 4, 5])
CONDITIONS = {
    "temperature": SamplingParams(temperature=0.5),
    "top-k and top-p": SamplingParams(temperature=0.9, top_k=8, top_p=0.8),
    "min-p": SamplingParams(temperature=1.2, min_p=0.4),
    "penalties and bias": SamplingParams(
        temperature=1.1,
        repetition_penalty=1.4,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        logit_bias={0: 1.5, 9: -100.0, 11: 2.0},
    ),
    "everything": SamplingParams(
        temperature=0.8,
        top_k=7,
        top_p=0.9,
        min_p=0.02,
        repetition_penalty=0.8,
        presence_penalty=-0.5,
        logit_bias={6: 1},
    ),
}


def expected(params: SamplingParams) -> list[float]:
    """Probability of each id, by the book."""
    x = [value / params.temperature for value in plainly(torch.tensor(LOGITS), params, SEQUENCE).tolist()]
    ranked = sorted(range(len(x)), key=lambda i: -x[i])
    kept = ranked[: params.top_k or len(x)]
    mass = [math.exp(x[i] - x[ranked[0]]) for i in kept]
    count = next(n for n in range(1, len(kept) + 1) if sum(mass[:n]) >= params.top_p * sum(mass) - 1e-12)
    kept = [i for i in kept[:count] if x[i] >= x[ranked[0]] + math.log(params.min_p or 1e-300)]
    weight = {i: math.exp(x[i] - x[ranked[0]]) for i in kept}
    return [weight.get(i, 0.0) / sum(weight.values()) for i in range(len(x))]


def chi_square(tokens: torch.Tensor, probability: list[float]) -> tuple[float, float]:
    """(statistic, its 99.9 % point by Wilson and Hilferty's approximation); infinite where an impossible id came."""
    counts = torch.bincount(tokens.long().cpu(), minlength=len(probability)).tolist()
    possible = [(n, p * tokens.numel()) for n, p in zip(counts, probability, strict=True) if p > 1e-12]
    impossible = any(n for n, p in zip(counts, probability, strict=True) if p <= 1e-12)
    freedom = len(possible) - 1
    spread = 2 / (9 * freedom)
    limit = freedom * (1 - spread + 3.09 * math.sqrt(spread)) ** 3
    return math.inf if impossible else sum((n - e) ** 2 / e for n, e in possible), limit


def assert_follows(tokens: torch.Tensor, params: SamplingParams) -> None:
    statistic, limit = chi_square(tokens, expected(params))
    assert statistic < limit
    wrong, limit = chi_square(tokens, torch.softmax(torch.tensor(LOGITS), -1).tolist())
    assert wrong > limit


@pytest.mark.parametrize("name", CONDITIONS)
def test_reference_distribution(device: torch.device, name: str) -> None:
    row = torch.tensor(LOGITS, device=device)
    assert_follows(draws(reference, row, CONDITIONS[name], 100_000, sequence=SEQUENCE), CONDITIONS[name])


@pytest.mark.parametrize("name", CONDITIONS)
def test_kernel_distribution(device: torch.device, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The same of the kernel, with as many draws as its interpreter bears."""
    row = torch.tensor(LOGITS, device=device)
    if device.type == "cpu":
        monkeypatch.setattr(sampling, "_PASSES", 1)  # quicker, and the same: see test_ops_filters.py
    count = draw_count(device, 150, 100_000)
    assert_follows(draws(sampling, row, CONDITIONS[name], count, seed=8, sequence=SEQUENCE), CONDITIONS[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONDITIONS)
def test_compiled_distribution_in_a_large_vocabulary(device: torch.device, name: str) -> None:
    """100,000 draws of the compiled kernel where the likely ids stand far apart, in blocks of their own."""
    row = torch.full((12 * 1500,), -200.0, device=device)
    row[::1500] = torch.tensor(LOGITS, device=device)
    params = CONDITIONS[name]
    moved = {token * 1500: bias for token, bias in params.bias_entries}
    params = dataclasses.replace(params, logit_bias=moved)
    sequence = ([1500 * i for i in SEQUENCE[0]], [1500 * i for i in SEQUENCE[1]])
    tokens = draws(sampling, row, params, 100_000, seed=9, sequence=sequence)
    assert (tokens % 1500 == 0).all()
    assert_follows(tokens // 1500, CONDITIONS[name])
