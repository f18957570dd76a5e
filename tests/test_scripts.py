"""The shell scripts: they parse, can be run, and check a given interpreter and use it without installing anything."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [
    "run_tests.sh",
    "run_complete_benchmark.sh",
    ".ci/run",
    *(f"scripts/{p.name}" for p in ROOT.glob("scripts/*.sh")),
]


def setup_env(root: Path, *args: str, python: str | None, path: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs ``setup_env.sh`` of a checkout from another folder; ``python`` is JITGRAPH_PYTHON."""
    environment = {key: value for key, value in os.environ.items() if key not in ("JITGRAPH_PYTHON", "PYTHONPATH")}
    if python is not None:
        environment["JITGRAPH_PYTHON"] = python
    if path is not None:
        environment["PATH"] = path
    command = ["bash", str(root / "scripts" / "setup_env.sh"), *args]
    return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the set-up reads, in a folder with a space in its name."""
    root = tmp_path / "a checkout"
    (root / "scripts").mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt", "scripts/setup_env.sh", "scripts/check_environment.py"):
        shutil.copy(ROOT / name, root / name)
    return root


@pytest.fixture(scope="module")
def checker() -> ModuleType:
    """``scripts/check_environment.py`` as a module."""
    spec = importlib.util.spec_from_file_location("check_environment", ROOT / "scripts" / "check_environment.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_parses_and_is_executable(name: str) -> None:
    script = ROOT / name
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=30)
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail\n" in text


def test_given_interpreter_is_used_and_nothing_is_installed(checkout: Path) -> None:
    result = setup_env(checkout, "bench", python=sys.executable)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{Path(sys.executable).parent.resolve() / Path(sys.executable).name}\n"
    assert result.stderr == ""
    assert sorted(path.name for path in checkout.iterdir()) == ["constraints.txt", "pyproject.toml", "scripts"]


def test_given_interpreter_without_packages_is_refused_by_name(checkout: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    result = setup_env(checkout, "dev", python=str(tmp_path / "bare" / "bin" / "python"))
    assert result.returncode == 1
    assert result.stdout == ""
    for missing in ("torch>=2.11 (not installed)", "transformers>=5.17 (not installed)", "pytest>="):
        assert missing in result.stderr
    assert "Traceback" not in result.stderr
    assert not (checkout / ".venv").exists()


def test_given_interpreter_that_does_not_exist_is_refused(checkout: Path) -> None:
    result = setup_env(checkout, "dev", python="no-such-python")
    assert result.returncode == 1
    assert "JITGRAPH_PYTHON=no-such-python is not a program" in result.stderr


def test_machine_without_python_is_told_what_to_install(checkout: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "mktemp", "cat", "rm"):
        found = shutil.which(name)
        assert found is not None
        (tools / name).symlink_to(found)
    result = setup_env(checkout, "dev", python=None, path=str(tools))
    assert result.returncode == 1
    assert "Install Python 3.10 to 3.14 with its venv module" in result.stderr


def test_complete_environment_is_reused_without_installing(checkout: Path) -> None:
    """With the stamp of the same files in place pip is not called: the venv's pip here would fail if it were."""
    home = checkout / ".venv" / "bin"
    home.mkdir(parents=True)
    fake = home / "python"
    fake.write_text(f'#!/bin/sh\n[ "$1 $2 $3" = "-m pip install" ] && exit 9\nexec {sys.executable!r} "$@"\n')
    fake.chmod(0o755)
    first = setup_env(checkout, "dev", python=None)
    assert first.returncode == 9, first.stderr
    assert not (checkout / ".venv" / ".jitgraph-installed").exists()

    fake.write_text(f'#!/bin/sh\n[ "$1 $2 $3" = "-m pip install" ] && exit 0\nexec {sys.executable!r} "$@"\n')
    assert setup_env(checkout, "dev", python=None).returncode == 0
    assert (checkout / ".venv" / ".jitgraph-installed").exists()

    fake.write_text(f'#!/bin/sh\n[ "$1 $2 $3" = "-m pip install" ] && exit 9\nexec {sys.executable!r} "$@"\n')
    again = setup_env(checkout, "dev", python=None)
    assert again.returncode == 0, again.stderr
    assert again.stdout == f"{fake}\n"

    with (checkout / "constraints.txt").open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    assert setup_env(checkout, "dev", python=None).returncode == 9


def test_wrong_purpose_is_refused(checkout: Path) -> None:
    result = setup_env(checkout, "both", python=sys.executable)
    assert result.returncode == 2
    assert "usage" in result.stderr


def test_checker_compares_versions(checker: ModuleType) -> None:
    assert checker.numbers("2.13.0+cpu") == (2, 13, 0)
    assert checker.problem("pytest", "1.0") is None
    assert checker.problem("pytest", "999") == f"pytest>=999 (found {pytest.__version__})"
    assert checker.problem("no-such-package", "1") == "no-such-package>=1 (not installed)"


def test_checker_reads_every_requirement(checker: ModuleType) -> None:
    """The small parser finds what a TOML parser would: one entry a line, none lost."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    core = dict(checker.requirements(text, "dependencies"))
    assert {"torch", "numpy", "tokenizers", "safetensors", "huggingface_hub", "jinja2", "typer", "rich"} <= set(core)
    assert ("triton" in core) == (sys.platform == "linux")
    assert "transformers" in dict(checker.requirements(text, "bench"))
    assert checker.OPTIONAL | {"pytest", "hypothesis"} <= {
        name for group in ("bench", "dev") for name, _ in checker.requirements(text, group)
    }
