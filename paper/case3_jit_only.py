#!/usr/bin/env python3
"""The paper's case 3, JIT without graphs: `jitgraph bench jit`, which has all options."""

import os
import sys
from pathlib import Path

script = Path(__file__).resolve().parent / "jitgraph.sh"
os.execvp("bash", ["bash", str(script), "bench", "jit", *sys.argv[1:]])
