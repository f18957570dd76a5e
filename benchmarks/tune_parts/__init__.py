"""Parts of ``benchmarks/tune_products.py``."""
