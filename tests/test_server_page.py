"""The page's files and ``/page/state``: what they tell, to whom, and that nothing in them reaches outside."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from server_fakes import MODEL, FakeBackend, FakeEngine, Site, ask, call, make_site, run

from jitgraph import LLM, SamplingParams
from jitgraph.graphs.store_records import State
from jitgraph.ipc.messages import Beat
from jitgraph.server import page
from jitgraph.server.client_errors import EngineGone
from jitgraph.server.page import FILE_PATHS, STATE_PATH, page_routes
from jitgraph.server.settings import ServerSettings
from jitgraph.text.prose import ASSETS

FOLDER = ASSETS / "page"
STATS: dict[str, Any] = {
    "graphs": {"decode/1/greedy": "ready", "prefill/8/full": "capturing"},
    "paths": {"exact": 3},
    "captures": 7,
    "graph_bytes": 4096,
    "capture_failures": {"secret reason": 1},
}


class Counted(FakeEngine):
    """An engine whose counters are asked for."""

    def __init__(self, **facts: Any) -> None:
        super().__init__(**facts)
        self.times = 0
        self.wait: asyncio.Event | None = None
        self.error: Exception | None = None

    async def stats(self) -> dict[str, Any]:
        self.times += 1
        if self.wait is not None:
            await self.wait.wait()
        if self.error is not None:
            raise self.error
        return STATS


def site(engine: FakeEngine | None = None, **settings: Any) -> Site:
    engine = engine or Counted()
    backend = FakeBackend(engine)
    made = make_site(engine, routes=page_routes(backend, ServerSettings(**settings)), **settings)
    made.backend = backend
    return made


def state(of: Site, **headers: str) -> dict[str, Any]:
    reply = ask(of, STATE_PATH, **headers)
    assert reply.status == 200, reply.body
    document: dict[str, Any] = reply.json
    return document


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("path", [*FILE_PATHS, STATE_PATH])
def test_every_answer_carries_the_policy(path: str) -> None:
    reply = ask(site(), path)
    assert reply.status == 200
    policy = dict(part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["form-action"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in reply.headers["content-security-policy"]
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["referrer-policy"] == "no-referrer"
    kinds = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml", "/": "text/html"}
    kind = kinds.get(path.rpartition(".")[2], "application/json")
    assert reply.headers["content-type"].startswith(kind)
    assert reply.headers["cache-control"] == ("no-store" if path == STATE_PATH else "no-cache")


def test_every_file_is_served_and_every_reference_leads_to_one() -> None:
    served = {Path(path).name or "index.html" for path in FILE_PATHS}
    assert served == {file.name for file in FOLDER.iterdir()}
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    named = re.findall(r'(?:href|src)="([^"#]+)"', html)
    assert named
    assert set(named) <= set(FILE_PATHS)
    for script in FOLDER.glob("*.js"):
        for name in re.findall(r'from "([^"]+)"', script.read_text(encoding="utf-8")):
            assert f"/page/{name.removeprefix('./')}" in FILE_PATHS


def test_nothing_in_the_files_reaches_outside_or_makes_markup_of_text() -> None:
    for file in FOLDER.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        without_comments = re.sub(r"(?m)//.*$", "", text) if file.suffix == ".js" else text
        assert not re.search(r"https?:|//[a-z]|@import|url\(", without_comments)
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "Storage"):
            assert word not in text, (file.name, word)
    html = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]*\bsrc=)", html)
    assert "<style" not in html
    assert not re.search(r"\s(?:style|on[a-z]+)=", html)


def test_the_documentation_has_a_picture_of_it() -> None:
    picture = (Path(__file__).resolve().parent.parent / "docs" / "images" / "chat-page.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 200_000


def test_head_and_other_methods() -> None:
    found = site()
    assert run(call(found.app, "HEAD", "/")).status == 200
    for path in ("/", STATE_PATH):
        assert run(call(found.app, "POST", path)).status == 405


# ---------------------------------------------------------------------------------------------------------------- state


def test_state_of_an_engine() -> None:
    engine = Counted()
    engine.last_beat = Beat(5, 1, 2, 30, 40, 50)
    beat = {"now_ns": 5, "running": 1, "waiting": 2, "free_pages": 30, "total_pages": 40, "steps": 50}
    beat |= {"away_s": 0.0, "longest_s": 0.0, "draining": False}
    assert state(site(engine)) == {
        "state": "ready",
        "model": MODEL,
        "chat": True,
        "facts": {"device": "cpu", "dtype": "float32", "emulated": True, "max_model_len": 512, "max_streams": 8},
        "beat": {"type": "Beat", **beat},
        "stats": {name: value for name, value in STATS.items() if name != "capture_failures"},
    }
    assert state(site(served_names=("short", "long")))["model"] == "short"


@pytest.mark.parametrize("name", ["starting", "restarting", "draining", "stopped", "failed"])
def test_state_without_an_engine(name: str) -> None:
    found = site()
    found.backend.client, found.backend.state = None, name
    none = dict.fromkeys(("model", "facts", "beat", "stats"))
    assert state(found) == {"state": name, "chat": False, **none}


def test_an_engine_that_does_not_answer_is_shown_without_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Counted()
    engine.error = EngineGone("it went")
    found = state(site(engine))
    assert (found["state"], found["model"], found["stats"]) == ("ready", MODEL, None)
    silent = Counted()
    silent.wait = asyncio.Event()
    monkeypatch.setattr(page, "_STATS_TIMEOUT_S", 0.01)
    assert state(site(silent))["stats"] is None


def test_many_pages_ask_the_engine_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Counted()
    found = site(engine)

    async def at_once() -> list[Any]:
        engine.wait = asyncio.Event()
        asked = [asyncio.ensure_future(call(found.app, "GET", STATE_PATH)) for _ in range(20)]
        while not engine.times:
            await asyncio.sleep(0)
        asked[0].cancel()  # whose page has gone takes nothing from the others
        await asyncio.sleep(0)
        engine.wait.set()
        return [reply.json["stats"]["captures"] for reply in await asyncio.gather(*asked[1:])]

    assert run(at_once()) == [7] * 19
    assert engine.times == 1
    state(found)
    assert engine.times == 1  # fresh enough
    monkeypatch.setattr(page, "FRESH_S", 0.0)
    state(found)
    assert engine.times == 2


def test_of_several_engines_one_is_shown_as_long_as_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "FRESH_S", 0.0)
    one, other = Counted(model="one"), Counted(model="other")
    found = site(one)
    assert state(found)["model"] == "one"
    found.backend.client = other  # the pool names the least busy one
    assert state(found)["model"] == "one"
    one.gone = "it ended"
    assert state(found)["model"] == "other"
    assert (one.times, other.times) == (2, 1)


def test_the_template_decides_between_chat_and_completions(tmp_path: Path) -> None:
    bundled = json.loads((ASSETS / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8"))
    plain = {name: value for name, value in bundled.items() if name != "chat_template"}
    folders = {name: tmp_path / name for name in ("inline", "file", "named", "none", "broken", "empty")}
    for folder in folders.values():
        folder.mkdir()
    (folders["inline"] / "tokenizer_config.json").write_text(json.dumps(bundled))
    (folders["file"] / "chat_template.jinja").write_text("{{ messages }}")
    (folders["named"] / "additional_chat_templates").mkdir()
    (folders["named"] / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    (folders["none"] / "tokenizer_config.json").write_text(json.dumps(plain))
    (folders["broken"] / "tokenizer_config.json").write_text("[")
    found = {name: state(site(Counted(folder=str(folder))))["chat"] for name, folder in folders.items()}
    assert found == {"inline": True, "file": True, "named": True, "none": False, "broken": False, "empty": False}
    assert state(site(Counted(folder=str(folders["none"])), chat_template="{{ messages }}"))["chat"]


# ----------------------------------------------------------------------------------------------------------------- keys


def basic(key: str, name: str = "anybody") -> str:
    return f"Basic {base64.b64encode(f'{name}:{key}'.encode()).decode()}"


def test_a_browser_is_told_to_ask_for_the_key_and_sends_it_with_everything() -> None:
    found = site(api_keys=("secret", "other"))
    for path in FILE_PATHS:
        reply = ask(found, path)
        assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
        assert reply.headers["www-authenticate"].startswith('Basic realm="jitgraph')
        for good in (basic("secret"), basic("secret", ""), basic("other", "\u00e9"), "Bearer secret"):
            assert ask(found, path, authorization=good).status == 200
    for wrong in (basic("secre"), basic(""), "Basic", "Basic !", "Basic c2VjcmV0", basic("x:secret"), "Bearer wrong"):
        for path in ("/", STATE_PATH, "/v1/models"):
            assert ask(found, path, authorization=wrong).error["code"] == "invalid_api_key", wrong
    reply = ask(found, STATE_PATH)  # the page asks for it itself, without the browser's window
    assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
    assert state(found, authorization=basic("secret"))["model"] == MODEL
    document = {"messages": [{"role": "user", "content": "x"}]}
    for given in (basic("secret"), "Bearer secret"):
        assert ask(found, "/v1/chat/completions", document, authorization=given).status == 200
    by_password, by_key = found.engine.asked
    assert by_password.salt == by_key.salt  # one caller, however the key came
    assert [record.client for record in found.records[-2:]] == ["key-1"] * 2
    without = make_site(api_keys=("secret",))
    assert ask(without, "/").headers["www-authenticate"] == "Bearer"  # no page, nothing to ask for


def test_pages_of_other_sites_cannot_use_what_the_browser_knows() -> None:
    found = site(api_keys=("secret",))
    document = {"messages": [{"role": "user", "content": "x"}]}

    def from_site(kind: str, authorization: str) -> int:
        headers = {"authorization": authorization, "sec_fetch_site": kind}
        return ask(found, "/v1/chat/completions", document, **headers).status

    assert {from_site(kind, basic("secret")) for kind in ("same-origin", "none")} == {200}
    assert {from_site(kind, basic("secret")) for kind in ("cross-site", "same-site")} == {403}
    assert from_site("cross-site", "Bearer secret") == 200  # whoever made that page knows the key
    assert ask(found, "/", authorization=basic("secret"), sec_fetch_site="cross-site").status == 200  # a link
    assert ask(site(), "/v1/chat/completions", document, authorization=basic("x"), sec_fetch_site="x").status == 200


def test_looking_is_no_work_for_log_and_metrics() -> None:
    found = site()
    for path in (*FILE_PATHS, STATE_PATH):
        ask(found, path)
    assert found.records == []


# ----------------------------------------------------------------------------------------------------- the real engine


def test_the_engine_tells_the_state_of_each_graph() -> None:
    with LLM("tiny", device="cpu") as llm:
        llm.generate([[5] * 21], SamplingParams(max_tokens=2))
        graphs = llm.stats()["graphs"]
        ready = [key for key, where in graphs.items() if where == State.READY.value]
        assert len(ready) == llm.stats()["ready_graphs"]
        assert {"decode/1/greedy", "prefill/8/full"} <= set(ready)
        assert graphs["prefill/21/full"] in {where.value for where in State}
        llm.settle()
        assert llm.stats()["graphs"]["prefill/21/full"] == "ready"
