"""Compiling, loading and launching kernels.

What belongs here: everything between a kernel's source and the GPU.

- Launching: ``kernel.py`` is the decorator that ``ops/`` uses, ``specialise.py`` decides what shares a binary,
  ``driver.py`` loads and launches it, ``target.py`` says for which architecture.
- Compiling: ``compiler.py`` makes a binary (``binary.py``), ``private_cache.py`` keeps Triton's own cache out of it,
  ``cubin.py`` reads its register use, ``nvrtc.py`` compiles CUDA C.
- Keeping: ``disk_cache.py`` stores it, under a key of ``cache_key.py``, ``source_digest.py`` and ``canonical.py``.
- Before ready: ``collect.py`` lists what a run needs, ``registry.py`` makes all of it ready, many at once.
- Checking: ``compile_only.py`` compiles without a GPU, ``monitor.py`` counts, ``strict.py`` forbids, ``modes.py`` is
  what ``compile_only`` and ``collect`` share.

What does not: kernel bodies and their wrappers (``ops/``), graphs (``graphs/``).
"""
