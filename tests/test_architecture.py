"""The shape of the code, checked on its syntax trees: imports only go down, dangerous tools stay where they belong.

``violations`` is the whole check. The tests at the end plant one fault of each kind and require that it is found.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 400

# A unit is a package or a top-level module; the vocabulary modules count as one unit, so do cli.py and cli_*.py, and
# llm.py and llm_*.py.
VOCABULARY = ("config", "types", "errors", "idle", "lengths", "lines", "locks", "metrics", "polling", "version")
FLOORS = {
    "vocabulary": 0,
    "text": 1,
    "ipc": 1,
    "jit": 1,
    "stream": 2,
    "ops": 2,
    "model": 3,
    "graphs": 4,
    "engine": 5,
    "server": 5,
    "llm": 6,
    "bench": 7,
    "cli": 8,
    "__main__": 9,
}
NO_TORCH = ("vocabulary", "text", "ipc", "stream", "server")
TORCH_LIKE = ("torch", "triton", "cuda", "transformers", "accelerate")

# Tool: the paths (files, or folders with a slash at the end) that may use it.
ALLOWED = {
    "CUDAGraph": ("graphs/capture.py", "bench/cases/hf_graphs.py"),
    "torch.compile": (),
    "cuda.bindings": ("jit/", "graphs/loop.py"),
    "socket": ("ipc/", "server/"),
    "subprocess": ("bench/", "server/spawn.py"),
    "pickle": (),
    "trust_remote_code": (),
    "os.environ": ("config.py",),
    "eval": (),
}
IMPORTS = {  # imported top-level module: the tool it is
    "cuda": "cuda.bindings",
    "socket": "socket",
    "socketserver": "socket",
    "subprocess": "subprocess",
    "pickle": "pickle",
    "cloudpickle": "pickle",
    "dill": "pickle",
    "marshal": "pickle",
    "shelve": "pickle",
}
ATTRIBUTES = {  # (left, right) of `left.right`: the tool it is; None is any left side
    (None, "CUDAGraph"): "CUDAGraph",
    (None, "make_graphed_callables"): "CUDAGraph",
    ("cuda", "graph"): "CUDAGraph",
    ("torch", "compile"): "torch.compile",
    ("torch", "load"): "pickle",
    ("os", "system"): "subprocess",
    ("os", "popen"): "subprocess",
    ("os", "environ"): "os.environ",
    ("os", "environb"): "os.environ",
    ("os", "getenv"): "os.environ",
    ("os", "putenv"): "os.environ",
}


def unit_of(module: str) -> str:
    """The unit of a dotted module name that starts with ``jitgraph``."""
    name = [*module.split("."), "llm"][1]  # jitgraph/__init__.py is the front door of llm.py
    if name in VOCABULARY:
        return "vocabulary"
    if name.startswith("llm_"):
        return "llm"
    return "cli" if name.startswith("cli_") else name


def imported_modules(tree: ast.Module, package: list[str], package_root: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of each import anywhere in a file, relative ones resolved.

    ``from jitgraph import x`` names the submodule where one exists, else the front door.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package[: len(package) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            if base != "jitgraph":
                yield node.lineno, base
                continue
            for alias in node.names:
                here = package_root / alias.name
                inside = here.is_dir() or here.with_suffix(".py").exists()
                yield node.lineno, f"jitgraph.{alias.name}" if inside else "jitgraph"


def tools_used(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, tool) of each use of a tool in ``ALLOWED``, imports of modules aside."""
    for node in ast.walk(tree):
        pairs: list[tuple[str | None, str]] = []
        if isinstance(node, ast.Attribute):
            left = node.value
            name = left.id if isinstance(left, ast.Name) else left.attr if isinstance(left, ast.Attribute) else None
            pairs = [(name, node.attr), (None, node.attr)]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            last = node.module.rsplit(".", 1)[-1]
            pairs = [pair for alias in node.names for pair in ((last, alias.name), (None, alias.name))]
        elif isinstance(node, ast.Call):
            for keyword in node.keywords:
                refused = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg == "trust_remote_code" and not refused:
                    yield node.lineno, "trust_remote_code"
            if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
                yield node.lineno, "eval"
        for tool in {ATTRIBUTES[pair] for pair in pairs if pair in ATTRIBUTES}:
            yield node.lineno, tool


