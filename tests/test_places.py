"""Where apoq's tables are, if the search_path doesn't lead there, or their version is not recorded."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa
from alembic.migration import MigrationContext
from alembic.operations import Operations
from click.testing import CliRunner, Result
from sqlalchemy.pool import NullPool

import apoq.migrations
from apoq import Queue, SchemaMismatch, Worker, prepare
from apoq.cli import main
from apoq.migrations import LATEST, current, differences
from apoq.schema.models import Base
from apoq.schema.preflight import problems

TABLES = {
    "apoq_tasks",
    "apoq_workers",
    "apoq_claims",
    "apoq_schedules",
    "apoq_pauses",
    "apoq_throttles",
    "apoq_limits",
    "apoq_progress",
    "apoq_links",
    "apoq_migrations",
}


@pytest.fixture
def connect(empty_url) -> Callable[..., sa.Engine]:
    """Make an engine with a search_path, for a role."""

    def connect(search_path: str | None = None, role: str | None = None) -> sa.Engine:
        settings = {"search_path": search_path, "role": role}
        options = " ".join(f"-c{name}={value}" for name, value in settings.items() if value)
        url = empty_url.update_query_dict({"options": options}) if options else empty_url
        return sa.create_engine(url, poolclass=NullPool)

    return connect


@pytest.fixture
def engine(connect) -> sa.Engine:
    return connect()


@pytest.fixture
def sql(engine) -> Callable[[str], None]:
    def execute(script: str) -> None:
        with engine.begin() as connection:
            connection.exec_driver_sql(script)

    return execute


@pytest.fixture
def app(sql, connect) -> sa.Engine:
    """A schema with apoq's tables, as a search_path of former days made them there."""
    sql("CREATE SCHEMA app")
    engine = connect("app")
    prepare(engine)
    return engine


