"""The rights of each kind of role: one table, from which `GRANT` statements and checks are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection, Table

from apoq.schema.models import schedules_table, tasks_table
from apoq.schema.statements.preflight import (
    closed_database,
    guarded,
    id_sequence,
    lacked_privileges,
    missing_roles,
    quoted_names,
    tables,
)
from apoq.schema.tables import links_table

PRODUCER: Final = "producer"
WORKER: Final = "worker"
READER: Final = "reader"
OPERATOR: Final = "operator"

TASKS, SCHEDULES, PAUSES = "apoq_tasks", "apoq_schedules", "apoq_pauses"
WORKERS, CLAIMS, LIMITS = "apoq_workers", "apoq_claims", "apoq_limits"
PROGRESS, THROTTLES = "apoq_progress", "apoq_throttles"
LINKS, MIGRATIONS = "apoq_links", "apoq_migrations"
TABLES: Final = (TASKS, WORKERS, CLAIMS, SCHEDULES, PAUSES, LIMITS, PROGRESS, THROTTLES, LINKS, MIGRATIONS)

GIVEN: Final = (
    *("created_at", "process_at", "data", "type", "queue", "priority", "retry_limit", "retry_delay"),
    *("timeout", "meta", "key", "expires_at"),
)
"""The columns that `add` writes."""

UNIQUE: Final = ("unique_key", "held_unique_key", "unique_until_end")
"""The columns that it also writes with a unique key."""

LINKED: Final = (
    *("id", "state", "blockers", "waiting_since", "waiting_for", "on_parent_failure"),
    *("group_id", "is_followed", "has_parts"),
)
"""The columns that it also writes for a task of a graph."""

RETURNED: Final = ("id", "created_at", "process_at", "expires_at")
"""The columns that `add` returns."""

LOOKED_AT: Final = ("id", "created_at", "state", "result", "is_followed")
"""The columns of its parents that `add` reads."""

AWAITED: Final = ("id", "queue", "type", "state", "result", "error")
"""The columns that `result` and `wait` read."""

CHANGED: Final = (
    *("state", "attempt", "fail_count", "rescue_count", "completed_at", "failed_at", "cancelled_at"),
    *("error", "held_unique_key", "waiting_since", "waiting_for", "pool_key", "result"),
)
"""The columns that `cancel` and `retry` write; they also write `process_at`."""

CASCADED: Final = ("error", "is_done", "needs_check")
"""The columns of edges that `cancel` and `retry` write."""

PRIVATE: Final = ("data", "meta", "error", "result")
"""The columns that a reader sees only with `--with-data`."""


class Grant(NamedTuple):
    """A privilege on a table, or on some of its columns."""

    privilege: str
    table: str
    columns: tuple[str, ...] = ()


class Options(NamedTuple):
    """Additional rights of producers and readers."""

    may_cancel: bool = False
    """Whether producers cancel and retry tasks, or use unique keys."""
    may_link: bool = False
    """Whether producers add tasks that wait for others, chains and groups."""
    may_wait: bool = False
    """Whether producers read results and progress of tasks."""
    may_schedule: bool = False
    """Whether producers schedule tasks, and pause and limit queues."""
    with_data: bool = False
    """Whether readers see the data, the metadata, the errors and the results of tasks."""


def grants(kind: str, options: Options) -> list[Grant]:
    """Return the privileges that a kind of role needs on apoq's tables."""
    return list(_KINDS[kind](options))


def needs_sequence(kind: str) -> bool:
    """Return whether this kind of role adds tasks, whose ids come from a sequence."""
    return kind != READER