def file_violations(path: Path, package_root: Path) -> Iterator[str]:
    """What is wrong with one file."""
    relative = path.relative_to(package_root)
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text, str(path))
    where = f"jitgraph/{relative.as_posix()}"
    if ast.get_docstring(tree) is None:
        yield f"{where}: no module docstring"
    lines = text.count("\n")
    if lines > MAX_LINES:
        yield f"{where}: {lines} lines, more than {MAX_LINES}"
    package = ["jitgraph", *relative.parent.parts]
    stem = [] if relative.stem == "__init__" else [relative.stem]
    unit = unit_of(".".join([*package, *stem]))
    if unit not in FLOORS:
        yield f"{where}: {unit} stands on no floor"
        return
    tools = list(tools_used(tree))
    for line, module in imported_modules(tree, package, package_root):
        top = module.split(".")[0]
        if top == "jitgraph":
            yield from edge_violations(f"{where}:{line}", unit, unit_of(module))
        elif unit in NO_TORCH and top in TORCH_LIKE:
            yield f"{where}:{line}: {top} in {unit}, which runs without torch"
        if top in IMPORTS:
            tools.append((line, IMPORTS[top]))
    for line, tool in tools:
        inside = relative.as_posix()
        if not any(inside == spot or (spot.endswith("/") and inside.startswith(spot)) for spot in ALLOWED[tool]):
            yield f"{where}:{line}: {tool} belongs in {', '.join(ALLOWED[tool]) or 'no file'}"


def edge_violations(where: str, unit: str, target: str) -> Iterator[str]:
    """What is wrong with an import from one unit of the project to another."""
    if target not in FLOORS:
        yield f"{where}: imports {target}, which stands on no floor"
    elif unit != target and FLOORS[target] > FLOORS[unit]:
        yield f"{where}: upward import, {unit} (floor {FLOORS[unit]}) of {target} (floor {FLOORS[target]})"
    elif unit != target and FLOORS[target] == FLOORS[unit] and unit != "__main__":
        yield f"{where}: sideways import, {unit} of {target} (both floor {FLOORS[unit]})"


def violations(root: Path) -> list[str]:
    """Everything wrong with the package ``jitgraph`` under ``root``, one line each."""
    package_root = root / "jitgraph"
    files = sorted(package_root.rglob("*.py"))
    return [line for path in files for line in file_violations(path, package_root)]


def test_the_code_has_the_declared_shape() -> None:
    assert len(list((ROOT / "jitgraph").rglob("*.py"))) > 20
    assert violations(ROOT) == []


def test_no_torch_packages_do_not_load_torch() -> None:
    """Also not by way of ``jitgraph/__init__.py`` or of a library."""
    files = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / "jitgraph").rglob("*.py"))
    modules = [".".join(file.parts).removesuffix(".__init__") for file in files]
    modules = [module for module in modules if unit_of(module) in NO_TORCH]
    assert {"jitgraph.config", "jitgraph.types", "jitgraph.errors"} <= set(modules)
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


# ------------------------------------------------------------------------------------- the checker finds planted faults


def plant(root: Path, name: str, body: str, docstring: str = '"""A module."""\n') -> list[str]:
    """Violations of a project whose only unusual file is ``jitgraph/name``."""
    base = {f"{unit}/__init__.py": "" for unit in ("text", "ipc", "jit", "ops", "model", "graphs", "engine", "server")}
    base |= {"__init__.py": "", "errors.py": "", "bench/__init__.py": "", "llm.py": "", "cli.py": ""}
    for file, content in {**base, name: body}.items():
        path = root / "jitgraph" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((docstring if file == name else '"""A module."""\n') + content, encoding="utf-8")
    return violations(root)


