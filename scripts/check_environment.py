"""Says whether the Python that runs this file can run the project, and what is missing where it cannot.

Called by ``setup_env.sh`` for an interpreter given by the user. Reads the ranges in ``pyproject.toml``, imports each
package and compares its version. Changes nothing. Uses the standard library alone, and syntax old enough that an
interpreter too old for the project can still say so.

Usage: check_environment.py bench|dev
"""

import importlib
import importlib.metadata
import re
import sys
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
GROUPS = {"bench": ("dependencies", "bench"), "dev": ("dependencies", "bench", "dev")}
# The scripts do without these: tests one after the other, checks left out (run_tests.sh says so).
OPTIONAL = {"pytest-xdist", "ruff", "mypy", "pre-commit"}


def requirements(text, group):
    """(package, least version) of each requirement of one list in ``pyproject.toml`` that this system needs."""
    block = re.search(rf"^{group} = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    if block is None:
        raise SystemExit(f"pyproject.toml has no list named {group}")
    wanted = []
    for entry in re.findall(r'^\s*"(.+)",$', block.group(1), re.MULTILINE):
        match = re.match(r"([\w.-]+)>=([\d.]+)(?:,<[\d.]+)?(; sys_platform == 'linux')?$", entry)
        if match and (match.group(3) is None or sys.platform == "linux"):
            wanted.append((match.group(1), match.group(2)))
    return wanted


def numbers(version):
    """The leading numbers of a version: 2.13.0+cpu is (2, 13, 0)."""
    return tuple(int(part) for part in re.match(r"[\d.]*\d", version).group().split("."))


def problem(package, least):
    """What is wrong with one package, or None."""
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"{package}>={least} (not installed)"
    if numbers(found) < numbers(least):
        return f"{package}>={least} (found {found})"
    try:
        importlib.import_module(package.replace("-", "_"))
    except Exception as error:  # whatever an import raises, the package cannot be used
        return f"{package} {found} (does not import: {type(error).__name__}: {error})"
    return None


def main():
    """Prints nothing and exits 0 where all is there; else names what is missing and exits 1."""
    text = PYPROJECT.read_text(encoding="utf-8")
    least = re.search(r'^requires-python = ">=([\d.]+)"', text, re.MULTILINE).group(1)
    if sys.version_info[:2] < numbers(least):
        sys.exit(f"{sys.executable} is Python {sys.version.split()[0]}, but the project needs {least} or newer.")
    missing = []
    for group in GROUPS[sys.argv[1]]:
        for package, version in requirements(text, group):
            wrong = None if package in OPTIONAL else problem(package, version)
            if wrong:
                missing.append(wrong)
    if missing:
        sys.exit(
            f"{sys.executable} cannot run the project; it lacks: {', '.join(missing)}. "
            "Install these there, or unset JITGRAPH_PYTHON to let this script make a .venv."
        )


if __name__ == "__main__":
    main()
