"""The page in a real browser, without a screen: over the real application with a fake engine, once with a real one.

Skipped where Chromium or chromedriver is not installed (``apt-get install chromium chromium-driver``). Run as a
program, ``python tests/test_page_browser.py PICTURE.png``, it makes the picture of the documentation.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from browser import ENTER, ESCAPE, TAB, Browser, programs
from server_fakes import EOS, TOKENIZER, FakeBackend, FakeEngine, Served, Site, ids_of

from jitgraph.ipc.messages import Beat
from jitgraph.server import page
from jitgraph.server.app import create_app
from jitgraph.server.auth import Keys
from jitgraph.server.page import page_routes
from jitgraph.server.settings import ServerSettings
from jitgraph.text.prose import ASSETS

ROOT = Path(__file__).resolve().parent.parent
FOUND = programs()
pytestmark = pytest.mark.skipif(FOUND is None, reason="Chromium or chromedriver is not installed")

NASTY = '<img src=x onerror="window.hacked=1"><script>window.hacked=2</script> & "so on" <b>'
DONE = "document.querySelector('#log article:last-of-type')?.getAttribute('aria-busy') === 'false'"
ANSWER = "#log article.assistant:last-of-type"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert FOUND is not None
    found = Browser(*FOUND, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


class Shown(FakeEngine):
    """An engine with a graph store to look at."""

    def __init__(self, text: str = "Hello there, friend!", **facts: Any) -> None:
        super().__init__(text, **facts)
        self.last_beat = Beat(1, 1, 2, 1000, 1024, 77)
        self.graphs = {f"decode/{n}/greedy": "ready" for n in range(1, 9)}
        self.graphs |= {f"prefill/{n}/full": "ready" for n in (8, 16, 512)}
        self.paths = {"exact": 30, "padded": 10, "eager": 0, "loop": 60}

    async def stats(self) -> dict[str, Any]:
        counted = {"captures": 11, "evictions": 3, "recaptures": 1, "captures_abandoned": 0, "compiles_after_ready": 0}
        return {**counted, "graphs": dict(self.graphs), "paths": dict(self.paths), "graph_bytes": 5 * 2**20}

    def says(self, text: str) -> None:
        """From now on."""
        self.answer = lambda asked: [*ids_of(text), EOS]


def make_server(**settings: Any) -> Served:
    """The real application, for engines that come and go."""
    backend, given = FakeBackend(None), ServerSettings(**settings)
    app = create_app(backend, given, routes=page_routes(backend, given))
    return Served(Site(FakeEngine(), backend, given, [], app))


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    """One without a key for most tests."""
    with make_server() as found:
        yield found


def show(browser: Browser, server: Served, engine: FakeEngine, wide: int = 1200, high: int = 900) -> None:
    """Puts an engine behind the server and opens the page."""
    backend = server.site.backend
    if backend.client is not None:
        backend.client.gone = "it was replaced"
    backend.client, backend.state = engine, "ready"
    browser.open("about:blank")
    for kind in ("browser", "performance"):
        browser.logs(kind)
    browser.resize(wide, high)
    browser.open(f"{server.url}/")
    if not server.site.settings.api_keys:
        browser.wait("document.getElementById('state').textContent === 'ready'")


def say(browser: Browser, text: str) -> None:
    """Sends a message and waits for the end of the answer."""
    before = browser.run("return document.querySelectorAll('article.assistant').length")
    browser.type("#prompt", text + ENTER)
    browser.wait(f"document.querySelectorAll('article.assistant').length === {before + 1} && {DONE}")


def said(browser: Browser) -> str:
    return browser.text(f"{ANSWER} .said")


def figures(browser: Browser) -> dict[str, float]:
    """What stands under the last answer."""
    line = browser.text(f"{ANSWER} .figures")
    return {name: float(value) for name, value in re.findall(r"(TTFT|ITL P99|ITL|tokens) ([\d.]+)", line)}


# ----------------------------------------------------------------------------------------------------------------- chat


def test_an_answer_comes_token_by_token_with_its_times(browser: Browser, server: Served) -> None:
    text = "One two three four five six seven eight nine ten. " * 3
    engine = Shown(text)
    engine.pause_s = 0.02
    show(browser, server, engine)
    browser.type("#prompt", "Count, please" + ENTER)
    browser.wait(f"(document.querySelector('{ANSWER} .said')?.textContent ?? '').length > 5")
    early = said(browser)
    assert text.startswith(early)
    assert early != text
    assert browser.run("return document.getElementById('stop').disabled") is False
    browser.wait(DONE)
    assert said(browser) == text
    assert browser.text("article.user .said") == "Count, please"
    found = figures(browser)
    tokens = len(ids_of(text)) + 1
    assert found["tokens"] == tokens  # the server's own count, the end of the answer included
    assert found["TTFT"] >= 20
    assert found["ITL P99"] >= found["ITL"] >= 10
    points = browser.run(f"return document.querySelector('{ANSWER} polyline').getAttribute('points').split(' ')")
    assert tokens / 2 < len(points) <= tokens
    assert "median" in browser.run(f"return document.querySelector('{ANSWER} svg').getAttribute('aria-label')")
    assert browser.text("#announce").startswith("Answer: complete. First token after")
    assert_quiet(browser, server)


def assert_quiet(browser: Browser, server: Served) -> None:
    """Nothing on the console, and no request to anywhere but the server."""
    assert [entry["message"] for entry in browser.logs("browser")] == []
    events = [json.loads(entry["message"])["message"] for entry in browser.logs("performance")]
    asked = [one["params"]["request"]["url"] for one in events if one["method"] == "Network.requestWillBeSent"]
    assert f"{server.url}/page/state" in asked
    inside = (
        f"{server.url}/",
        "chrome:",
        "chrome-untrusted:",
        "devtools:",
        "data:",
        "about:",
    )  # the browser's own pages
    assert [url for url in asked if not url.startswith(inside)] == []


def test_text_is_text(browser: Browser, server: Served) -> None:
    """Neither what the user says nor what the model says nor an error becomes markup."""
    engine = Shown(NASTY, model=f"a {NASTY}")
    show(browser, server, engine)
    say(browser, NASTY)
    assert said(browser) == browser.text("article.user .said") == NASTY
    assert browser.text("#model") == f"a {NASTY}"
    engine.die_after = 1
    say(browser, "again")
    assert browser.run("return document.querySelectorAll('#log img, #log script, #log b, #model b').length") == 0
    assert browser.run("return window.hacked") is None


def test_the_policy_holds_in_the_browser(browser: Browser, server: Served) -> None:
    """A script that gets into the page all the same does not run, and nothing is fetched from elsewhere."""
    show(browser, server, Shown())
    browser.run(
        "const add = (one) => document.body.append(Object.assign(document.createElement('script'), one));"
        "add({ textContent: 'window.hacked = 1' });"
        "add({ src: 'http://127.0.0.1:9/x.js' });"
        "document.body.insertAdjacentHTML('beforeend', '<img src=\"/x\" onerror=\"window.hacked = 2\">');"
    )
    blocked = browser.wait_for(lambda: [e["message"] for e in browser.logs("browser")], "a violation is reported")
    assert browser.run("return window.hacked") is None
    assert any("Content Security Policy" in message for message in blocked)


def test_the_conversation_goes_on(browser: Browser, server: Served) -> None:
    engine = Shown("First answer.")
    show(browser, server, engine)
    browser.run("document.getElementById('system').value = 'Be brief.'")
    say(browser, "One")
    engine.says("Second answer.")
    say(browser, "Two")
    prompt = prompt_of(engine)
    order = [prompt.index(part) for part in ("Be brief.", "One", "First answer.", "Two")]
    assert order == sorted(order)
    browser.click("#clear")
    assert browser.run("return document.querySelectorAll('article').length") == 0
    say(browser, "Three")
    assert "One" not in prompt_of(engine)


def prompt_of(engine: FakeEngine) -> str:
    return TOKENIZER.decode(list(engine.asked[-1].ids), skip_special_tokens=False)


def test_sampling_settings_reach_the_engine(browser: Browser, server: Served) -> None:
    engine = Shown("a b c stop here and more")
    show(browser, server, engine)
    say(browser, "plain")
    defaults = engine.asked[-1].params
    assert (defaults.max_tokens, defaults.temperature, defaults.seed) == (128, 0.0, None)
    given = {"max_tokens": 20, "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "seed": 7,
             "repetition_penalty": 1.2}  # fmt: skip
    for name, value in given.items():
        browser.run("document.getElementById(arguments[0]).value = ''", name)
        browser.type(f"#{name}", str(value))
    browser.type("#stop-strings", "stop\nnever")
    say(browser, "set")
    params = engine.asked[-1].params
    assert {name: getattr(params, name) for name in given} == given
    assert said(browser) == "a b c "
    browser.run("document.getElementById('temperature').value = '-1'")
    say(browser, "wrong")
    assert "temperature" in browser.text(f"{ANSWER} .error")


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stopping(browser: Browser, server: Served, how: str) -> None:
    engine = Shown("word " * 200)
    engine.pause_s = 0.02
    show(browser, server, engine)
    browser.run("document.getElementById('max_tokens').value = '200'")
    browser.type("#prompt", "Talk" + ENTER)
    browser.wait(f"(document.querySelector('{ANSWER} .said')?.textContent ?? '').length > 5")
    if how == "button":
        browser.click("#stop")
    else:
        browser.press(ESCAPE)
    browser.wait(DONE)
    browser.wait_for(engine.asked[0].cancelled.is_set, "the engine is told")
    assert browser.text(f"{ANSWER} .error") == "Stopped."
    begun = said(browser)
    assert 0 < len(begun) < len("word " * 200)
    engine.says("Short.")
    say(browser, "Again")
    assert said(browser) == "Short."
    assert f"<|assistant|>\n{begun}<|end|>" in prompt_of(engine)  # it stays part of the conversation


def test_an_engine_that_ends(browser: Browser, server: Served) -> None:
    engine = Shown("word " * 50)
    show(browser, server, engine)
    engine.die_after = 5
    say(browser, "Talk")
    assert said(browser).startswith("word")
    assert "the engine ended" in browser.text(f"{ANSWER} .error")
    backend = server.site.backend
    backend.client, backend.state = None, "restarting"
    browser.wait("document.getElementById('state').textContent === 'restarting'")
    say(browser, "Now")
    assert "restarted" in browser.text(f"{ANSWER} .error")
    engine.die_after = None
    backend.client, backend.state = engine, "ready"
    engine.says("Back again.")
    browser.wait("document.getElementById('state').textContent === 'ready'")
    say(browser, "And now")
    assert said(browser) == "Back again."
    assert prompt_of(engine).count("Now") == 0  # what got no answer is not part of the conversation
    browser.logs("browser")


# ------------------------------------------------------------------------------------------------------ keys and modes


def test_the_browser_asks_for_the_key_and_the_page_needs_no_other(browser: Browser) -> None:
    """Name and password are given as part of the address, which is all that a browser without a screen takes."""
    engine = Shown("With a password.")
    with make_server(api_keys=("right",)) as server:
        show(browser, server, engine)
        assert browser.run("return document.getElementById('state')") is None  # no page without a key
        browser.open(f"{server.url.replace('//', '//me:right@')}/")
        browser.wait("document.getElementById('state').textContent === 'ready'")
        assert browser.run("return document.getElementById('key-form').hidden")
        say(browser, "Open?")
        assert said(browser) == "With a password."
        browser.open(f"{server.url}/")  # it is remembered
        browser.wait("document.getElementById('state').textContent === 'ready'")
        assert "right" not in browser.run("return document.documentElement.outerHTML + location.href")
    browser.logs("browser")


def test_the_page_asks_for_the_key_where_the_browser_has_none_that_fits(browser: Browser) -> None:
    engine = Shown("With a key.")
    with make_server(api_keys=("right", "old")) as server:
        show(browser, server, engine)
        browser.open(f"{server.url.replace('//', '//me:old@')}/")
        browser.wait("document.getElementById('state').textContent === 'ready'")
        server.site.app.middleware_stack.app._keys = Keys(["right"])  # the server was started again with others
        browser.wait("!document.getElementById('key-form').hidden && document.activeElement.id === 'key'")
        assert browser.text("#state") == "locked"
        assert browser.text("#key-error") == ""
        browser.press(*"wrong", ENTER)
        browser.wait("document.getElementById('key-error').textContent.includes('wrong')")
        browser.type("#key", "right" + ENTER)
        browser.wait("document.getElementById('state').textContent === 'ready'")
        assert browser.run("return document.getElementById('key-form').hidden")
        say(browser, "Open?")
        assert said(browser) == "With a key."
        kept = browser.run("return [localStorage.length, sessionStorage.length, document.cookie, location.href]")
        assert kept[:3] == [0, 0, ""]
        assert "right" not in kept[3]
        assert "right" not in browser.run(
            "return document.documentElement.outerHTML + document.getElementById('key').value"
        )
    browser.logs("browser")


def test_a_model_without_chat_template_goes_on_with_the_text(browser: Browser, server: Served, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ASSETS / "tokenizer", folder)
    config = folder / "tokenizer_config.json"
    config.write_text(re.sub(r',\s*"chat_template": ".*"', "", config.read_text(encoding="utf-8")), encoding="utf-8")
    engine = Shown(" there was a stone.", folder=str(folder))
    show(browser, server, engine)
    browser.wait("document.getElementById('prompt-label').textContent === 'Text to go on with'")
    assert browser.run("return document.getElementById('system-field').hidden")
    say(browser, "Once upon a time")
    assert said(browser) == " there was a stone."
    assert prompt_of(engine).endswith("Once upon a time")
    assert figures(browser)["tokens"] == len(ids_of(" there was a stone.")) + 1


# ---------------------------------------------------------------------------------------------------------- graph store


def chips(browser: Browser) -> list[str]:
    """Size and state of each graph that is shown."""
    return list(browser.run("return [...document.querySelectorAll('#groups .chip')].map((one) => one.textContent)"))


def test_the_graph_store_is_shown_live(browser: Browser, server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "FRESH_S", 0.0)
    engine = Shown()
    show(browser, server, engine)
    browser.wait("document.querySelectorAll('#groups .chip').length === 11")
    assert chips(browser) == [*(f"{n} ready" for n in range(1, 9)), "8 ready", "16 ready", "512 ready"]
    assert browser.text("#store-note") == ("11 ready, 0 queued, 0 capturing, 0 retiring; 5.0 MiB; emulated on the CPU")
    counters = browser.run("return document.getElementById('counters').innerText")
    assert re.search(r"Evictions\s+3\b", counters)
    widths = browser.run("return [...document.querySelectorAll('#paths .bar span')].map((one) => one.style.width)")
    assert widths == ["30%", "10%", "0%", "60%"]
    load = browser.run("return document.getElementById('load').innerText")
    assert re.search(r"Running, waiting\s+1, 2", load)
    assert re.search(r"Free KV pages\s+1,000 of 1,024", load)
    engine.graphs |= {"prefill/37/full": "capturing", "prefill/16/full": "retiring", "prefill/99/full": "queued"}
    browser.wait("document.querySelectorAll('#groups .chip').length === 13")
    assert chips(browser)[8:] == ["8 ready", "16 retiring", "37 capturing", "99 queued", "512 ready"]
    engine.last_beat = Beat(2, 8, 0, 900, 1024, 99)
    browser.wait("document.getElementById('load').innerText.includes('8, 0')")


# --------------------------------------------------------------------------------------------- people and their screens


def test_the_keyboard_is_enough(browser: Browser, server: Served) -> None:
    show(browser, server, Shown())
    browser.press(TAB)
    assert browser.run("return document.activeElement.textContent") == "Go to the message box"
    browser.press(ENTER)
    browser.wait("document.activeElement.id === 'prompt'")
    browser.run("document.getElementById('prompt').value = ''")
    browser.press("a")
    browser.tell("Input.dispatchKeyEvent", type="keyDown", modifiers=8, key="Enter", code="Enter", text="\r",
                 windowsVirtualKeyCode=13)  # fmt: skip
    browser.press("b")
    assert browser.run("return document.getElementById('prompt').value") == "a\nb"
    browser.press(ENTER)
    browser.wait(DONE)
    assert browser.text("article.user .said") == "a\nb"
    assert browser.run("return document.activeElement.id") == "prompt"
    reached = set()
    for _ in range(25):
        browser.press(TAB)
        reached.add(browser.run("return document.activeElement.id || document.activeElement.tagName"))
    assert {"send", "clear", "SUMMARY", "max_tokens", "temperature", "seed", "system", "log"} <= reached


def test_everything_has_a_name(browser: Browser, server: Served) -> None:
    show(browser, server, Shown())
    say(browser, "Hi")
    nameless = browser.run(
        "const named = (one) => one.labels?.length || one.textContent.trim() || one.getAttribute('aria-label')"
        "  || one.getAttribute('aria-labelledby');"
        "const all = 'input, textarea, button, summary, svg[role=img], ul, section, aside';"
        "return [...document.querySelectorAll(all)].filter((one) => !named(one)).map((one) => one.outerHTML)"
    )
    assert nameless == []
    assert browser.run("return document.documentElement.lang") == "en"
    headings = browser.run("return [...document.querySelectorAll('h1, h2, h3')].map((one) => one.tagName)")
    assert headings.count("H1") == 1
    twice = browser.run(
        "const ids = [...document.querySelectorAll('[id]')].map((one) => one.id);"
        "return ids.filter((id, i) => ids.indexOf(id) !== i)"
    )
    assert twice == []


CONTRAST = """
const bright = (colour) => {
  const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (one) => {
  for (let at = one; at; at = at.parentElement) {
    const colour = getComputedStyle(at).backgroundColor;
    if (!/rgba\\(.*, 0\\)/.test(colour)) return colour;
  }
  return "rgb(255, 255, 255)";
};
const poor = [];
for (const one of document.querySelectorAll("body *")) {
  const own = [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (!own || one.disabled || !one.checkVisibility()) continue;
  const [a, b] = [bright(getComputedStyle(one).color), bright(behind(one))].sort((x, y) => y - x);
  const ratio = (a + 0.05) / (b + 0.05);
  if (ratio < 4.5) poor.push(`${one.tagName}.${one.className}: ${ratio.toFixed(2)}`);
}
return poor;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(browser: Browser, server: Served, scheme: str) -> None:
    """WCAG's 4.5 to 1."""
    engine = Shown()
    engine.graphs |= {"prefill/37/full": "capturing", "prefill/21/full": "queued", "prefill/9/full": "retiring"}
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.tell("Emulation.setEmulatedMedia", features=features)
    try:
        show(browser, server, engine)
        say(browser, "Hi")
        engine.die_after = 1
        say(browser, "Error")
        assert browser.run(CONTRAST) == []
        back = browser.run("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", back))) < 3 * 128) == (scheme == "dark")
    finally:
        browser.tell("Emulation.setEmulatedMedia", features=[])


