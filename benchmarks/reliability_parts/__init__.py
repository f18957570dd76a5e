"""The parts of `benchmarks/reliability.py`, one topic a file: what is broken on purpose, and what must follow."""
