"""Measurements of single features of apoq: ``python -m benchmarks.features --help``."""
