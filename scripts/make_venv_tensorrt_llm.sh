#!/usr/bin/env bash
# Makes .venv-tensorrt-llm in the project's folder and installs TensorRT-LLM there, for case 5 of the benchmark. It pins
# a PyTorch of its own, so it cannot share the project's environment. Arguments go to pip, for instance a version:
# make_venv_tensorrt_llm.sh 'tensorrt-llm==X.Y.Z'
set -euo pipefail

root="$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv-tensorrt-llm"
base="${JITGRAPH_PYTHON:-python3}"

if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "$base is not Python 3.10 or newer: set JITGRAPH_PYTHON to one that is." >&2
    exit 1
fi
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    "$base" -m venv --clear "$venv"
fi
if [[ $# -eq 0 ]]; then
    set -- tensorrt-llm
fi
"$venv/bin/python" -m pip install "$@"
"$venv/bin/python" -c 'import importlib.metadata as m; print("installed: TensorRT-LLM", m.version("tensorrt-llm"))'

cat <<TEXT
Point the benchmark at it:
    ./run_complete_benchmark.sh --python tensorrt-llm=.venv-tensorrt-llm/bin/python
TEXT
