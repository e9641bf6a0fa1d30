"""Roles with the grants of `apoq grants` do what they are for, and PostgreSQL refuses the rest."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool
from waiting import patience

from apoq import Cancel, DuplicateTask, Queue, Retry, Snooze, Worker
from apoq.cli import main
from apoq.schema.grants import KINDS, OPERATOR, PRODUCER, READER, TABLES, WORKER

pytestmark = pytest.mark.as_owner("the roles of these tests are their own")

until = patience(20)

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(engine) -> Run:
    """Call a command as a role: the owner of the tables, or that of a URL."""

    def run(*arguments: str, url: sa.URL = engine.url) -> tuple[int, str]:
        text = url.render_as_string(hide_password=False)
        done = CliRunner().invoke(main, [*arguments, "--database-url", text])
        return done.exit_code, done.output

    return run


@pytest.fixture
def become(engine, run) -> Iterator[Callable[..., sa.URL]]:
    """Create a role with the grants that `apoq grants` applies; return its URL."""
    made: list[str] = []
    with engine.begin() as connection:
        connection.exec_driver_sql("REVOKE ALL ON SCHEMA public FROM PUBLIC")

    def become(kind: str | None, *options: str) -> sa.URL:
        role = f"{engine.url.database}_{kind or 'nobody'}"
        if role not in made:
            with engine.begin() as connection:
                connection.exec_driver_sql(f"CREATE ROLE {role} LOGIN PASSWORD 'app'")
            made.append(role)
        if kind is not None:
            code, said = run("grants", f"--{kind}", role, *options, "--apply")
            assert code == 0, said
        return engine.url.set(username=role, password="app")

    yield become
    with engine.begin() as connection:
        for role in made:
            connection.exec_driver_sql(f"DROP OWNED BY {role}; DROP ROLE {role}")


@pytest.fixture
def connect(become) -> Callable[..., sa.Engine]:
    return lambda *arguments: sa.create_engine(become(*arguments), poolclass=NullPool)


def refused(engine: sa.Engine, statement: str) -> bool:
    with engine.connect() as connection:
        try:
            connection.exec_driver_sql(statement)
        except sa.exc.ProgrammingError as error:
            return error.orig.sqlstate == "42501"
    return False


class TestWorkers:
    def test_one_does_all_that_workers_do(self, connect, engine, queue):
        other = Queue("other")
        outcomes = {
            "cancel": Cancel(),
            "snooze": Snooze(3600),
            "retry": Retry(delay=0),
            "fail": ValueError(),
        }

        def process(task):
            if task.data in outcomes and task.attempt == 1:
                raise outcomes[task.data]
            if task.data == "session":
                queue.add(task.session, "plain")

        as_worker = connect(WORKER)
        worker = Worker(as_worker, queue, other, poll_interval=0.1, keep_completed=timedelta(days=1))
        worker.use("t", process)
        worker.use("plain", lambda task: None)
        with engine.begin() as connection:
            for data in (*outcomes, "plain", "session", "x" * 20_000):
                queue.add(connection, "t", data, retry_limit=0 if data == "fail" else 1)
            other.add(connection, "plain", unique_key="k", unique_until="ended")
            queue.schedule(connection, "often", "plain", every=1)
            connection.exec_driver_sql(
                "INSERT INTO apoq_tasks (type, state, completed_at) "
                "VALUES ('t', 'completed', now() - interval '2 days')"
            )
            connection.exec_driver_sql(
                "INSERT INTO apoq_tasks (type, state, worker_id, claim_token, attempt, claimed_at) "
                "VALUES ('t', 'running', gen_random_uuid(), 1, 1, now())"
            )
        worker.start()
        try:
            until(lambda: worker.stats()[1:] >= (6, 1, 1, 1) and worker.is_healthy())
            until(lambda: _count(engine, "completed_at < now() - interval '1 day'") == 0)
            until(lambda: _count(engine, "schedule = 'often' AND state = 'completed'"))
        finally:
            worker.stop()

        assert _count(engine, "queue = 'other' AND state = 'completed'") == 1

    @pytest.mark.parametrize(
        "statement",
        [
            "TRUNCATE apoq_tasks",
            "ALTER TABLE apoq_tasks ADD COLUMN x int",
            "DROP TABLE apoq_claims",
            "INSERT INTO apoq_pauses (queue) VALUES ('default')",
            "DELETE FROM apoq_schedules",
            "UPDATE apoq_migrations SET version_num = '9'",
            "SELECT setval('apoq_tasks_id_seq', 1)",
        ],
    )
    def test_it_may_not_do_more(self, connect, statement):
        assert refused(connect(WORKER), statement)


class TestProducers:
    def test_one_adds_and_no_more(self, connect, queue, run):
        as_web = connect(PRODUCER)
        with Session(as_web) as session, session.begin():
            task_id = queue.add(session, "t", {"secret": 1}, meta={"a": 1}, delay=1, priority=2).id
            queue.add_many(session, "t", [{}] * 3)
            queue.add_many(session, "t", ({} for _ in range(3)))

        assert run("add", "t", url=as_web.url)[0] == 0
        for statement in (
            "SELECT data FROM apoq_tasks",
            "UPDATE apoq_tasks SET state = 'cancelled'",
            "DELETE FROM apoq_tasks",
            "INSERT INTO apoq_tasks (type, claim_token) VALUES ('t', 5)",
            "SELECT * FROM apoq_workers",
            "SELECT * FROM apoq_schedules",
        ):
            assert refused(as_web, statement), statement
        with pytest.raises(sa.exc.ProgrammingError) as caught, Session(as_web) as session:
            queue.cancel(session, task_id)
        assert "`apoq grants --producer ROLE` prints" in caught.value.__notes__[0]

    def test_with_more_it_cancels_retries_and_has_unique_keys(self, connect, queue):
        as_web = connect(PRODUCER, "--may-cancel")
        with Session(as_web) as session, session.begin():
            task = queue.add(session, "t", unique_key="k", on_conflict="replace")
            assert queue.add(session, "t", {"n": 2}, unique_key="k", on_conflict="replace").id == task.id
            assert queue.add(session, "t", unique_key="k").add_outcome == "kept"
            with pytest.raises(DuplicateTask):
                queue.add(session, "t", unique_key="k", on_conflict="raise")
            queue.add_many(session, "t", [{}], unique_key=lambda data: "k", on_conflict="replace")
            assert queue.cancel(session, unique_key="k")
            plain = queue.add(session, "t")
            assert queue.cancel(session, plain)
            assert queue.retry(session, plain)

        assert refused(as_web, "UPDATE apoq_tasks SET claim_token = 9")
        assert refused(as_web, "DELETE FROM apoq_tasks")

    def test_with_more_it_schedules_and_pauses(self, connect, queue):
        as_web = connect(PRODUCER, "--may-schedule")
        with Session(as_web) as session, session.begin():
            queue.schedule(session, "often", "t", every=60)
            assert len(queue.schedules(session)) == 1
            assert queue.unschedule(session, "often")
            queue.pause(session)
            assert queue.resume(session)


class TestReaders:
    def test_one_sees_statistics_and_no_data(self, become, connect, engine, queue, run):
        with engine.begin() as connection:
            task_id = queue.add(connection, "t", {"secret": 1}).id
        url = become(READER)

        for command in ("stats --types", "check", "metrics --once"):
            code, said = run(*command.split(), url=url)
            assert code == 0, said
        assert "apoq_database_up 1.0" in run("metrics", "--once", url=url)[1]
        for column in ("data", "meta", "error", "result"):
            assert refused(connect(READER), f"SELECT {column} FROM apoq_tasks")
        code, said = run("show", str(task_id), url=url)
        assert code == 1
        assert f"as the owner of the tables, GRANT SELECT ON public.apoq_tasks TO {url.username}\n" in said

    def test_with_the_data_it_sees_everything_and_changes_nothing(self, become, connect, engine, queue, run):
        with engine.begin() as connection:
            task_id = queue.add(connection, "t").id
            queue.schedule(connection, "often", "t", every=60)
        url = become(READER, "--with-data")

        for command in ("list", f"show {task_id}", "failures", "schedules", "stats"):
            code, said = run(*command.split(), url=url)
            assert code == 0, said
        for statement in ("UPDATE apoq_tasks SET state = 'x'", "INSERT INTO apoq_tasks (type) VALUES ('t')"):
            assert refused(connect(READER), statement)

    def test_what_it_may_not_read_is_left_out_of_the_metrics_and_named(self, become, engine, run, caplog):
        url = become(READER)
        with engine.begin() as connection:
            connection.exec_driver_sql(f"REVOKE ALL ON apoq_schedules FROM {url.username}")
            connection.exec_driver_sql(f"REVOKE SELECT (next_at) ON apoq_schedules FROM {url.username}")

        _, said = run("metrics", "--once", url=url)

        assert "apoq_database_up 0.0" in said
        assert "apoq_workers_alive 0.0" in said
        assert "apoq_schedule_late_seconds" not in said
        assert "the metrics lack the schedules" in caplog.text
        assert "permission denied for table apoq_schedules: grant what `apoq grants --reader" in caplog.text


class TestOperators:
    def test_one_manages_tasks(self, become, engine, queue, run):
        with engine.begin() as connection:
            ids = [queue.add(connection, "t", unique_key=key).id for key in (None, "k")]
            queue.schedule(connection, "often", "t", every=3600)
        url = become(OPERATOR)

        for command in (
            *(f"cancel {task_id}" for task_id in ids),
            *(f"retry {task_id}" for task_id in ids),
            "pause default --reason night",
            "resume default",
            "list",
            f"show {ids[0]}",
            "schedules pause often",
            "schedules resume often",
            "schedules run-now often",
            "schedules remove often",
            "add t",
            "prune --completed-before 1s --yes",
        ):
            code, said = run(*command.split(), url=url)
            assert code == 0, f"{command}: {said}"

    @pytest.mark.parametrize(
        "statement",
        ["UPDATE apoq_tasks SET claim_token = 9", "DELETE FROM apoq_workers", "TRUNCATE apoq_tasks"],
    )
    def test_it_does_not_do_the_work_of_workers(self, connect, statement):
        assert refused(connect(OPERATOR), statement)


class TestTheCommand:
    def test_what_it_prints_is_what_it_applies(self, become, run, engine):
        url = become(WORKER)

        code, said = run("grants", "--worker", url.username)

        assert code == 0
        with engine.begin() as connection:
            for statement in said.splitlines():
                connection.exec_driver_sql(statement)
        assert "GRANT SELECT, INSERT, UPDATE, DELETE ON public.apoq_tasks" in said
        assert "GRANT USAGE ON SEQUENCE public.apoq_tasks_id_seq" in said

    @pytest.mark.parametrize("kind", KINDS)
    def test_doctor_names_what_is_missing_and_that_is_enough(self, become, run, engine, kind):
        url = become(kind)
        role = url.username
        code, said = run("doctor", f"--{kind}", role)
        assert (code, f"'{role}' has the rights of a {kind}" in said) == (0, True), said
        with engine.begin() as connection:
            connection.exec_driver_sql(
                f"DROP OWNED BY {role}; ALTER TABLE apoq_tasks ENABLE ROW LEVEL SECURITY"
            )

        code, said = run("doctor", f"--{kind}", role)

        assert (code, f"'{role}' lacks rights of a {kind}" in said) == (1, True)
        (cure,) = re.findall(r"→ (GRANT USAGE ON SCHEMA .*)", said)
        assert "CREATE POLICY" in cure
        with engine.begin() as connection:
            connection.exec_driver_sql(cure)
        assert run("doctor", f"--{kind}", role)[0] == 0

    def test_one_missing_column_is_named(self, become, run, engine):
        role = become(PRODUCER).username
        with engine.begin() as connection:
            connection.exec_driver_sql(f"REVOKE INSERT (meta) ON apoq_tasks FROM {role}")

        _, said = run("doctor", "--producer", role)

        assert f"→ GRANT INSERT (meta) ON public.apoq_tasks TO {role}\n" in said

    def test_names_are_quoted(self, engine, run):
        _, said = run("grants", "--reader", 'The "Readers"')

        assert 'TO "The ""Readers""";' in said

    def test_bad_input_is_explained(self, run, empty_url):
        assert run("grants") == (
            2,
            "Error: no role was given: pass --producer, --worker, --reader, --operator\n",
        )
        code, said = run("grants", "--worker", "nobody", "--apply")
        assert (code, "there is no role 'nobody'" in said) == (2, True)
        code, said = run("doctor", "--worker", "nobody")
        assert (code, "there is no role 'nobody'" in said) == (1, True)
        assert run("grants", "--worker", "nobody", url=empty_url)[0] == 4

    def test_one_that_is_not_the_owner_can_not_apply_them(self, become, run):
        url = become(WORKER)

        code, said = run("grants", "--operator", url.username, "--apply", url=url)

        assert (code, "as the owner of the tables: GRANT DELETE ON public.apoq_schedules" in said) == (
            1,
            True,
        ), said


