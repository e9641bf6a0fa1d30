"""What keeps a worker from working is found before it starts, with what to do about it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import probe
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool
from waiting import patience

from apoq import Queue, Worker, prepare
from apoq.errors import UnsupportedDatabase
from apoq.schema.grants import RIGHTS
from apoq.schema.preflight import (
    READ_ONLY,
    ROLE,
    ROW_SECURITY,
    SCHEMA,
    TABLE,
    Problem,
    only_adds,
    problems,
)

pytestmark = pytest.mark.as_owner("the roles of these tests are their own")

until = patience(20)


def grant_all(role: str) -> str:
    return (
        f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}; "
        f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {role}"
    )


@pytest.fixture
def sql(engine) -> Callable[[str], None]:
    """Execute statements as the owner of the tables."""

    def execute(script: str) -> None:
        with engine.begin() as connection:
            connection.connection.driver_connection.execute(script)  # as it stands, with its per cent signs

    return execute


@pytest.fixture
def role(engine, sql) -> Iterator[str]:
    """A role that may connect and nothing else; its name has to be quoted."""
    name = f'"{engine.url.database} App"'
    sql(f"CREATE ROLE {name} LOGIN PASSWORD 'app'")
    yield name
    sql(f"DROP OWNED BY {name}; DROP ROLE {name}")


@pytest.fixture
def as_role(engine, role) -> sa.Engine:
    """The test's database, for that role."""
    return sa.create_engine(engine.url.set(username=role.strip('"'), password="app"), poolclass=NullPool)


def look(engine: sa.Engine, schema: str | None = None) -> list[Problem]:
    with engine.begin() as connection:
        return problems(connection, schema)


def works(engine: sa.Engine, queue: Queue) -> bool:
    worker = Worker(engine, queue)
    worker.use("t", lambda task: None)
    worker.start()
    try:
        return bool(until(lambda: worker.stats().completed))
    finally:
        worker.stop()


