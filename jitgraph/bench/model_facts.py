"""The ``model`` object of a study: what the floors and the reader need to know about a model. No weights are read."""

from __future__ import annotations

from typing import Any

from jitgraph.bench.plan import Plan
from jitgraph.model.spec import ModelSpec

ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


def model_facts(plan: Plan, spec: ModelSpec) -> dict[str, Any]:
    """Figures of the plan's model."""
    element = ELEMENT_BYTES[plan.dtype]
    per_token = spec.prefill_flops(2) - spec.prefill_flops(1)
    return {
        "name": plan.model,
        "weights": plan.weights,
        "seed": plan.seed,
        "dtype": plan.dtype,
        "family": spec.family,
        "layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "vocab_size": spec.vocab_size,
        "max_model_len": plan.max_model_len,
        "linear_parameters": spec.linear_parameters(),
        "weight_bytes": spec.linear_parameters() * element,
        "kv_bytes_per_token": spec.kv_bytes_per_token(element),
        "flops_per_token": per_token,
        "flops_once": spec.prefill_flops(1) - per_token,
    }
