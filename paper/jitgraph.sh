#!/usr/bin/env bash
# Runs any jitgraph command from this repository, not installed, in the environment of ./run_complete_benchmark.sh and in
# the same folder, so that results go to output/ there. The wrappers beside it call it.
set -euo pipefail

root="$(CDPATH='' cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$("$root/scripts/setup_env.sh" bench)"
cd "$root"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m jitgraph "$@"