class TestRights:
    def test_a_role_that_may_do_everything_has_no_problem(self, engine):
        assert look(engine) == []

    def test_where_there_are_no_tables_there_is_none_either(self, empty_url):
        assert look(sa.create_engine(empty_url, poolclass=NullPool)) == []

    @pytest.mark.parametrize("schema", [None, "jobs", 'Job"s, Inc.'])
    def test_what_it_says_to_grant_is_enough_to_work(self, engine, sql, role, as_role, schema):
        queue = Queue(schema=schema)
        if schema is None:
            sql("REVOKE USAGE ON SCHEMA public FROM PUBLIC")
        else:
            prepare(engine, schema=schema)
        with Session(engine) as session, session.begin():
            queue.add(session, "t")

        subjects = []
        while found := look(as_role, schema):
            subjects.append({problem.subject for problem in found})
            sql(";".join(problem.fix for problem in found))

        assert subjects == [{SCHEMA}, {ROLE}]
        assert works(as_role, queue)

    @pytest.mark.parametrize(
        ("table", "right"), [(table, right) for table, rights in RIGHTS.items() for right in rights]
    )
    def test_a_right_that_is_missing_is_named(self, sql, role, as_role, table, right):
        sql(f"{grant_all(role)}; REVOKE {right} ON {table} FROM {role}")

        (problem,) = look(as_role)

        assert problem.fix == f"GRANT {right} ON public.{table} TO {role}"
        assert not problem.is_fatal

    def test_so_is_that_on_the_sequence(self, sql, role, as_role):
        sql(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")

        (problem,) = look(as_role)

        assert problem.fix == f"GRANT USAGE ON SEQUENCE public.apoq_tasks_id_seq TO {role}"
        assert not problem.is_fatal

    @pytest.mark.parametrize(
        ("grants", "adds"),
        [
            ("INSERT, SELECT ON apoq_tasks", True),
            ("INSERT (type, data), SELECT (id) ON apoq_tasks", True),
            ("INSERT ON apoq_tasks", False),
            ("SELECT ON apoq_tasks", False),
            ("INSERT, SELECT, UPDATE ON apoq_tasks", True),
            ("INSERT, SELECT, DELETE ON apoq_tasks", False),
        ],
    )
    def test_a_role_that_only_adds_is_known(self, sql, role, as_role, grants, adds):
        sql(f"GRANT {grants} TO {role}")
        with as_role.begin() as connection:
            assert not only_adds(connection)  # its id comes from the sequence

        sql(f"GRANT USAGE ON SEQUENCE apoq_tasks_id_seq TO {role}")
        with as_role.begin() as connection:
            assert only_adds(connection) is adds


class TestRowSecurity:
    @pytest.fixture(autouse=True)
    def granted(self, sql, role):
        sql(grant_all(role))

    @pytest.mark.parametrize("table", RIGHTS)
    def test_it_is_found_on_each_table(self, engine, sql, role, as_role, table):
        sql(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")

        (problem,) = look(as_role)

        assert (problem.subject, problem.is_fatal) == (ROW_SECURITY, False)
        assert f"row-level security on public.{table}" in problem.text
        assert look(engine) == []  # it isn't for the tables' owner

    @pytest.mark.parametrize(
        "policy", ["TO {role} USING (true)", "USING (true) WITH CHECK (true)", "TO {group} USING (true)"]
    )
    def test_a_policy_that_lets_everything_through_is_none(self, sql, role, as_role, policy):
        group = role.replace("App", "Group")
        sql(f"CREATE ROLE {group} ROLE {role}; ALTER TABLE apoq_tasks ENABLE ROW LEVEL SECURITY")
        sql("CREATE POLICY part ON apoq_tasks USING (type = 'a')")
        assert [problem.subject for problem in look(as_role)] == [ROW_SECURITY]

        sql(f"CREATE POLICY whole ON apoq_tasks {policy.format(role=role, group=group)}")
        assert look(as_role) == []

        sql("CREATE POLICY fewer ON apoq_tasks AS RESTRICTIVE USING (type = 'a')")
        assert [problem.subject for problem in look(as_role)] == [ROW_SECURITY]
        sql(f"DROP OWNED BY {group}; DROP ROLE {group}")

    @pytest.mark.parametrize(
        "policy",
        ["FOR SELECT USING (true)", "USING (true) WITH CHECK (type = 'a')", "TO CURRENT_USER USING (true)"],
    )
    def test_a_policy_that_lets_only_something_through_is_one(self, sql, role, as_role, policy):
        sql(f"ALTER TABLE apoq_tasks ENABLE ROW LEVEL SECURITY; CREATE POLICY part ON apoq_tasks {policy}")

        assert [problem.subject for problem in look(as_role)] == [ROW_SECURITY]

    def test_what_it_says_to_do_is_enough(self, sql, as_role):
        sql("ALTER TABLE apoq_tasks ENABLE ROW LEVEL SECURITY; CREATE POLICY t ON apoq_tasks USING (false)")
        (problem,) = look(as_role)

        create, _, disable = problem.fix.partition(", if no policy there is restrictive; otherwise ")
        sql(create)

        assert look(as_role) == []
        sql(f"DROP POLICY apoq_worker ON apoq_tasks; {disable}")
        assert look(as_role) == []


class TestReadOnly:
    ON = "SET default_transaction_read_only = on"

    @pytest.mark.parametrize(
        "who", ["ROLE {role}", "ROLE {role} IN DATABASE {database}", "DATABASE {database}"]
    )
    def test_what_makes_it_so_is_named_and_undone(self, engine, sql, role, as_role, who):
        who = who.format(role=role, database=engine.url.database)
        sql(f"{grant_all(role)}; ALTER {who} {self.ON}")

        (problem,) = look(as_role)

        assert problem.subject == READ_ONLY
        assert problem.fix == f"ALTER {who} RESET default_transaction_read_only"
        with engine.connect() as connection:
            connection.exec_driver_sql("SET default_transaction_read_only = off")
            connection.commit()
            connection.exec_driver_sql(problem.fix)
            connection.commit()
        assert look(as_role) == []

    @pytest.mark.parametrize(
        "arguments",
        [
            {"connect_args": {"options": "-c default_transaction_read_only=on"}},
            {"execution_options": {"postgresql_readonly": True}},
        ],
    )
    def test_a_connection_that_is_so_by_itself_is_known_too(self, url, arguments):
        engine = sa.create_engine(url, poolclass=NullPool, **arguments)

        (problem,) = look(engine)

        assert (problem.subject, "in the URL" in problem.fix) == (READ_ONLY, True)

    def test_a_standby_is_told_from_a_setting(self):
        row = {"is_standby": True, "is_read_only": True, "read_only_source": None}

        (problem,) = probe.read_only_problems(row)

        assert "connect to the primary" in problem.fix


OTHERS = {
    "partitioned": """
        ALTER TABLE apoq_tasks RENAME TO old;
        CREATE TABLE apoq_tasks (LIKE old INCLUDING GENERATED) PARTITION BY LIST (queue)
        """,
    "view": "ALTER TABLE apoq_tasks RENAME TO old; CREATE VIEW apoq_tasks AS SELECT * FROM old",
    "materialized": """
        ALTER TABLE apoq_tasks RENAME TO old; CREATE MATERIALIZED VIEW apoq_tasks AS SELECT * FROM old
        """,
    "foreign": """
        ALTER TABLE apoq_tasks RENAME TO old;
        CREATE FOREIGN DATA WRAPPER w; CREATE SERVER s FOREIGN DATA WRAPPER w;
        CREATE FOREIGN TABLE apoq_tasks (id bigint) SERVER s
        """,
}
CHILDREN = {
    "parent": 'CREATE TABLE child () INHERITS (apoq_tasks); CREATE TABLE "2nd" () INHERITS (apoq_tasks)',
    "child": "CREATE TABLE parent (id bigint NOT NULL); ALTER TABLE apoq_tasks INHERIT parent",
    "partition": """
        CREATE TABLE parent (LIKE apoq_tasks INCLUDING GENERATED) PARTITION BY LIST (queue);
        ALTER TABLE parent ATTACH PARTITION apoq_tasks DEFAULT
        """,
}


class TestTable:
    @pytest.mark.parametrize("made", [*OTHERS.values(), *CHILDREN.values()], ids=[*OTHERS, *CHILDREN])
    def test_a_worker_does_not_start_on_another_kind_of_table(self, engine, sql, worker, made):
        sql(made)
        (problem,) = look(engine)
        assert (problem.subject, problem.is_fatal) == (TABLE, True)

        for start in (worker.start, worker.work):
            with pytest.raises(UnsupportedDatabase, match="unique only within one table") as raised:
                start()
            assert problem.text in str(raised.value)
            assert problem.fix in str(raised.value)

    @pytest.mark.parametrize("made", CHILDREN.values(), ids=CHILDREN)
    def test_what_it_says_to_do_is_enough(self, engine, sql, made):
        sql(made)
        (problem,) = look(engine)

        sql(problem.fix)

        assert look(engine) == []

    def test_that_of_another_schema_is_none_of_its_business(self, engine, sql):
        prepare(engine, schema="jobs")
        sql(
            "ALTER TABLE jobs.apoq_tasks RENAME TO old; CREATE VIEW jobs.apoq_tasks AS SELECT * FROM jobs.old"
        )

        assert look(engine) == []
        assert [problem.subject for problem in look(engine, "jobs")] == [TABLE]


class TestStart:
    def test_what_may_still_be_mended_is_logged_once_and_the_worker_goes_on(
        self, engine, sql, role, as_role, queue, caplog
    ):
        sql(grant_all(role))
        sql("ALTER TABLE apoq_tasks ENABLE ROW LEVEL SECURITY")
        sql("CREATE POLICY hidden ON apoq_tasks USING (false)")
        with Session(engine) as session, session.begin():
            queue.add(session, "t")
        worker = Worker(as_role, queue)
        worker.use("t", lambda task: None)

        caplog.set_level(logging.ERROR, "apoq")

        worker.start()
        try:
            (record,) = caplog.records
            assert (record.levelname, "CREATE POLICY apoq_worker" in record.message) == ("ERROR", True)
            sql("DROP POLICY hidden ON apoq_tasks; ALTER TABLE apoq_tasks DISABLE ROW LEVEL SECURITY")
            until(lambda: worker.stats().completed)
        finally:
            worker.stop()

        assert caplog.records == [record]

    def test_a_right_that_it_needs_to_enter_is_logged_before_it_fails(
        self, sql, role, as_role, queue, caplog
    ):
        sql(f"{grant_all(role)}; REVOKE INSERT ON apoq_workers FROM {role}")

        with pytest.raises(Exception, match="permission denied for table apoq_workers"):
            Worker(as_role, queue).start()

        assert f"GRANT INSERT ON public.apoq_workers TO {role}" in caplog.text
