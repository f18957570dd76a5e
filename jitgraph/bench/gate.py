"""The correctness gate: reference first tokens from transformers, and how certain each of them is.

``compute_references`` runs once, in a process of its own, before any case. Two correct engines round differently, so a
first token is compared only where the reference's best logit leads the second by more than the rounding error. That
error is the larger of two estimates, both of the difference between two logits:

- ``eps * sqrt(layers) * max|logit|``: one rounding of the result's size in each layer, added as a random walk;
- twice the largest change in any logit when the reference itself computes the prompt another way (first half and second
  half as two calls through its cache, so that every matrix product has another shape).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from jitgraph.bench.plan import Plan
from jitgraph.errors import ConfigError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Reference:
    """What the reference says about one prompt."""

    token_id: int
    gap: float
    """How far the best logit leads the second."""
    error: float
    """Rounding error of that lead."""

    @property
    def certain(self) -> bool:
        """Whether another correct engine must choose the same token."""
        return self.gap > self.error


def mismatches(reference: Mapping[int, Reference], tokens: Mapping[int, int | None]) -> tuple[list[str], list[str]]:
    """What is wrong, and what could be checked: one phrase a prompt length. A case that tells no id is not checked."""
    wrong, checked = [], []
    for length, token_id in tokens.items():
        known = reference[length]
        if not known.certain or token_id is None:
            continue
        checked.append(str(length))
        if token_id != known.token_id:
            wrong.append(
                f"at {length} tokens the first token is {token_id}, the reference's {known.token_id} "
                f"(its lead {known.gap:.4g} exceeds the rounding error {known.error:.4g})"
            )
    return wrong, checked


def references_to_json(references: Mapping[int, Reference]) -> dict[str, Any]:
    """As a JSON object."""
    return {str(length): asdict(reference) for length, reference in references.items()}


def references_from_json(record: Mapping[str, Any]) -> dict[int, Reference]:
    """Back from ``references_to_json``."""
    return {int(length): Reference(**fields) for length, fields in record.items()}


def compute_references(
    plan: Plan, prompts: Mapping[int, list[int]], progress: Callable[[int, int], None]
) -> dict[int, Reference]:
    """Reference first tokens of every prompt; loads the model through transformers.

    Raises:
        ConfigError: transformers is not installed.
    """
    import torch

    from jitgraph.bench.hf_model import load_hf_model

    model = load_hf_model(plan)
    layers = int(model.config.get_text_config().num_hidden_layers)
    found = {}
    with torch.inference_mode():
        for index, (length, ids) in enumerate(prompts.items()):
            progress(index, len(prompts))
            found[length] = _reference(model, torch.tensor([ids], device=plan.device), layers)
    return found


def _reference(model: Any, ids: torch.Tensor, layers: int) -> Reference:
    """``ids``: ``[1, n]``."""
    import torch

    last = model(ids, use_cache=False, logits_to_keep=1).logits[0, -1]
    eps = torch.finfo(last.dtype).eps
    logits = last.float()
    if not bool(logits.isfinite().all()):
        raise ConfigError("the reference's logits are not finite: use another dtype, or mend the checkpoint")
    best = logits.topk(2)
    error = eps * layers**0.5 * float(logits.abs().max())
    half = ids.shape[1] // 2
    if half:
        past = model(ids[:, :half], use_cache=True).past_key_values
        other = model(ids[:, half:], past_key_values=past, use_cache=True, logits_to_keep=1).logits[0, -1].float()
        error = max(error, 2 * float((other - logits).abs().max()))
    return Reference(int(best.indices[0]), float(best.values[0] - best.values[1]), error)