@pytest.mark.parametrize("wide", [320, 375, 768, 1200])
def test_it_fits_the_screen(browser: Browser, server: Served, wide: int) -> None:
    engine = Shown("Averylongwordwithoutanyspaces" * 8)
    show(browser, server, engine, wide, 700)
    say(browser, "Hi")
    assert browser.run("return document.documentElement.scrollWidth") <= wide
    outside = browser.run(
        "return [...document.querySelectorAll('body *:not(.skip):not(.unseen)')]"
        ".filter((one) => one.checkVisibility() && one.getBoundingClientRect().right > innerWidth + 0.5)"
        ".map((one) => one.outerHTML.slice(0, 80))"
    )
    assert outside == []
    lowest = browser.run(
        "return Math.min(...[...document.querySelectorAll('button')].map((b) => b.offsetHeight || 99))"
    )
    assert lowest >= 40  # a finger hits it
    columns = browser.run(
        "return getComputedStyle(document.querySelector('main')).gridTemplateColumns.split(' ').length"
    )
    assert columns == (2 if wide > 960 else 1)


# ------------------------------------------------------------------------------------------------------ the real engine


@contextmanager
def real_server() -> Iterator[str]:
    """``jitgraph serve tiny``; its address."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o700)
        environment = {**os.environ, "XDG_RUNTIME_DIR": folder, "OMP_NUM_THREADS": "1"}
        environment.pop("JITGRAPH_API_KEY", None)
        command = [sys.executable, "-m", "jitgraph", "serve", "tiny", "--device", "cpu", "--port", "0"]
        with subprocess.Popen(
            [*command, "--request-log", "none"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        ) as server:
            try:
                yield _address(server)
            finally:
                server.terminate()
                server.wait(60)


def _address(server: subprocess.Popen[str]) -> str:
    lines = []
    assert server.stderr is not None
    for line in server.stderr:
        lines.append(line)
        found = re.search(r"ready at (http://\S+) after", line)
        if found:
            threading.Thread(target=server.stderr.read, daemon=True).start()  # nobody waits for a reader
            return found.group(1)
    raise AssertionError("".join(lines))


def converse(browser: Browser, url: str) -> bytes:
    """A short conversation with a real engine; the picture of it."""
    browser.resize(1200, 900)
    browser.open(f"{url}/")
    browser.wait("document.getElementById('state').textContent === 'ready'")
    browser.run("document.getElementById('max_tokens').value = '48'")
    browser.type("#temperature", "0.8")
    browser.type("#seed", "3")
    say(browser, "Which graph serves a prompt of this length?")
    say(browser, "And this one, which is longer by a few words?")
    # A length that had no graph of its own: the store captures it now that nobody waits.
    browser.wait("document.querySelectorAll('#groups .chip.ready').length >= 36")
    browser.wait("!document.querySelector('#groups .chip.queued, #groups .chip.capturing')")
    return browser.screenshot()


def test_with_a_real_engine(browser: Browser) -> None:
    with real_server() as url:
        picture = converse(browser, url)
        assert figures(browser)["tokens"] >= 1
        assert figures(browser)["TTFT"] > 0
        assert "emulated on the CPU" in browser.text("#store-note")
        assert sum(browser.run("return [...document.querySelectorAll('.path .number')].map((n) => +n.textContent)")) > 0
        assert [entry["message"] for entry in browser.logs("browser")] == []
        assert picture.startswith(b"\x89PNG")
        assert 20_000 < len(picture) < 200_000


def main(path: str) -> None:
    """Makes the picture of the documentation."""
    assert FOUND is not None, "install chromium and chromium-driver first"
    with tempfile.TemporaryDirectory() as profile, real_server() as url:
        browser = Browser(*FOUND, Path(profile))
        try:
            Path(path).write_bytes(converse(browser, url))
        finally:
            browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
