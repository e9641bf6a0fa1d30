"""Checks of apoq's tables and workers."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from datetime import timedelta
from importlib.metadata import version
from typing import Final, Protocol

import sqlalchemy as sa

from apoq.core.states import PENDING
from apoq.migrations import LATEST, current
from apoq.migrations.places import ambiguous, where_looked, why_missing
from apoq.migrations.steps import newer
from apoq.monitor.check import BAD, OK, WARNING, Finding
from apoq.monitor.formatting import clean, length, size, tasks
from apoq.monitor.keys import COUNTED as OF_KEYS
from apoq.monitor.keys import read_keys
from apoq.monitor.pauses import Pause
from apoq.monitor.stats import Figures, WorkerFigures
from apoq.schema.citus import placement
from apoq.schema.preflight import CITUS, ROLE, ids_problem, only_adds, problems
from apoq.schema.statements.claim import CHANGED
from apoq.schema.statements.count import COUNTED
from apoq.schema.statements.schedules import all_schedules, is_orphan
from apoq.schema.statements.server import holders, indexes_naming, server, vacuuming

MAX_DEAD_ROWS: Final = 50_000
"""Dead rows that are harmless, even if there are fewer live ones."""

LONG_TRANSACTION: Final = timedelta(minutes=5)
"""How long a transaction may hold up vacuum."""

LATE_AFTER_SECONDS: Final = 60.0
"""Seconds that a task may have been due without a warning."""

SWEEP_DURATION: Final = timedelta(minutes=2)
"""About how long it takes until a worker recovers a running task that no claim has recorded.

A sweep begins at most 72 s after the last one and finds the task; the next one, some 5 s later, recovers it.
With many tasks, the sweep itself takes some time.
"""

MAX_SCHEDULES: Final = 10_000
"""How many schedules are checked."""

HUNDRED_GB: Final = 100 * 1024**3
FEW_DAYS: Final = 7
"""If completed tasks take more than 100 GB in so many days, that is worth a look."""

MAX_NAMED: Final = 3
"""How many similar findings are listed."""


class KnownQueue(Protocol):
    """The statistics of a queue that are checked."""

    @property
    def name(self) -> str:
        """The queue's name."""

    @property
    def lag(self) -> float | None:
        """For how many seconds the oldest ready task has been due."""

    @property
    def oldest_type(self) -> str | None:
        """The type of that task, if it is known."""


class Known(Protocol):
    """The statistics that are checked: `Figures`, or an `Overview`."""

    @property
    def queues(self) -> Sequence[KnownQueue]:
        """The queues."""

    @property
    def has_more_queues(self) -> bool:
        """Whether there are other queues."""

    @property
    def workers(self) -> Sequence[WorkerFigures]:
        """The workers."""

    @property
    def has_more_workers(self) -> bool:
        """Whether there are other workers."""

    @property
    def pauses(self) -> Sequence[Pause]:
        """The pauses."""

    @property
    def has_more_pauses(self) -> bool:
        """Whether there are other pauses."""

    @property
    def orphans(self) -> int:
        """Running tasks whose worker is not alive."""

    @property
    def unnoted(self) -> int:
        """Running tasks that no claim has recorded."""


def check_role(connection: sa.Connection, schema: str | None) -> Iterator[Finding]:
    """Check for what a worker with this role lacks; a role that only adds tasks need not run them."""
    found = problems(connection, schema)
    if only_adds(connection, schema):
        grants = "; ".join(problem.fix for problem in found if problem.subject == ROLE)
        text = "this role can add tasks, but not run them"
        yield Finding(WARNING, ROLE, text, f"if it should run them: {grants}")
        found = [problem for problem in found if problem.subject != ROLE]
    for problem in found:
        yield Finding(BAD, problem.subject, problem.text, problem.fix)


