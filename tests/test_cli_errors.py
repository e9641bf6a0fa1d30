"""Whatever the server refuses a command with, it ends with one line and an exit code."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result
from sqlalchemy.pool import NullPool

from apoq.cli import main

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
@pytest.mark.parametrize(("stage", "command"), [("read", "check"), ("write", "add")], ids=["read", "write"])
def test_an_error_of_any_class_is_one_line_and_an_exit_code(run, stage, command, state, code):
    check(run(*READS[command], stage=stage, state=state), state, code)


@pytest.mark.parametrize("command", READS)
def test_any_command_that_can_not_read_ends_with_one_line_and_an_exit_code(run, command):
    for state, code in FEW.items():
        check(run(*READS[command], stage="read", state=state), state, code)


@pytest.mark.parametrize("command", WRITES)
def test_any_command_that_can_not_write_ends_with_one_line_and_an_exit_code(run, command):
    for state, code in FEW.items():
        check(run(*WRITES[command], stage="write", state=state), state, code)
