#!/usr/bin/env bash
# Sets the environment up and runs the five-case latency benchmark on what this machine has. Tables and raw samples
# go to output/ in the project's folder. Arguments go to `jitgraph bench all`:
#
#   ./run_complete_benchmark.sh
#   ./run_complete_benchmark.sh --prompt-lengths 10,100 --ttft-iterations 5 --p99-iterations 100
#   ./run_complete_benchmark.sh ablation      the further cases of this engine as well
#   JITGRAPH_PYTHON=python3 ./run_complete_benchmark.sh   with an environment that exists; nothing is downloaded
set -euo pipefail

root="$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="$("$root/scripts/setup_env.sh" bench)"
cd "$root"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

echo "Results go to $root/output unless --output names another folder."
exec "$python" -m jitgraph bench all "$@"