def check_version(connection: sa.Connection, schema: str | None) -> Iterator[Finding]:
    """Check that the tables have this library's version, and which are used if there are several sets."""
    found = current(connection, schema)
    if found == LATEST:
        yield Finding(OK, "tables", f"version {LATEST}, which is right for this library")
        if schema is None and (problem := ambiguous(connection)):
            yield Finding(WARNING, "tables", problem.text, problem.fix)
        return
    if found > LATEST:
        yield Finding(BAD, "tables", newer(found), "pip install --upgrade apoq")
        return
    if not found and (problem := why_missing(connection, schema)):
        yield Finding(BAD, "tables", problem.text, problem.fix)
        return
    where = "" if schema is None else f" in the schema {schema!r}"
    none = f"there are none{where}, in {where_looked(connection, schema)}"
    text = f"version {found}, but this library needs {LATEST}" if found else none
    option = "" if schema is None else f" --schema {shlex.quote(schema)}"
    cure = f"apoq migrate{option}, or alembic upgrade head if your migrations include apoq's"
    yield Finding(BAD, "tables", text, cure)


def check_limits(connection: sa.Connection, schema: str | None) -> Iterator[Finding]:
    """Check for keys that are held up by failed tasks."""
    found = [each for each in read_keys(connection, schema) if each.held_by is not None]
    for each in found[:MAX_NAMED]:
        yield Finding(
            WARNING,
            "limits",
            f"the key {clean(each.key or '')!r} of the queue {clean(each.queue)!r} is held up by the failed "
            f"task {each.held_by}; {tasks(each.waiting, OF_KEYS.waiting)} waiting",
            f"apoq retry {each.held_by}, or delete it",
        )
    if len(found) > MAX_NAMED:
        yield Finding(
            WARNING, "limits", f"{len(found) - MAX_NAMED:,} more keys are held up", "apoq keys --full"
        )


def check_vacuum(connection: sa.Connection, schema: str | None) -> Iterator[Finding]:
    """Check that dead rows are removed, because each task leaves some behind."""
    found = connection.execute(vacuuming(schema)).mappings().one()
    setting = connection.execute(server()).mappings().one()["autovacuum"]
    dead, live = found["n_dead_tup"], found["n_live_tup"]
    text = f"about {dead:,} dead rows"
    if (node := placement(connection, schema)) is not None:
        dead, text = 0, f"the number of dead rows is not known here, but only on the node {node.node}"
    if "autovacuum_enabled=false" in found["options"]:
        cure = f"ALTER TABLE {_name(schema)} RESET (autovacuum_enabled)"
        yield Finding(BAD, "vacuum", f"autovacuum is off for the task table; {text}", cure)
    elif setting != "on":
        yield Finding(
            BAD, "vacuum", f"autovacuum is off; {text}", "ALTER SYSTEM SET autovacuum = on, and reload"
        )
    elif dead > max(MAX_DEAD_ROWS, live):
        cure = f"end the transactions that are listed below, if any; then VACUUM {_name(schema)}"
        yield Finding(WARNING, "vacuum", f"{text}, more than live ones", cure)
    else:
        yield Finding(OK, "vacuum", f"autovacuum is on; {text}")


def check_placement(connection: sa.Connection, schema: str | None) -> Iterator[Finding]:
    """Say on which node of a Citus cluster the tables are, and whether this connection leads there."""
    if (found := placement(connection, schema)) is None:
        return
    if found.is_here:
        entrance = "to which this connection leads"
    else:
        entrance = (
            "and this connection leads to another one: all workers, and all programs that add tasks, should "
            "connect to the same node"
        )
    yield Finding(OK, CITUS, f"{_name(schema)} is on the node {found.node}, {entrance}")


def check_indexes(connection: sa.Connection, schema: str | None) -> Iterator[Finding]:
    """Check for indexes that make each claim write to every index."""
    for name in connection.scalars(indexes_naming(schema), {"columns": list(CHANGED)}):
        text = f"{name} has a column that claims change, so each claim writes to every index of the tasks"
        yield Finding(WARNING, "indexes", text, f"DROP INDEX CONCURRENTLY {name}, if you don't need it")


