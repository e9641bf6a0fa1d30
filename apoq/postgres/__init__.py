"""How apoq talks to PostgreSQL; it knows no task."""
