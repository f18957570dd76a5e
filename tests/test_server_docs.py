"""``docs/server.md`` names what there is: options, endpoints, fields, caps, codes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from server_fakes import FakeBackend, make_site
from starlette.routing import Route
from typer.main import get_command

from jitgraph.cli import app
from jitgraph.server.listen import KEEP_ALIVE_S
from jitgraph.server.openai.schema import ChatRequest, CompletionRequest, StructuredOutputs
from jitgraph.server.page import FILE_PATHS, page_routes
from jitgraph.server.serve import ServeOptions
from jitgraph.server.settings import ServerSettings
from jitgraph.server.supervisor_policy import Limits
from jitgraph.types import MAX_LOGIT_BIAS

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
FLAT = " ".join(TEXT.split())


def section(title: str) -> str:
    return TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    """The rows of the section's table, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def serve_params() -> list[Any]:
    command: Any = get_command(app)
    return [param for param in command.commands["serve"].params if param.opts != ["model"]]


def test_every_option_stands_there_with_its_default() -> None:
    told: dict[str, str] = {}
    for names, default, _ in rows("Options"):
        for i, name in enumerate(re.findall(r"`(--[a-z-]+)`", names)):
            shown = default.split(", ")
            told[name] = shown[i] if len(shown) > i and "max" not in name else default
    params = serve_params()
    assert set(told) == {name for param in params for name in (*param.opts, *param.secondary_opts)}
    for param in params:
        shown = told[param.opts[0]].strip("`")
        if isinstance(param.default, bool):
            assert shown == ("on" if param.default else "off"), param.opts
        elif isinstance(param.default, (int, float)):
            assert float(shown) == param.default, param.opts
        elif param.default:
            assert shown == param.default, param.opts
    named = set(re.findall(r"(--[a-z]+(?:-[a-z]+)*)", TEXT))
    assert named <= set(told)


def test_every_endpoint_stands_there() -> None:
    async def scrape(_: str) -> tuple[bytes, str]:
        return b"", ""

    routes = [route for route in make_site(scrape=scrape).app.routes if isinstance(route, Route)]
    routes += page_routes(FakeBackend(None))  # type: ignore[arg-type]
    there = {
        f"{method} {route.path.replace(':path', '')}"
        for route in routes
        for method in (route.methods or set()) - {"HEAD"}
        if route.path == "/" or route.path not in FILE_PATHS
    }
    assert set(re.findall(r"`((?:GET|POST) [^`]+)`", section("Endpoints"))) == there


def test_every_field_stands_there() -> None:
    told = set(re.findall(r"`([a-z_]+)`", section("What works of OpenAI's interface")))
    fields = {*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__}
    assert fields - told - {"modalities"} == set()
    unsupported = re.findall(r"(\w+): Unsupported", (ROOT / "jitgraph/server/openai/schema.py").read_text())
    refused = TEXT.partition("**Refused by name**")[2]
    assert all(f"`{name}`" in refused for name in unsupported if name in fields)
    assert set(StructuredOutputs.__struct_fields__) <= told


def test_figures_are_those_of_the_code() -> None:
    caps, limits = ServerSettings(), Limits()
    for said in (
        f"`n` (to {caps.max_n})",
        f"`stop` (to {caps.max_stops})",
        f"`logit_bias` (to {MAX_LOGIT_BIAS} entries)",
        f"`top_logprobs` (to {caps.max_logprobs})",
        f"`logprobs` (to {caps.max_logprobs})",
        f"or a list of either, to {caps.max_prompts})",
        f"Body over {caps.max_body_bytes >> 20} MiB, not JSON, headers over {caps.max_header_bytes >> 10} KiB",
        f"Connections are kept for {KEEP_ALIVE_S} s",
        f"up to {limits.restarts} times in {limits.window_s / 60:g} minutes",
    ):
        assert said in FLAT, said
    assert caps.send_timeout_s == 60 and "does not read for a minute" in FLAT


def test_every_code_is_one_of_the_code() -> None:
    source = "".join(path.read_text() for path in (ROOT / "jitgraph" / "server").rglob("*.py"))
    codes = {code for _, cell, _ in rows("Errors") for code in re.findall(r"`(\w+)`", cell)}
    assert len(codes) > 15
    assert [code for code in sorted(codes) if f'"{code}"' not in source] == []


def test_metrics_carry_the_name_under_which_the_model_is_served() -> None:
    assert ServeOptions("folder/x", ()).label == "folder/x"
    named = ServerSettings(served_names=("short", "long"))
    assert ServeOptions("folder/x", (), settings=named).label == "short"
