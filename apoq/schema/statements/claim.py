"""Claims due tasks for one worker."""

from __future__ import annotations

from functools import cache
from typing import Any, Final, TypeVar

from sqlalchemy import (
    CTE,
    VARCHAR,
    BigInteger,
    ColumnElement,
    Double,
    FromClause,
    Integer,
    Numeric,
    Select,
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
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.sql.dml import ReturningUpdate
from sqlalchemy.sql.selectable import TableValuedAlias

from apoq.schema.models import tasks_table
from apoq.schema.statements.arrays import bigints
from apoq.schema.statements.clock import in_utc
from apoq.schema.statements.levels import level
from apoq.schema.statements.literals import (
    EPOCH,
    MAX_BIGINT_MINUS_ONE,
    MAX_INTEGER_MINUS_ONE,
    ONE,
    RUNNING,
    ZERO,
)
from apoq.schema.statements.notes import note
from apoq.schema.statements.queues import given_queues
from apoq.schema.statements.states import is_pending

CHANGED: Final = ("state", "claim_token", "attempt", "worker_id", "claimed_at", "prefetched")
"""The columns that a claim changes. If an index contained one of them, a claim would write to every index."""

CHANGED_IF_SET: Final = ("held_unique_key", "pool_slot")
"""The columns that it also changes if they have a value; those of a plain task stay NULL."""


C = TypeVar("C")

ClaimedTask = tuple[
    int,  # id
    str,  # type
    str | None,  # data as JSON; None or truncated if it is large
    int,  # priority
    float,  # created_at, in seconds since 1970
    float,  # process_at, in seconds since 1970
    int,  # attempt
    int,  # fail_count
    int,  # claim_token
    int | None,  # retry_limit
    float | None,  # retry_delay, in seconds
    float | None,  # timeout, in seconds
    str | None,  # meta as JSON; None if it is large
    str,  # queue
    float | None,  # tick_at, in seconds since 1970
    float | None,  # expires_at, in seconds since the claim
    C,  # the claim, which the worker adds
]
"""The columns of a task that `claim` returns, and the claim to which the task belongs.

A thousand of these can wait at once, and the garbage collector visits each of them repeatedly. If they were
objects of a class, that would take a tenth of a busy worker's time, so an object is made only when a task
starts.
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
QUEUE: Final = 13
TICK_AT: Final = 14
EXPIRES_IN: Final = 15
CLAIM: Final = 16
"""The indexes of these values in a `ClaimedTask`."""

LONGEST: Final = 8_000
"""Maximum size of data that a claim returns: in bytes as stored, and in characters of its text."""


@cache
def claim(
    schema: str | None,
    *,
    ahead: bool = False,
    passes_over: bool = False,
    overflows: bool = False,
    keyed: bool = False,
    bare: bool = False,
    noted: bool = True,
    with_limited: bool = False,
) -> ReturningUpdate[Any]:
    """Mark up to `at_most` due tasks of the given `queues` as running, and return them unordered.

    Tasks are taken from the queues in their order, from each up to its own `at_most`. In a queue, they are
    taken by level, in the order of its `levels`. In each level, only tasks behind a position are taken:
    behind the `process_at` in `behind_times` (seconds since 1970) and the id in `behind_ids`. So a claim
    doesn't scan index entries of tasks that were claimed before, even if a long transaction elsewhere
    prevents vacuum from removing them. See `given_queues`.

    Options:

    - `ahead`: the claim may take more tasks than there are `free` slots. It skips tasks that were rescued
      from a dead worker, because such a task may kill this worker as well, and with it tasks that only wait.
    - `passes_over`: skip the tasks with the ids `passed_over`.
    - `overflows`: afterwards, take tasks of all levels lower than a queue's `lower_than`.
    - `keyed`: these are tasks with concurrency keys, and otherwise tasks without; the levels are of one sort.
    - `bare`: return NULL for all data and metadata, as for large values.
    - `noted`: record the claim in the table of claims, as claim `number` of the worker `by_worker`. Otherwise
      the caller does so in the same transaction: Citus accepts no statement that writes to two tables.
    - `with_limited`: also take tasks of types and queues that have limits, although they get no places.

    `retry_limits` is a JSON object with the limits of each queue, by type. A task with more failures than its
    own limit, or else its type's, is claimed only to be ended: it doesn't start.

    The attempt is counted by the claim, not when the attempt ends, so that an attempt that kills its worker
    counts as well. Times are returned as seconds since 1970, and data as text, because most of them are never
    read. Data of more than `LONGEST` bytes is returned as NULL, and a longer text is truncated to one
    character more than that: such data is read when the task starts. So the claim returns quickly, and tasks
    that wait for a slot take little memory.
    """
    tasks = tasks_table(schema)
    queues = given_queues(schema, with_limited=with_limited)
    found = picked(schema, queues, ahead=ahead, passes_over=passes_over, overflows=overflows, keyed=keyed)
    free = bindparam("free", type_=BigInteger)
    is_ahead = select(func.count() > free).select_from(found).scalar_subquery() if ahead else None
    statement = (
        update(tasks)
        # By ctid in an array: by id, or by a join, the server needs a tenth more time. A locked row keeps its
        # ctid. A row that another session updated between the start of this statement and the lock has
        # another ctid, and is left to another claim.
        .where(_place == any_(func.array(select(found.c.ctid).scalar_subquery())))
        # The place is that of an attempt when its type had a limit.
        .values(claimed_values(tasks, is_ahead=is_ahead) | {"pool_slot": null()})
        .returning(*returned_columns(tasks, bare=bare))
    )
    return statement.add_cte(note(schema, found).cte("note")) if noted else statement


@cache
def next_due(
    schema: str | None,
    *,
    ahead: bool = False,
    passes_over: bool = False,
    overflows: bool = False,
    keyed: bool = False,
) -> Select[tuple[int]]:
    """Return the ids of the tasks that `claim` would take with the same parameters, without taking them."""
    queues = given_queues(schema, with_limited=False)
    found = picked(schema, queues, ahead=ahead, passes_over=passes_over, overflows=overflows, keyed=keyed)
    return select(found.c.id)


_place: ColumnElement[Any] = literal_column("ctid")
_at_most = bindparam("at_most", type_=BigInteger)


def picked(
    schema: str | None,
    queues: CTE,
    *,
    ahead: bool,
    passes_over: bool,
    overflows: bool,
    keyed: bool,
    columns: tuple[str, ...] = (),
) -> CTE:
    """Lock due tasks of these queues, and return their ctids, ids and other columns."""
    tasks = tasks_table(schema)
    levels = _levels(queues)
    due = (
        select(_place, tasks.c.id, *(tasks.c[name] for name in columns))
        .where(*_is_claimable(tasks, queues, ahead=ahead, passes_over=passes_over))
        .limit(queues.c.at_most)
        # Other workers claim at the same time: skip the tasks that they have locked, instead of waiting.
        .with_for_update(skip_locked=True)
        .correlate(queues, levels)
    )
    # One index scan per level, so that a scan for due tasks of a lower level doesn't read the future tasks
    # of a higher one. The outer limits end the scans early, so no row is locked without being taken,
    # unless its data is large.
    of_level = due.where(*_is_on(tasks, levels)).order_by(tasks.c.process_at, tasks.c.id).lateral("due")
    found = select(*of_level.c).select_from(levels.join(of_level, true()))
    if overflows:
        has_key = tasks.c.key.is_not(None) if keyed else tasks.c.key.is_(None)
        lower = (level(tasks) < queues.c.lower_than) & has_key
        order = level(tasks).desc(), tasks.c.process_at, tasks.c.id
        rest = due.where(lower).order_by(*order).lateral("rest")
        found = select(*union_all(found.correlate(queues), select(*rest.c)).subquery("found").c)
    of_queue = found.limit(queues.c.at_most).correlate(queues).lateral("of_queue")
    return select(*of_queue.c).select_from(queues.join(of_queue, true())).limit(_at_most).cte("picked")


def _levels(queues: FromClause) -> TableValuedAlias:
    """Return the levels from which tasks of a queue are claimed, with a position in each."""
    return (
        func.unnest(queues.c.levels, queues.c.behind_times, queues.c.behind_ids)
        .table_valued("level", "behind_time", "behind_id")
        .render_derived("levels")
    )


def _is_on(tasks: Table, levels: TableValuedAlias) -> tuple[ColumnElement[bool], ...]:
    """Return the conditions that a task is of a level and behind its position."""
    return (
        level(tasks) == levels.c.level,
        tuple_(tasks.c.process_at, tasks.c.id)
        > tuple_(func.to_timestamp(levels.c.behind_time), levels.c.behind_id),
    )


def _is_claimable(
    tasks: Table, queues: FromClause, *, ahead: bool, passes_over: bool
) -> list[ColumnElement[bool]]:
    """Return the conditions that this worker may run a task of a queue now."""
    conditions = [
        tasks.c.queue == queues.c.queue,
        is_pending(tasks),
        tasks.c.process_at <= func.now(),
        tasks.c.type == any_(queues.c.types),
    ]
    if ahead:
        conditions.append(tasks.c.rescue_count <= ZERO)
    if passes_over:
        conditions.append(tasks.c.id != all_(bigints("passed_over")))
    return conditions


def claimed_values(tasks: Table, *, is_ahead: ColumnElement[bool] | None) -> dict[str, Any]:
    """Return the values that a claim writes to a task, except for its places.

    `is_ahead`: whether the claim takes more tasks than there are free slots.
    """
    # A task without attempts left doesn't start: if this worker dies now, that must not count as an attempt.
    may_not_have_begun = _has_no_attempts_left(tasks)
    if is_ahead is not None:
        may_not_have_begun = or_(is_ahead, may_not_have_begun)
    return {
        "state": RUNNING,
        # With a maximum, because another program may have written any number there, and an overflow would
        # stop every claim.
        "claim_token": func.least(tasks.c.claim_token, MAX_BIGINT_MINUS_ONE) + ONE,
        "attempt": func.least(tasks.c.attempt, MAX_INTEGER_MINUS_ONE) + ONE,
        "worker_id": bindparam("by_worker", type_=Uuid),
        "claimed_at": func.now(),
        "prefetched": may_not_have_begun,
        # A key that is held until the task has started is given up here: a task that is added from now on is
        # another one. NULL stays NULL.
        "held_unique_key": case((tasks.c.unique_until_end, tasks.c.held_unique_key)),
    }


def _has_no_attempts_left(tasks: Table) -> ColumnElement[bool]:
    """Return the condition that a task has used up its attempts."""
    limits = cast(bindparam("retry_limits", type_=Text), JSONB)
    # Numeric, because a number in Python may be too large for any integer type here.
    its_types_limit = cast(func.jsonb_extract_path_text(limits, tasks.c.queue, tasks.c.type), Numeric)
    return and_(
        tasks.c.fail_count > ZERO,  # false for most tasks, which saves the other comparison
        tasks.c.fail_count > func.coalesce(tasks.c.retry_limit, its_types_limit),
    )


def returned_columns(tasks: Table, *, bare: bool) -> tuple[ColumnElement[Any], ...]:
    """Return the columns of a `ClaimedTask`."""
    return (
        tasks.c.id,
        tasks.c.type,
        cast(null(), Text) if bare else short_text(tasks.c.data),
        tasks.c.priority,
        func.date_part(EPOCH, in_utc(tasks.c.created_at), type_=Double),
        func.date_part(EPOCH, in_utc(tasks.c.process_at), type_=Double),
        tasks.c.attempt,
        tasks.c.fail_count,
        tasks.c.claim_token,
        tasks.c.retry_limit,
        # In seconds, because an interval may be too long for Python's timedelta.
        func.date_part(EPOCH, tasks.c.retry_delay, type_=Double),
        func.date_part(EPOCH, tasks.c.timeout, type_=Double),
        cast(null(), Text) if bare else short_text(tasks.c.meta),
        tasks.c.queue,
        func.date_part(EPOCH, in_utc(tasks.c.tick_at), type_=Double),
        case((tasks.c.expires_at.is_not(None), _expires_in(tasks))),
    )


def _expires_in(tasks: Table) -> ColumnElement[float]:
    """Return the seconds from the claim to `expires_at`.

    Claims also take expired tasks, and the worker ends them: a condition would be read for each task, and the
    expired ones would stay where every scan begins.
    """
    # As numbers, because infinite times can't be subtracted before PostgreSQL 17.
    expires_at, claimed_at = (
        func.date_part(EPOCH, in_utc(time), type_=Double) for time in (tasks.c.expires_at, tasks.c.claimed_at)
    )
    return expires_at - claimed_at


def short_text(data: ColumnElement[Any]) -> ColumnElement[str | None]:
    """Return data as text; NULL if the data is large, and truncated if only its text is long.

    A number with an exponent can be long only as text: jsonb stores 1e100000 in a few bytes.
    """
    is_short = func.pg_column_size(data, type_=Integer) <= literal_column(str(LONGEST), Integer)
    # A cast to varchar(n) truncates, and takes less time than left() for shorter texts.
    return case((is_short, cast(cast(data, Text), VARCHAR(LONGEST + 1))))
