"""The pytest plugin, in projects of their own, and the database that it makes."""

from __future__ import annotations

import subprocess
import sys
from textwrap import dedent

import pytest
import sqlalchemy as sa

from apoq import ApoqError
from apoq.testing.databases import private_database


@pytest.fixture(autouse=True)
def database_url(server, monkeypatch) -> None:
    monkeypatch.setenv("DATABASE_URL", server.render_as_string(hide_password=False))


@pytest.fixture
def run_pytest(tmp_path):
    """Run a project's pytest, and answer its output."""

    def run(test: str, conftest: str = "") -> str:
        (tmp_path / "conftest.py").write_text(dedent(conftest))
        (tmp_path / "test_it.py").write_text(dedent(test))
        command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "--rootdir", str(tmp_path)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout

    return run


def databases(admin) -> set[str]:
    with admin.connect() as connection:
        return set(connection.scalars(sa.text("SELECT datname FROM pg_database")))


def test_a_project_without_apoq_does_not_import_it(run_pytest):
    output = run_pytest(
        """
        import sys

        def test_nothing_is_imported():
            assert "apoq_pytest" in sys.modules
            assert not {"apoq", "sqlalchemy", "psycopg"} & sys.modules.keys()
        """
    )

    assert "1 passed" in output


def test_its_fixtures_give_a_database_and_sessions_that_are_rolled_back(run_pytest, tmp_path, admin):
    output = run_pytest(
        """
        from pathlib import Path
        from apoq import Queue
        from apoq.testing import assert_enqueued, drain, enqueued

        def test_it_runs(apoq_session, worker):
            Queue().add(apoq_session, "greet", {"user_id": 7})
            apoq_session.commit()
            assert_enqueued(apoq_session, "greet", user_id=7)
            assert [task.state for task in drain(apoq_session, worker)] == ["completed"]

        def test_it_has_left_nothing(apoq_session):
            assert not enqueued(apoq_session)

        def test_the_database_is_its_own(apoq_url, apoq_engine):
            assert apoq_engine.url == apoq_url
            Path("name").write_text(apoq_url.database)

        def test_that_fails(apoq_session):
            Queue().add(apoq_session, "greet", {"user_id": 8})
            assert enqueued(apoq_session, "greet", user_id=7)
        """,
        """
        import pytest
        from apoq import Worker

        @pytest.fixture
        def worker(apoq_engine):
            worker = Worker(apoq_engine)
            worker.use("greet", lambda task: None)
            return worker
        """,
    )

    assert "1 failed, 3 passed" in output
    assert 'assert [] (there is: greet {"user_id": 8})' in output
    assert (tmp_path / "name").read_text() not in databases(admin)


def test_a_role_that_may_not_create_a_database_is_told_what_to_do(server, admin, monkeypatch):
    with admin.connect() as connection:
        connection.exec_driver_sql("CREATE ROLE apoq_guest LOGIN PASSWORD 'secret'")
    url = server.set(username="apoq_guest", password="secret")
    monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False))

    with pytest.raises(ApoqError, match=r"permission denied.*define your own fixture apoq_engine") as raised:
        private_database().__enter__()

    assert "secret" not in str(raised.value)
    with admin.connect() as connection:
        connection.exec_driver_sql("DROP ROLE apoq_guest")


def test_the_database_is_its_own_if_the_url_has_an_option_for_the_name(server, monkeypatch):
    url = server.set(database=None).update_query_dict({"dbname": server.database})
    monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False))

    with private_database() as private:
        engine = sa.create_engine(private, poolclass=sa.NullPool)
        with engine.connect() as connection:
            current = connection.exec_driver_sql("SELECT current_database()").scalar_one()

    assert current.startswith("apoq_test_")


def test_the_database_is_dropped_when_its_tests_have_failed(admin):
    with pytest.raises(ZeroDivisionError), private_database() as url:
        assert url.database in databases(admin)
        raise ZeroDivisionError

    assert url.database not in databases(admin)
