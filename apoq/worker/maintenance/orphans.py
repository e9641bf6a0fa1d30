"""Deletes progress whose tasks don't exist any more."""

from __future__ import annotations

from collections import defaultdict
from typing import Final

from sqlalchemy import Engine

from apoq.postgres.connections import execute
from apoq.schema.statements.arrays import array_text
from apoq.schema.statements.progress import delete_orphans, look_for_orphans

BATCH_SIZE: Final = 1_000
"""Rows that one look reads at most."""

_BEFORE_ALL: Final = -(2**63)


class Orphans:
    """Looks through the progress in each schema, a bounded number of rows at a time, again and again.

    The pruner deletes progress together with its task. Rows are left if tasks are deleted by hand, or if
    a worker that deletes tasks on completion dies.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._after: defaultdict[str | None, int] = defaultdict(lambda: _BEFORE_ALL)
        """The last id that was looked at, by schema."""

    def delete(self, schema: str | None) -> None:
        """Look at the next rows in a schema, and delete those without a task."""
        parameters = {"after": self._after[schema], "at_most": BATCH_SIZE}
        found = execute(self._engine, look_for_orphans(schema), parameters).fetchall()
        self._after[schema] = found[-1][0] if len(found) == BATCH_SIZE else _BEFORE_ALL
        if ids := [task_id for task_id, is_there in found if not is_there]:
            execute(self._engine, delete_orphans(schema), {"ids": array_text(ids)})
