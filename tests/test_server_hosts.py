"""Names under which a server without a key may be asked: what keeps pages that moved their own name here outside."""

from __future__ import annotations

from dataclasses import replace

import pytest
from server_fakes import ask, chat, make_site, served
from typer.testing import CliRunner

from jitgraph.server.hosts import Hosts
from jitgraph.server.openai.errors import ApiError
from jitgraph.server.serve import ServeOptions
from jitgraph.server.settings import ServerSettings

OWN = ["localhost", "LOCALHOST:8000", "localhost.", "127.0.0.1:80", "127.8.9.1", "[::1]:8000", "[::1]", " localhost "]
FOREIGN = [
    *("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "127.0.0.1@evil"),
    *("192.168.1.1", "0.0.0.0", "[::2]", "[::1", "", ":8000", "localhost\x00", "xn--80ak6aa92e"),
]


def test_a_server_that_needs_no_key_is_asked_by_its_own_names_alone() -> None:
    site = make_site(allowed_hosts=("127.0.0.1", "Box.local"))
    for host in [*OWN, "box.local", "BOX.LOCAL:8000"]:
        assert ask(site, "/v1/models", host=host).status == 200, host
    for host in FOREIGN:
        if host == "[::1":
            continue  # no browser sends it, and it leads here all the same
        for path in ("/v1/models", "/health", "/nothing"):
            reply = ask(site, path, host=host)
            assert (reply.status, reply.error["code"]) == (403, "unknown_host"), host
        assert "--allowed-host" in reply.error["message"] and reply.error["type"] == "permission_error"
    before = len(site.engine.asked)
    body = {"messages": [{"role": "user", "content": "x"}]}
    assert ask(site, "/v1/chat/completions", body, host="evil.example").status == 403
    assert len(site.engine.asked) == before
    assert chat(site).status == 200  # no such header: no browser


def test_where_a_key_is_wanted_or_any_name_is_allowed_no_name_is_refused() -> None:
    for settings in ({"api_keys": ("k",), "allowed_hosts": ("a",)}, {"allowed_hosts": ("*", "a")}, {}):
        reply = ask(make_site(**settings), "/v1/models", host="evil.example", authorization="Bearer k")
        assert reply.status == 200, settings
    with pytest.raises(ApiError):
        Hosts(["a"]).check(b"b")


def test_the_server_knows_its_names_from_where_it_listens() -> None:
    def names(host: str, *allowed: str) -> tuple[str, ...]:
        settings = replace(ServerSettings(), allowed_hosts=allowed)
        return ServeOptions(model="m", commands=(), host=host, settings=settings).hosts

    assert names("127.0.0.1") == ("127.0.0.1",) and names("::1") == ("::1",)
    assert names("127.0.0.1", "box") == ("127.0.0.1", "box")
    assert names("0.0.0.0") == ()  # whoever lets anybody in has no name to tell them by
    assert names("0.0.0.0", "box") == ("0.0.0.0", "box")


def test_the_option_is_there() -> None:
    from jitgraph.cli import app

    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    assert "--allowed-host" in shown


def test_over_the_wire() -> None:
    with served(allowed_hosts=("localhost",)) as site:
        assert site.post("/tokenize", {"prompt": "x"}).status_code == 200
        assert site.post("/tokenize", {"prompt": "x"}, headers={"Host": "evil.example"}).status_code == 403
