#!/usr/bin/env bash
# The paper's case 2, CUDA graphs without JIT: `jitgraph bench cuda-graph`, which has all options.
set -euo pipefail

exec bash "$(dirname "${BASH_SOURCE[0]}")/jitgraph.sh" bench cuda-graph "$@"
