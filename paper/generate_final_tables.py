#!/usr/bin/env python3
"""The paper's final tables, from the raw samples in output/: `jitgraph report`, or of the folder that is named."""

import os
import sys
from pathlib import Path

script = Path(__file__).resolve().parent / "jitgraph.sh"
os.execvp("bash", ["bash", str(script), "report", *sys.argv[1:]])