class TestRowSecurity:
    @pytest.fixture
    def sql(self, engine) -> Callable[..., None]:
        """Execute statements as the owner; {role} is the role's name."""

        def execute(*statements: str) -> None:
            with engine.begin() as connection:
                for statement in statements:
                    connection.exec_driver_sql(statement)

        return execute

    @pytest.fixture
    def guarded(self, sql) -> None:
        sql(*(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY" for table in TABLES))

    def test_each_kind_has_its_policies_on_each_table(self, guarded, connect, queue):
        with connect(PRODUCER, "--may-cancel", "--may-link").begin() as connection:
            first = queue.add(connection, "t")
            queue.add(connection, "t", after=[first])
            assert queue.cancel(connection, first)
            assert queue.retry(connection, first, with_cancelled=True)
        worker = Worker(connect(WORKER), queue)
        worker.use("t", lambda task: None)

        assert worker.work()
        assert worker.work()

        with connect(READER).begin() as connection:
            assert connection.scalar(sa.text("SELECT count(*) FROM apoq_tasks")) == 2
        connect(WORKER)  # once more: the policies are there

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_doctor_is_content_with_what_was_granted(self, guarded, become, run, kind):
        role = become(kind).username

        code, said = run("doctor", f"--{kind}", role)

        assert (code, f"'{role}' has the rights of a {kind}\n" in said) == (0, True), said

    def test_policies_of_any_name_count(self, guarded, become, run, sql):
        role = become(WORKER).username
        for table in TABLES:
            sql(
                f"DROP POLICY apoq_worker_all_{role} ON {table}",
                f"CREATE POLICY mine ON {table} TO {role} USING (true)",
            )

        assert run("doctor", "--worker", role)[0] == 0
        assert "CREATE POLICY" not in run("grants", "--worker", role)[1]

    def test_one_that_lets_only_some_rows_through_is_not_enough_for_a_worker(self, guarded, become, run, sql):
        role = become(WORKER).username
        sql(f"ALTER POLICY apoq_worker_all_{role} ON apoq_tasks USING (type = 'a')")

        code, said = run("doctor", "--worker", role)

        assert code == 1
        assert f"row-level security hides rows of public.apoq_tasks from '{role}'" in said
        (cure,) = re.findall(r"→ (DROP POLICY .*)", said)
        sql(cure)
        assert run("doctor", "--worker", role)[0] == 0

    def test_for_a_producer_it_is_left_as_it_is(self, become, run, sql, queue):
        url = become(PRODUCER)
        role = url.username
        sql(
            "ALTER TABLE apoq_tasks ENABLE ROW LEVEL SECURITY",
            f"CREATE POLICY tenant ON apoq_tasks TO {role} USING (meta ->> 'tenant' = '7')",
        )

        code, said = run("grants", "--producer", role, "--apply")

        assert (code, "CREATE POLICY" in said) == (0, False)
        code, said = run("doctor", "--producer", role)
        assert code == 0
        assert (
            "has the rights of a producer; by row-level security, it sees only some rows of public.apoq_tasks"
            in said
        )

    def test_a_producer_gets_only_the_policies_that_are_missing(self, become, run, sql):
        role = become(PRODUCER).username
        sql(
            "ALTER TABLE apoq_tasks ENABLE ROW LEVEL SECURITY",
            f"CREATE POLICY tenant ON apoq_tasks FOR INSERT TO {role} WITH CHECK (meta ->> 'tenant' = '7')",
        )

        _, said = run("grants", "--producer", role)

        (policy,) = re.findall(r"CREATE POLICY .*;", said)
        assert f" ON public.apoq_tasks FOR SELECT TO {role} USING (true);" in policy

    def test_a_role_that_does_not_exist_yet_gets_its_policies(self, guarded, run):
        assert run("grants", "--worker", "nobody")[1].count("CREATE POLICY") == len(TABLES)

    def test_a_restrictive_policy_is_named(self, guarded, become, run, sql):
        role = become(WORKER).username
        sql(f"CREATE POLICY less ON apoq_tasks AS RESTRICTIVE TO {role} USING (type = 'a')")

        for command in ("doctor", "grants"):
            code, said = run(command, "--worker", role, *(["--apply"] if command == "grants" else []))
            assert code == 1
            cure = (
                f"change the restrictive policies less of public.apoq_tasks, or ALTER ROLE {role} BYPASSRLS"
            )
            assert cure in said

        sql(f"ALTER ROLE {role} BYPASSRLS")
        assert run("doctor", "--worker", role)[0] == 0

    def test_the_names_of_policies_are_not_truncated(self, guarded, run, sql, engine):
        roles = [f"{engine.url.database}_{'x' * 40}_{number}" for number in range(2)]
        sql(*(f"CREATE ROLE {role}" for role in roles))
        try:
            for _ in range(2):
                code, said = run("grants", *(f"--worker={role}" for role in roles), "--apply")
                assert code == 0, said
            assert run("doctor", *(f"--worker={role}" for role in roles))[0] == 0
        finally:
            sql(*(f"DROP OWNED BY {role}; DROP ROLE {role}" for role in roles))

    def test_it_does_not_apply_to_the_owner_unless_it_is_forced(self, guarded, run, sql, engine):
        owner = f"{engine.url.database}_owner"
        sql(f"CREATE ROLE {owner}", *(f"ALTER TABLE {table} OWNER TO {owner}" for table in TABLES))
        try:
            assert "CREATE POLICY" not in run("grants", "--worker", owner)[1]
            sql("ALTER TABLE apoq_tasks FORCE ROW LEVEL SECURITY")
            assert run("grants", "--worker", owner)[1].count("CREATE POLICY") == 1
        finally:
            sql(f"REASSIGN OWNED BY {owner} TO CURRENT_USER", f"DROP OWNED BY {owner}", f"DROP ROLE {owner}")


class TestConnecting:
    def test_the_right_to_connect_is_granted_if_not_everybody_has_it(
        self, become, connect, run, engine, queue
    ):
        database = engine.url.database
        with engine.begin() as connection:
            connection.exec_driver_sql(f"REVOKE ALL ON DATABASE {database} FROM PUBLIC")
        role = become(None).username
        assert f"GRANT CONNECT ON DATABASE {database} TO {role}" in run("doctor", "--producer", role)[1]

        with connect(PRODUCER).begin() as connection:
            queue.add(connection, "t")

    def test_otherwise_it_is_not_mentioned(self, become, run):
        assert "CONNECT" not in run("grants", "--worker", become(WORKER).username)[1]


def _count(engine: sa.Engine, condition: str) -> int:
    with engine.connect() as connection:
        return connection.scalar(sa.text(f"SELECT count(*) FROM apoq_tasks WHERE {condition}"))
