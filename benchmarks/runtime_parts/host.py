"""Part *host*: what a decode step costs the host in each way to put kernels and graphs together.

The last part of a process: the profiler that counts launches slows down all that comes after it.
"""

from __future__ import annotations

import importlib
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from jitgraph.bench.ablation import HOST_US
from jitgraph.bench.attribution import host_time, launch_figures
from jitgraph.bench.cases.common import EngineCase
from jitgraph.bench.plan import ABLATION_COLUMNS
from runtime_parts.lab import Lab, Result

LOOPS, STEPS = "hybrid", "hybrid-steps"
"""The engine as users get it, a lone stream in loops on the device; and with each step launched by the host."""
PROMPT_TOKENS = 100


def host(lab: Lab) -> Result:
    """The benchmark's engine cases, all loaded at once: first everybody's time, then everybody's launches."""
    lab.close()
    plan = replace(lab.plan, prompt_lengths=(PROMPT_TOKENS,))
    prompt = lab.ids(PROMPT_TOKENS)
    found: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        cases: dict[str, EngineCase] = {}
        for name in (*ABLATION_COLUMNS, STEPS):
            case = cases[name] = _case(name)
            stack.callback(case.close)
            case.load(plan)
        for name, case in cases.items():
            host_time(case._llm, prompt, 8)
            tokens = lab.scale.host_tokens if name in (LOOPS, STEPS) else lab.scale.host_tokens // 5
            took = host_time(case._llm, prompt, tokens)
            found[name] = {HOST_US: took.step_us, "host_us_per_step_with_text": took.client_us, "tokens": took.tokens}
            lab.say(f"  {name}: {took.step_us:.1f} µs of the host a step")
        for name, case in cases.items():
            found[name] |= launch_figures(case._llm, prompt, lab.cuda)
            lab.say(f"  {name}: {found[name]['launches_per_step']:.3f} launches a step")
        settings = {name: case.describe() for name, case in cases.items()}
    return Result(samples={"cases": found}, conditions={"as_users_get_it": LOOPS, "settings": settings})


def _case(name: str) -> EngineCase:
    """A case of the benchmark, not loaded yet."""
    if name == STEPS:
        return EngineCase(ops="jit", graphs=True, fused_sampling=True, device_loop=False)
    case: EngineCase = importlib.import_module("jitgraph.bench.cases." + name.replace("-", "_")).make()
    case.isolated = False  # the host's time is taken inside the engine
    return case
