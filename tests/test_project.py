"""The project's own papers: declared dependencies, pinned versions, citation, links that lead somewhere."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from jitgraph.config import ENVIRONMENT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/architecture.md",
    "docs/benchmarking.md",
    "docs/log.md",
    "docs/metrics.md",
    "docs/research.md",
    "docs/server.md",
)
# Used where they are installed, named in a sentence where they are not: each pins a PyTorch of its own.
SEPARATE = {"tensorrt_llm", "vllm"}
BROUGHT_BY_TORCH = {"cuda"}
FOLDER_EXTRAS = {"bench": "bench", "model": "hf", "engine": "serve", "ipc": "serve", "server": "serve"}


def project() -> dict[str, Any]:
    """The ``[project]`` table of ``pyproject.toml``."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def modules(requirements: list[str]) -> set[str]:
    """Import names of requirements."""
    return {Requirement(text).name.replace("-", "_") for text in requirements}


def imports(path: Path) -> set[str]:
    """Top-level names of the absolute imports anywhere in a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_every_import_is_declared() -> None:
    """A user without extras gets all that the runtime imports; a folder may use its own extra besides."""
    table = project()
    core = modules(table["dependencies"]) | BROUGHT_BY_TORCH
    for path in sorted((ROOT / "jitgraph").rglob("*.py")):
        folder = path.relative_to(ROOT / "jitgraph").parts[0]
        extra = table["optional-dependencies"].get(FOLDER_EXTRAS.get(folder, ""), [])
        allowed = core | modules(extra) | (SEPARATE if folder == "bench" else set())
        undeclared = imports(path) - set(sys.stdlib_module_names) - {"jitgraph"} - allowed
        assert undeclared == set(), f"{path.relative_to(ROOT)} imports what pyproject.toml does not declare for it"


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_pin_what_pyproject_asks_for(python: str) -> None:
    """On every supported Python: at most one pin a package, one for each requirement, inside its range."""
    environment = {"python_version": python, "sys_platform": "linux"}
    pins: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        (specifier,) = pin.specifier
        assert specifier.operator == "==", line
        if pin.marker is None or pin.marker.evaluate(environment):
            assert canonicalize_name(pin.name) not in pins, f"two pins of {pin.name} for Python {python}"
            pins[canonicalize_name(pin.name)] = specifier.version
    table = project()
    for text in [
        *table["dependencies"],
        *(entry for extra in table["optional-dependencies"].values() for entry in extra),
    ]:
        wanted = Requirement(text)
        if wanted.name != "jitgraph":
            assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), text


def test_python_versions_agree() -> None:
    """What pyproject promises is what the set-up accepts."""
    table = project()
    assert table["requires-python"] == f">={PYTHONS[0]}"
    classifiers = {text.rsplit(" :: ", 1)[-1] for text in table["classifiers"] if ":: Python :: 3." in text}
    assert classifiers == set(PYTHONS)
    first, last = (tuple(int(part) for part in version.split(".")) for version in (PYTHONS[0], PYTHONS[-1]))
    assert f"{first} <= sys.version_info[:2] <= {last}" in (ROOT / "scripts/setup_env.sh").read_text(encoding="utf-8")


def test_citation_names_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == project()["version"]
    paper = citation["references"][0]
    assert citation["preferred-citation"] == paper
    assert paper["title"].startswith("Hybrid JIT-CUDA Graph Optimization")
    assert [author["family-names"] for author in paper["authors"]] == ["Yadav", "Zhao"]
    assert {"type": "other", "value": "arXiv:2604.23467"}.items() <= paper["identifiers"][0].items()


def test_changelog_has_the_version() -> None:
    assert f"## [{project()['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_license_is_the_one_declared() -> None:
    assert project()["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("MIT License\n")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_python_snippets(name: str) -> None:
    """Relative links lead to files that exist, headings included, and Python snippets parse."""
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        ast.parse(snippet)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in targets:
        if "://" in target:
            continue
        file, _, heading = target.partition("#")
        goal = path.parent / file if file else path
        assert goal.exists(), f"{name} links to {target}"
        if heading:
            headings = re.findall(r"^#+ (.+)$", goal.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}
            assert heading in slugs, f"{name} links to {target}"


def test_the_table_of_environment_variables_is_whole() -> None:
    """Every variable that the code or a set-up script names is in ``config.ENVIRONMENT``, and the other way round."""
    sources = [*(ROOT / "jitgraph").rglob("*.py"), *(ROOT / "scripts").iterdir(), *ROOT.glob("*.sh")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources if path.suffix in (".py", ".sh"))
    named = set(re.findall(r"\b(?:JITGRAPH|HF|XDG|TRITON)_[A-Z][A-Z_]*\b", text))
    assert named == set(ENVIRONMENT)


@pytest.mark.parametrize("collecting", [True, False])
def test_names_of_the_package_come_when_asked_for_and_leave_the_collector_as_it_was(collecting: bool) -> None:
    script = f"""
import gc, sys
import jitgraph
assert "torch" not in sys.modules
gc.enable() if {collecting} else gc.disable()
jitgraph.Client, jitgraph.AsyncClient
assert "torch" not in sys.modules
assert jitgraph.LLM.__name__ == "LLM" and "torch" in sys.modules
assert gc.isenabled() is {collecting}
try:
    jitgraph.Nothing
except AttributeError as error:
    assert "no attribute 'Nothing'" in str(error)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