CLEAN = [
    ("model/decoder.py", "from jitgraph.ops import select\nfrom jitgraph import errors\nimport torch\n"),
    ("model/loader.py", "from .decoder import Decoder\nfrom ..ops import select\n"),
    ("graphs/capture.py", "import torch\ngraph = torch.cuda.CUDAGraph()\n"),
    ("config.py", "import os\nhome = os.environ.get('HOME')\n"),
    ("bench/run.py", "import subprocess\nimport transformers\nfrom jitgraph.llm import LLM\n"),
    ("jit/launch.py", "from cuda.bindings import driver\n"),
    ("model/hf.py", "import re\nre.compile('x')\nload(trust_remote_code=False)\nmodel.eval()\n"),
    ("__main__.py", "from jitgraph.cli import main\n"),
    ("cli.py", "from jitgraph import __version__\nfrom jitgraph import cli_progress\n"),
]
FAULTS = [
    ("ops/bad.py", "from jitgraph.model import decoder\n", "upward import, ops (floor 2) of model (floor 3)"),
    ("ops/bad.py", "def f():\n    import jitgraph.engine\n", "upward import, ops (floor 2) of engine (floor 5)"),
    ("ops/bad.py", "from ..model.decoder import Decoder\n", "upward import, ops (floor 2) of model (floor 3)"),
    ("ops/bad.py", "from jitgraph import cli\n", "upward import, ops (floor 2) of cli (floor 8)"),
    ("engine/bad.py", "from jitgraph import LLM\n", "upward import, engine (floor 5) of llm (floor 6)"),
    ("engine/bad.py", "import jitgraph.cli_progress\n", "upward import, engine (floor 5) of cli (floor 8)"),
    ("errors.py", "from .text import tokenizer\n", "upward import, vocabulary (floor 0) of text (floor 1)"),
    ("text/bad.py", "import jitgraph.jit.kernel\n", "sideways import, text of jit (both floor 1)"),
    ("engine/bad.py", "from jitgraph.server import app\n", "sideways import, engine of server (both floor 5)"),
    ("misc/bad.py", "", "misc stands on no floor"),
    ("cli.py", "import jitgraph.misc\n", "imports misc, which stands on no floor"),
    ("text/bad.py", "import torch.nn\n", "torch in text, which runs without torch"),
    ("types.py", "def f():\n    from torch import Tensor\n", "torch in vocabulary, which runs without torch"),
    ("server/bad.py", "from transformers import AutoTokenizer\n", "transformers in server, which runs without torch"),
    ("ipc/bad.py", "import triton\n", "triton in ipc, which runs without torch"),
    (
        "engine/bad.py",
        "import torch\ng = torch.cuda.CUDAGraph()\n",
        "CUDAGraph belongs in graphs/capture.py",
    ),
    (
        "engine/bad.py",
        "from torch.cuda import CUDAGraph\n",
        "CUDAGraph belongs in graphs/capture.py",
    ),
    (
        "engine/bad.py",
        "with torch.cuda.graph(g):\n    pass\n",
        "CUDAGraph belongs in graphs/capture.py",
    ),
    ("model/bad.py", "import torch\nf = torch.compile(f)\n", "torch.compile belongs in no file"),
    ("model/bad.py", "from torch import compile as c\n", "torch.compile belongs in no file"),
    ("engine/bad.py", "from cuda.bindings import runtime\n", "cuda.bindings belongs in jit/, graphs/loop.py"),
    ("llm.py", "import socket\n", "socket belongs in ipc/, server/"),
    ("cli.py", "def f():\n    import subprocess\n", "subprocess belongs in bench/"),
    ("cli.py", "import os\nos.system('ls')\n", "subprocess belongs in bench/"),
    ("ipc/bad.py", "import pickle\n", "pickle belongs in no file"),
    ("model/bad.py", "import torch\ntorch.load('x')\n", "pickle belongs in no file"),
    ("bench/bad.py", "load('x', trust_remote_code=True)\n", "trust_remote_code belongs in no file"),
    ("bench/bad.py", "load('x', trust_remote_code=flag)\n", "trust_remote_code belongs in no file"),
    ("engine/bad.py", "import os\nos.environ['X'] = '1'\n", "os.environ belongs in config.py"),
    ("cli.py", "from os import getenv\n", "os.environ belongs in config.py"),
    ("cli.py", "exec('1')\n", "eval belongs in no file"),
    ("cli.py", "x = 1\n" * MAX_LINES, f"{MAX_LINES + 1} lines, more than {MAX_LINES}"),
]


@pytest.mark.parametrize(("name", "body"), CLEAN)
def test_clean_files_pass(tmp_path: Path, name: str, body: str) -> None:
    (tmp_path / "jitgraph" / "model").mkdir(parents=True)
    assert plant(tmp_path, name, body) == []


@pytest.mark.parametrize(("name", "body", "message"), FAULTS)
def test_planted_faults_are_found(tmp_path: Path, name: str, body: str, message: str) -> None:
    found = plant(tmp_path, name, body)
    assert len(found) == 1, found
    assert found[0].startswith(f"jitgraph/{name}")
    assert message in found[0]


def test_missing_docstring_is_found(tmp_path: Path) -> None:
    assert plant(tmp_path, "cli.py", "x = 1\n", docstring="") == ["jitgraph/cli.py: no module docstring"]
