"""apoq beside the floor, PgQueuer and Procrastinate, in one run: ``python -m benchmarks``."""
