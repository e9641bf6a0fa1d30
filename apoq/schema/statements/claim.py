"""Take due tasks, so that nobody else does."""

from __future__ import annotations

from functools import cache
from typing import Any, Final, TypeVar

from sqlalchemy import (
    CTE,
    VARCHAR,
    BigInteger,
    ColumnElement,
    Double,
    Integer,
    Numeric,
    Select,
    SmallInteger,
    Table,
    Text,
    Uuid,
    all_,
    and_,
    any_,
    bindparam,
    case,
    cast,
    func,
    literal_column,
    null,
    or_,
    select,
    true,
    tuple_,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.sql.dml import ReturningUpdate
from sqlalchemy.sql.selectable import TableValuedAlias

from apoq.schema.models import tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.literals import EPOCH, LAST_BUT_ONE, LAST_BUT_ONE_BIGINT, ONE, RUNNING, ZERO
from apoq.schema.statements.notes import note
from apoq.schema.statements.states import is_pending

CHANGED: Final = ("state", "claim_token", "attempt", "worker_id", "claimed_at", "prefetched")
"""The columns that a claim writes to. Where an index names one of them, it writes to every index, too."""


C = TypeVar("C")

ClaimedTask = tuple[
    int,  # id
    str,  # type
    str | None,  # data: its JSON; None or cut off if it is large
    int,  # priority
    float,  # created_at, in seconds since 1970
    float,  # process_at, the same
    int,  # attempt
    int,  # fail_count
    int,  # claim_token
    int | None,  # retry_limit
    float | None,  # retry_delay, in seconds
    float | None,  # timeout, in seconds
    str | None,  # meta: its JSON; None if it is large
    C,  # the claim that it belongs to, which the worker adds
]
"""What `claim` returns of a task, and the claim that it belongs to.

A thousand of these wait at once, and the garbage collector looks at each again and again. As objects of a
class they would take a tenth of a busy worker's time: one is made when a task begins.
"""

ID: Final = 0
TYPE: Final = 1
DATA: Final = 2
PRIORITY: Final = 3
CREATED_AT: Final = 4
PROCESS_AT: Final = 5
ATTEMPT: Final = 6
FAIL_COUNT: Final = 7
CLAIM_TOKEN: Final = 8
RETRY_LIMIT: Final = 9
RETRY_DELAY: Final = 10
TIMEOUT: Final = 11
META: Final = 12
CLAIM: Final = 13
"""Where these stand in a `ClaimedTask`."""

LONGEST: Final = 8_000
"""Bytes that data takes when it is stored, and characters of its text, at most, to be in a claim's answer."""


@cache
def claim(
    schema: str | None,
    *,
    ahead: bool = False,
    passes_over: bool = False,
    overflows: bool = False,
    bare: bool = False,
) -> ReturningUpdate[Any]:
    """Mark up to `at_most` due tasks of `from_queue` and `of_types` as running; return them in no order.

    Of the priorities of `priorities`, the first first, and in each behind a position: the `process_at`, in
    seconds since 1970, of `behind_times` and the id of `behind_ids`. So a claim walks through nothing that is
    known to be taken, even if a long transaction elsewhere keeps it from being vacuumed away. `overflows`:
    after these, all that are lower than `lower_than`.

    `ahead`: they may be more than find one of the `free` slots at once. Then what was taken from a dead
    worker before is passed over, because it may kill this one, too, and must not take tasks with it that
    merely waited.

    `passes_over`: not those with the ids `passed_over`.

    `bare`: all data and metadata is null, as that which is large always is.

    `retry_limits`: a JSON object, of each type's limit. A task that has failed more often than that, or than
    its own limit, is taken to be ended, and doesn't begin.

    The attempt is counted here, and not when it ends: one that kills its worker counts as well. Times are
    returned as seconds since 1970, and data as text, because most of them are never read. Data that takes
    more than `LONGEST` bytes is null, and its text is cut off after one character more: it is read when the
    task begins. So a claim is soon answered, and what waits for a slot takes little memory.

    What is taken is written down, as the `number` of the claims of `by_worker`.
    """
    tasks = tasks_table(schema)
    picked = _picked(tasks, ahead=ahead, passes_over=passes_over, overflows=overflows)
    return (
        update(tasks)
        # By where they stand, and as an array: by id, or joined, it takes the server a tenth longer. What is
        # locked stays in its place. What another session has moved meanwhile, by writing to it between this
        # statement's beginning and the lock, is left to another claim.
        .where(_place == any_(func.array(select(picked.c.ctid).scalar_subquery())))
        .values(_effect(tasks, picked, ahead=ahead))
        .returning(*_returned(tasks, bare=bare))
        .add_cte(note(schema, picked).cte("note"))
    )


@cache
def next_due(
    schema: str | None, *, ahead: bool = False, passes_over: bool = False, overflows: bool = False
) -> Select[tuple[int]]:
    """Return the ids of the tasks that `claim` would take with the same parameters, without taking them."""
    picked = _picked(tasks_table(schema), ahead=ahead, passes_over=passes_over, overflows=overflows)
    return select(picked.c.id)


_place: ColumnElement[Any] = literal_column("ctid")
_at_most = bindparam("at_most", type_=BigInteger)


def _picked(tasks: Table, *, ahead: bool, passes_over: bool, overflows: bool) -> CTE:
    """Lock due tasks, and return where they stand and their ids."""
    due = (
        select(_place, tasks.c.id)
        .where(*_is_claimable(tasks, ahead=ahead, passes_over=passes_over))
        .limit(_at_most)
        # Others claim at the same time: what they hold is passed over, not waited for.
        .with_for_update(skip_locked=True)
    )
    # One index scan for each priority: future tasks of a higher priority are not walked through to find due
    # ones of a lower. The outer limit ends the scans early, so no row is locked without being taken, unless
    # its data is large.
    levels = _levels()
    level = due.where(*_is_on(tasks, levels)).order_by(tasks.c.process_at, tasks.c.id).lateral("due")
    found = select(*level.c).select_from(levels.join(level, true()))
    if overflows:
        lower = tasks.c.priority < bindparam("lower_than", type_=SmallInteger)
        order = tasks.c.priority.desc(), tasks.c.process_at, tasks.c.id
        rest = due.where(lower).order_by(*order).subquery("rest")
        found = select(*union_all(found, select(*rest.c)).subquery("found").c)
    return found.limit(_at_most).cte("picked")


def _levels() -> TableValuedAlias:
    """Return the priorities that are claimed from, the highest first, and a position in each."""
    return (
        func.unnest(
            cast(bindparam("priorities", type_=Text), ARRAY(SmallInteger)),
            cast(bindparam("behind_times", type_=Text), ARRAY(Double)),
            cast(bindparam("behind_ids", type_=Text), ARRAY(BigInteger)),
        )
        .table_valued("priority", "behind_time", "behind_id")
        .render_derived("levels")
    )


def _is_on(tasks: Table, levels: TableValuedAlias) -> tuple[ColumnElement[bool], ...]:
    """Pick the tasks of a level that are behind its position."""
    return (
        tasks.c.priority == levels.c.priority,
        tuple_(tasks.c.process_at, tasks.c.id)
        > tuple_(func.to_timestamp(levels.c.behind_time), levels.c.behind_id),
    )


def _is_claimable(tasks: Table, *, ahead: bool, passes_over: bool) -> list[ColumnElement[bool]]:
    """Pick the tasks that this worker may run now."""
    conditions = [
        tasks.c.queue == bindparam("from_queue", type_=Text),
        is_pending(tasks),
        tasks.c.process_at <= func.now(),
        tasks.c.type == any_(bindparam("of_types", type_=ARRAY(Text))),
    ]
    if ahead:
        conditions.append(tasks.c.rescue_count <= ZERO)
    if passes_over:
        conditions.append(tasks.c.id != all_(bigints("passed_over")))
    return conditions


def _effect(tasks: Table, picked: CTE, *, ahead: bool) -> dict[str, Any]:
    """Return what a claim writes to a task: the columns of `CHANGED`."""
    # A task that has used up its attempts is ended, and doesn't begin: a death doesn't count for it.
    may_not_have_begun = _is_spent(tasks)
    if ahead:
        count = select(func.count()).select_from(picked).scalar_subquery()
        may_not_have_begun = or_(count > bindparam("free", type_=BigInteger), may_not_have_begun)
    return {
        "state": RUNNING,
        # Whatever another program has written there, no task is in the way of all others.
        "claim_token": func.least(tasks.c.claim_token, LAST_BUT_ONE_BIGINT) + ONE,
        "attempt": func.least(tasks.c.attempt, LAST_BUT_ONE) + ONE,
        "worker_id": bindparam("by_worker", type_=Uuid),
        "claimed_at": func.now(),
        "prefetched": may_not_have_begun,
    }


def _is_spent(tasks: Table) -> ColumnElement[bool]:
    """Pick the tasks that have used up their attempts."""
    limits = cast(bindparam("retry_limits", type_=Text), JSONB)
    # Numeric, because Python's numbers may be longer than any integer here.
    its_types_limit = cast(func.jsonb_extract_path_text(limits, tasks.c.type), Numeric)
    return and_(
        tasks.c.fail_count > ZERO,  # most have never failed, and nothing more is asked of them
        tasks.c.fail_count > func.coalesce(tasks.c.retry_limit, its_types_limit),
    )


def _returned(tasks: Table, *, bare: bool) -> tuple[ColumnElement[Any], ...]:
    """Return the columns of a `ClaimedTask`."""
    return (
        tasks.c.id,
        tasks.c.type,
        cast(null(), Text) if bare else short_text(tasks.c.data),
        tasks.c.priority,
        func.date_part(EPOCH, tasks.c.created_at, type_=Double),
        func.date_part(EPOCH, tasks.c.process_at, type_=Double),
        tasks.c.attempt,
        tasks.c.fail_count,
        tasks.c.claim_token,
        tasks.c.retry_limit,
        # In seconds, because an interval may be longer than Python's.
        func.date_part(EPOCH, tasks.c.retry_delay, type_=Double),
        func.date_part(EPOCH, tasks.c.timeout, type_=Double),
        cast(null(), Text) if bare else short_text(tasks.c.meta),
    )


def short_text(data: ColumnElement[Any]) -> ColumnElement[str | None]:
    """Return data as text: null if it is large, and its beginning if it is long as text only.

    As a number is that has an exponent: jsonb stores 1e100000 in a few bytes.
    """
    is_short = func.pg_column_size(data, type_=Integer) <= literal_column(str(LONGEST), Integer)
    # A cast to varchar(n) cuts off, and for what is shorter takes less time than left() does.
    return case((is_short, cast(cast(data, Text), VARCHAR(LONGEST + 1))))