def _producer(options: Options) -> Iterator[Grant]:
    cancels, links, waits = options.may_cancel, options.may_link, options.may_wait
    yield Grant("SELECT", MIGRATIONS)
    yield Grant("INSERT", TASKS, (*GIVEN, *(UNIQUE if cancels else ()), *(LINKED if links else ())))
    if cancels:
        yield Grant("SELECT", TASKS)
    else:
        read = (*RETURNED, *(LOOKED_AT if links else ()), *(AWAITED if waits else ()))
        yield Grant("SELECT", TASKS, tuple(dict.fromkeys(read)))
    if changed := (*(_all_changed() if cancels else ()), *(("is_followed",) if links else ())):
        yield Grant("UPDATE", TASKS, changed)
    if cancels:
        for privilege in ("SELECT", "INSERT", "UPDATE", "DELETE"):
            yield Grant(privilege, THROTTLES)
        # `cancel_many` and `retry_many` find running tasks by their claims.
        yield Grant("SELECT", CLAIMS)
        yield Grant("SELECT", LINKS)
        yield Grant("UPDATE", LINKS, CASCADED)
    if links:
        yield Grant("INSERT", LINKS)
    if waits:
        yield Grant("SELECT", PROGRESS)
    if options.may_schedule:
        for privilege in ("SELECT", "INSERT", "UPDATE", "DELETE"):
            yield Grant(privilege, SCHEDULES)
            yield Grant(privilege, PAUSES)
            yield Grant(privilege, LIMITS)


def _worker(_options: Options) -> Iterator[Grant]:
    for table, privileges in RIGHTS.items():
        for privilege in privileges:
            yield Grant(privilege, table)


def _reader(options: Options) -> Iterator[Grant]:
    for table in TABLES:
        if table in _WITH_DATA and not options.with_data:
            columns = (column.name for column in _WITH_DATA[table](None).c)
            yield Grant("SELECT", table, tuple(name for name in columns if name not in PRIVATE))
        elif table != THROTTLES and (options.with_data or table != PROGRESS):
            yield Grant("SELECT", table)


_WITH_DATA: Final[Mapping[str, Callable[[str | None], Table]]] = {
    TASKS: tasks_table,
    SCHEDULES: schedules_table,
    LINKS: links_table,
}
"""The tables that have private columns."""


def _operator(_options: Options) -> Iterator[Grant]:
    yield from _reader(Options(with_data=True))
    # `retry` reserves a unique key by a row that it deletes, and `prune` deletes tasks.
    yield Grant("INSERT", TASKS, (*GIVEN, *UNIQUE, "state", "schedule", "tick_at"))
    yield Grant("UPDATE", TASKS, _all_changed())
    yield Grant("DELETE", TASKS)
    yield Grant("DELETE", PROGRESS)
    yield Grant("UPDATE", LINKS, CASCADED)
    yield Grant("DELETE", LINKS)
    for privilege in ("UPDATE", "DELETE"):
        yield Grant(privilege, SCHEDULES)
    for privilege in ("INSERT", "UPDATE", "DELETE"):
        yield Grant(privilege, PAUSES)
        yield Grant(privilege, LIMITS)


def _all_changed() -> tuple[str, ...]:
    given = (name for name in GIVEN if name not in {"created_at", "queue"})
    return (*CHANGED, *given, "unique_until_end")


RIGHTS: Final[Mapping[str, tuple[str, ...]]] = {
    TASKS: ("SELECT", "INSERT", "UPDATE", "DELETE"),
    WORKERS: ("SELECT", "INSERT", "UPDATE", "DELETE"),
    CLAIMS: ("SELECT", "INSERT", "DELETE"),
    SCHEDULES: ("SELECT", "INSERT", "UPDATE"),
    PAUSES: ("SELECT",),
    LIMITS: ("SELECT", "INSERT", "UPDATE"),
    THROTTLES: ("SELECT", "INSERT", "UPDATE", "DELETE"),
    PROGRESS: ("SELECT", "INSERT", "UPDATE", "DELETE"),
    LINKS: ("SELECT", "INSERT", "UPDATE", "DELETE"),
    MIGRATIONS: ("SELECT",),
}
"""The rights that a worker's role needs on each table. Its processors may add tasks of any kind."""

_KINDS: Final = {PRODUCER: _producer, WORKER: _worker, READER: _reader, OPERATOR: _operator}
KINDS: Final = tuple(_KINDS)


class Place(NamedTuple):
    """Where the tables are, as identifiers in SQL."""

    schema: str
    tables: Mapping[str, str]
    sequence: str | None
    guarded: frozenset[str]
    """The names of the tables that have row-level security."""
    database: str | None
    """The database, if not every role may connect to it."""


