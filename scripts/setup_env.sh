#!/usr/bin/env bash
# Makes sure there is a Python environment for the project, and prints its interpreter's path (the only line on stdout).
#
#   scripts/setup_env.sh bench|dev
#
# JITGRAPH_PYTHON set: that interpreter is checked and used as it is; nothing is downloaded or installed.
# Otherwise:           .venv in the project's folder, made with the first Python 3.10 to 3.14 found and filled with the
#                      versions in constraints.txt. A second run finds it complete and installs nothing.
set -euo pipefail

root="$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
purpose="${1:-dev}"
say() { printf '%s\n' "$*" >&2; }

if [[ "$purpose" != bench && "$purpose" != dev ]]; then
    say "usage: setup_env.sh bench|dev"
    exit 2
fi

if [[ -n "${JITGRAPH_PYTHON:-}" ]]; then
    if ! python="$(command -v -- "$JITGRAPH_PYTHON")"; then
        say "JITGRAPH_PYTHON=$JITGRAPH_PYTHON is not a program: set it to a Python interpreter, or unset it."
        exit 1
    fi
    # Absolute, without resolving links: a virtual environment's interpreter is known by its path.
    python="$(CDPATH='' cd "$(dirname "$python")" && pwd)/$(basename "$python")"
    "$python" "$root/scripts/check_environment.py" "$purpose" >&2
    printf '%s\n' "$python"
    exit 0
fi

venv="$root/.venv"
python="$venv/bin/python"
stamp="$venv/.jitgraph-installed"

usable() { # an interpreter of a version that constraints.txt covers
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1
}

make_venv() {
    local candidate log
    log="$(mktemp)"
    for candidate in python3 python3.12 python3.13 python3.11 python3.14 python3.10 python; do
        usable "$candidate" || continue
        say "Making .venv with $("$candidate" --version)"
        if "$candidate" -m venv --clear "$venv" >"$log" 2>&1; then
            rm -f "$log"
            return 0
        fi
        say "$candidate could not make a virtual environment:"
        cat "$log" >&2
    done
    rm -f "$log"
    say "No usable Python found. Install Python 3.10 to 3.14 with its venv module (on Debian and Ubuntu: the package"
    say "python3-venv), or set JITGRAPH_PYTHON to an interpreter that already has the packages in pyproject.toml."
    return 1
}

fingerprint() { # of everything that decides what is installed, and of the folder that the editable install points to
    "$python" - "$root" <<'PYTHON'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
parts = [str(root).encode(), *((root / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())
PYTHON
}

pin() { sed -n "s/^\($1==[^; ]*\).*/\1/p" "$root/constraints.txt" | head -n 1; }

# The checks import a fraction of the modules that pip would compile, and run_tests.sh has Python keep what it compiles.
compile="$([[ "$purpose" == dev ]] && echo --no-compile || echo --compile)"
install() { "$python" -m pip install --disable-pip-version-check "$compile" -c constraints.txt "$@" >&2; }

if ! usable "$python" || ! "$python" -m pip --version >/dev/null 2>&1; then
    make_venv
fi

wanted="$(fingerprint)"
if [[ ! -f "$stamp" || "$(cat "$stamp")" != "$wanted" ]]; then
    say "Installing the packages of constraints.txt into .venv (once; PyTorch is the largest)"
    cd "$root"
    first=("$(pin torch)" "setuptools>=77") # the second, of pyproject.toml, saves an environment made to build in
    if [[ "$(uname -s)" == Linux ]]; then
        first+=("$(pin triton)")
    fi
    install "${first[@]}"
    install --no-build-isolation -e ".[bench,dev]"
    printf '%s\n' "$wanted" >"$stamp"
fi
printf '%s\n' "$python"
