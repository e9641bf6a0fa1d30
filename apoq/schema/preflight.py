"""Finds problems that keep workers from working: unsupported tables, missing rights, read-only sessions.

A worker checks this when it starts, and `apoq doctor` whenever it is called.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from sqlalchemy import Connection

from apoq.errors import UnsupportedDatabase
from apoq.schema.citus import placement
from apoq.schema.grants import RIGHTS
from apoq.schema.statements.preflight import (
    id_sequence,
    id_source,
    last_ids,
    session,
    tables,
)

logger = logging.getLogger(__name__)

TABLE, CITUS = "table", "citus"
READ_ONLY, SCHEMA, ROLE, ROW_SECURITY = "read-only", "schema", "rights", "row security"
IDS = "ids"
"""The subjects of problems."""

_KINDS: Final = {
    "p": "a partitioned table",
    "v": "a view",
    "m": "a materialized view",
    "f": "a foreign table",
}

_ORDINARY: Final = (
    "but must be an ordinary table: workers identify the tasks that they claim by ctid, which is unique only "
    "within one table"
)


class Problem(NamedTuple):
    """A problem that keeps workers from working."""

    subject: str
    text: str
    """A description of the problem."""
    fix: str
    """How to fix it, usually as SQL."""
    is_fatal: bool = False
    """Whether a worker must not start, because it would harm other tasks, or every statement would fail."""


def check(connection: Connection, schema: str | None = None) -> None:
    """Raise `UnsupportedDatabase` if workers can't work on these tables; log all other problems.

    Called when a worker starts. Missing rights are only logged, because they may be granted while it runs.
    """
    for problem in problems(connection, schema):
        if problem.is_fatal:
            raise UnsupportedDatabase(f"{problem.text}: {problem.fix}")
        logger.error("%s: %s", problem.text, problem.fix)


def problems(connection: Connection, schema: str | None = None) -> list[Problem]:
    """Return the problems that keep this role from working on the tasks of a schema, the fatal ones first.

    Missing tables are not among them; see `apoq.migrations.check`.
    """
    who = connection.execute(session()).mappings().one()
    found = _tables(connection, schema)
    locked = [row for row in found if not row["is_reachable"]]
    if locked:
        name, role = locked[0]["schema"], who["role"]
        text = f"the role {role} may not use the schema {name}, which has apoq's tables"
        return [Problem(SCHEMA, text, f"GRANT USAGE ON SCHEMA {name} TO {role}")]
    return [
        *(
            problem
            for row in found
            if row["name"] == "apoq_tasks"
            for problem in _kind(connection, row, schema)
        ),
        *_split(found),
        *_read_only(who),
        *(problem for row in found for problem in _rights(row, who["role"])),
        *(problem for row in found for problem in _sequence(connection, row, who["role"])),
        *(problem for row in found for problem in _row_security(row, who["role"])),
    ]


def ids_problem(connection: Connection, schema: str | None = None) -> Problem | None:
    """Return the problem if new tasks get no ids, or ids in use, as after a restore without the sequence."""
    row = next((row for row in _tables(connection, schema) if row["name"] == "apoq_tasks"), None)
    source = row and connection.execute(id_source(), {"oid": row["oid"]}).mappings().first()
    if row is None or not source:
        return None
    name = row["qualified"]
    if not source["has_default"]:
        sequence = f"{row['schema']}.apoq_tasks_id_seq"
        fix = (
            f"CREATE SEQUENCE IF NOT EXISTS {sequence} OWNED BY {name}.id; "
            f"ALTER TABLE {name} ALTER id SET DEFAULT nextval({_literal(sequence)}); "
            f"{_setval(sequence, name)}"
        )
        return Problem(IDS, f"{name}.id has no default, so no task can be added", fix)
    if source["name"] is None:
        return None
    next_id, highest = tuple(connection.execute(last_ids(schema, source["name"], source["schema"])).one())
    if highest is None or highest < next_id:
        return None
    text = f"the next new task gets the id {next_id}, but there are tasks up to id {highest}: adding fails"
    return Problem(IDS, text, _setval(source["quoted"], name))


def only_adds(connection: Connection, schema: str | None = None) -> bool:
    """Return whether this role can add tasks, but can't delete them, so that it isn't meant for workers."""
    return any(
        row["may_insert"] and not row["closed_sequences"] and "DELETE" not in row["rights"]
        for row in _tables(connection, schema)
        if row["name"] == "apoq_tasks" and row["is_reachable"]
    )


def _tables(connection: Connection, schema: str | None) -> list[Any]:
    parameters = {"names": list(RIGHTS), "schema": schema}
    return list(connection.execute(tables(), parameters).mappings())


def _kind(connection: Connection, row: Any, schema: str | None) -> Iterator[Problem]:
    """Report a task table whose rows are in several tables, or on other servers."""
    name = row["qualified"]
    if row["kind"] in _KINDS:
        fix = (
            "run `apoq migrate --schema NAME` to create the tables in another schema, and use it with "
            "Queue(schema=…)"
        )
        yield Problem(TABLE, f"{name} is {_KINDS[row['kind']]}, {_ORDINARY}", fix, is_fatal=True)
    elif row["parent"]:
        what, fix = (
            ("a partition", f"ALTER TABLE {row['parent']} DETACH PARTITION {name}")
            if row["is_partition"]
            else ("a child table", f"ALTER TABLE {name} NO INHERIT {row['parent']}")
        )
        yield Problem(TABLE, f"{name} is {what} of {row['parent']}, {_ORDINARY}", fix, is_fatal=True)
    elif row["children"]:
        fix = "; ".join(f"ALTER TABLE {child} NO INHERIT {name}" for child in row["children"])
        text = f"{name} has child tables that inherit from it, {_ORDINARY}"
        yield Problem(TABLE, text, fix, is_fatal=True)
    found = placement(connection, schema)
    if found is not None and not found.is_whole:
        text = (
            f"{name} is distributed by Citus over several nodes, where workers can't work: only its schema "
            "as a whole may be sharded"
        )
        yield Problem(CITUS, text, f"SELECT undistribute_table({_literal(name)})", is_fatal=True)


def _split(found: list[Any]) -> Iterator[Problem]:
    """Report a search_path that finds apoq's tables in different schemas."""
    if len({row["schema"] for row in found}) > 1:
        names = ", ".join(row["qualified"] for row in found)
        text = f"the search_path leads to tables of different schemas: {names}"
        fix = (
            "change it to lead to one schema with all of apoq's tables, or pass that schema "
            "(--schema, Queue(schema=…))"
        )
        yield Problem(TABLE, text, fix)