def find(connection: Connection, schema: str | None) -> Place | None:
    """Return where apoq's tables are; None if there are none that this role sees."""
    parameters = {"names": list(TABLES), "schema": schema}
    found = {row["name"]: row for row in connection.execute(tables(), parameters).mappings()}
    if TASKS not in found:
        return None
    its = found[TASKS]
    sequence = connection.execute(id_sequence(), {"oid": its["oid"]}).mappings().first()
    oids = [row["oid"] for row in found.values()]
    return Place(
        its["schema"],
        {name: row["qualified"] for name, row in found.items()},
        None if sequence is None else sequence["quoted"],
        frozenset(connection.execute(guarded(), {"oids": oids}).scalars()),
        connection.execute(closed_database()).scalar(),
    )


def quoted(connection: Connection, roles: list[str]) -> list[str]:
    """Return names as identifiers in SQL."""
    return list(connection.execute(quoted_names(), {"names": roles}).scalar_one() or ())


def unknown(connection: Connection, roles: list[str]) -> list[str]:
    """Return those of the roles that don't exist."""
    return list(connection.execute(missing_roles(), {"names": roles}).scalar_one())


def statements(place: Place, kind: str, role: str, options: Options) -> list[str]:
    """Return the statements that give a role, as an identifier in SQL, what its kind needs."""
    return [
        *([] if place.database is None else [f"GRANT CONNECT ON DATABASE {place.database} TO {role}"]),
        f"GRANT USAGE ON SCHEMA {place.schema} TO {role}",
        *_merged(grants(kind, options), place, role),
        *([f"GRANT USAGE ON SEQUENCE {place.sequence} TO {role}"] if _uses_sequence(place, kind) else []),
    ]


def missing(connection: Connection, place: Place, kind: str, role: str, options: Options) -> list[str]:
    """Return the statements that give a role what it lacks."""
    wanted: list[tuple[str, str, str | None]] = [("USAGE", place.schema, None)]
    if place.database is not None:
        wanted.append(("CONNECT", place.database, None))
    if _uses_sequence(place, kind):
        wanted.append(("SEQUENCE", str(place.sequence), None))
    given = grants(kind, options)
    for grant in given:
        wanted += (
            (grant.privilege, place.tables[grant.table], column) for column in grant.columns or (None,)
        )
    parameters = {
        "role": role,
        "privileges": [privilege for privilege, _, _ in wanted],
        "objects": [name for _, name, _ in wanted],
        "columns": [column for _, _, column in wanted],
    }
    lacked = {tuple(row) for row in connection.execute(lacked_privileges(), parameters)}
    (name,) = quoted(connection, [role])
    found = []
    if ("CONNECT", place.database, None) in lacked:
        found.append(f"GRANT CONNECT ON DATABASE {place.database} TO {name}")
    if ("USAGE", place.schema, None) in lacked:
        found.append(f"GRANT USAGE ON SCHEMA {place.schema} TO {name}")
    narrowed = (
        grant._replace(columns=tuple(c for c in grant.columns if _is_in(lacked, place, grant, c)))
        for grant in given
        if any(_is_in(lacked, place, grant, column) for column in grant.columns or (None,))
    )
    found += _merged(list(narrowed), place, name)
    if ("SEQUENCE", place.sequence, None) in lacked:
        found.append(f"GRANT USAGE ON SEQUENCE {place.sequence} TO {name}")
    return found


def _uses_sequence(place: Place, kind: str) -> bool:
    return place.sequence is not None and needs_sequence(kind)


def _is_in(lacked: set[Any], place: Place, grant: Grant, column: str | None) -> bool:
    return (grant.privilege, place.tables[grant.table], column) in lacked


def _merged(given: list[Grant], place: Place, role: str) -> Iterator[str]:
    """Yield one statement for each table."""
    for table in TABLES:
        its = [grant for grant in given if grant.table == table]
        if its:
            privileges = ", ".join(
                f"{grant.privilege} ({', '.join(grant.columns)})" if grant.columns else grant.privilege
                for grant in its
            )
            yield f"GRANT {privileges} ON {place.tables[table]} TO {role}"
