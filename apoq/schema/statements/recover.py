"""Take back what dead workers held, and what no worker holds."""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Delete,
    FromClause,
    Select,
    Text,
    Update,
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
from sqlalchemy.types import Integer

from apoq.schema.models import claims_table, tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.heartbeat import alive
from apoq.schema.statements.literals import LAST_BUT_ONE, LOWEST_BUT_ONE, PENDING
from apoq.schema.statements.notes import forget_claims, is_noted, noted
from apoq.schema.statements.states import runs


@cache
def rescue(schema: str | None) -> Update:
    """Make running tasks of the workers `dead` pending again; `at_most` so many, after the first few.

    Those are `passed_over`, none unless told otherwise: they could not be written. A worker that has shown
    since that it is alive keeps its tasks.

    What had begun has failed once more. What was claimed ahead loses no attempt, because nobody knows whether
    it had begun; from then on it is claimed only when it can begin at once. Whether it has attempts left is
    decided by the worker that claims it next, which knows the limit of its type.
    """
    held = tasks_table(schema).alias("held")
    orphans = (
        select(held.c.id)
        .where(_is_held_by_dead(schema, held))
        .order_by(held.c.id)
        .limit(bindparam("at_most", type_=Integer))
        .offset(bindparam("passed_over", 0, type_=Integer))
        # Other workers sweep too, and a settle may be under way.
        .with_for_update(skip_locked=True)
        .cte("orphans")
    )
    tasks = tasks_table(schema)
    return update(tasks).where(tasks.c.id == orphans.c.id).values(_rescued(schema))


@cache
def held_by_dead(schema: str | None) -> Select[Any]:
    """Return how many running tasks the workers `dead` hold."""
    held = tasks_table(schema).alias("held")
    return select(func.count()).select_from(held).where(_is_held_by_dead(schema, held))


@cache
def forget_dead(schema: str | None) -> Delete:
    """Forget the claims of the workers `dead` of which nothing is held any more."""
    return forget_claims(schema, _is_of_dead(schema))


@cache
def rescue_unnoted(schema: str | None) -> Update:
    """Make the tasks of `ids`, claimed under `tokens`, pending again, if no worker that is alive holds them.

    For running tasks that no claim has noted, as after a restore of the task table alone.
    """
    tasks = tasks_table(schema)
    found = func.unnest(bigints("ids"), bigints("tokens")).table_valued("id", "token").render_derived("found")
    held = tasks.alias("held")
    orphans = (
        select(held.c.id)
        .join(found, and_(held.c.id == found.c.id, held.c.claim_token == found.c.token))
        .where(runs(held), ~is_noted(schema, held.c.id), ~alive(schema, held.c.worker_id))
        .with_for_update(of=held, skip_locked=True)
        .cte("orphans")
    )
    return update(tasks).where(tasks.c.id == orphans.c.id).values(_rescued(schema))


def _rescued(schema: str | None) -> dict[str, ColumnElement[Any]]:
    tasks = tasks_table(schema)
    ahead = tasks.c.prefetched
    # Within the bounds of an integer, whatever another program has written there: a row that could not be
    # written would be in the way of others.
    return {
        "state": PENDING,
        "rescue_count": func.least(tasks.c.rescue_count, LAST_BUT_ONE) + 1,
        "attempt": case((ahead, func.greatest(tasks.c.attempt, LOWEST_BUT_ONE) - 1), else_=tasks.c.attempt),
        "fail_count": case(
            (ahead, tasks.c.fail_count), else_=func.least(tasks.c.fail_count, LAST_BUT_ONE) + 1
        ),
        "failed_at": case((ahead, tasks.c.failed_at), else_=func.clock_timestamp()),
        "error": cast(bindparam("reason", type_=Text), JSONB),
    }


def _is_held_by_dead(schema: str | None, held: FromClause) -> ColumnElement[bool]:
    # Another worker may have taken it since.
    return and_(noted(schema, held, _is_of_dead(schema)), runs(held), held.c.worker_id == any_(_dead()))


def _is_of_dead(schema: str | None) -> ColumnElement[bool]:
    claims = claims_table(schema)
    return and_(claims.c.worker_id == any_(_dead()), ~alive(schema, claims.c.worker_id))


def _dead() -> ColumnElement[Any]:
    return bindparam("dead", type_=ARRAY(Uuid))


@cache
def give_back(schema: str | None) -> Select[tuple[int]]:
    """Make tasks pending again that a live worker claimed without learning of it: all of its but `held`.

    It has learnt of the claims `known`. Returns how many are left, because another session has locked them.
    """
    tasks = tasks_table(schema)
    is_stray = and_(
        noted(schema, tasks, _is_unknown(schema)),
        runs(tasks),
        tasks.c.worker_id == bindparam("by_worker", type_=Uuid),
        tasks.c.id != all_(bigints("held")),
    )
    # Another session may be cancelling one, in a transaction that takes its time.
    strays = select(tasks.c.id).where(is_stray).with_for_update(skip_locked=True).cte("strays")
    given = (
        update(tasks)
        .where(tasks.c.id == strays.c.id)
        .values(state=PENDING, attempt=func.greatest(tasks.c.attempt, LOWEST_BUT_ONE) - 1)
        .returning(tasks.c.id)
        .cte("given")
    )
    all_of_them = select(func.count()).select_from(tasks).where(is_stray).scalar_subquery()
    return select(all_of_them - select(func.count()).select_from(given).scalar_subquery())


@cache
def forget_unknown(schema: str | None) -> Delete:
    """Forget the claims of a live worker that it hasn't learnt of, with nothing left to give back."""
    tasks = tasks_table(schema)
    return forget_claims(schema, _is_unknown(schema), tasks.c.id != all_(bigints("held")))


def _is_unknown(schema: str | None) -> ColumnElement[bool]:
    claims = claims_table(schema)
    is_its = claims.c.worker_id == bindparam("by_worker", type_=Uuid)
    return and_(is_its, claims.c.number != all_(bigints("known")))
