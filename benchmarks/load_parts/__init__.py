"""What ``benchmarks/load_agreement.py`` is made of."""
