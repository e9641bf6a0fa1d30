"""Makes running tasks pending again if their worker is dead, or doesn't know of them."""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Delete,
    FromClause,
    Select,
    Text,
    Uuid,
    all_,
    and_,
    any_,
    bindparam,
    case,
    cast,
    func,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.sql.dml import ReturningUpdate
from sqlalchemy.types import Integer

from apoq.schema.models import tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.clock import now
from apoq.schema.statements.heartbeat import is_alive
from apoq.schema.statements.literals import MAX_INTEGER_MINUS_ONE, MIN_INTEGER_PLUS_ONE, PENDING
from apoq.schema.statements.notes import forget_claims, is_noted, noted
from apoq.schema.statements.states import has_running_state
from apoq.schema.statements.take_keys import lacks_key
from apoq.schema.tables import claims_table


@cache
def rescue(schema: str | None) -> ReturningUpdate[Any]:
    """Make up to `at_most` running tasks of the workers `dead` pending again, and return their ids.

    It skips the first `passed_over` tasks (0 by default), which could not be written. A worker that has sent
    a heartbeat in the meantime keeps its tasks.

    For a task that had started, this counts as a failure. A prefetched task doesn't lose an attempt, because
    it is unknown whether it had started; from then on, it is claimed only if it can start at once. The worker
    that claims a task next decides whether it has attempts left, because it knows the limit of the type.
    """
    held = tasks_table(schema).alias("held")
    orphans = (
        select(held.c.id)
        .where(_is_held_by_dead(schema, held))
        .order_by(held.c.id)
        .limit(bindparam("at_most", type_=Integer))
        .offset(bindparam("passed_over", 0, type_=Integer))
        # Other workers sweep as well, and a task may be in the middle of being settled.
        .with_for_update(skip_locked=True)
        .cte("orphans")
    )
    tasks = tasks_table(schema)
    return (
        update(tasks)
        .where(tasks.c.id == orphans.c.id)
        .values(_rescued(schema))
        .returning(tasks.c.id, lacks_key(tasks))
    )


@cache
def held_by_dead(schema: str | None) -> Select[Any]:
    """Return the number of running tasks of the workers `dead`."""
    held = tasks_table(schema).alias("held")
    return select(func.count()).select_from(held).where(_is_held_by_dead(schema, held))


@cache
def forget_dead(schema: str | None) -> Delete:
    """Delete the claims of the workers `dead` that have no running tasks."""
    return forget_claims(schema, _is_of_dead(schema))


@cache
def rescue_unnoted(schema: str | None) -> ReturningUpdate[Any]:
    """Make the tasks of `ids`, claimed with `tokens`, pending again unless a living worker has them.

    It is for running tasks that are in no claim, such as after a restore of the task table alone.
    """
    tasks = tasks_table(schema)
    found = func.unnest(bigints("ids"), bigints("tokens")).table_valued("id", "token").render_derived("found")
    held = tasks.alias("held")
    orphans = (
        select(held.c.id)
        .join(found, and_(held.c.id == found.c.id, held.c.claim_token == found.c.token))
        .where(has_running_state(held), ~is_noted(schema, held.c.id), ~is_alive(schema, held.c.worker_id))
        .with_for_update(of=held, skip_locked=True)
        .cte("orphans")
    )
    return (
        update(tasks)
        .where(tasks.c.id == orphans.c.id)
        .values(_rescued(schema))
        .returning(tasks.c.id, lacks_key(tasks))
    )


def _rescued(schema: str | None) -> dict[str, ColumnElement[Any]]:
    tasks = tasks_table(schema)
    ahead = tasks.c.prefetched
    # Within the range of an integer, because another program may have written any number there, and a row
    # that can't be written would block others.
    return {
        "state": PENDING,
        "rescue_count": func.least(tasks.c.rescue_count, MAX_INTEGER_MINUS_ONE) + 1,
        "attempt": case(
            (ahead, func.greatest(tasks.c.attempt, MIN_INTEGER_PLUS_ONE) - 1), else_=tasks.c.attempt
        ),
        "fail_count": case(
            (ahead, tasks.c.fail_count), else_=func.least(tasks.c.fail_count, MAX_INTEGER_MINUS_ONE) + 1
        ),
        "failed_at": case((ahead, tasks.c.failed_at), else_=now()),
        "error": cast(bindparam("reason", type_=Text), JSONB),
    }


def _is_held_by_dead(schema: str | None, held: FromClause) -> ColumnElement[bool]:
    # Another worker may have taken it since.
    return and_(
        noted(schema, held, _is_of_dead(schema)), has_running_state(held), held.c.worker_id == any_(_dead())
    )


def _is_of_dead(schema: str | None) -> ColumnElement[bool]:
    claims = claims_table(schema)
    return and_(claims.c.worker_id == any_(_dead()), ~is_alive(schema, claims.c.worker_id))


def _dead() -> ColumnElement[Any]:
    return bindparam("dead", type_=ARRAY(Uuid))


@cache
def give_back(schema: str | None) -> Select[tuple[int, list[int] | None]]:
    """Make tasks pending again that a living worker claimed without receiving the result.

    These are the tasks of all of its claims except the `known` ones, and not the tasks `held`. Returns how
    many could not be released because another session has locked them, and the ids of the released ones that
    don't hold their unique keys.
    """
    tasks = tasks_table(schema)
    is_stray = and_(
        noted(schema, tasks, _is_unknown(schema)),
        has_running_state(tasks),
        tasks.c.worker_id == bindparam("by_worker", type_=Uuid),
        tasks.c.id != all_(bigints("held")),
    )
    # Another session may be cancelling one of them, in a long transaction.
    strays = select(tasks.c.id).where(is_stray).with_for_update(skip_locked=True).cte("strays")
    given = (
        update(tasks)
        .where(tasks.c.id == strays.c.id)
        .values(state=PENDING, attempt=func.greatest(tasks.c.attempt, MIN_INTEGER_PLUS_ONE) - 1)
        .returning(tasks.c.id, lacks_key(tasks))
        .cte("given")
    )
    all_of_them = select(func.count()).select_from(tasks).where(is_stray).scalar_subquery()
    without_key = select(func.array_agg(given.c.id)).where(given.c.lacks_key).scalar_subquery()
    return select(all_of_them - select(func.count()).select_from(given).scalar_subquery(), without_key)


@cache
def forget_unknown(schema: str | None) -> Delete:
    """Delete the claims of a living worker that it doesn't know and that have no tasks left to release."""
    tasks = tasks_table(schema)
    return forget_claims(schema, _is_unknown(schema), tasks.c.id != all_(bigints("held")))


def _is_unknown(schema: str | None) -> ColumnElement[bool]:
    claims = claims_table(schema)
    is_its = claims.c.worker_id == bindparam("by_worker", type_=Uuid)
    has_begun = claims.c.number <= bindparam("latest", type_=BigInteger)
    return and_(is_its, has_begun, claims.c.number != all_(bigints("known")))
