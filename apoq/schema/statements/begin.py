"""Note which of the tasks that were claimed ahead have begun."""

from __future__ import annotations

from functools import cache

from sqlalchemy import Update, and_, false, func, select, update

from apoq.schema.models import tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.states import runs


@cache
def begin(schema: str | None) -> Update:
    """Note that the tasks of `ids`, claimed under `tokens`, have begun: from now on, their attempts count.

    What another session has locked is passed over.
    """
    tasks = tasks_table(schema)
    found = func.unnest(bigints("ids"), bigints("tokens")).table_valued("id", "token").render_derived("found")
    held = tasks.alias("held")
    begun = (
        select(held.c.id)
        .join(found, and_(held.c.id == found.c.id, held.c.claim_token == found.c.token))
        .where(runs(held), held.c.prefetched)
        .with_for_update(of=held, skip_locked=True)
        .cte("begun")
    )
    return update(tasks).where(tasks.c.id == begun.c.id).values(prefetched=false())