def _read_only(who: Any) -> Iterator[Problem]:
    if who["is_standby"]:
        fix = "connect to the primary; with several hosts in the URL, add target_session_attrs=read-write"
        yield Problem(READ_ONLY, "this server is a standby, which is read-only", fix)
    elif who["is_read_only"]:
        setting = "default_transaction_read_only"
        resets = {
            "user": f"ALTER ROLE {who['login']} RESET {setting}",
            "database user": f"ALTER ROLE {who['login']} IN DATABASE {who['database']} RESET {setting}",
            "database": f"ALTER DATABASE {who['database']} RESET {setting}",
            "global": f"ALTER ROLE ALL RESET {setting}",
            "configuration file": f"ALTER SYSTEM SET {setting} = off; SELECT pg_reload_conf()",
        }
        source = who["read_only_source"]
        fix = resets.get(source, f"don't set {setting} in the URL, in PGOPTIONS or in the program")
        yield Problem(READ_ONLY, "transactions are read-only here, but a worker has to write", fix)


def _rights(row: Any, role: str) -> Iterator[Problem]:
    lacking = [right for right in RIGHTS[row["name"]] if right not in row["rights"]]
    if lacking:
        text = f"the role {role} lacks {', '.join(lacking)} on {row['qualified']}, which a worker needs"
        yield Problem(ROLE, text, f"GRANT {', '.join(lacking)} ON {row['qualified']} TO {role}")


def _sequence(connection: Connection, row: Any, role: str) -> Iterator[Problem]:
    """Report that new tasks would get no ids."""
    if row["name"] != "apoq_tasks":
        return
    sequence = connection.execute(id_sequence(), {"oid": row["oid"]}).mappings().first()
    if sequence is not None and not sequence["is_usable"]:
        name = sequence["quoted"]
        text = (
            f"the role {role} lacks USAGE on the sequence {name}, which a worker needs to add the tasks of "
            "schedules and of on_failure"
        )
        yield Problem(ROLE, text, f"GRANT USAGE ON SEQUENCE {name} TO {role}")


def _row_security(row: Any, role: str) -> Iterator[Problem]:
    if row["is_guarded"]:
        text = (
            f"row-level security on {row['qualified']} may hide rows from the role {role}, and a worker "
            "can run only tasks that it sees"
        )
        fix = (
            f"CREATE POLICY apoq_worker ON {row['qualified']} TO {role} USING (true), if no policy there is "
            f"restrictive; otherwise ALTER TABLE {row['qualified']} DISABLE ROW LEVEL SECURITY"
        )
        yield Problem(ROW_SECURITY, text, fix)


def _setval(sequence: str, table: str) -> str:
    return f"SELECT setval({_literal(sequence)}, (SELECT max(id) FROM {table}))"  # noqa: S608 - only shown, never executed


def _literal(name: str) -> str:
    return "'" + name.replace("'", "''") + "'"
