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
The five cases of the benchmark do not drive vLLM. To measure it on the same weights, export a preset for it:
    .venv/bin/jitgraph export llama-2-7b llama-2-7b-random
    .venv-vllm/bin/vllm bench latency --model llama-2-7b-random --batch-size 1 --input-len 10 --output-len 1
TEXT