def check_ids(connection: sa.Connection, schema: str | None) -> Iterator[Finding]:
    """Check that the next tasks get IDs that are not in use."""
    if problem := ids_problem(connection, schema):
        yield Finding(BAD, problem.subject, problem.text, problem.fix)


def check_horizon(connection: sa.Connection) -> Iterator[Finding]:
    """Check for transactions that prevent the removal of dead rows, which makes every queue slower."""
    found = connection.execute(holders(), {"longer_than": LONG_TRANSACTION}).mappings().all()
    if not found:
        text = f"nothing has held up vacuum for {length(LONG_TRANSACTION.total_seconds())}"
        yield Finding(OK, "transactions", text)
    for row in found[:MAX_NAMED]:
        name = clean(row["name"])
        match row["kind"]:
            case "session":
                text = f"{name} has been in a transaction for {length(row['age'])}, and is {row['state']}"
                cure = f"SELECT pg_terminate_backend({row['pid']}), and fix the program that left it open"
            case "prepared transaction":
                text = f"{name!r} has been prepared for {length(row['age'])}"
                cure = "COMMIT PREPARED or ROLLBACK PREPARED '{}'".format(name.replace("'", "''"))
            case _:
                text = f"the replication slot {name!r} is unused, and holds up vacuum"
                cure = f"start its replica, or SELECT pg_drop_replication_slot('{name}')"
        yield Finding(WARNING, "transactions", text, cure)


def check_workers(found: Known) -> Iterator[Finding]:
    """Check which workers are alive, and which have died."""
    alive = [worker for worker in found.workers if worker.is_alive]
    dead = [worker for worker in found.workers if not worker.is_alive]
    ours = version("apoq")
    number = f"{len(alive):,}{'+' if found.has_more_workers else ''}"
    others = sorted({worker.version for worker in alive} - {ours})
    if not alive:
        yield Finding(WARNING, "workers", "none is alive", "start one: apoq worker yourmodule:queue")
    elif others:
        text = f"{number} alive, some with apoq {', '.join(others)}; this is {ours}"
        yield Finding(WARNING, "workers", text, "restart them with the same version when convenient")
    else:
        yield Finding(OK, "workers", f"{number} alive")
    for worker in dead[:MAX_NAMED]:
        text = f"{clean(worker.host)}, process {worker.pid}, died {length(worker.unseen_for)} ago"
        cure = "see its log; live workers take over its tasks. This warning ends after an hour"
        yield Finding(WARNING, "workers", text, cure)
    if found.orphans:
        text = f"{tasks(found.orphans, COUNTED)} running whose worker is not alive"
        if alive:
            yield Finding(WARNING, "running", text, "wait some seconds: live workers take over these tasks")
        else:
            yield Finding(BAD, "running", text, "start a worker: it takes over these tasks")
    if found.unnoted:
        text = f"{tasks(found.unnoted, COUNTED)} running that no claim has recorded, as in a partial restore"
        wait = f"a worker makes them pending within about {length(SWEEP_DURATION.total_seconds())}"
        yield Finding(WARNING, "running", text, f"wait: {wait}" if alive else f"start a worker: {wait}")


def check_schedules(
    connection: sa.Connection, schema: str | None, at_most: int = MAX_SCHEDULES
) -> Iterator[Finding]:
    """Check for schedules that don't tick, whose tasks don't run, or that the code has lost."""
    parameters = {"from_queue": None, "named": None, "at_most": at_most}
    rows = connection.execute(all_schedules(schema), parameters).mappings().all()
    found = [finding for row in rows if row["paused_at"] is None for finding in _check_schedule(row)]
    if rows and not found:
        yield Finding(OK, "schedules", f"{len(rows):,}, all of which tick")
    yield from found[:MAX_NAMED]
    if len(found) > MAX_NAMED:
        text = f"{len(found) - MAX_NAMED:,} more have such problems"
        yield Finding(WARNING, "schedules", text, "run apoq schedules")


