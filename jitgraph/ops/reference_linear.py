"""Plain PyTorch meaning of the matrix products with what stands around them: part of ``reference.py``, same rules and
letters.

The twins may fuse: one of them takes the RMSNorm, the residual or the activation into its product. So the residual
has a contract of its own: ``linear_add`` returns what is still to be added to it, and the next norm adds that.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import NamedTuple

import torch

from jitgraph.ops.reference import add_rms_norm, rms_norm, silu_mul


class Use(Enum):
    """What becomes of a product."""

    PLAIN = ""
    ADD = "+"
    """It is added to what the output held."""
    GATED = "g"
    """Its halves are a gate and what the gate lets through: the output is silu(gate) * up."""


class ProductShape(NamedTuple):
    """The products ``[T, K] @ [N, K].T`` of a model, added to their output or not."""

    n: int
    k: int
    add: bool

    @property
    def use(self) -> Use:
        """What becomes of them, as far as the library is concerned."""
        return Use.ADD if self.add else Use.PLAIN


class SplitScratch(NamedTuple):
    """Workspace of ops whose sums are split over programs: products, and attention of a chunk behind a long context.

    ``partial``: float32, at least ``linear.partial_words`` and ``prefill_fused.partial_words``. ``arrivals``: int32,
    zero between launches.
    """

    partial: torch.Tensor
    arrivals: torch.Tensor


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, scratch: SplitScratch
) -> None:
    """out = x @ weight.T (+ bias); x ``[T, K]``, weight ``[N, K]``, bias ``[N]``, out ``[T, N]``."""
    del scratch
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def row_by_row(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, scratch: SplitScratch
) -> None:
    """``linear`` one row at a time, each in tensors of its own, so that the bits of a row depend neither on how many
    there are nor on where it lies: libraries also choose by alignment."""
    for row in range(x.shape[0]):
        single = torch.empty_like(out[row : row + 1])
        linear(x[row : row + 1].clone(), weight, bias, single, scratch)
        out[row] = single[0]


Product = Callable[..., None]
"""``linear`` or a twin of it."""


def norm_linear(
    pending: torch.Tensor | None,
    residual: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    normed: torch.Tensor,
    out: torch.Tensor,
    scratch: SplitScratch,
    product: Product = linear,
) -> None:
    """residual += pending, if any; out = rms_norm(residual) @ weight.T (+ bias).

    pending, residual, normed ``[T, D]``, norm ``[D]``, weight ``[N, D]``, out ``[T, N]``. ``normed`` is workspace.
    """
    _norm(pending, residual, norm, eps, normed)
    product(normed, weight, bias, out, scratch)


def linear_add(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    hidden: torch.Tensor,
    residual: torch.Tensor,
    scratch: SplitScratch,
    product: Product = linear,
) -> torch.Tensor | None:
    """residual += x @ weight.T (+ bias), now or at the next norm: returns what is still to be added, or None.

    x ``[T, K]``, weight ``[D, K]``, hidden (workspace) and residual ``[T, D]``.
    """
    del residual
    product(x, weight, bias, hidden, scratch)
    return hidden


def norm_gated(
    pending: torch.Tensor | None,
    residual: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    normed: torch.Tensor,
    gate_up: torch.Tensor,
    activated: torch.Tensor,
    scratch: SplitScratch,
    product: Product = linear,
) -> None:
    """residual += pending, if any; activated = silu(gate) * up, [gate, up] = rms_norm(residual) @ weight.T (+ bias).

    weight ``[2 I, D]`` (gate first), bias ``[2 I]``, activated ``[T, I]``; normed ``[T, D]`` and gate_up ``[T, 2 I]``
    are workspace.
    """
    norm_linear(pending, residual, norm, eps, weight, bias, normed, gate_up, scratch, product)
    silu_mul(gate_up, activated)


def _norm(
    pending: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
) -> None:
    if pending is None:
        rms_norm(residual, weight, eps, out)
    else:
        add_rms_norm(pending, residual, weight, eps, out)


invariant_norm_linear = partial(norm_linear, product=row_by_row)
invariant_linear_add = partial(linear_add, product=row_by_row)
invariant_norm_gated = partial(norm_gated, product=row_by_row)
