"""Parts of ``benchmarks/ipc.py``."""
