"""The model of a plan as transformers builds it, with the very weights that the engine has. Torch only when called."""

from __future__ import annotations

import importlib.util
from typing import Any

from jitgraph.bench.cases.common import CaseUnavailable
from jitgraph.bench.plan import Plan


def load_hf_model(plan: Plan) -> Any:
    """``AutoModelForCausalLM`` on the plan's device, SDPA attention, no sampling settings and no EOS of its own.

    Raises:
        CaseUnavailable: transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise CaseUnavailable("not installed", "not installed: pip install 'jitgraph[bench]' brings transformers")
    import transformers

    from jitgraph.model.device import torch_dtype
    from jitgraph.model.loader import find_model

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    source = find_model(plan.model, weights=plan.weights)
    dtype = torch_dtype(plan.dtype)
    if plan.weights == "random" or source.folder is None:
        model = _random_model(source, plan, dtype)
    else:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source.folder, dtype=dtype, attn_implementation="sdpa"
        )
        model = loaded.to(plan.device)
    settings = model.generation_config
    settings.eos_token_id = None  # every request runs to its last token, in every case
    settings.do_sample, settings.temperature, settings.top_k, settings.top_p = False, None, None, None
    return model.eval().requires_grad_(False)


def _random_model(source: Any, plan: Plan, dtype: Any) -> Any:
    """The config's architecture with seeded random weights, made on the device: no second copy, no host copy."""
    import torch
    import transformers

    from jitgraph.model.hf import random_model
    from jitgraph.model.hf_spec import ForeignSpec, foreign_config
    from jitgraph.model.random_weights import random_state_dict

    if isinstance(source.spec, ForeignSpec):
        made = foreign_config(source.config, source.name)
        return random_model(made, torch.device(plan.device), dtype, plan.seed)
    settings = {
        name: value for name, value in source.config.items() if name not in ("model_type", "architectures", "dtype")
    }
    config = transformers.AutoConfig.for_model(source.config["model_type"], **settings)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    state = random_state_dict(source.spec, plan.seed, torch.device(plan.device), dtype)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    # Rotary tables are buffers outside the state dict, so they are still on the meta device: built anew.
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            model.set_submodule(name, type(module)(config=model.config).to(plan.device))
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not left, f"without values: {left}"
    return model
