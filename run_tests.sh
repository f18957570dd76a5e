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

has() { "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)' "$1"; }

if has ruff && has mypy; then
    echo "== ruff"
    "$python" -m ruff check .
    "$python" -m ruff format --check .
    echo "== mypy"
    "$python" -m mypy
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
    options+=(-n "$workers")
fi
echo "== pytest"
exec "$python" -m pytest "${options[@]}" "$@"
