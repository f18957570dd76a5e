"""The documents: they quote the record and the published tables, the paths, names and links in them exist."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from quote import DOCUMENTS
from runtime_parts.quotes import MORE_BLOCKS, PLACE, Missing, Sources, fill
from runtime_parts.quotes_text import our_cells, published_cells

from jitgraph.bench.plan import CASES

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "h200"
ALL = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
APPROACHES = sorted(name for name in ALL if name.startswith("docs/approaches/"))
ABOUT_CODE = [*APPROACHES, "docs/from_the_paper.md", "docs/research.md", "docs/benchmarking.md"]
QUOTED = [*APPROACHES, "docs/from_the_paper.md", "docs/research.md"]
"""Their figures come from blocks alone."""
KINDS = (".py", ".sh", ".md", ".json", ".toml", ".txt", ".cff", "/")
NOT_KEPT = ("output/", "raw/")
"""Beginnings of paths that a run makes."""


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def sources() -> Sources:
    files = (RECORD / "runtime.json", RECORD / "summary.json", ROOT / "benchmarks" / "published.json")
    return Sources(*map(load, files))


# -------------------------------------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_quote_the_record(name: str, sources: Sources) -> None:
    text = text_of(name)
    filled = fill(text, sources.record, sources.summary, sources.published)
    assert filled == text, f"run benchmarks/quote.py: {name} does not quote the record"
    assert all(match[3].strip() for match in PLACE.finditer(text)), f"{name} has a place without figures"


def test_every_document_about_the_approaches_is_filled_and_every_block_is_shown() -> None:
    assert {*APPROACHES, "docs/from_the_paper.md", "docs/research.md"} <= {*DOCUMENTS}
    places = [match[2] for name in DOCUMENTS for match in PLACE.finditer(text_of(name))]
    assert {*MORE_BLOCKS} <= {*places} and len({*places}) == len(places)


def changed(value: Any) -> Any:
    """The same record with every figure and every reason another one."""
    if isinstance(value, dict):
        return {name: one if name in ("prompt_tokens", "lengths") else changed(one) for name, one in value.items()}
    if isinstance(value, list):
        return [changed(one) for one in value]
    if isinstance(value, float):
        return value * 1.37 + 0.11
    return f"{value}?" if isinstance(value, str) and " " in value else value


@pytest.mark.parametrize("name", MORE_BLOCKS)
def test_a_block_follows_its_figures(name: str, sources: Sources) -> None:
    block, place = MORE_BLOCKS[name], f"<!-- figures: {name} -->\nas it was\n<!-- /figures -->"
    other = Sources(changed(sources.record), changed(sources.summary), changed(sources.published))
    assert block(sources) != block(other), "another record, another text"
    for lines in (block(sources), block(other)):
        for at, line in enumerate(lines):
            if at and line.startswith("|") and lines[at - 1].startswith("|"):
                assert line.count("|") == lines[at - 1].count("|"), f"columns: {line}"
    with pytest.raises(Missing):
        block(Sources({"figures": {}}, {}))
    assert fill(place, {"figures": {}}, {}) == place, "no figures, no change"
    filled = fill(place, sources.record, sources.summary, sources.published)
    assert "as it was" not in filled and "\n".join(block(sources)) in filled


def row(case: str, protocol: str, metric: str, tokens: int, mean: float, **more: Any) -> dict[str, Any]:
    names = {"case": case, "protocol": protocol, "metric": metric, "prompt_tokens": tokens, "mean": mean}
    return {**names, "pacing": "interactive", "std": 0.1, "p99": mean, "ratio": 2.0, "peak_memory_gib": None, **more}


def known() -> dict[str, Any]:
    """A study of two lengths whose figures can be told by heart: the hybrid is beaten once, TensorRT-LLM is missing."""
    times = {"baseline": (20.0, 22.0), "cuda-graph": (10.0, 24.0), "jit": (12.0, 12.0), "hybrid": (4.0, 16.0)}
    rows = []
    for case, pair in times.items():
        for tokens, ms in zip((10, 500), pair, strict=True):
            rows.append(row(case, "ttft", "ttft_ms", tokens, ms))
            rows.append(row(case, "p99", "ttft_ms", tokens, ms, p99=ms + 1))
            rows.append(row(case, "p99", "ttft_ms", tokens, 99.0, pacing="sustained"))
        rows.append(row(case, "ttft", "itl_ms", 10, 77.0))
        rows.append(row(case, "p99", "itl_ms", 10, pair[0] / 2, peak_memory_gib=pair[0]))
        rows.append(row(case, "warmup", "ready_s", 0, 5.0))
    rows.append(row("linears", "ttft", "ttft_ms", 1, 1.0))
    environment = {"device_name": "Card", "torch": "1.2"}
    model = {"name": "m", "weights": "random", "dtype": "float16"}
    cases = {"hybrid": {"isolated": True, "device_loop": True}, "tensorrt-llm": {"reason": "not installed"}}
    return {"environment": environment, "model": model, "cases": cases, "rows": rows}


def test_blocks_of_a_known_study() -> None:
    figures = {"launches_per_step": {"hybrid": 1 / 64, "jit": 900.0}, "host_us_per_step": {"hybrid": 20.0}}
    here = Sources({"figures": figures}, known())
    shown = MORE_BLOCKS["approaches"](here)
    assert "one Card, m, random weights, float16, batch 1, 50 ms before each request; PyTorch 1.2." in shown[0]
    assert "The hybrid's engine in a process of its own, decoding in loops on the device." in shown[0]
    assert "| JIT + CUDA graph | 10.00 | 11.00 | 2.00 | 0.016 | 5.0 | 4.0 |" in shown
    assert "| JIT | 12.00 | 13.00 | 6.00 | 900 | 5.0 | 12.0 |" in shown
    assert "| TensorRT-LLM | \u2013 | \u2013 | \u2013 | \u2013 | \u2013 | \u2013 |" in shown
    assert shown[-1] == "*TensorRT-LLM has no figures in the run of record: not installed.*"
    assert MORE_BLOCKS["case-tensorrt-llm"](here)[-1] == shown[-1]
    one = MORE_BLOCKS["case-hybrid"](here)
    assert "| P99 of TTFT, ms | 5.00 | 17.00 | 11.00 |" in one and "| TTFT, ms | 4.00 | 16.00 | 10.00 |" in one
    assert "| host time a decode step (runtime's record), µs | 20 |" in one
    assert not [line for line in one if "after 500" in line], "what was not measured has no line"
    assert "| JIT kernels inside the graph | 10.00 | 2.00 |" in MORE_BLOCKS["parts"](here)
    assert "| CUDA graph | 10.00 | 24.00 | 2.40 | 1.06 |" in MORE_BLOCKS["growth"](here)


def test_the_studys_own_attribution_comes_first() -> None:
    summary = known()
    summary["cases"]["hybrid"]["attribution"] = {"launches_per_step": 1.0, "host_us_per_step": 44.0}
    here = Sources({"figures": {"launches_per_step": {"hybrid": 1 / 64, "jit": 900.0}}}, summary)
    one = MORE_BLOCKS["case-hybrid"](here)
    assert "| launches a decode step | 1 |" in one and "| host time a decode step, µs | 44 |" in one
    assert not [line for line in MORE_BLOCKS["case-jit"](here) if "launches" in line], "two records do not mix"


def test_conclusions_of_a_known_study(sources: Sources) -> None:
    """Verdicts follow the cells: the hybrid is beaten at one length of two, graphs alone lose to the baseline there."""
    figures = {"window_stream_tokens": 20_000, "window_graph_growth_bytes": 64}
    shown = MORE_BLOCKS["conclusions"](Sources({"figures": figures}, known(), sources.published))
    found = {line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1:] for line in shown}
    first = found["the hybrid has the lowest TTFT and P99 of all cases"]
    assert first == ["20 of 20", "20 of 20", "2 of 4", "in part |"]
    assert found["the hybrid is faster than TensorRT-LLM: average TTFT, times"][2:] == ["\u2013", "not measured |"]
    assert found["the hybrid is faster than JIT: average TTFT, times"][2:] == ["1.20", "yes |"]
    assert found["graphs alone are slower than the baseline, TTFT and P99"][1:] == ["19 of 20", "2 of 4", "in part |"]
    assert found["the hybrid's TTFT varies least (standard deviation)"][2:] == ["0 of 2", "no |"], "a tie is not less"
    assert found["rolling graphs keep memory bounded at any length"][-1] == "no |"
    summary = known()
    summary["rows"] = [one for one in summary["rows"] if one["case"] != "hybrid"]
    with pytest.raises(Missing):
        MORE_BLOCKS["conclusions"](Sources({"figures": figures}, summary, sources.published))


def test_what_is_said_about_the_published_tables_follows_from_them(sources: Sources) -> None:
    """The sentences of ``docs/from_the_paper.md`` that no block holds."""
    published, cells = sources.published, published_cells(sources.published)
    stated, overview = published["stated"], published["overview"]
    columns = [*cells.ttft_ms.values(), *cells.p99_ms.values(), *cells.std_ms.values()]
    assert {len(column) for column in columns} == {len(cells.lengths)}
    assert {*cells.ttft_ms} == {*cells.p99_ms} == {*CASES}
    for which in ("ttft_ms", "p99_ms"):
        off = {case: abs(stated[f"average_{which}"][case] - (cells.average(which, case) or 0)) for case in CASES}
        assert min(off.values()) > 0.015, "no stated average is exactly that of its cells"
        averages, times = stated[f"average_{which}"], stated[which.replace("_ms", "_times")]
        wrong = {case for case, factor in times.items() if abs(averages[case] / averages["hybrid"] - factor) > 0.006}
        assert wrong == ({"tensorrt-llm"} if which == "ttft_ms" else set())
        if which == "ttft_ms":
            assert {*sorted(off, key=off.__getitem__)[-2:]} == {"cuda-graph", "jit"}
    readme, other = stated["average_p99_ms"], overview["p99_ms"]
    assert readme["cuda-graph"] > readme["jit"] and other["cuda-graph"] < other["jit"]
    for text in (stated["average_ttft_ms"], stated["average_p99_ms"], overview["ttft_ms"], overview["p99_ms"]):
        assert text["baseline"] / text["hybrid"] < 2 < 4 < stated["key_finding_times"]["baseline"]
    assert all(cells.ttft_ms[case][0] > 4 * cells.ttft_ms[case][1] for case in ("baseline", "jit", "tensorrt-llm"))
    assert all(cells.std_ms[case][0] > cells.ttft_ms[case][0] for case in ("baseline", "jit"))
    assert all((cells.times("ttft_ms", c, skip=1) or 9) < 1.105 for c in ("baseline", "jit", "tensorrt-llm"))
    assert {round(a - b, 2) for a, b in zip(cells.p99_ms["jit"], cells.p99_ms["hybrid"], strict=True)} == {1.0}
    assert all(cells.p99_ms["cuda-graph"][at] == max(c[at] for c in cells.p99_ms.values()) for at in range(10))
    assert (cells.wins("ttft_ms", "hybrid"), cells.wins("p99_ms", "hybrid")) == ((10, 10), (10, 10))


def test_what_is_said_in_short_follows_from_the_record(sources: Sources) -> None:
    """Both documents say that the hybrid is first and that graphs alone are faster than no graphs."""
    shown = "\n".join(MORE_BLOCKS["conclusions"](sources))
    assert re.search(r"^\| the hybrid has the lowest .* \| yes \|$", shown, re.MULTILINE)
    assert re.search(r"^\| graphs alone are slower than the baseline.* \| no \|$", shown, re.MULTILINE)
    ours = our_cells(sources.summary)
    growth = {case: values[-1] / values[0] for case, values in ours.ttft_ms.items()}
    assert max(growth["baseline"], growth["jit"]) < 1.5 < min(growth["cuda-graph"], growth["hybrid"])


@pytest.mark.parametrize("name", QUOTED)
def test_no_figure_is_typed_by_hand(name: str) -> None:
    """Outside the blocks a measured quantity may not stand; the pause before a request is a rule, not a measurement."""
    prose = PLACE.sub("", text_of(name))
    found = {match[0] for match in re.finditer(r"(?<![\w.])\d[\d.,]*\s?(?:ms|µs|us|s|GiB|MiB|TB/s|%)(?!\w)", prose)}
    assert found <= {"50 ms"}, f"{name} has figures that no block fills"


# ------------------------------------------------------------------------------------------------------ paths and links


def paths_in(text: str) -> Iterator[str]:
    """What stands between backticks and names a file or a folder."""
    for quoted in re.findall(r"`([^`\s]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if quoted.endswith(KINDS) and not quoted.startswith(("-", *NOT_KEPT)) and not set(quoted) & set("*<>{}…:"):
            yield quoted


@pytest.mark.parametrize("name", [*APPROACHES, "docs/from_the_paper.md"])
def test_paths_exist(name: str) -> None:
    found = [*paths_in(text_of(name))]
    assert found or name.endswith("README.md")
    assert [path for path in found if not (ROOT / path).exists()] == []


def defined_in(path: Path) -> set[str]:
    """Names that a module defines at its top, and those of its classes' methods with the class before them."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


