"""A worker embedded in a Flask application that real servers run."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import probe
import pytest
import sqlalchemy as sa
from applications.harness import Process, free_port, until
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from apoq import prepare
from apoq.flask import Apoq

pytestmark = pytest.mark.slow

PROGRAM = """
    import os
    import sqlalchemy as sa
    from flask import Flask
    from flask_sqlalchemy import SQLAlchemy
    from apoq.flask import Apoq

    db = SQLAlchemy()
    apoq = Apoq()

    @apoq.processor("t")
    def process(task):
        task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})

    def create_app():
        app = Flask(__name__)
        app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE_URL"]
        app.config.from_prefixed_env()
        db.init_app(app)
        apoq.init_app(app)

        @app.post("/<int:count>")
        def add(count):
            apoq.add_many("t", range(count))
            db.session.commit()
            return "added"

        @app.get("/health")
        def health():
            return ("well", 200) if apoq.is_healthy() else ("ill", 503)

        return app
"""


class Server:
    """A web server with the program, in processes of its own."""

    def __init__(self, process: Process, port: int) -> None:
        self.process = process
        self._client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}",
            trust_env=False,
            timeout=30,
            # A connection for each request, so that each of several processes gets its share.
            limits=httpx.Limits(max_keepalive_connections=0),
        )

    def add(self, count: int) -> None:
        assert self._client.post(f"/{count}").status_code == httpx.codes.OK

    def health(self) -> int:
        try:
            return self._client.get("/health").status_code
        except httpx.TransportError:
            return 0

    def end(self) -> None:
        self._client.close()
        self.process.end()


@pytest.fixture
def serve(tmp_path, url, empty_url) -> Iterator[Callable[..., Server]]:
    """Start the program, by a command in which ``{port}`` is the server's port."""
    (tmp_path / "app.py").write_text(textwrap.dedent(PROGRAM))
    started: list[Server] = []

    def serve(url: sa.URL, *command: str, **environment: str) -> Server:
        port = free_port()
        process = Process(
            [sys.executable, "-m", *(part.format(port=port) for part in command)],
            cwd=tmp_path,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(tmp_path),
                "DATABASE_URL": url.render_as_string(hide_password=False),
                "FLASK_APOQ_IN_PROCESS_WORKER": "true",
                "PYTHONUNBUFFERED": "1",
                **environment,
            },
            log=Path(tmp_path / f"{len(started)}.log"),
        )
        server = Server(process, port)
        started.append(server)
        until(server.health, what="it serves", alive=process)
        return server

    yield serve
    for server in started:
        server.end()
        print(server.process.output())  # which pytest shows where the test has failed


GUNICORN = ("gunicorn", "--bind", "127.0.0.1:{port}", "--workers", "2", "app:create_app()")
FLASK = ("flask", "run", "--port", "{port}")


def one(engine: sa.Engine, statement: str) -> object:
    with engine.connect() as connection:
        return connection.exec_driver_sql(statement).scalar_one()


COMPLETED = "SELECT count(*) FROM apoq_tasks WHERE state = 'completed'"
WORKERS = "SELECT count(*) FROM apoq_workers"
EFFECTS = "SELECT count(*) - count(DISTINCT task_id) FROM ledger"


@pytest.mark.parametrize(
    "command",
    [(*GUNICORN, "--preload"), (*GUNICORN, "--worker-class", "gthread"), (*FLASK, "--debug")],
    ids=["preloaded", "with threads", "with the reloader"],
)
def test_what_serves_works_each_task_once(serve, url, engine, command):
    server = serve(url, *command)
    workers = 1 if "--debug" in command else 2
    # Each process has one once it has served a request.
    until(lambda: server.health() and one(engine, WORKERS) == workers, what="all work", alive=server.process)

    for _ in range(10):
        server.add(20)
    until(lambda: one(engine, COMPLETED) == 200, what="all are completed", alive=server.process)

    assert one(engine, EFFECTS) == 0
    assert one(engine, WORKERS) == workers


