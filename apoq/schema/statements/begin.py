"""Records that prefetched tasks have started."""

from __future__ import annotations

from functools import cache

from sqlalchemy import Update, and_, false, func, select, update

from apoq.schema.models import tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.states import has_running_state


@cache
def begin(schema: str | None) -> Update:
    """Record that the tasks `ids`, claimed with `tokens`, have started: from now on, their attempts count.

    Tasks that another session has locked are skipped.
    """
    tasks = tasks_table(schema)
    found = func.unnest(bigints("ids"), bigints("tokens")).table_valued("id", "token").render_derived("found")
    held = tasks.alias("held")
    begun = (
        select(held.c.id)
        .join(found, and_(held.c.id == found.c.id, held.c.claim_token == found.c.token))
        .where(has_running_state(held), held.c.prefetched)
        .with_for_update(of=held, skip_locked=True)
        .cte("begun")
    )
    return update(tasks).where(tasks.c.id == begun.c.id).values(prefetched=false())
