"""Mutated input files for every loader: `python -m parity_tests.fuzz --count 2000` (see `fuzz.__main__`)."""
