#!/usr/bin/env python3
"""The paper's case 1, transformers: `jitgraph bench baseline`, which has all options."""

import os
import sys
from pathlib import Path

script = Path(__file__).resolve().parent / "jitgraph.sh"
os.execvp("bash", ["bash", str(script), "bench", "baseline", *sys.argv[1:]])
