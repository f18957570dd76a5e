"""``report.html`` and its plots: whole, deterministic, honest about what is missing; comparisons of several runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from bench_report_cases import BASES_MS, HAS_MATPLOTLIB, NASTY, NO_MATPLOTLIB, write_run, write_runtime
from rich.console import Console
from typer.testing import CliRunner

from jitgraph.bench.plots_palette import COLOURS
from jitgraph.bench.records import Event
from jitgraph.bench.report import write_report
from jitgraph.bench.report_compare import FASTER, SAME, SLOWER, UNKNOWN, compare, comparisons, verdicts
from jitgraph.bench.run import recompute
from jitgraph.bench.study import load_study
from jitgraph.bench.table_text import NO_VALUE
from jitgraph.cli import app
from jitgraph.errors import ConfigError, OutputError

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "h200"
needs_matplotlib = pytest.mark.skipif(not HAS_MATPLOTLIB, reason=NO_MATPLOTLIB)
EVENTS = (Event("capture", 5, 0.0), Event("capture", 9, 0.0), Event("eviction", 9, 0.0), Event("collection", 70, 0.0))


class Page(HTMLParser):
    """A page taken apart: the text of each section's cells and paragraphs, and every attribute."""

    VOID = ("meta", "link", "br")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.cells: list[str] = []
        self.words: list[str] = []
        self.tags: list[str] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self._open == [], "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self._open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.references.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, "elements overlap"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("td", "th"):
            self.cells[-1] += data
        elif data.strip():
            self.words.append(data.strip())

    def says(self, text: str) -> bool:
        return any(text in word for word in [*self.words, *self.cells])


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("report", "report_compare"):
        monkeypatch.setattr(f"jitgraph.bench.{module}.missing_reason", lambda: "pip install 'jitgraph[bench]'")


# ---------------------------------------------------------------------------------------------------------------- words


def test_the_page_has_both_pacings_and_says_what_is_missing(tmp_path: Path, without_plots: None) -> None:
    study = write_run(tmp_path, emulated=True)
    files = write_report(study, tmp_path)
    assert files[-1] == tmp_path / "report.html" and not (tmp_path / "plots").exists()
    page = Page(files[-1])
    for pacing in ("interactive pacing (50 ms pause before each request)", "sustained pacing (back to back)"):
        assert page.says(f"TTFT in ms, mean ± std, {pacing}") and page.says(f"P99 of TTFT in ms, {pacing}")
    assert page.says("This report has no plots: pip install 'jitgraph[bench]'.")
    assert page.says("Emulated: on the CPU plain PyTorch stands in for kernels and graphs")
    titles = {cell for cell in page.cells if cell.startswith("JIT + CUDA graph")}
    assert titles == {"JIT + CUDA graph (emulated)", "JIT + CUDA graph"}, "as a title emulated, as a winner short"
    assert page.says("TTFT, average (emulated)") and page.says("TensorRT-LLM: not installed: run the script.")
    assert page.cells.count("not installed") >= 8, "an empty cell says why"
    assert page.says("Padding cost: not in this folder's record")
    assert page.says("The cases that exist for the ablation alone were not run")
    row = study.select("p99", "ttft_ms", "sustained")["jit", 100]
    assert f"{row.summary.p99:.2f}" in page.cells and f"{row.ratio:.6g}" in page.cells


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    write_report(write_run(tmp_path, pacings=("interactive",), events=EVENTS), tmp_path)
    page = Page(tmp_path / "report.html")
    assert all(target.startswith(("#", "data:,")) for target in page.references), "nothing is fetched"
    assert not {"script", "img", "iframe", "object"} & set(page.tags)
    assert len(set(page.ids)) == len(page.ids), "an id stands for one element"
    anchors = {target[1:] for target in page.references if target.startswith("#")}
    assert anchors <= set(page.ids)


def test_text_is_text(tmp_path: Path, without_plots: None) -> None:
    """Neither a reason nor a device's name becomes markup."""
    facts = {"tensorrt-llm": {"status": "failed", "reason": NASTY}, "jit": {"attention": NASTY}}
    write_report(write_run(tmp_path, device=NASTY, facts=facts), tmp_path)
    page = Page(tmp_path / "report.html")
    assert page.says(NASTY)
    assert not {"script", "img"} & set(page.tags) and page.tags.count("title") == 1


def test_a_record_that_has_next_to_nothing(tmp_path: Path) -> None:
    """No case got anywhere, no ceiling: there is a page all the same."""
    write_run(tmp_path, {})
    (tmp_path / "raw" / "ceiling.json").unlink()
    write_report(load_study(tmp_path), tmp_path)
    page = Page(tmp_path / "report.html")
    for words in ("No case became ready.", "No ceiling was measured in this run.", "No case has rows."):
        assert page.says(words), words
    assert page.says("JIT + CUDA graph has no figures: not run.")


