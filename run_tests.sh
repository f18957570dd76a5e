#!/usr/bin/env bash
# Sets the environment up, then checks style, types and behaviour. Arguments go to pytest:
#
#   ./run_tests.sh                          everything this machine can run
#   ./run_tests.sh -m gpu                   only what needs a GPU
#   JITGRAPH_PYTHON=python3 ./run_tests.sh  with an environment that exists; nothing is downloaded
set -euo pipefail

root="$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="$("$root/scripts/setup_env.sh" dev)"
cd "$root"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
unset PYTHONDONTWRITEBYTECODE # set in many containers: each of the processes that tests start would compile all it imports

has() { "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)' "$1"; }

types=""
if has ruff && has mypy; then
    echo "== ruff"
    "$python" -m ruff check .
    "$python" -m ruff format --check .
    # It takes most of a minute, of one core, where it has no cache: the tests run beside it, and what it says comes last.
    said="$(mktemp)"
    "$python" -m mypy >"$said" 2>&1 &
    types=$!
    trap 'kill "$types" 2>/dev/null || true; rm -f "$said"' EXIT
else
    echo "== ruff and mypy are not both installed for $python: style and types are not checked, the tests run alone"
fi

# Two workers where two cores are; one where tests share a GPU, because they would share its memory and its time too.
workers="$("$python" - <<'PYTHON'
import importlib.util, os, torch
parallel = importlib.util.find_spec("xdist") and (os.cpu_count() or 1) >= 2 and not torch.cuda.is_available()
print(2 if parallel else 0)
PYTHON
)"
options=(--durations=10 -rs)
if [[ "$workers" != 0 ]]; then
    options+=(-n "$workers" --dist loadfile --no-loadscope-reorder) # whole files: no worker repeats another's fixtures
fi
echo "== pytest"
status=0
"$python" -m pytest "${options[@]}" "$@" || status=$?
if [[ -n "$types" ]]; then
    echo "== mypy"
    wait "$types" || status=1
    cat "$said"
fi
exit "$status"
