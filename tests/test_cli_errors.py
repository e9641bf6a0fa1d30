"""Whatever the server refuses a command with, it ends with one line and an exit code."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from uuid import uuid4

import click
import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result
from sqlalchemy.pool import NullPool

from apoq.cli import main
from apoq.cli.group import Commands
from apoq.cli.target import Target

RAISING = """
    CREATE FUNCTION raise_it(stage text) RETURNS text LANGUAGE plpgsql AS $$
    BEGIN
        IF current_setting('test.stage', true) = stage THEN
            RAISE EXCEPTION E'it is\\nrefused' USING ERRCODE = current_setting('test.state');
        END IF;
        RETURN '0001';
    END $$;
    CREATE FUNCTION raise_it_for_a_row() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM raise_it('write');
        RETURN coalesce(NEW, OLD);
    END $$;
    CREATE TRIGGER theirs BEFORE INSERT OR UPDATE OR DELETE ON apoq_tasks
        FOR EACH ROW EXECUTE FUNCTION raise_it_for_a_row();
    DROP TABLE apoq_migrations;
    CREATE VIEW apoq_migrations AS SELECT raise_it('read') AS version_num;
    INSERT INTO apoq_tasks (type, state, completed_at) VALUES ('t', 'completed', '2020-01-01');
    INSERT INTO apoq_tasks (type) VALUES ('t');
"""
"""What raises an error when tables are read, or written to, by what the session says."""

APP = """
from apoq import Queue
queue = Queue()
@queue.task
def paint(): ...
"""

READS = {
    "migrate": ["migrate"],
    "check": ["check"],
    "add": ["add", "t"],
    "list": ["list"],
    "show": ["show", "1"],
    "stats": ["stats"],
    "retry": ["retry", "1"],
    "cancel": ["cancel", "2"],
    "prune": ["prune", "--completed-before", "1h"],
}
WRITES = {name: READS[name] for name in ("add", "retry", "cancel")}

# A state of each class, and of those that are spoken of by themselves; with the exit code.
STATES = {
    "02000": 1,
    "03000": 1,
    "08000": 3,
    "08006": 3,
    "08P01": 3,
    "09000": 1,
    "0A000": 1,
    "0LP01": 1,
    "0Z000": 1,
    "20000": 1,
    "21000": 1,
    "22000": 1,
    "22021": 1,
    "22P05": 1,
    "23505": 1,
    "23514": 1,
    "24000": 1,
    "25000": 1,
    "25006": 1,
    "25P02": 1,
    "25P03": 1,
    "25P04": 1,
    "26000": 1,
    "27000": 1,
    "28000": 3,
    "28P01": 3,
    "2B000": 1,
    "2D000": 1,
    "34000": 1,
    "38000": 1,
    "3B001": 1,
    "3D000": 3,
    "3F000": 4,
    "40001": 1,
    "40P01": 1,
    "42000": 1,
    "42501": 1,
    "42601": 1,
    "42703": 4,
    "42P01": 4,
    "42883": 1,
    "44000": 1,
    "53000": 1,
    "53100": 1,
    "53200": 1,
    "53300": 3,
    "53400": 1,
    "54000": 1,
    "55000": 1,
    "55P03": 1,
    "57014": 1,
    "57P01": 3,
    "57P03": 3,
    "57P05": 1,
    "58000": 1,
    "58030": 1,
    "72000": 1,
    "F0000": 1,
    "HV000": 1,
    "P0001": 1,
    "XX000": 1,
    "XX001": 1,
    "ZZ999": 1,
}

FEW = {state: STATES[state] for state in ("0A000", "25006", "42P01", "53300", "57014", "P0001", "XX000")}


@pytest.fixture(autouse=True)
def log() -> Iterator[None]:
    """Undo what the worker's command does to the log of this process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="module")
def module_url(template, create_database, drop_database) -> Iterator[sa.URL]:
    url = create_database(template.database)
    engine = sa.create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql(RAISING)
    yield url
    drop_database(url)


@pytest.fixture
def run(module_url, monkeypatch) -> Callable[..., Result]:
    monkeypatch.setenv("DATABASE_URL", module_url.render_as_string(hide_password=False))

    def call(*arguments: str, stage: str, state: str) -> Result:
        monkeypatch.setenv("PGOPTIONS", f"-c test.stage={stage} -c test.state={state}")
        return CliRunner().invoke(main, arguments)

    return call


def is_one_line(done: Result) -> bool:
    return done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1


def assert_says_what_to_do(done: Result) -> None:
    _, refused, advice = done.stderr.partition("it is refused")
    assert (refused, len(advice) > 10) == ("it is refused", True), done.stderr


def check(done: Result, state: str, code: int) -> None:
    assert (state, done.exit_code, is_one_line(done)) == (state, code, True), done.output
    assert_says_what_to_do(done)


@pytest.mark.parametrize(("state", "code"), STATES.items(), ids=STATES)
def test_an_error_of_any_class_is_one_line_and_an_exit_code(run, state, code):
    check(run("check", stage="read", state=state), state, code)


@pytest.mark.parametrize("command", READS)
def test_any_command_that_can_not_read_ends_with_one_line_and_an_exit_code(run, command):
    for state, code in FEW.items():
        check(run(*READS[command], stage="read", state=state), state, code)


@pytest.mark.parametrize("command", WRITES)
def test_any_command_that_can_not_write_ends_with_one_line_and_an_exit_code(run, command):
    for state, code in FEW.items():
        check(run(*WRITES[command], stage="write", state=state), state, code)