@pytest.fixture
def role(sql, empty_url) -> Iterator[str]:
    """A role, that is named like a schema of its own."""
    name = f"role_{empty_url.database}"
    sql(f"CREATE ROLE {name}; CREATE SCHEMA {name} AUTHORIZATION {name}")
    yield name
    sql(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


def cli(engine: sa.Engine, *arguments: str) -> Result:
    url = engine.url.render_as_string(hide_password=False)
    return CliRunner().invoke(main, [*arguments, "--database-url", url])


def check(engine: sa.Engine, schema: str | None = None) -> None:
    with engine.begin() as connection:
        apoq.migrations.check(connection, schema)


def tables(engine: sa.Engine) -> dict[str, set[str]]:
    """Return apoq's tables by their schema."""
    found: dict[str, set[str]] = {}
    with engine.begin() as connection:
        rows = connection.exec_driver_sql(
            "SELECT schemaname, tablename FROM pg_tables WHERE tablename LIKE 'apoq%%'"
        )
        for schema, table in rows:
            found.setdefault(schema, set()).add(table)
    return found


class TestALostSearchPath:
    def test_check_says_where_they_are_and_what_to_do(self, app, engine):
        with pytest.raises(SchemaMismatch) as caught:
            check(engine)

        message = str(caught.value)
        assert "apoq's tables are in the schema 'app'" in message
        assert '"$user", public' in message
        assert "search_path%3Dapp" in message
        assert "Queue(schema='app')" in message

    def test_migrate_makes_no_second_set(self, app, engine):
        done = cli(engine, "migrate")

        assert done.exit_code == 4
        assert "--schema app" in done.output
        assert tables(engine) == {"app": TABLES}

    def test_prepare_makes_no_second_set(self, app, engine):
        with pytest.raises(SchemaMismatch, match="in the schema 'app'"):
            prepare(engine)

        assert tables(engine) == {"app": TABLES}

    def test_what_the_message_names_makes_one(self, app, engine):
        said = cli(engine, "migrate").output

        assert "`apoq migrate --schema public`" in said
        assert cli(engine, "migrate", "--schema", "public").exit_code == 0
        assert tables(engine) == {"app": TABLES, "public": TABLES}
        check(engine)

    def test_a_revision_of_the_users_own_warns(self, app, engine):
        with (
            engine.begin() as connection,
            pytest.warns(UserWarning, match="another set.*in the schema 'app'"),
        ):
            apoq.migrations.upgrade(Operations(MigrationContext.configure(connection)), version=1)

    def test_the_doctor_says_it(self, app, engine):
        done = cli(engine, "doctor")

        assert done.exit_code == 1
        assert "in the schema 'app'" in " ".join(done.output.split())

    def test_a_worker_says_it_and_doesnt_start(self, app, engine):
        worker = Worker(engine, Queue())

        with pytest.raises(SchemaMismatch, match="in the schema 'app'"):
            worker.start()

    def test_of_many_schemas_some_are_named(self, engine, sql):
        for number in range(5):
            prepare(engine, schema=f"t{number}")

        with pytest.raises(SchemaMismatch, match=r"in the schemas 't0', 't1', 't2' and 2 more"):
            check(engine)

    def test_a_schema_in_the_path_that_the_role_may_not_use_is_a_grant(self, app, connect, role):
        with pytest.raises(SchemaMismatch, match=f"GRANT USAGE ON SCHEMA app TO {role}"):
            check(connect("app,public", role))

    def test_one_that_is_named_like_another_role_is_too(self, connect, role, sql):
        """As `"$user"` leads to it."""
        prepare(connect(role=role))

        with pytest.raises(SchemaMismatch, match=f"in the schema '{role}'"):
            check(connect())

    def test_what_another_application_has_for_itself_is_in_nobodys_way(self, app, connect, role):
        prepare(connect(role=role))

        assert tables(app) == {"app": TABLES, role: TABLES}

    def test_a_schema_that_is_named_explicitly_is_made(self, app, engine):
        with pytest.raises(
            SchemaMismatch, match=r"in the schema 'jobs' are missing.* some in the schema 'app'"
        ):
            check(engine, "jobs")

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            prepare(engine, schema="jobs")

        assert tables(engine) == {"app": TABLES, "jobs": TABLES}


class TestNoTablesAtAll:
    def test_the_database_is_named_for_it_may_be_the_wrong_one(self, engine):
        with pytest.raises(SchemaMismatch, match=f"are missing, .*in the database {engine.url.database}"):
            check(engine)

    def test_a_search_path_without_a_schema_is_said(self, connect):
        engine = connect("nowhere")

        done = cli(engine, "migrate")

        assert done.exit_code == 4
        assert "the search_path (nowhere) must include an existing schema" in done.output


class TestTwoSets:
    @pytest.fixture
    def both(self, app, engine, connect) -> sa.Engine:
        prepare(engine, schema="public")
        return connect("app,public")

    def test_the_first_one_is_used_and_the_doctor_says_so(self, both):
        done = cli(both, "doctor")

        said = " ".join(done.output.split())
        assert "the schema 'app' are used" in said
        assert "others, in the schema 'public'" in said
        assert "workers" in said  # it goes on

    def test_a_mixture_of_both_is_a_problem(self, both, sql):
        sql("DROP TABLE app.apoq_claims")

        with both.begin() as connection:
            [problem] = problems(connection)

        assert "public.apoq_claims" in problem.text
        assert "app.apoq_tasks" in problem.text


def lose_the_rows(engine: sa.Engine) -> None:
    """Do what pg_dump --schema-only does."""
    with engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM apoq_migrations")


def lose_the_table(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE apoq_migrations")


@pytest.mark.parametrize("lose", [lose_the_rows, lose_the_table])
class TestTablesWithoutTheirVersion:
    def test_they_are_recognised(self, engine, lose):
        prepare(engine)
        lose(engine)

        with pytest.raises(SchemaMismatch, match=r"exist, but no version is recorded.*`apoq migrate`"):
            check(engine)

    def test_migrate_records_it_and_keeps_the_tasks(self, engine, lose):
        prepare(engine)
        lose(engine)
        with engine.begin() as connection:
            Queue().add(connection, "t")

        done = cli(engine, "migrate")

        assert (done.exit_code, "recorded version 1" in done.output) == (0, True)
        with engine.begin() as connection:
            assert current(connection) == LATEST
            assert differences(connection) == []
            assert connection.exec_driver_sql("SELECT count(*) FROM apoq_tasks").scalar() == 1

    def test_a_revision_and_a_script_record_it_and_keep_the_tasks(self, engine, lose):
        prepare(engine)
        for script in (None, apoq.migrations.upgrade_sql(version=1)):
            lose(engine)
            with engine.begin() as connection:
                if script is None:
                    apoq.migrations.upgrade(Operations(MigrationContext.configure(connection)), version=1)
                else:
                    connection.exec_driver_sql(script)

            check(engine)

    def test_where_they_are_though_another_schema_is_first_in_the_path(self, engine, lose, sql, connect):
        prepare(engine)
        lose(engine)
        sql("CREATE SCHEMA first")

        prepare(connect("first,public"))

        assert tables(engine) == {"public": TABLES}

    def test_in_a_schema_of_their_own(self, engine, lose, connect):
        prepare(engine, schema="jobs")
        lose(connect("jobs"))

        with pytest.raises(SchemaMismatch, match=r"in the schema 'jobs' exist.*`apoq migrate --schema jobs`"):
            check(engine, "jobs")
        prepare(engine, schema="jobs")
        check(engine, "jobs")


def test_what_create_all_has_made_is_recognised_too(engine):
    Base.metadata.create_all(engine)

    prepare(engine)

    with engine.begin() as connection:
        assert differences(connection) == []
    check(engine)


def test_part_of_them_is_completed(engine, sql):
    prepare(engine)
    sql("DROP TABLE apoq_migrations, apoq_claims; DROP INDEX apoq_tasks_open_idx")

    prepare(engine)

    with engine.begin() as connection:
        assert differences(connection) == []
