"""Compares apoq with the floor, PgQueuer and Procrastinate in one run: ``python -m benchmarks``."""