@pytest.mark.parametrize("name", ABOUT_CODE)
def test_names_beside_paths_exist(name: str) -> None:
    """`path` (`name`, `Class.method`): each is defined there."""
    named = re.findall(r"`([\w/]+\.py)`\s+\(((?:`[\w.]+`(?:,\s+)?)+)\)", text_of(name))
    assert named or name not in APPROACHES or name.endswith("README.md")
    for path, names in named:
        missing = set(re.findall(r"`([\w.]+)`", names)) - defined_in(ROOT / path)
        assert missing == set(), f"{name}: {path} does not define {', '.join(sorted(missing))}"


def slugs(path: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("name", ALL)
def test_relative_links_lead_somewhere(name: str) -> None:
    path = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(name)):
        if "://" in target:
            continue
        file, _, heading = target.partition("#")
        goal = path.parent / file if file else path
        assert goal.exists(), f"{name} links to {target}"
        assert not heading or heading in slugs(goal), f"{name} links to {target}"


def test_planted_mistakes_are_found(tmp_path: Path) -> None:
    """The checks above can fail."""
    assert [*paths_in("`a/b.py` `output/x.csv` `--option` ```\n`c/d.py`\n``` `e/`")] == ["a/b.py", "e/"]
    (tmp_path / "m.py").write_text("X = 1\nY: int = 2\nclass C:\n    def m(self): ...\ndef f(): ...\n")
    assert defined_in(tmp_path / "m.py") == {"X", "Y", "C", "C.m", "f"}
    (tmp_path / "d.md").write_text("# What's *new*, and why\n")
    assert slugs(tmp_path / "d.md") == {"whats-new-and-why"}


def test_the_paper_is_cited() -> None:
    text, citation = text_of("docs/from_the_paper.md"), text_of("CITATION.cff")
    assert "arXiv:2604.23467" in text and "arXiv:2604.23467" in citation
    assert "Yadav, Divakar Kumar and Zhao, Tian" in text
