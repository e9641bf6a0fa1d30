"""Take due tasks, so that nobody else does."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    Boolean,
    ColumnElement,
    Double,
    Numeric,
    SmallInteger,
    Text,
    Uuid,
    and_,
    any_,
    bindparam,
    cast,
    func,
    literal_column,
    or_,
    select,
    true,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.sql.dml import ReturningUpdate

from apoq.model import tasks_table
from apoq.statements.literals import EPOCH, LAST_BUT_ONE, ONE, RUNNING, ZERO
from apoq.statements.notes import note
from apoq.statements.states import is_pending

CHANGED: Final = ("state", "token", "attempt", "worker_id", "claimed_at", "claimed_ahead")
"""The columns that a claim writes to. Where an index names one of them, it writes to every index, too."""


@cache
def claim(schema: str | None) -> ReturningUpdate[Any]:
    """Mark up to `at_most` due tasks of `from_queue` and `of_types` as running; answer them in no order.

    Of the priorities of `priorities`, the first first, and in each behind a position: the `process_at`, in
    seconds since 1970, of `behind_times` and the id of `behind_ids`. So a claim walks through nothing that is
    known to be taken, even where a long transaction elsewhere keeps it from being vacuumed away.

    `ahead`: they are more than find a slot at once. Then what was taken from a dead worker before is passed
    over: it may kill this one, too, and is to take no task with it that merely waited.

    `retry_limits`: a JSON object, of each type's limit. A task that has failed more often than that, or than
    its own limit, is taken to be ended, and doesn't begin.

    The attempt is counted here, and not when it ends: one that kills its worker counts as well. Times are
    answered as seconds since 1970, and data as text, for most of them nobody asks Python to read.

    What is taken is written down, as the `number` of the claims of `by_worker`.
    """
    tasks = tasks_table(schema)
    place: ColumnElement[Any] = literal_column("ctid")
    levels = (
        func.unnest(
            cast(bindparam("priorities", type_=Text), ARRAY(SmallInteger)),
            cast(bindparam("behind_times", type_=Text), ARRAY(Double)),
            cast(bindparam("behind_ids", type_=Text), ARRAY(BigInteger)),
        )
        .table_valued("priority", "behind_time", "behind_id")
        .render_derived("levels")
    )
    limit = bindparam("at_most", type_=BigInteger)
    ahead = bindparam("ahead", type_=Boolean)
    # One index scan for each priority: future tasks of a higher priority are not walked through to find
    # due ones of a lower. The outer limit ends the scans early, so no row is locked without being taken.
    due = (
        select(place, tasks.c.id)
        .where(
            tasks.c.queue == bindparam("from_queue", type_=Text),
            is_pending(tasks),
            tasks.c.priority == levels.c.priority,
            tuple_(tasks.c.process_at, tasks.c.id)
            > tuple_(func.to_timestamp(levels.c.behind_time), levels.c.behind_id),
            tasks.c.process_at <= func.now(),
            or_(tasks.c.rescue_count == ZERO, ~ahead),
            tasks.c.type == any_(bindparam("of_types", type_=ARRAY(Text))),
        )
        .order_by(tasks.c.process_at, tasks.c.id)
        .limit(limit)
        # Others claim at the same time: what they hold is passed over, not waited for.
        .with_for_update(skip_locked=True)
        .lateral("due")
    )
    limits = cast(bindparam("retry_limits", type_=Text), JSONB)
    # Numeric, for Python's numbers may be longer than any integer here.
    its_types_limit = cast(func.jsonb_extract_path_text(limits, tasks.c.type), Numeric)
    is_spent = and_(
        tasks.c.fail_count > ZERO,  # most have never failed, and nothing more is asked of them
        tasks.c.fail_count > func.coalesce(tasks.c.retry_limit, its_types_limit),
    )
    picked = select(due.c.ctid, due.c.id).select_from(levels.join(due, true())).limit(limit).cte("picked")
    return (
        update(tasks)
        # By where they stand, and as an array: by id, or joined, it takes the server a tenth longer. What is
        # locked stays in its place. What somebody has moved meanwhile, by writing to it between this
        # statement's beginning and the lock, is left to another claim.
        .where(place == any_(func.array(select(picked.c.ctid).scalar_subquery())))
        .values(
            state=RUNNING,
            token=tasks.c.token + ONE,
            # Whatever another program has written there, no task is in the way of all others.
            attempt=func.least(tasks.c.attempt, LAST_BUT_ONE) + ONE,
            worker_id=bindparam("by_worker", type_=Uuid),
            claimed_at=func.now(),
            # Nor has that begun which is to be ended: where this worker dies, it doesn't count.
            claimed_ahead=or_(ahead, is_spent),
        )
        .returning(
            tasks.c.id,
            tasks.c.type,
            cast(tasks.c.data, Text),
            tasks.c.priority,
            func.date_part(EPOCH, tasks.c.created_at, type_=Double),
            func.date_part(EPOCH, tasks.c.process_at, type_=Double),
            tasks.c.attempt,
            tasks.c.fail_count,
            tasks.c.token,
            tasks.c.retry_limit,
            tasks.c.retry_delay,
            # In seconds, for an interval may be longer than Python's.
            func.date_part(EPOCH, tasks.c.timeout, type_=Double),
        )
        .add_cte(note(schema, picked).cte("note"))
    )
