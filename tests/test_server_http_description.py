"""The server against its own description: schemathesis makes requests from it and judges the answers by it."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import load_all_checks
from server_fakes import PATIENCE_S, FakeEngine, Served, served

from jitgraph.server.openapi import description

load_all_checks()
CHECKS = [
    schemathesis.checks.CHECKS.get_one(name)
    for name in (
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
    )
]
SCHEMA = schemathesis.openapi.from_dict(description())


@pytest.fixture(scope="module")
def running() -> Any:
    async def scrape(_: str) -> tuple[bytes, str]:
        return b"x 1\n", "text/plain"

    with served(FakeEngine(text="ok"), scrape=scrape) as found:
        yield found


@SCHEMA.parametrize()
@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
)
def test_the_server_keeps_to_its_description(case: Any, running: Served) -> None:
    response = case.call(base_url=running.url, timeout=PATIENCE_S)
    case.validate_response(response, checks=CHECKS)
