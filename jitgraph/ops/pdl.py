"""Programmatic dependent launch (PDL): a kernel may be set up while the one in front of it still runs.

A kernel launched so begins early and must wait (``enter``) before it touches anything that another kernel writes; then
all that came before is done and visible. Every kernel of a step that is launched so waits, so completion holds down the
whole chain. Hopper and newer; elsewhere a launch is an ordinary one. The bits are the same with and without.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from jitgraph.jit.target import target_arch

_FIRST_ARCH = 90
PDL_TOKENS = 160
"""Tokens of a step up to which it pays behind a matrix product. Beyond, a kernel that begins early takes room from the
product that still runs: a step of 200 tokens is 1 % slower with it, one of 50 is 1.5 % faster (H200)."""


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def enter(PDL: tl.constexpr):  # type: ignore[no-untyped-def]
    """The wait, and the word that the next kernel may be set up. The interpreter knows neither: PDL is 0 there."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def pdl_options(tokens: int = 1) -> dict[str, Any]:
    """What a wrapper passes to a kernel that has the constant PDL, in a step of ``tokens`` tokens: that constant, and
    the launch's attribute."""
    if tokens <= PDL_TOKENS and target_arch() >= _FIRST_ARCH:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


def pdl_options_before(tokens: int) -> dict[str, Any]:
    """The same for a kernel whose successor is always launched so: it says when that one may be set up, whether or not
    it follows a matrix product that it had better leave alone."""
    if target_arch() >= _FIRST_ARCH:
        return {"PDL": True, "launch_pdl": tokens <= PDL_TOKENS}
    return {"PDL": False}
