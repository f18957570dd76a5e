#!/usr/bin/env bash
# The paper's case 4, JIT-compiled kernels in CUDA graphs: `jitgraph bench hybrid`, which has all options.
set -euo pipefail

exec bash "$(dirname "${BASH_SOURCE[0]}")/jitgraph.sh" bench hybrid "$@"
