"""The rights that `docs/roles.md` grants are enough for what each role does, and no more."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from datetime import timedelta

import pages
import psycopg
import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool
from waiting import patience

from apoq import Queue, Retry, Task, Worker
from apoq.cli import main
from apoq.schema.grants import (
    PRODUCER,
    READER,
    RIGHTS,
    WORKER,
    Options,
    find,
    missing,
    statements,
)
from apoq.schema.models import tasks_table
from apoq.schema.preflight import only_adds, problems

pytestmark = pytest.mark.as_owner("the roles of these tests are their own")

until = patience(20)

SCRIPTS = [block.code for block in pages.blocks(pages.DOCS / "roles.md", "sql")]
ADDS, CHANGES, THROTTLES, LINKS, RESULTS, SCHEDULES, WORKS, READS, WORK_POLICY, ADD_POLICY = SCRIPTS
INSERTED = set(re.search(r"INSERT \((.*?)\)", " ".join(ADDS.split())).group(1).split(", "))
OTHERS = {column.name for column in tasks_table(None).c} - INSERTED - {"indexed_state"}


@pytest.fixture
def grant(engine) -> Iterator[Callable[..., str]]:
    """Run scripts of the page, for a role of the test's own; return the database's URL for it."""
    made = []
    with engine.begin() as connection:
        connection.exec_driver_sql("REVOKE ALL ON SCHEMA public FROM PUBLIC")

    def run(*scripts: str) -> sa.URL:
        (name,) = set(re.findall(r"\bapp_\w+", "".join(scripts)))
        role = f"{engine.url.database}_{name}"
        with engine.begin() as connection:
            for script in scripts:
                connection.exec_driver_sql(re.sub(rf"\b{name}\b", role, script))
            connection.exec_driver_sql(f"ALTER ROLE {role} PASSWORD 'app'")
        made.append(role)
        return engine.url.set(username=role, password="app")

    yield run
    with engine.begin() as connection:
        for role in made:
            connection.exec_driver_sql(f"DROP OWNED BY {role}; DROP ROLE {role}")


@pytest.fixture
def connect(grant) -> Callable[..., sa.Engine]:
    return lambda *scripts: sa.create_engine(grant(*scripts), poolclass=NullPool)


def add_in_every_way(url: sa.URL, queue: Queue) -> int:
    """Add tasks through each kind of session; return how many."""
    engine = sa.create_engine(url, poolclass=NullPool)
    with Session(engine) as session, session.begin():
        assert queue.add(session, "t").id
        queue.add_many(session, "t", ({} for _ in range(5)))
        queue.add_many(session, "t", [{}] * 3_000)  # by COPY
    with engine.begin() as connection:
        queue.add(connection, "t", {}, priority=3, retry_limit=2, retry_delay=1, timeout=60, expires_in=600)
    with psycopg.connect(url.set(drivername="postgresql").render_as_string(hide_password=False)) as driver:
        queue.add(driver, "t")
        queue.add_many(driver, "t", [{}] * 3_000)

    async def add() -> None:
        engine = create_async_engine(url, poolclass=NullPool)
        async with AsyncSession(engine) as session, session.begin():
            await queue.add(session, "t")
            await queue.add_many(session, "t", [{}] * 3_000)
        async with engine.begin() as connection:
            await queue.add(connection, "t")

    asyncio.run(add())
    return 1 + 5 + 3_000 + 1 + 1 + 3_000 + 1 + 3_000 + 1


def test_what_one_role_has_added_another_one_works(grant, engine, queue):
    added = add_in_every_way(grant(ADDS), queue)
    with engine.begin() as connection:
        queue.add(connection, "fails", retry_limit=1, retry_delay=0)
        queue.add(connection, "writes")

    def write(task):
        task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})

    def fail(task):
        raise Retry

    as_worker = sa.create_engine(grant(WORKS, "GRANT INSERT ON ledger TO app_worker"), poolclass=NullPool)
    worker = Worker(as_worker, queue)
    worker.use("t", lambda task: None)
    worker.use("fails", fail)
    worker.use("writes", write)
    worker.start()
    try:
        until(lambda: (worker.stats().completed, worker.stats().failed) == (added + 1, 1))
        assert worker.is_healthy()
    finally:
        worker.stop()

    with engine.begin() as connection:
        assert connection.scalar(sa.text("SELECT count(*) FROM ledger")) == 1
        assert connection.scalar(sa.text("SELECT count(*) FROM apoq_workers")) == 0


def test_one_that_adds_may_read_results_and_progress(grant, engine, queue):
    def process(task) -> int:
        task.set_progress(1)
        return 5

    as_web = sa.create_engine(grant(ADDS, RESULTS), poolclass=NullPool)
    worker = Worker(sa.create_engine(grant(WORKS), poolclass=NullPool), queue)
    worker.use("t", process, keep_result=True)
    with Session(as_web) as session, session.begin():
        task_id = queue.add(session, "t").id
    worker.work()

    assert queue.wait(as_web, task_id, timeout=20).value == 5
    with Session(as_web) as session:
        assert queue.progress(session, task_id).done == 1


def test_one_that_works_ticks_and_one_that_adds_may_schedule(grant, engine, queue):
    as_web = sa.create_engine(grant(ADDS, SCHEDULES), poolclass=NullPool)
    with Session(as_web) as session, session.begin():
        queue.schedule(session, "often", "t", every=1)
        queue.schedule(session, "never", "t", every=1)
        assert queue.unschedule(session, "never") is True
        assert len(queue.schedules(session)) == 1

    @queue.task(every=3600, type="declared")
    def declared() -> None: ...

    worker = Worker(sa.create_engine(grant(WORKS), poolclass=NullPool), queue)
    worker.use("t", lambda task: None)
    worker.start()
    try:
        until(lambda: worker.stats().completed)
    finally:
        worker.stop()

    with Session(engine) as session:
        assert [its.name for its in queue.schedules(session)] == ["declared", "often"]


def test_one_that_works_keeps_no_task_if_it_is_told_so(grant, engine, queue):
    with engine.begin() as connection:
        queue.add(connection, "t")
    worker = Worker(sa.create_engine(grant(WORKS)), queue, keep_completed=timedelta())
    worker.use("t", lambda task: None)
    assert worker.work()

    with engine.begin() as connection:
        assert connection.scalar(sa.text("SELECT count(*) FROM apoq_tasks")) == 0


@pytest.mark.parametrize("column", sorted(OTHERS))
def test_one_that_adds_sets_nothing_that_is_the_workers(connect, column):
    statement = sa.text(f"INSERT INTO apoq_tasks (type, {column}) VALUES ('t', DEFAULT)")

    with (
        pytest.raises(sa.exc.ProgrammingError, match="permission denied"),
        connect(ADDS).begin() as connection,
    ):
        connection.execute(statement)


def test_one_that_adds_reads_and_changes_nothing(connect, engine, queue):
    with engine.begin() as connection:
        task_id = queue.add(connection, "t", {"secret": 1}).id
    as_web = connect(ADDS)

    for look in (
        "SELECT data FROM apoq_tasks",
        "DELETE FROM apoq_tasks",
        "SELECT setval('apoq_tasks_id_seq', 1)",
    ):
        with pytest.raises(sa.exc.ProgrammingError, match="permission denied"), as_web.begin() as connection:
            connection.exec_driver_sql(look)
    for change in (queue.cancel, queue.retry):
        with pytest.raises(sa.exc.ProgrammingError, match="permission denied"), as_web.begin() as connection:
            change(connection, task_id)


def test_one_that_adds_loads_no_task_again(connect, queue):
    as_web = connect(ADDS)
    with Session(as_web) as session:
        task = queue.add(session, "t")
        session.commit()
        assert task.id
        with pytest.raises(sa.exc.ProgrammingError, match="permission denied"):
            task.state  # noqa: B018
    with Session(as_web, expire_on_commit=False) as session:
        task = queue.add(session, "t")
        session.commit()
        assert task.state == "pending"
    with Session(as_web) as session, pytest.raises(sa.exc.ProgrammingError, match="permission denied"):
        session.add(Task(type="t"))
        session.flush()


def test_with_more_rights_it_cancels_and_retries(connect, engine, queue):
    as_web = connect(ADDS, CHANGES)
    with Session(as_web) as session, session.begin():
        task = queue.add(session, "t")
        assert queue.cancel(session, task)
        assert queue.retry(session, task)


def test_the_page_grants_to_a_worker_what_the_preflight_wants(connect):
    found = re.findall(r"GRANT ([A-Z, ]+) ON (apoq_\w+) TO", WORKS)

    assert {table: tuple(rights.split(", ")) for rights, table in found} == RIGHTS
    with connect(WORKS).begin() as connection:
        assert problems(connection) == []


@pytest.mark.parametrize(
    ("kind", "options", "scripts"),
    [
        (PRODUCER, Options(), [ADDS]),
        (PRODUCER, Options(may_wait=True), [ADDS, RESULTS]),
        (PRODUCER, Options(may_link=True), [ADDS, LINKS]),
        (PRODUCER, Options(may_cancel=True, may_schedule=True), [ADDS, CHANGES, THROTTLES, SCHEDULES]),
        (WORKER, Options(), [WORKS]),
        (READER, Options(with_data=True), [READS]),
    ],
    ids=["producer", "producer that waits", "of graphs", "producer with more", "worker", "reader"],
)
def test_the_page_has_what_the_command_grants(engine, grant, kind, options, scripts):
    role = grant(*scripts).username
    with engine.begin() as connection:
        place = find(connection, None)
        assert missing(connection, place, kind, role, options) == []
        connection.exec_driver_sql(f"DROP OWNED BY {role}")
        for statement in statements(place, kind, role, options):
            connection.exec_driver_sql(statement)
        privileges = privileges_of(connection, role)
        for script in scripts:
            for line in script.split(";"):
                if "GRANT" in line:
                    connection.exec_driver_sql(re.sub(r"\bapp_\w+", role, line))

        assert privileges_of(connection, role) == privileges  # so the page grants no more


def privileges_of(connection: sa.Connection, role: str) -> set[tuple[str, ...]]:
    rows = connection.execute(
        sa.text(
            "SELECT table_name, column_name, privilege_type FROM information_schema.column_privileges "
            "WHERE grantee = :role"
        ),
        {"role": role},
    )
    return {tuple(row) for row in rows}


def test_a_worker_needs_the_sequence_of_the_ids(connect, engine):
    """It adds the tasks of schedules and of `on_failure`."""
    as_worker = connect(WORKS.replace("GRANT USAGE ON SEQUENCE", "-- GRANT USAGE ON SEQUENCE"))
    with as_worker.begin() as connection:
        [problem] = problems(connection)
        role = connection.scalar(sa.text("SELECT current_user"))
    assert (
        problem.text
        == f"the role {role} lacks USAGE on the sequence public.apoq_tasks_id_seq, which a worker needs to "
        "add the tasks of schedules and of on_failure"
    )

    with engine.begin() as connection:
        connection.exec_driver_sql(problem.fix)
    with as_worker.begin() as connection:
        assert problems(connection) == []


@pytest.mark.parametrize("scripts", [[ADDS], [ADDS, CHANGES]], ids=["adds", "changes"])
def test_to_the_doctor_one_that_adds_is_well(grant, scripts):
    url = grant(*scripts)
    with sa.create_engine(url, poolclass=NullPool).begin() as connection:
        assert only_adds(connection)
    shown = CliRunner().invoke(main, ["doctor", "--database-url", url.render_as_string(hide_password=False)])
    assert (shown.exit_code, "this role can add tasks" in shown.output) == (0, True), shown.output


def test_one_that_reads_looks_at_everything(grant, engine, queue):
    with engine.begin() as connection:
        task_id = queue.add(connection, "t").id
    url = grant(READS).render_as_string(hide_password=False)

    for command in ("list", "list --state running", f"show {task_id}", "stats --types", "check"):
        done = CliRunner().invoke(main, [*command.split(), "--database-url", url])
        assert done.exit_code == 0, done.output


def test_the_policy_lets_a_worker_see_everything(connect, engine):
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE apoq_tasks ENABLE ROW LEVEL SECURITY")

    with connect(WORKS, WORK_POLICY).begin() as connection:
        assert problems(connection) == []


def test_those_for_one_that_adds_let_it_add(connect, engine, queue):
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE apoq_tasks ENABLE ROW LEVEL SECURITY")

    with connect(ADDS, ADD_POLICY).begin() as connection:
        queue.add(connection, "t")
        queue.add_many(connection, "t", ({} for _ in range(3_000)))

    with engine.begin() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(Task)) == 3_001


def test_one_that_adds_graphs_may_add_them(connect, engine):
    queue = Queue()

    @queue.task
    def step() -> None: ...

    with engine.begin() as connection:
        older = queue.add(connection, "t")
    with Session(connect(ADDS, LINKS)) as session, session.begin():
        first = queue.add(session, "t")
        queue.add(session, "t", after=[first, older])
        queue.chain(session, step.call(), step.call(), step.call())
        with queue.group(session) as group:
            group.add_many([step.call()] * 3)
            group.then(step.call())

    with engine.begin() as connection:
        states = connection.scalars(sa.text("SELECT state FROM apoq_tasks")).all()
    assert sorted(states) == ["pending"] * 6 + ["waiting"] * 4


def test_one_that_adds_graphs_may_add_cancel_and_retry_them(connect, engine):
    queue = Queue()
    with Session(connect(ADDS, CHANGES, LINKS)) as session, session.begin():
        first = queue.add(session, "t")
        queue.add(session, "t", after=[first])
        with queue.group(session) as group:
            group.add_many("t", [{}] * 3)
            group.then("t")
        assert queue.cancel(session, first)
        assert queue.retry(session, first, with_cancelled=True)

    with engine.begin() as connection:
        states = connection.scalars(sa.text("SELECT state FROM apoq_tasks ORDER BY id")).all()
    assert sorted(states) == ["pending"] * 4 + ["waiting"] * 2
