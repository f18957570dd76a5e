"""The parts of ``benchmarks/runtime.py``, one topic a file: what is measured, how it is kept, what follows from it."""
