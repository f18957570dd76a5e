#!/usr/bin/env bash
# Makes .venv-vllm in the project's folder and installs vLLM there. It pins a PyTorch of its own, so it cannot share the
# project's environment. Arguments go to pip, for instance a version: make_venv_vllm.sh 'vllm==X.Y.Z'
set -euo pipefail

root="$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv-vllm"
base="${JITGRAPH_PYTHON:-python3}"

if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "$base is not Python 3.10 or newer: set JITGRAPH_PYTHON to one that is." >&2
    exit 1
fi
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    "$base" -m venv --clear "$venv"
fi
if [[ $# -eq 0 ]]; then
    set -- vllm
fi
"$venv/bin/python" -m pip install "$@"
"$venv/bin/python" -c 'import importlib.metadata as m; print("installed: vLLM", m.version("vllm"))'

cat <<TEXT
Point the benchmark at it:
    .venv/bin/jitgraph bench vllm --python vllm=.venv-vllm/bin/python --output output
TEXT
