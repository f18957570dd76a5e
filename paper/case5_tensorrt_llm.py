#!/usr/bin/env python3
"""The paper's case 5, TensorRT-LLM: `jitgraph bench tensorrt-llm`, which has all options."""

import os
import sys
from pathlib import Path

script = Path(__file__).resolve().parent / "jitgraph.sh"
os.execvp("bash", ["bash", str(script), "bench", "tensorrt-llm", *sys.argv[1:]])
