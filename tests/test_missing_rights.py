"""PostgreSQL refuses what a role was not granted, and apoq names the grant that is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool
from waiting import patience

from apoq import Queue, Worker
from apoq.cli import main
from apoq.monitor.rights import Rights, read_rights
from apoq.schema import grants
from apoq.schema.grants import OPERATOR, PRODUCER, READER, TABLES, WORKER, Options

pytestmark = pytest.mark.as_owner("the roles of these tests are their own")

until = patience(20)

ALL = Options(may_cancel=True, may_link=True, may_wait=True, may_schedule=True)

ROLES = {
    "producer": (PRODUCER, Options()),
    "producer that cancels": (PRODUCER, Options(may_cancel=True)),
    "producer of graphs": (PRODUCER, Options(may_link=True)),
    "producer that waits": (PRODUCER, Options(may_wait=True)),
    "producer that schedules": (PRODUCER, Options(may_schedule=True)),
    "producer with all": (PRODUCER, ALL),
    "worker": (WORKER, Options()),
    "reader": (READER, Options()),
    "reader of data": (READER, Options(with_data=True)),
    "operator": (OPERATOR, Options()),
}

Privilege = tuple[str, str, str | None]
"""A privilege on a table, or on one of its columns."""


@pytest.fixture
def become(engine) -> Iterator[Callable[[str, Options], sa.URL]]:
    """Create a role with the grants of its kind; return its URL."""
    role = f"{engine.url.database}_role"
    with engine.begin() as connection:
        connection.exec_driver_sql("REVOKE ALL ON SCHEMA public FROM PUBLIC")
        connection.exec_driver_sql(f"CREATE ROLE {role} LOGIN PASSWORD 'app'")

    def become(kind: str, options: Options) -> sa.URL:
        with engine.begin() as connection:
            place = grants.find(connection, None)
            for statement in grants.statements(place, kind, role, options):
                connection.exec_driver_sql(statement)
        return engine.url.set(username=role, password="app")

    yield become
    with engine.begin() as connection:
        connection.exec_driver_sql(f"DROP OWNED BY {role}; DROP ROLE {role}")


@pytest.fixture
def connect(become) -> Callable[[str, Options], sa.Engine]:
    return lambda *arguments: sa.create_engine(become(*arguments), poolclass=NullPool)


@pytest.fixture
def revoke(engine) -> Callable[[str, str], None]:
    def revoke(table: str, role: str) -> None:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"REVOKE ALL ON {table} FROM {role}")

    return revoke


def attempts(engine: sa.Engine) -> Iterator[tuple[Privilege, str]]:
    """Yield a statement for each privilege on each column of apoq's tables; none has an effect."""
    for table in TABLES:
        for column in (its["name"] for its in sa.inspect(engine).get_columns(table)):
            yield ("SELECT", table, column), f"SELECT {column} FROM {table} LIMIT 0"
            yield ("INSERT", table, column), f"INSERT INTO {table} ({column}) VALUES (DEFAULT)"
            yield ("UPDATE", table, column), f"UPDATE {table} SET {column} = DEFAULT WHERE false"
        yield ("DELETE", table, None), f"DELETE FROM {table} WHERE false"
        yield ("TRUNCATE", table, None), f"TRUNCATE {table}"
        yield ("ALTER", table, None), f"ALTER TABLE {table} ADD COLUMN extra int"
        yield ("DROP", table, None), f"DROP TABLE {table}"


def is_refused(connection: sa.Connection, statement: str) -> bool:
    try:
        connection.exec_driver_sql(statement)
    except sa.exc.DBAPIError as error:
        return error.orig.sqlstate == "42501"
    finally:
        connection.rollback()
    return False


@pytest.mark.parametrize(("kind", "options"), ROLES.values(), ids=ROLES)
def test_a_role_may_do_what_it_was_granted_and_nothing_else(engine, connect, kind, options):
    given = {(its.privilege, its.table): its.columns for its in grants.grants(kind, options)}
    statements = dict(attempts(engine))

    with connect(kind, options).connect() as connection:
        refused = {privilege for privilege, text in statements.items() if is_refused(connection, text)}

    def is_granted(privilege: str, table: str, column: str | None) -> bool:
        columns = given.get((privilege, table))
        return columns is not None and (not columns or column in columns)

    assert refused == {its for its in statements if not is_granted(*its)}


@pytest.mark.parametrize(("kind", "options"), ROLES.values(), ids=ROLES)
def test_only_the_owner_sets_the_next_id(connect, kind, options):
    with connect(kind, options).connect() as connection:
        assert is_refused(connection, "SELECT setval('apoq_tasks_id_seq', 1)")
        assert is_refused(connection, "SELECT nextval('apoq_tasks_id_seq')") is (kind == READER)


def link(session: Session, queue: Queue) -> None:
    queue.add(session, "t", after=[queue.add(session, "t")])


def link_in_group(session: Session, queue: Queue) -> None:
    with queue.group(session) as group:
        group.add_many("t", [{}])
        group.then("t")