def _check_schedule(row: sa.RowMapping) -> Iterator[Finding]:
    name = f"{clean(row['name'])!r} of queue {clean(row['queue'])!r}"
    late = (row["now"] - row["next_at"]).total_seconds()
    if not row["is_worked"]:
        text = f"{name} adds no tasks, because no live worker works on its queue"
        yield Finding(WARNING, "schedules", text, "start a worker for this queue")
    elif late > LATE_AFTER_SECONDS:
        text = f"{name} should have ticked {length(late)} ago"
        yield Finding(WARNING, "schedules", text, "see the log of a worker of this queue")
    elif row["last_state"] == PENDING and (row["last_due_for"] or 0) > LATE_AFTER_SECONDS:
        type_ = clean(row["type"])
        text = f"{name} has a task of type {type_!r} that has been due for {length(row['last_due_for'])}"
        cure = (
            f"if no worker has a processor for {type_!r}, start one that has, or remove the schedule; "
            "otherwise, start more workers"
        )
        yield Finding(WARNING, "schedules", text, cure)
    if is_orphan(row):
        text = f"{name} is not declared by the code of any live worker, but still adds tasks"
        yield Finding(WARNING, "schedules", text, f"apoq schedules remove {shlex.quote(row['name'])}")


def check_disk(found: Figures) -> Iterator[Finding]:
    """Say how large the tables are, and how fast they grow; the free space is not visible in SQL."""
    text = f"the task table takes {size(found.bytes)}"
    per_day = sum(queue.bytes_per_day or 0 for queue in found.queues)
    if found.rows <= 0 or not per_day:
        yield Finding(OK, "disk", text)
        return
    days = HUNDRED_GB / per_day
    text += (
        f"; at the rate of the last hour, completed tasks take {size(per_day)} a day until they are deleted: "
        f"100 GB would hold {days:,.0f} days of them. The free space is not visible in SQL: compare with df"
    )
    if days >= FEW_DAYS:
        yield Finding(OK, "disk", text)
    else:
        cure = "keep fewer: Worker(…, keep_completed=Keep(timedelta(hours=1), at_most=100_000))"
        yield Finding(WARNING, "disk", text, cure)


def check_queues(found: Known) -> Iterator[Finding]:
    """Check for tasks that have been due for too long, and for queues without a worker."""
    worked = {name for worker in found.workers if worker.is_alive for name in worker.queues}
    paused = {(pause.queue, pause.type) for pause in found.pauses}
    for pause in found.pauses:
        of_type = "" if pause.type is None else f" --type {shlex.quote(pause.type)}"
        yield Finding(WARNING, "pauses", str(pause), f"apoq resume {shlex.quote(pause.queue)}{of_type}")
    if found.has_more_pauses:
        yield Finding(WARNING, "pauses", "there are more pauses than these", "end those that you don't need")
    late = [
        queue
        for queue in found.queues
        if (queue.lag or 0) > LATE_AFTER_SECONDS
        and not paused & {(queue.name, None), (queue.name, queue.oldest_type)}
    ]
    if not late:
        yield Finding(OK, "queues", f"no task has been due for more than {length(LATE_AFTER_SECONDS)}")
    for queue in late[:MAX_NAMED]:
        type_ = clean(queue.oldest_type)
        text = f"{clean(queue.name)!r} has had a task of type {type_!r} due for {length(queue.lag or 0)}"
        if queue.name not in worked and not found.has_more_workers:
            cure = "start a worker for this queue"
            yield Finding(BAD, "queues", f"{text}, but no live worker", cure)
        else:
            cure = (
                f"if no worker has a processor for {type_!r}, start one that has, or correct the type; "
                "otherwise, start more workers"
            )
            yield Finding(WARNING, "queues", text, cure)
    if len(late) > MAX_NAMED:
        yield Finding(WARNING, "queues", f"{len(late) - MAX_NAMED:,} more have such tasks", "run apoq stats")
    if found.has_more_queues:
        yield Finding(OK, "queues", f"only the first {len(found.queues):,} queues were checked")


def _name(schema: str | None) -> str:
    return "apoq_tasks" if schema is None else f"{schema}.apoq_tasks"
