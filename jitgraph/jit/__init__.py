"""Compiling, loading and launching Triton kernels.

What belongs here: everything between a kernel body and the GPU. ``kernel.py`` is the decorator that ``ops/`` uses,
``specialise.py`` decides which arguments share a binary, ``compiler.py`` makes the binary, ``cubin.py`` reads its
register use, ``driver.py`` loads and launches it, ``compile_only.py`` compiles without a GPU, ``monitor.py`` counts.

What does not: kernel bodies and their wrappers (``ops/``), graphs (``graphs/``).
"""
