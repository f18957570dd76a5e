"""The report in a real browser, without a screen: quiet, alone, and inside the window at every width and scheme.

Skipped where Chromium or chromedriver is not installed (``apt-get install chromium chromium-driver``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench_report_cases import BASES_MS, HAS_MATPLOTLIB, NO_MATPLOTLIB, write_run, write_runtime
from browser import Browser, programs
from rich.console import Console

from jitgraph.bench.plots_palette import COLOURS
from jitgraph.bench.records import Event
from jitgraph.bench.report import write_report
from jitgraph.bench.report_compare import compare

FOUND = programs()
pytestmark = [
    pytest.mark.skipif(FOUND is None, reason="Chromium or chromedriver is not installed"),
    pytest.mark.skipif(not HAS_MATPLOTLIB, reason=NO_MATPLOTLIB),
]
SIZES, SCHEMES = ((1280, 900), (390, 844)), ("light", "dark")
SMALLEST_TEXT_PX = 8.0
"""In a plot on a phone."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert FOUND is not None
    found = Browser(*FOUND, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report with every kind of plot and the longest titles, and a comparison."""
    first, second = tmp_path_factory.mktemp("first-run"), tmp_path_factory.mktemp("second-run")
    told = {case: {"attribution": {"host_us_per_step": 20.0, "launches_per_step": 1.0}} for case in BASES_MS}
    bases = {**BASES_MS, "jit-all": 15.0, "split": 9.0}
    study = write_run(first, bases, emulated=True, facts=told, events=[Event("capture", 5, 0.0)])
    write_runtime(first, "unseen", {"first": {"14": 4.4, "335": 9.0}, "exact": {"14": [4.0], "335": [8.0]}})
    write_report(study, first)
    write_run(second, {**bases, "hybrid": 5.0})
    compare([first, second], Console(quiet=True))
    return {"report": first / "report.html", "comparison": first / "comparison.html"}


def show(browser: Browser, page: Path, width: int, height: int, scheme: str) -> None:
    browser.open("about:blank")
    for kind in ("browser", "performance"):
        browser.logs(kind)
    browser.tell("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    browser.resize(width, height)
    browser.open(page.as_uri())


@pytest.mark.parametrize("name", ["report", "comparison"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_quiet_alone_and_inside_the_window(
    browser: Browser, pages: dict[str, Path], name: str, scheme: str, width: int, height: int
) -> None:
    show(browser, pages[name], width, height, scheme)
    browser.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    inside = browser.run("return [document.documentElement.scrollWidth, innerWidth]")
    assert inside == [width, width], "nothing reaches over the edge of the window"
    assert [entry["message"] for entry in browser.logs("browser")] == []
    events = [json.loads(entry["message"])["message"] for entry in browser.logs("performance")]
    asked = [one["params"]["request"]["url"] for one in events if one["method"] == "Network.requestWillBeSent"]
    own = ("about:", "data:", "chrome:", "chrome-untrusted:", "devtools:")
    assert {url for url in asked if not url.startswith(own)} == {pages[name].as_uri()}, "one file is all"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_page_and_plots_follow_the_scheme(browser: Browser, pages: dict[str, Path], scheme: str) -> None:
    show(browser, pages["report"], *SIZES[0], scheme)

    def colour(name: str) -> str:
        value = COLOURS[name][SCHEMES.index(scheme)]
        return f"rgb({', '.join(str(int(value[i : i + 2], 16)) for i in (1, 3, 5))})"

    assert browser.run("return getComputedStyle(document.body).backgroundColor") == colour("back")
    strokes = browser.run(
        "return [...document.querySelectorAll('#ttft svg path, #ttft svg use')].map((e) => getComputedStyle(e).stroke)"
    )
    assert {colour(case) for case in BASES_MS} <= set(strokes)
    texts = browser.run("return [...document.querySelectorAll('svg text')].map((e) => getComputedStyle(e).fill)")
    assert set(texts) <= {colour("text"), colour("soft")}


@pytest.mark.parametrize("name", ["report", "comparison"])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_words_of_a_plot_are_inside_it_and_can_be_read(
    browser: Browser, pages: dict[str, Path], name: str, width: int, height: int
) -> None:
    show(browser, pages[name], width, height, "light")
    outside, smallest = browser.run(
        """
        const outside = [];
        let smallest = Infinity;
        for (const svg of document.querySelectorAll('svg')) {
          const frame = svg.getBoundingClientRect();
          const scale = frame.width / svg.viewBox.baseVal.width;
          for (const text of svg.querySelectorAll('text')) {
            const box = text.getBoundingClientRect();
            if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1
                || box.top < frame.top - 1) outside.push(text.textContent);
            smallest = Math.min(smallest, scale * parseFloat(getComputedStyle(text).fontSize));
          }
        }
        return [outside, smallest];
        """
    )
    assert outside == []
    assert smallest >= SMALLEST_TEXT_PX


def test_on_a_phone_wide_tables_scroll_in_their_own_box(browser: Browser, pages: dict[str, Path]) -> None:
    show(browser, pages["report"], *SIZES[1], "light")
    wide = browser.run(
        "return [...document.querySelectorAll('.scroll')].filter((e) => e.scrollWidth > e.clientWidth)"
        ".map((e) => [e.tabIndex, e.getAttribute('role'), e.getAttribute('aria-label').length > 10])"
    )
    assert len(wide) >= 4 and all(one == [0, "region", True] for one in wide), "the keyboard reaches them"
    assert browser.run("return [...document.querySelectorAll('.figures')].every((e) => e.scrollWidth <= e.clientWidth)")