def test_the_same_record_gives_the_same_bytes(tmp_path: Path) -> None:
    study = write_run(tmp_path, lengths=(10,), pacings=("interactive",))
    contents = []
    for _ in range(2):
        contents.append({file.name: file.read_bytes() for file in write_report(study, tmp_path)})
    assert contents[0] == contents[1]


def test_old_plots_are_called_old(tmp_path: Path, without_plots: None) -> None:
    (tmp_path / "plots").mkdir()
    write_report(write_run(tmp_path), tmp_path)
    assert Page(tmp_path / "report.html").says("plots holds is of an earlier report")


def test_the_page_may_go_elsewhere(tmp_path: Path, without_plots: None) -> None:
    write_run(tmp_path / "run")
    result = CliRunner().invoke(app, ["report", str(tmp_path / "run"), "--output", str(tmp_path / "page.html")])
    assert result.exit_code == 0, result.output
    assert Page(tmp_path / "page.html").says("Time to the first token") and not (tmp_path / "run/report.html").exists()
    with pytest.raises(OutputError, match="cannot be written"):
        recompute(tmp_path / "run", Console(quiet=True), tmp_path / "nowhere" / "page.html")


def test_measuring_needs_no_plotting_library() -> None:
    code = "import sys, jitgraph.cli; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_without_matplotlib_the_report_says_how_to_get_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write_report(write_run(tmp_path), tmp_path)
    assert Page(tmp_path / "report.html").says("pip install 'jitgraph[bench]', then jitgraph report FOLDER")


