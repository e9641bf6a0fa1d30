"""Tasks that a test has made to run by hand."""

from __future__ import annotations

import sqlalchemy as sa

_NOTE = sa.text("""
    INSERT INTO apoq_claims (worker_id, number, task_ids)
    SELECT worker_id, 0, array_agg(id) FROM apoq_tasks WHERE state = 'running' GROUP BY worker_id
""")


def note(connection: sa.Connection) -> None:
    """Write down what is running, as claims do."""
    connection.execute(_NOTE)