CALLS: dict[str, tuple[Callable[[Session, Queue], object], str]] = {
    "cancel": (lambda session, queue: queue.cancel(session, 1), "--may-cancel to cancel and retry tasks"),
    "retry": (lambda session, queue: queue.retry(session, 1), "--may-cancel to cancel and retry tasks"),
    "unique key": (lambda session, queue: queue.add(session, "t", unique_key="k"), "and for unique keys"),
    "throttle": (
        lambda session, queue: queue.add(session, "t", unique_key="k", throttle=60),
        "--may-cancel for throttled tasks",
    ),
    "after": (link, "--may-link for `after`, chains and groups"),
    "group": (link_in_group, "--may-link for `after`, chains and groups"),
    "result": (lambda session, queue: queue.result(session, 1), "--may-wait to read results"),
    "progress": (lambda session, queue: queue.progress(session, 1), "--may-wait to read progress"),
    "schedule": (lambda session, queue: queue.schedule(session, "s", "t", every=60), "--may-schedule"),
    "pause": (lambda session, queue: queue.pause(session), "--may-schedule"),
    "limit": (lambda session, queue: queue.limit(session, 5), "--may-schedule"),
}


@pytest.mark.parametrize(("call", "option"), CALLS.values(), ids=CALLS)
def test_a_caller_gets_the_option_that_is_missing(connect, queue, call, option):
    with (
        pytest.raises(sa.exc.ProgrammingError, match="permission denied") as caught,
        Session(connect(PRODUCER, Options())) as session,
    ):
        call(session, queue)

    (note,) = caught.value.__notes__
    assert option in note
    assert "`apoq doctor --producer ROLE` with the same options names what it lacks" in note


def test_a_caller_that_may_not_use_the_sequence_gets_the_command(connect, engine, queue):
    as_web = connect(PRODUCER, Options())
    with engine.begin() as connection:
        connection.exec_driver_sql(f"REVOKE ALL ON SEQUENCE apoq_tasks_id_seq FROM {as_web.url.username}")

    with (
        pytest.raises(sa.exc.ProgrammingError, match="permission denied for sequence") as caught,
        Session(as_web) as session,
    ):
        queue.add(session, "t")

    assert "`apoq grants --producer ROLE` prints. " in caught.value.__notes__[0]


COMMANDS = {
    (READER, Options()): ("check", "stats", "limits"),
    (READER, Options(with_data=True)): ("stats", "show 2", "schedules", "limits"),
    (OPERATOR, Options()): ("cancel 1", "stats", "show 2", "schedules", "limits"),
}

WITHOUT: dict[tuple[str, Options], set[str]] = {(READER, Options()): {"apoq_schedules", "apoq_links"}}
"""The tables that only `apoq metrics` and `apoq doctor` read, which go on without them."""


@pytest.mark.parametrize(
    ("kind", "options", "table"),
    [
        (kind, options, table)
        for kind, options in COMMANDS
        for table in TABLES
        if table in {its.table for its in grants.grants(kind, options)} - WITHOUT.get((kind, options), set())
    ],
)
def test_a_command_names_the_grant_that_is_missing(become, engine, queue, revoke, kind, options, table):
    with Session(engine) as session, session.begin():
        link(session, queue)
        queue.schedule(session, "often", "t", every=3600)
    url = become(kind, options)
    role = url.username
    revoke(table, role)

    def run(command: str) -> str:
        shown = CliRunner().invoke(
            main, [*command.split(), "--database-url", url.render_as_string(hide_password=False)]
        )
        return shown.output

    named = re.compile(rf"as the owner of the tables, GRANT .* ON public.{table} TO {role}\n")

    assert any(named.search(run(command)) for command in COMMANDS[kind, options])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(OPERATOR, Rights(tasks=True, pauses=True, schedules=True, runs=True, limits=True)), (READER, Rights())],
    ids=[OPERATOR, READER],
)
def test_the_dashboard_knows_what_a_role_may_change(connect, kind, expected):
    with connect(kind, Options(with_data=True)).connect() as connection:
        assert read_rights(connection, None) == expected


@pytest.mark.parametrize("table", ["apoq_claims", "apoq_links", "apoq_tasks"])
def test_a_worker_logs_the_grant_if_it_is_taken_away(connect, engine, queue, revoke, caplog, table):
    as_worker = connect(WORKER, Options())
    worker = Worker(as_worker, queue, poll_interval=0.1)
    worker.use("t", lambda task: None)
    worker.start()
    try:
        revoke(table, as_worker.url.username)
        with Session(engine) as session, session.begin():
            link(session, queue)
        hint = f"permission denied for table {table}: grant what `apoq grants --worker ROLE` prints"
        until(lambda: hint in caplog.text)
    finally:
        worker.stop()


class TestItsOwnTests:
    """Tests of callers and workers, in which each statement of apoq runs as a role with its grants."""

    # `.ci/nightly` runs all of them.
    FILES = ("test_graphs.py", pytest.param("test_worker_events.py", marks=pytest.mark.slow))

    @pytest.mark.parametrize("file", FILES)
    def test_they_pass(self, server, file):
        tests = Path(__file__).parent
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", tests / file],
            env={
                **os.environ,
                "APOQ_TEST_AS_ROLES": "1",
                "DATABASE_URL": server.render_as_string(hide_password=False),
            },
            cwd=tests.parent,
            capture_output=True,
            text=True,
            check=False,
        )

        assert done.returncode == 0, done.stdout[-5_000:]
