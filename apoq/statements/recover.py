"""Take back what dead workers held."""

from __future__ import annotations

from functools import cache

from sqlalchemy import (
    ColumnElement,
    Delete,
    Select,
    Text,
    Update,
    Uuid,
    all_,
    and_,
    bindparam,
    case,
    cast,
    delete,
    exists,
    func,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import Integer

from apoq.model import claims_table, tasks_table
from apoq.statements.arrays import bigints
from apoq.statements.heartbeat import alive, beat, next_death
from apoq.statements.literals import PENDING
from apoq.statements.notes import forget_claims, noted
from apoq.statements.states import runs


@cache
def beat_and_rescue(schema: str | None) -> Select[tuple[int, bool, float | None]]:
    """Show that the worker lives, and take back what dead ones held, in one statement.

    Answers how many tasks those were, whether dead workers' claims are written down, and the seconds until
    the next worker counts as dead, if it isn't seen before.
    """
    rescued = rescue(schema).returning(tasks_table(schema).c.id).cte("rescued")
    count = select(func.count()).select_from(rescued).scalar_subquery()
    return select(count, exists().where(_is_of_dead(schema)), next_death(schema)).add_cte(
        beat(schema).cte("beat")
    )


@cache
def rescue(schema: str | None) -> Update:
    """Make running tasks that no live worker holds pending again; `at_most` so many, after the first few.

    Those are `passed_over`, none unless told otherwise: they could not be written.

    Asked in this way round, a worker whose row is gone counts as dead too; `by_worker` itself is alive. What
    had begun has failed once more; what was claimed ahead loses no attempt, for nobody knows whether it had
    begun. From then on it is claimed only when it can begin at once. Whether it has attempts left is decided
    by whoever claims it next, and knows its type's limit.
    """
    tasks = tasks_table(schema)
    held = tasks.alias("held")
    orphans = (
        select(held.c.id)
        .where(
            noted(schema, held, _is_of_dead(schema)),
            runs(held),
            # Another may have taken it since.
            held.c.worker_id.is_distinct_from(bindparam("by_worker", type_=Uuid)),
            ~alive(schema, held.c.worker_id),
        )
        .order_by(held.c.id)
        .limit(bindparam("at_most", type_=Integer))
        .offset(bindparam("passed_over", 0, type_=Integer))
        # Other workers sweep too, and a settle may be under way.
        .with_for_update(skip_locked=True)
        .cte("orphans")
    )
    ahead = tasks.c.claimed_ahead
    return (
        update(tasks)
        .where(tasks.c.id == orphans.c.id)
        .values(
            state=PENDING,
            rescue_count=tasks.c.rescue_count + 1,
            attempt=case((ahead, tasks.c.attempt - 1), else_=tasks.c.attempt),
            fail_count=case((ahead, tasks.c.fail_count), else_=tasks.c.fail_count + 1),
            failed_at=case((ahead, tasks.c.failed_at), else_=func.clock_timestamp()),
            error=cast(bindparam("reason", type_=Text), JSONB),
        )
    )


@cache
def forget_dead(schema: str | None) -> Delete:
    """Forget the claims of dead workers of which nothing is held any more."""
    return forget_claims(schema, _is_of_dead(schema))


def _is_of_dead(schema: str | None) -> ColumnElement[bool]:
    claims = claims_table(schema)
    is_other = claims.c.worker_id.is_distinct_from(bindparam("by_worker", type_=Uuid))
    return and_(is_other, ~alive(schema, claims.c.worker_id))


@cache
def give_back(schema: str | None) -> Select[tuple[int]]:
    """Make tasks pending again that a live worker claimed without learning of it: all of its but `held`.

    It has learnt of the claims `known`. Answers how many are left, for somebody else has locked them.
    """
    tasks = tasks_table(schema)
    is_stray = and_(
        noted(schema, tasks, _is_unknown(schema)),
        runs(tasks),
        tasks.c.worker_id == bindparam("by_worker", type_=Uuid),
        tasks.c.id != all_(bigints("held")),
    )
    # Somebody may be cancelling one, in a transaction that takes its time.
    strays = select(tasks.c.id).where(is_stray).with_for_update(skip_locked=True).cte("strays")
    given = (
        update(tasks)
        .where(tasks.c.id == strays.c.id)
        .values(state=PENDING, attempt=tasks.c.attempt - 1)
        .returning(tasks.c.id)
        .cte("given")
    )
    all_of_them = select(func.count()).select_from(tasks).where(is_stray).scalar_subquery()
    return select(all_of_them - select(func.count()).select_from(given).scalar_subquery())


@cache
def forget_unknown(schema: str | None) -> Delete:
    """Forget the claims of a live worker of which it hasn't learnt, once all that they took is given back."""
    return delete(claims_table(schema)).where(_is_unknown(schema))


def _is_unknown(schema: str | None) -> ColumnElement[bool]:
    claims = claims_table(schema)
    is_its = claims.c.worker_id == bindparam("by_worker", type_=Uuid)
    return and_(is_its, claims.c.number != all_(bigints("known")))