@pytest.mark.parametrize(
    ("state", "code"), {"0A000": 1, "42501": 1, "42P01": 4, "P0001": 1, "XX000": 1}.items()
)
def test_a_worker_that_can_not_start_ends_with_one_line_and_an_exit_code(
    run, tmp_path, monkeypatch, state, code
):
    (tmp_path / "app_that_is_refused.py").write_text(APP)
    monkeypatch.syspath_prepend(tmp_path)

    done = run("worker", "app_that_is_refused:queue", "--log-level", "critical", stage="read", state=state)

    check(done, state, code)


def test_a_read_only_database_is_not_an_unreachable_one(template, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", template.render_as_string(hide_password=False))
    monkeypatch.setenv("PGOPTIONS", "-c default_transaction_read_only=on")

    for command in (["add", "t"], ["migrate", "--schema", "jobs"]):
        done = CliRunner().invoke(main, command)

        assert (done.exit_code, "is read-only: cannot execute" in done.stderr) == (1, True)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("statement_timeout=1ms", "raise statement_timeout"),
        ("idle_in_transaction_session_timeout=1ms", "raise idle_in_transaction_session_timeout"),
    ],
)
def test_a_timeout_of_the_role_is_named(template, monkeypatch, option, said):
    monkeypatch.setenv("DATABASE_URL", template.render_as_string(hide_password=False))
    monkeypatch.setenv("PGOPTIONS", f"-c {option}")

    done = CliRunner().invoke(main, ["check"])

    # The server may have closed the connection before it was heard.
    assert is_one_line(done)
    assert done.exit_code == 3 or (done.exit_code == 1 and said in done.stderr)


class TestAnEncoding:
    @pytest.fixture
    def narrow(self, admin, server, drop_database, monkeypatch) -> Iterator[Callable[[str], sa.URL]]:
        made = []

        def create(encoding: str) -> sa.URL:
            made.append(server.set(database=f"apoq_test_{uuid4().hex[:10]}"))
            with admin.connect() as connection:
                connection.exec_driver_sql(
                    f"CREATE DATABASE {made[-1].database} ENCODING '{encoding}' TEMPLATE template0 "
                    "LC_COLLATE 'C' LC_CTYPE 'C'"
                )
            monkeypatch.setenv("DATABASE_URL", made[-1].render_as_string(hide_password=False))
            return made[-1]

        yield create
        for url in made:
            drop_database(url)

    def test_that_lacks_a_character_is_named(self, narrow):
        narrow("LATIN1")
        assert CliRunner().invoke(main, ["migrate"]).exit_code == 0
        assert CliRunner().invoke(main, ["add", "café", '"é"']).exit_code == 0

        for command in (["add", "t", '"💖"'], ["list", "--queue", "💖"], ["cancel", "--type", "💖"]):
            done = CliRunner().invoke(main, command)

            assert (done.exit_code, is_one_line(done)) == (1, True)
            assert "use a database whose encoding is UTF8" in done.stderr

    def test_that_is_none_is_named(self, narrow):
        narrow("SQL_ASCII")

        done = CliRunner().invoke(main, ["migrate"])

        assert (done.exit_code, is_one_line(done), "SQL_ASCII" in done.stderr) == (4, True, True)

    def test_that_is_none_is_named_on_the_engine_of_a_framework(self, narrow):
        engine = sa.create_engine(narrow("SQL_ASCII"), poolclass=NullPool)

        done = framework(engine, "stats")

        assert (done.exit_code, is_one_line(done), "SQL_ASCII" in done.stderr) == (4, True, True)


def framework(engine: sa.Engine, *arguments: str) -> Result:
    """Call a command as a framework does, with its own engine."""

    @click.group(cls=Commands)
    @click.pass_context
    def theirs(ctx):
        ctx.obj = Target(engine=engine)

    return CliRunner().invoke(theirs, arguments)


def test_the_engine_of_a_framework_may_be_of_any_kind_and_stays_as_it_is(url):
    engine = sa.create_engine(
        url,
        isolation_level="AUTOCOMMIT",
        connect_args={"options": "-c DateStyle=German -c IntervalStyle=iso_8601"},
        pool_size=1,
        max_overflow=0,
    )

    for command in (["add", "t", "--timeout", "5"], ["list"], ["doctor"], ["cancel", "1"], ["stats"]):
        assert framework(engine, *command).exit_code == 0

    with engine.connect() as connection:
        assert connection.scalar(sa.text("SHOW DateStyle")) == "German, DMY"
        assert connection.connection.driver_connection.autocommit
    engine.dispose()


def test_a_pool_without_a_free_connection_is_named(url):
    engine = sa.create_engine(url, pool_size=1, max_overflow=0, pool_timeout=0.1)

    with engine.connect():
        done = framework(engine, "list")

    assert (done.exit_code, is_one_line(done), "pool_size" in done.stderr) == (1, True, True)
    engine.dispose()


@pytest.mark.parametrize(
    "arguments",
    [
        ["list", "--before", "9" * 30],
        ["list", "--queue", "a\0b"],
        ["add", "t", "@a\0b"],
        ["add", "x" * 300],
        ["show", "\ud800"],
        ["prune", "--failed-before", "5000000d", "--yes"],
        ["worker", "app:queue", "--timeout", "nan"],
        ["worker", "app:queue", "--timeout", "1e300"],
    ],
)
def test_an_argument_that_can_not_be_is_a_usage_error(run, arguments):
    done = run(*arguments, stage="none", state="")

    assert (done.exit_code, "Traceback" in done.output) == (2, False)


def test_the_lowest_id_has_none_below_it(run):
    assert run("list", "--before", str(-(2**63)), stage="none", state="").exit_code == 0
