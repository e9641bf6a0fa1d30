"""The command line: how its commands find a database, and what they say where they can't."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points

import click
import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result
from sqlalchemy.pool import NullPool

from apoq.cli import main
from apoq.cli.group import COMMANDS, Commands
from apoq.cli.output import confirm, table
from apoq.cli.target import Target
from apoq.migrations import LATEST, steps

SECRET = "s3cr3t"


def plain(url: sa.URL) -> str:
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


def execute(url: sa.URL, script: str) -> None:
    engine = sa.create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql(script)


@pytest.fixture
def run(monkeypatch) -> Callable[..., Result]:
    """Call the command line as a shell does, with this in its environment."""
    monkeypatch.delenv("DATABASE_URL", raising=False)
    monkeypatch.delenv("APOQ_DATABASE_URL", raising=False)

    def call(*arguments: str, **environment: str) -> Result:
        return CliRunner(env=environment).invoke(main, arguments)

    return call


class TestTheGroup:
    def test_it_is_a_program(self, monkeypatch, capsys):
        (script,) = entry_points(group="console_scripts", name="apoq")
        monkeypatch.setattr(sys, "argv", ["apoq", "--version"])

        with pytest.raises(SystemExit) as ended:
            script.load()()

        assert ended.value.code == 0
        assert "0.1.0" in capsys.readouterr().out

    def test_it_is_a_module(self):
        command = [sys.executable, "-m", "apoq", "--version"]

        assert "0.1.0" in subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def test_help_imports_no_command(self):
        program = "import sys; from apoq.cli import main; main(['--help'], standalone_mode=False); "
        program += "print(*(n for n in ('alembic', 'rich', 'apoq.cli.worker') if n in sys.modules))"

        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

        assert done.stdout.splitlines()[-1] == ""

    @pytest.mark.parametrize("name", COMMANDS)
    def test_each_command_has_a_help(self, run, name):
        done = run(name, "--help")

        assert done.exit_code == 0
        assert "--database-url" in done.output

    @pytest.mark.parametrize("name", COMMANDS)
    def test_each_command_says_the_same_of_itself_as_the_list(self, run, name):
        assert COMMANDS[name] in " ".join(run(name, "--help").output.split())

    def test_an_unknown_command_is_a_usage_error(self, run):
        assert run("wrok").exit_code == 2

    def test_a_framework_offers_them_on_its_own_engine(self, engine):
        @click.group(cls=Commands)
        @click.pass_context
        def theirs(ctx):
            ctx.obj = Target(engine=engine)

        @theirs.command()
        def more():
            """Their own."""

        runner = CliRunner()
        assert "more" in runner.invoke(theirs, ["--help"]).output
        assert "--database-url" not in runner.invoke(theirs, ["migrate", "--help"]).output
        assert runner.invoke(theirs, ["check"]).exit_code == 0


class TestTheTarget:
    def test_no_database_is_a_usage_error_that_says_how_to_name_one(self, run):
        done = run("migrate")

        assert done.exit_code == 2
        assert "--database-url, or set APOQ_DATABASE_URL or DATABASE_URL" in done.output

    @pytest.mark.parametrize(
        ("arguments", "environment"),
        [
            (["migrate", "--database-url", "{}"], {}),
            (["--database-url", "{}", "migrate"], {}),
            (["migrate"], {"DATABASE_URL": "{}"}),
            (["migrate"], {"APOQ_DATABASE_URL": "{}", "DATABASE_URL": "nonsense"}),
            (["migrate", "--database-url", "{}"], {"APOQ_DATABASE_URL": "nonsense"}),
            (["--database-url", "{}", "migrate"], {"APOQ_DATABASE_URL": "nonsense"}),
            (["--database-url", "nonsense", "migrate", "--database-url", "{}"], {}),
        ],
    )
    def test_the_nearest_name_counts(self, run, url, arguments, environment):
        done = run(
            *(argument.format(plain(url)) for argument in arguments),
            **{name: value.format(plain(url)) for name, value in environment.items()},
        )

        assert (done.exit_code, "already" in done.output) == (0, True)

    @pytest.mark.parametrize(
        "url",
        [
            "nonsense",
            f"postgresql://app:{SECRET}@host:port/app",
            f"postgres//app:{SECRET}@host/app",
            "",
        ],
    )
    @pytest.mark.parametrize("name", ["migrate", "check"])
    def test_a_malformed_url_is_a_usage_error_without_the_password(self, run, name, url):
        done = run(name, "--database-url", url)

        assert done.exit_code == 2
        assert SECRET not in done.output + repr(done.exception.__cause__)
        assert "Traceback" not in done.output

    @pytest.mark.parametrize("command", ["migrate", "check", "doctor", "list", "revision"])
    def test_a_schema_that_can_not_be_is_a_usage_error(self, run, url, command):
        for arguments in ([command, "--schema", "it's"], ["--schema", "x" * 64, command]):
            done = run(*arguments, DATABASE_URL=plain(url))

            assert (done.exit_code, "a schema's name" in done.output) == (2, True)

    @pytest.mark.parametrize(
        ("arguments", "environment"),
        [
            (["list", "--queue", "\udcff"], {}),
            (["\udcff"], {}),
            (["list", "--database-url", f"postgresql://app:{SECRET}\udcff@host/app"], {}),
            (["list"], {"DATABASE_URL": f"postgresql://app:{SECRET}\udcff@host/app"}),
        ],
        ids=["option", "command", "url", "variable"],
    )
    def test_bytes_that_are_no_text_are_a_usage_error(self, run, url, arguments, environment):
        done = run(*arguments, **({"DATABASE_URL": plain(url)} | environment))

        assert (done.exit_code, "is not text in UTF-8" in done.output) == (2, True)
        assert SECRET not in done.output

    def test_another_database_is_a_usage_error(self, run):
        done = run("check", "--database-url", f"mysql://app:{SECRET}@host/app")

        assert done.exit_code == 2
        assert "starts with postgresql://" in done.output

    @pytest.mark.parametrize("name", ["migrate", "check"])
    def test_an_unreachable_database_is_said_in_one_line_without_the_password(self, run, name):
        done = run(name, DATABASE_URL=f"postgresql://app:{SECRET}@127.0.0.1:1/app?sslpassword={SECRET}")

        assert done.exit_code == 3
        assert "the database at postgresql://app:***@127.0.0.1:1/app can't be reached" in done.output
        assert SECRET not in done.output
        assert done.output.count("\n") == 1

    def test_a_database_that_does_not_exist_is_named(self, run, url):
        done = run("check", DATABASE_URL=plain(url.set(database="apoq_no_such")))

        assert done.exit_code == 3
        assert 'database "apoq_no_such" does not exist' in done.output

    def test_missing_tables_are_said_with_the_command_that_makes_them(self, run, empty_url):
        done = run("check", "--schema", "jobs", DATABASE_URL=plain(empty_url))

        assert done.exit_code == 4
        assert "`apoq migrate --schema jobs`" in done.output

    def test_its_connections_say_who_they_are(self, url):
        target = Target(plain(url))

        with target.begin() as connection:
            name = connection.scalar(sa.text("SHOW application_name"))
        target.close()

        assert name == "apoq"


class TestMigrate:
    def test_it_makes_the_tables_once(self, run, empty_url):
        first = run("migrate", DATABASE_URL=plain(empty_url))
        second = run("migrate", DATABASE_URL=plain(empty_url))

        assert first.output == f"Created apoq's tables, at version {LATEST}.\n"
        assert second.output == f"apoq's tables already have version {LATEST}: nothing to do.\n"

    def test_it_makes_them_in_a_schema(self, run, empty_url):
        run("migrate", "--schema", "jobs", DATABASE_URL=plain(empty_url))

        assert run("check", "--schema", "jobs", DATABASE_URL=plain(empty_url)).exit_code == 0
        assert run("check", DATABASE_URL=plain(empty_url)).exit_code == 4

    def test_it_does_not_wait_for_ever_for_a_lock_that_another_session_keeps(
        self, run, empty_url, monkeypatch
    ):
        monkeypatch.setattr(steps, "LOCK_WAIT_SECONDS", 0.1)
        with sa.create_engine(empty_url, poolclass=NullPool).connect() as connection:
            connection.exec_driver_sql(f"SELECT pg_advisory_lock({steps.LOCK_KEY})")

            done = run("migrate", DATABASE_URL=plain(empty_url))

        assert (done.exit_code, "SELECT pg_terminate_backend(" in done.output) == (4, True)

    def test_a_newer_database_wants_a_newer_library(self, run, url):
        execute(url, "UPDATE apoq_migrations SET version_num = '0099'")

        done = run("migrate", DATABASE_URL=plain(url))

        assert done.exit_code == 4
        assert "pip install --upgrade apoq" in done.output

    def test_a_role_that_may_not_is_told_so(self, run, empty_url):
        execute(empty_url, f"CREATE ROLE {empty_url.database} LOGIN PASSWORD '{SECRET}'")
        try:
            done = run(
                "migrate",
                DATABASE_URL=plain(empty_url.set(username=empty_url.database, password=SECRET)),
            )
        finally:
            execute(empty_url, f"DROP ROLE {empty_url.database}")

        assert done.exit_code == 1
        assert "permission denied" in done.output
        assert "use another role" in done.output


class TestCheck:
    def test_tables_as_they_should_be_pass(self, run, url):
        done = run("check", DATABASE_URL=plain(url))

        assert done.exit_code == 0
        assert f"have version {LATEST} and match it" in done.output

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ("ALTER TABLE apoq_tasks DROP COLUMN error", "the column apoq_tasks.error is missing"),
            ("DROP TABLE apoq_workers", "the table apoq_workers is missing"),
            (
                "ALTER TABLE apoq_tasks ALTER COLUMN data DROP NOT NULL",
                "the column apoq_tasks.data must not accept NULL",
            ),
            (
                "ALTER TABLE apoq_tasks ALTER COLUMN fail_count TYPE smallint",
                "the type of apoq_tasks.fail_count must be INTEGER, got SMALLINT",
            ),
            (
                "ALTER TABLE apoq_tasks ALTER COLUMN priority SET DEFAULT 7",
                "the default of apoq_tasks.priority must be 0, got 7",
            ),
            (
                "ALTER TABLE apoq_tasks ALTER COLUMN process_at DROP DEFAULT",
                "the default of apoq_tasks.process_at must be now(), got nothing",
            ),
            ("DROP INDEX apoq_tasks_open_idx", "the index apoq_tasks_open_idx is missing"),
            (
                (
                    "DROP INDEX apoq_tasks_failed_idx; CREATE INDEX apoq_tasks_failed_idx ON apoq_tasks"
                    " (queue, coalesce(cancelled_at, failed_at, process_at)) WHERE indexed_state = 'failed'"
                ),
                "the index apoq_tasks_failed_idx is missing or differs from the model",
            ),
            (
                (
                    "DROP INDEX apoq_tasks_completed_idx; CREATE INDEX apoq_tasks_completed_idx"
                    " ON apoq_tasks (completed_at) WHERE state = 'completed'"
                ),
                "the index apoq_tasks_completed_idx is missing or differs from the model",
            ),
            (
                "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'apoq_tasks_failed_idx'::regclass",
                "the index apoq_tasks_failed_idx is not valid",
            ),
            (
                "ALTER TABLE apoq_tasks DROP CONSTRAINT apoq_tasks_state_check",
                "the CHECK apoq_tasks_state_check is missing",
            ),
            (
                (
                    "ALTER TABLE apoq_tasks DROP CONSTRAINT apoq_tasks_state_check;"
                    " ALTER TABLE apoq_tasks ADD CONSTRAINT apoq_tasks_state_check"
                    " CHECK (state IN ('pending', 'done'))"
                ),
                "the CHECK apoq_tasks_state_check is missing or differs from the model",
            ),
        ],
    )
    def test_what_differs_from_the_model_is_named(self, run, url, change, said):
        execute(url, change)

        done = run("check", DATABASE_URL=plain(url))

        assert done.exit_code == 1
        assert f"✗ {said}" in done.output

    def test_the_same_in_a_schema(self, run, empty_url):
        run("migrate", "--schema", "my Jobs", DATABASE_URL=plain(empty_url))
        execute(empty_url, 'ALTER TABLE "my Jobs".apoq_tasks DROP COLUMN error')

        done = run("check", "--schema", "my Jobs", DATABASE_URL=plain(empty_url))

        assert done.exit_code == 1
        assert done.output.count("✗") == 1

    def test_what_somebody_has_added_is_theirs(self, run, url):
        execute(url, "ALTER TABLE apoq_tasks ADD COLUMN tenant int")
        execute(url, "CREATE INDEX ON apoq_tasks (tenant); CREATE TABLE orders (id int)")

        assert run("check", DATABASE_URL=plain(url)).exit_code == 0

    def test_a_program_gets_json(self, run, url):
        execute(url, "ALTER TABLE apoq_tasks DROP COLUMN error")

        done = run("check", "--json", DATABASE_URL=plain(url))

        assert json.loads(done.stdout) == {
            "version": LATEST,
            "differences": ["the column apoq_tasks.error is missing"],
        }


class TestOutput:
    def test_a_question_that_nobody_can_answer_is_a_no(self):
        with pytest.raises(click.UsageError, match="pass --yes"):
            confirm("Delete 7 tasks?", yes=False)

    def test_yes_is_not_asked(self):
        confirm("Delete 7 tasks?", yes=True)

    def test_numbers_stand_on_the_right(self):
        assert [column.justify for column in table("type", "tasks", right=["tasks"]).columns] == [
            "left",
            "right",
        ]