# ---------------------------------------------------------------------------------------------------------------- plots


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with every kind of plot."""
    if not HAS_MATPLOTLIB:
        pytest.skip(NO_MATPLOTLIB)
    folder = tmp_path_factory.mktemp("drawn")
    told = {case: {"attribution": {"host_us_per_step": 20.0, "launches_per_step": 1.0}} for case in BASES_MS}
    study = write_run(folder, {**BASES_MS, "jit-all": 15.0, "split": 9.0}, facts=told, events=EVENTS)
    write_runtime(folder, "unseen", {"first": {"14": 4.4, "335": 9.0}, "exact": {"14": [4.0], "335": [8.0]}})
    write_report(study, folder)
    yield folder


PLOTS = {f"{protocol}_{pacing}" for protocol in ("ttft", "p99", "speedup") for pacing in ("interactive", "sustained")}
PLOTS |= {f"{kind}_{n}" for kind in ("cdf_ttft", "cdf_itl", "itl_timeline") for n in (10, 100)}
PLOTS |= {"startup", "memory", "ablation_ttft", "ablation_itl", "host_time", "launches", "padding"}


def test_every_plot_has_both_files_and_a_place_in_the_page(drawn: Path) -> None:
    assert {file.name for file in (drawn / "plots").iterdir()} == {f"{n}.{s}" for n in PLOTS for s in ("svg", "png")}
    for name in PLOTS:
        assert (drawn / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n")
        tree = ElementTree.parse(drawn / "plots" / f"{name}.svg")  # well-formed, with text as text
        assert tree.getroot().findall(".//{http://www.w3.org/2000/svg}text")
    page = (drawn / "report.html").read_text(encoding="utf-8")
    assert page.count("<figure>") == page.count("<svg ") == page.count('role="img"') == len(PLOTS)
    assert page.count("<figcaption>") == len(PLOTS)
    assert all(len(label) > 40 for label in re.findall(r'role="img" aria-label="([^"]*)"', page))


def test_plots_in_the_page_have_the_pages_colours(drawn: Path) -> None:
    page = (drawn / "report.html").read_text(encoding="utf-8")
    body = page[page.index("<body>") :]
    literal = set(re.findall(r"#[0-9a-f]{6}", body))
    assert literal == set(), "a colour that would not follow the scheme"
    for case in BASES_MS:
        assert f"var(--{case})" in body
        assert COLOURS[case][0] in (drawn / "plots" / "ttft_interactive.svg").read_text(encoding="utf-8")


def test_events_are_marked_where_the_record_has_them(drawn: Path) -> None:
    page = Page(drawn / "report.html")
    assert page.says("Marks at the lower edge: 2 of kind capture, 1 of kind collection, 1 of kind eviction.")
    assert page.says("The record notes no captures, evictions or collections beside these samples, so none are marked.")
    with_events, without = ((drawn / "plots" / f"itl_timeline_{n}.svg").read_text(encoding="utf-8") for n in (10, 100))
    for name in ("capture", "eviction", "collection"):
        assert f">{name}</text>" in with_events and f">{name}</text>" not in without


def test_the_ceiling_is_drawn_in(drawn: Path) -> None:
    for name in ("ttft_sustained", "p99_interactive", "cdf_ttft_10", "cdf_itl_100", "itl_timeline_10"):
        assert ">ceiling</text>" in (drawn / "plots" / f"{name}.svg").read_text(encoding="utf-8"), name


@needs_matplotlib
def test_the_run_of_record(tmp_path: Path) -> None:
    """Every section has something to show, and its figures are those of the committed tables."""
    folder = tmp_path / "record"
    shutil.copytree(RECORD, folder)
    write_report(load_study(folder), folder)
    page = Page(folder / "report.html")
    for name in ("final_ttft_table", "final_p99_table"):
        committed = (RECORD / f"{name}.md").read_text(encoding="utf-8")
        lines = [line.split("|")[1:-1] for line in committed.splitlines() if line.startswith("| ")]
        rows = [[cell.strip(" *") for cell in line] for line in lines]
        assert rows
        for row in rows:
            assert all(cell in page.cells for cell in row if cell and cell != NO_VALUE), row
    assert page.tags.count("figure") >= 15


# ----------------------------------------------------------------------------------------------------------- comparison


def two_runs(folder: Path, **second: object) -> list[Path]:
    folders = [folder / name for name in ("before", "after")]
    write_run(folders[0], spread=0.05)
    write_run(folders[1], {**BASES_MS, "hybrid": 5.0, "jit": 20.0}, spread=0.05, **second)  # type: ignore[arg-type]
    return folders


def test_differences_are_told_where_intervals_do_not_overlap(tmp_path: Path) -> None:
    found = comparisons([load_study(folder) for folder in two_runs(tmp_path)])
    assert {(one.anchor, one.pacing) for one in found} == {
        *((anchor, pacing) for anchor in ("ttft", "p99", "itl", "itl-p99") for pacing in ("interactive", "sustained")),
        ("ready", ""),
        ("memory", ""),
    }
    (ttft,) = (one for one in found if (one.anchor, one.pacing) == ("ttft", "sustained"))
    pairs = ttft.pairs(1)
    assert {case: pairs[case, 10].verdict for case in BASES_MS} == {
        "baseline": SAME,
        "cuda-graph": SAME,
        "jit": SLOWER,
        "hybrid": FASTER,
    }
    assert pairs["hybrid", 100].ratio == pytest.approx(5 / 6)
    assert verdicts([ttft], 1) == {FASTER: 2, SLOWER: 2, SAME: 4, UNKNOWN: 0}
    (ready,) = (one for one in found if one.anchor == "ready")
    assert verdicts([ready], 1)[UNKNOWN] == 4, "one sample each"


def test_a_comparison_is_a_page_in_the_first_folder(tmp_path: Path, without_plots: None) -> None:
    before, after = two_runs(tmp_path, device="Other GPU", emulated=True, lengths=(10, 200))
    result = CliRunner().invoke(app, ["report", str(before), str(after)])
    assert result.exit_code == 0 and "after against before: " in result.output
    assert not (after / "comparison.html").exists() and not (before / "report.html").exists()
    page = Page(before / "comparison.html")
    assert page.says("before and after; ratios are to before") and page.says("Emulated cases are among these")
    assert {"Fake GPU", "Other GPU", "JIT + CUDA graph (emulated)"} <= set(page.cells)
    assert {"apart: faster", "apart: slower", "overlap", "no interval", "0.833"} <= set(page.cells)
    assert "not measured" in page.cells, "a length that one run alone has"
    assert all(target.startswith(("#", "data:,")) for target in page.references)


@needs_matplotlib
def test_a_comparison_has_plots_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere" / "page.html"
    target.parent.mkdir()
    assert compare(two_runs(tmp_path), Console(quiet=True), target) == target
    names = {file.name for file in (target.parent / "plots").iterdir()}
    assert "comparison_1_itl_p99_sustained.svg" in names and len(names) == 16
    assert target.read_text(encoding="utf-8").count("<svg ") == 8
    assert len(set(Page(target).ids)) == len(Page(target).ids)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    before, _ = two_runs(tmp_path)
    with pytest.raises(ConfigError, match="named twice"):
        compare([before, tmp_path / "after" / ".." / "before"], Console(quiet=True))
    with pytest.raises(OutputError, match="holds no benchmark run"):
        compare([before, tmp_path], Console(quiet=True))
    assert not (before / "comparison.html").exists()


def test_several_runs_and_folders_of_one_name(tmp_path: Path, without_plots: None) -> None:
    folders = [tmp_path / name / "output" for name in ("a", "b", "c")]
    for number, folder in enumerate(folders):
        write_run(folder, {**BASES_MS, "hybrid": 6.0 + number})
    compare(folders, Console(quiet=True))
    page = Page(folders[0] / "comparison.html")
    assert page.cells.count("Ratio") == 2 * 10, "two columns in each of ten tables"
    assert all(page.says(f"{folder}, ms") for folder in folders), "names alike are told apart by their paths"
