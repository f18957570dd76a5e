"""Peer: any server that speaks OpenAI's completions, where ``--url openai=URL`` says (``cases/url.py``)."""

from __future__ import annotations

from jitgraph.bench.cases.common import Case, CaseUnavailable

HOW_TO_NAME = "no URL: pass --url openai=URL, the address of a server that speaks OpenAI's completions"


def make() -> Case:
    """Never a case: without a URL there is no server.

    Raises:
        CaseUnavailable: always.
    """
    raise CaseUnavailable("no URL", HOW_TO_NAME)