def test_it_is_healthy_once_it_works_and_leaves_when_the_server_ends(serve, url, engine):
    server = serve(url, *GUNICORN, "--workers", "1")

    until(lambda: server.health() == 200, what="it is healthy", alive=server.process)
    assert one(engine, WORKERS)
    server.process.end()

    assert one(engine, WORKERS) == 0


CONFIGURATION = """
    def post_worker_init(process):
        process.wsgi.extensions["apoq"].worker.start()

    def worker_exit(server, process):
        process.wsgi.extensions["apoq"].worker.stop(timeout=20)
"""


def test_the_servers_hooks_may_start_and_stop_it(serve, url, engine, tmp_path):
    (tmp_path / "gunicorn.conf.py").write_text(textwrap.dedent(CONFIGURATION))
    server = serve(url, *GUNICORN, FLASK_APOQ_IN_PROCESS_WORKER="false")

    until(lambda: one(engine, WORKERS) == 2, what="both work", alive=server.process)
    server.end()

    assert one(engine, WORKERS) == 0


def test_where_it_cannot_start_the_server_serves_and_says_so(serve, empty_url):
    server = serve(empty_url, *FLASK)

    assert server.health() == 503
    until(lambda: "can't start" in server.process.output(), what="it says so", alive=server.process)
    assert server.health() == 503
    said = server.process.output()
    assert "the in-process worker of 'app' can't start" in said
    assert "apoq's tables are missing" in said


class TestInThisProcess:
    @pytest.fixture
    def db(self) -> SQLAlchemy:
        return SQLAlchemy()

    @pytest.fixture
    def apoq(self) -> Apoq:
        return Apoq()

    @pytest.fixture
    def app(self, db, apoq, url) -> Iterator[Flask]:
        app = Flask("shop")
        app.config.update(SQLALCHEMY_DATABASE_URI=url, APOQ_IN_PROCESS_WORKER=True)
        db.init_app(app)
        apoq.init_app(app)
        yield app
        with app.app_context():
            apoq.worker.stop(timeout=5)
            db.engine.dispose()

    def test_the_first_request_starts_it(self, app, apoq, engine):
        assert not app.extensions["apoq"].is_healthy()

        app.test_client().get("/")

        until(app.extensions["apoq"].is_healthy, what="it is healthy")

    def test_one_that_could_not_start_is_tried_again(self, db, empty_url, monkeypatch, caplog):
        monkeypatch.setattr("apoq.worker.in_process.START_RETRY_SECONDS", 0)
        app = Flask("shop")
        app.config.update(SQLALCHEMY_DATABASE_URI=empty_url, APOQ_IN_PROCESS_WORKER=True)
        db.init_app(app)
        Apoq(app)
        installed = app.extensions["apoq"]
        client = app.test_client()

        client.get("/")
        until(lambda: "CRITICAL" in caplog.text, what="it says that it can't")
        with app.app_context():
            prepare(db.engine)
        until(lambda: client.get("/") and installed.is_healthy(), what="it is healthy")

        installed.worker.stop()
        with app.app_context():
            db.engine.dispose()

    def test_no_request_starts_it_again_once_it_was_stopped(self, app, apoq):
        app.test_client().get("/")
        until(app.extensions["apoq"].is_healthy, what="it is healthy")
        app.extensions["apoq"].worker.stop()

        app.test_client().get("/")

        assert not app.extensions["apoq"].is_healthy()

    def test_tests_start_none(self, app, engine):
        app.testing = True

        app.test_client().get("/")

        assert not probe.has_in_process_worker(app)

    def test_commands_start_none(self, app):
        result = app.test_cli_runner().invoke(args=["apoq", "check"])

        assert result.exit_code == 0, result.output
        assert not probe.has_in_process_worker(app)
