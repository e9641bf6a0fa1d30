"""Workers inside somebody's application: forked, started and stopped from anywhere, never stopped at all."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Self

import probe
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from waiting import patience

pytestmark = pytest.mark.slow

SOON = 30.0

until = patience(SOON)

PROMPT = 5.0
"""Seconds in which a program ends that needs one at most, on a machine that has other things to do."""

PROLOGUE = """
    import gc, os, sys, threading, time, warnings
    from datetime import timedelta
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # Python 3.12 on: of forks beside threads
    import sqlalchemy as sa
    from sqlalchemy.orm import Session
    from apoq import Queue, Worker

    engine = sa.create_engine(sys.argv[1])
    worker = Worker(engine, concurrency=1, poll_interval=timedelta(seconds=60))
    entered, let_go = threading.Event(), threading.Event()

    def effect(task):
        task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})
        if task.data == "slow":
            entered.set()
            let_go.wait(30)

    worker.use("effect", effect)

    def add(data=None):
        with Session(engine) as session, session.begin():
            Queue().add(session, "effect", data)

    def one(statement):
        with engine.connect() as connection:
            return connection.exec_driver_sql(statement).scalar_one()

    def completed():
        return one("SELECT count(*) FROM apoq_tasks WHERE state = 'completed'")

    def until(condition):
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, "it didn't come about in time"
            time.sleep(0.01)

    def sessions():
        # Those of this database, but for the one that asks.
        with engine.connect() as connection:
            return set(connection.exec_driver_sql(
                "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND backend_type = "
                "'client backend'"
            ).scalars())

    def await_exit(child):
        found = 0, 0
        deadline = time.monotonic() + 30
        while found[0] == 0:
            found = os.waitpid(child, os.WNOHANG)
            if time.monotonic() > deadline:
                os.kill(child, 9)
                os.waitpid(child, 0)
                raise AssertionError("the child hung")
            time.sleep(0.01)
        assert found[1] == 0, f"the child ended with {found[1]}"
"""


@pytest.fixture
def run(url) -> Callable[..., str]:
    """Run a script to its end, which is to be a good one; answer its output."""

    def run(code: str, *, to: sa.URL = url, timeout: float = 90) -> str:
        source = textwrap.dedent(PROLOGUE) + textwrap.dedent(code)
        command = [sys.executable, "-c", source, to.render_as_string(hide_password=False)]
        path = [os.environ.get("PYTHONPATH", ""), str(Path(__file__).parent)]  # where `probe` is
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, check=False, env=environment
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return run


def rows(engine: sa.Engine, statement: str) -> list[tuple]:
    with engine.connect() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(statement)]


def ledger(engine: sa.Engine) -> tuple[int, int]:
    return rows(engine, "SELECT count(*), count(DISTINCT task_id) FROM ledger")[0]


def outcomes(engine: sa.Engine) -> set[tuple]:
    return set(rows(engine, "SELECT state, attempt, fail_count FROM apoq_tasks"))


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system doesn't fork")


@needs_fork
class TestFork:
    def test_the_parent_goes_on_and_the_child_begins_a_life_of_its_own(self, engine, run):
        run("""
            worker.start()
            add()
            until(lambda: completed() == 1)
            before = sessions()
            if (child := os.fork()) == 0:
                assert "apoq" not in " ".join(thread.name for thread in threading.enumerate())
                worker.stop()  # it hasn't started here
                worker.start()
                until(lambda: one("SELECT count(*) FROM apoq_workers") == 2)
                assert one("SELECT count(DISTINCT pid) FROM apoq_workers") == 2
                assert one("SELECT pg_backend_pid()") not in before
                for _ in range(20):
                    add()
                until(lambda: completed() == 21)
                worker.stop()
                assert one("SELECT count(*) FROM apoq_workers") == 1
                sys.exit()
            await_exit(child)
            for _ in range(20):
                add()
            until(lambda: completed() == 41)
            assert before <= sessions(), "a session of the parent's was ended"
            worker.stop()
        """)

        assert ledger(engine) == (41, 41)
        assert outcomes(engine) == {("completed", 1, 0)}

    def test_a_childs_end_leaves_a_transaction_of_the_parents_alone(self, engine, run):
        run("""
            worker.start()
            add("slow")
            assert entered.wait(30)
            before = sessions()
            for end in (sys.exit, lambda: os._exit(0)):
                if (child := os.fork()) == 0:
                    add()
                    assert worker.work().data is None
                    del worker
                    gc.collect()
                    end()
                await_exit(child)
            assert before <= sessions()
            let_go.set()
            until(lambda: completed() == 3)
            assert before <= sessions()
            worker.stop()
        """)

        assert ledger(engine) == (3, 3)
        assert outcomes(engine) == {("completed", 1, 0)}

    def test_a_lock_that_another_thread_held_does_not_hang_the_child(self, engine, run):
        run("""
            import probe

            worker.start()
            add("slow")
            assert entered.wait(30)
            stopping = threading.Thread(target=worker.stop)
            stopping.start()
            until(lambda: probe.is_busy_starting_or_stopping(worker))
            if (child := os.fork()) == 0:
                worker.stop()
                add()
                until(worker.work)
                worker.start()
                worker.stop()
                sys.exit()
            await_exit(child)
            let_go.set()
            stopping.join(30)
            assert not stopping.is_alive()
        """)

        assert ledger(engine) == (2, 2)

    def test_children_of_a_busy_process_neither_hang_nor_disturb_it(self, engine, run):
        run("""
            worker.start()
            with Session(engine) as session, session.begin():
                Queue().add_many(session, "effect", [None] * 1_000)
            for _ in range(6):
                if (child := os.fork()) == 0:
                    add()
                    worker.work()
                    worker.start()
                    worker.stop()
                    sys.exit()
                await_exit(child)
            until(lambda: completed() == 1_006)
            worker.stop()
        """)

        assert ledger(engine) == (1_006, 1_006)
        assert outcomes(engine) == {("completed", 1, 0)}

    def test_notifications_of_parent_and_child_wake_an_idle_worker(self, engine, run):
        began = time.monotonic()
        run("""
            worker.start()
            for round in range(1, 6):
                add()
                until(lambda: completed() == 2 * round - 1)
                if (child := os.fork()) == 0:
                    add()
                    sys.exit()
                await_exit(child)
                until(lambda: completed() == 2 * round)
            worker.stop()
        """)

        assert time.monotonic() - began < 50  # the worker looks by itself once a minute
        assert ledger(engine) == (10, 10)

    def test_a_server_that_falls_silent_is_noticed_in_the_child(self, run):
        run("""
            import psycopg
            from apoq.postgres.connections import execute, own_engine
            worker.start()  # and in the parent, a thread watches
            if (child := os.fork()) == 0:
                try:
                    execute(own_engine(engine), sa.text("SELECT pg_sleep(20)"), {}, timeout=0.1)
                except psycopg.OperationalError:
                    sys.exit()
                sys.exit("nobody noticed")
            await_exit(child)
            worker.stop()
        """)

    def test_processors_listeners_and_options_are_kept(self, engine, run):
        told = run("""
            worker.events.on("task.completed", lambda task: print(worker, task.type, flush=True))
            if (child := os.fork()) == 0:
                add()
                worker.work()
                sys.exit()
            await_exit(child)
        """)

        assert told == "<Worker of Queue('default') concurrency=1> effect\n"

    def test_coroutines_run_in_the_child(self, engine, run):
        run("""
            async def write(task):
                await task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})

            def add_async():
                with Session(engine) as session, session.begin():
                    Queue().add(session, "async")

            worker.use("async", write)
            worker.start()
            add_async()
            until(lambda: completed() == 1)
            if (child := os.fork()) == 0:
                add_async()
                until(lambda: completed() == 2)  # the parent's work
                worker.start()
                for _ in range(20):
                    add_async()
                until(lambda: completed() == 22)
                worker.stop()
                sys.exit()
            await_exit(child)
            add_async()
            until(lambda: completed() == 23)
            worker.stop()
        """)

        assert ledger(engine) == (23, 23)


class TestThreads:
    def test_several_threads_start_it_once_and_stop_it_once(self, engine, worker):
        worker.use("t", lambda task: None)

        for _ in range(5):
            together(8, worker.start)
            assert len(rows(engine, "SELECT * FROM apoq_workers")) == 1
            names = [thread.name for thread in threading.enumerate()]
            assert names.count("apoq-claimer") == names.count("apoq-heartbeat") == 1
            together(8, worker.stop)
            assert rows(engine, "SELECT * FROM apoq_workers") == []
            assert "apoq-claimer" not in [thread.name for thread in threading.enumerate()]

    def test_stopping_before_starting_is_harmless(self, engine, worker, queue):
        together(4, worker.stop)
        worker.stop(timeout=0)

        worker.use("t", lambda task: None)
        worker.start()
        with Session(engine) as session, session.begin():
            queue.add(session, "t")
        until(lambda: outcomes(engine) == {("completed", 1, 0)})

    def test_a_stop_ends_the_start_that_is_under_way(self, engine, worker):
        with engine.begin() as connection:
            connection.exec_driver_sql("LOCK apoq_workers")
            starting = threading.Thread(target=worker.start)
            starting.start()
            until(lambda: rows(engine, "SELECT 1 FROM pg_locks WHERE NOT granted"))

            worker.stop()

            starting.join(SOON)
            assert not starting.is_alive()
        assert not probe.lifecycle(worker).is_in_use

    def test_a_processor_that_starts_or_stops_its_worker_does_not_hang_the_stop(self, engine, worker, queue):
        entered, stopping, refused = threading.Event(), threading.Event(), []

        def meddle(task: object) -> None:
            entered.set()
            assert stopping.wait(SOON)
            worker.start()
            try:
                worker.stop()
            except RuntimeError as error:
                refused.append(error)

        worker.use("t", meddle)
        with Session(engine) as session, session.begin():
            queue.add(session, "t")
        worker.start()
        assert entered.wait(SOON)
        stopper = threading.Thread(target=worker.stop, args=(10,))  # it would give the task back then
        stopper.start()
        until(lambda: probe.is_busy_starting_or_stopping(worker))
        stopping.set()
        stopper.join(SOON)

        assert not stopper.is_alive()
        assert len(refused) == 1
        assert outcomes(engine) == {("completed", 1, 0)}


def together(count: int, function: Callable[[], object]) -> None:
    """Call a function from several threads at the same moment."""
    barrier = threading.Barrier(count)

    def call() -> None:
        barrier.wait(SOON)
        function()

    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
        assert not thread.is_alive()


class TestExit:
    """A program that ends without having stopped its worker."""

    def test_an_idle_worker_does_not_hold_it_up(self, engine, run):
        told = run("""
            worker.start()
            add()
            until(lambda: completed() == 1)
            print(time.time())
        """)

        assert time.time() - float(told) < PROMPT
        assert rows(engine, "SELECT * FROM apoq_workers") == []

    def test_what_it_held_is_given_back_with_no_attempt_used_up(self, engine, run):
        told = run("""
            worker.use("sleep", lambda task: time.sleep(60))
            with Session(engine) as session, session.begin():
                Queue().add_many(session, "sleep", range(10))
            worker.start()
            until(lambda: one("SELECT count(*) FROM apoq_tasks WHERE state = 'running'") == 1)
            import logging
            logging.disable(logging.WARNING)  # of the tasks that still run
            print(time.time())
        """)

        assert time.time() - float(told) < PROMPT
        assert outcomes(engine) == {("pending", 0, 0)}
        assert rows(engine, "SELECT * FROM apoq_workers") == []

    def test_short_tasks_are_ended_first(self, engine, run):
        run("""
            with Session(engine) as session, session.begin():
                Queue().add_many(session, "effect", [None] * 3_000)
            worker.start()
            until(lambda: completed() > 500)
        """)

        assert outcomes(engine) <= {("completed", 1, 0), ("pending", 0, 0)}
        assert ledger(engine) == (done := rows(engine, COMPLETED)[0][0], done)
        assert rows(engine, "SELECT * FROM apoq_workers") == []

    def test_a_child_that_started_its_own_gives_back_what_that_one_held(self, engine, run):
        run("""
            if (child := os.fork()) == 0:
                worker.start()
                add("slow")
                assert entered.wait(30)
                import logging
                logging.disable(logging.WARNING)
                sys.exit()
            await_exit(child)
        """)

        assert outcomes(engine) == {("pending", 0, 0)}
        assert ledger(engine) == (0, 0)

    def test_a_database_that_does_not_answer_holds_it_up_for_a_second(self, engine, url, run):
        with Relay(url) as relay:

            def freeze() -> None:
                until(lambda: rows(engine, "SELECT * FROM apoq_workers"))
                time.sleep(0.2)  # until it listens, and all is quiet
                relay.freeze()

            freezing = threading.Thread(target=freeze)
            freezing.start()
            told = run(
                """
                worker.start()
                time.sleep(1.5)
                import logging
                logging.disable(logging.WARNING)
                print(time.time())
                """,
                to=relay.url,
            )
            freezing.join(SOON)

        assert time.time() - float(told) < PROMPT


COMPLETED = "SELECT count(*) FROM apoq_tasks WHERE state = 'completed'"


class Relay:
    """A way to the server that can be cut with no word to either end."""

    def __init__(self, url: sa.URL) -> None:
        self._server = url
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._open = threading.Event()
        self._open.set()
        port = self._listening.getsockname()[1]
        # Without a host among the query's parameters, which would win.
        self.url = url.set(host="127.0.0.1", port=port, query={}).update_query_dict({"sslmode": "disable"})

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self._listening, *self._sockets):
            each.close()
        self._open.set()

    def freeze(self) -> None:
        self._open.clear()

    def _accept(self) -> None:
        try:
            while True:
                client, _ = self._listening.accept()
                server = self._connect()
                self._sockets += [client, server]
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=self._carry, args=ends, daemon=True).start()
        except OSError:
            return

    def _connect(self) -> socket.socket:
        host = self._server.query.get("host") or self._server.host or "127.0.0.1"
        port = self._server.port or int(self._server.query.get("port", 5432))
        if str(host).startswith("/"):
            server = socket.socket(socket.AF_UNIX)
            server.connect(f"{host}/.s.PGSQL.{port}")
            return server
        return socket.create_connection((host, port))

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65_536):
                self._open.wait(SOON)
                target.sendall(data)
        except OSError:
            return


def test_a_thread_that_ends_is_not_missed_in_silence(run):
    told = run("""
        import logging
        exits = []

        @sa.event.listens_for(engine, "connect")
        def connect(*_):
            if exits:
                sys.exit("enough")

        worker = Worker(engine, poll_interval=timedelta(seconds=0.05))
        worker.use("effect", effect)
        worker.start()
        other = sa.create_engine(engine.url).connect()
        logging.basicConfig(stream=sys.stdout, level=logging.CRITICAL)
        exits.append(True)
        other.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        until(lambda: "apoq-scanner" not in [thread.name for thread in threading.enumerate()])
        print("healthy:", worker.is_healthy())
        exits.clear()
        worker.stop()
    """)

    assert "the worker's thread apoq-scanner died unexpectedly" in told
    assert "SystemExit: enough" in told
    assert "healthy: False" in told


APP = """
    import os, warnings
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # Python 3.12 on: of forks beside threads
    import sqlalchemy as sa
    from flask import Flask
    from sqlalchemy.orm import Session
    from apoq import Queue, Worker, prepare

    engine = sa.create_engine(os.environ["APP_DATABASE"])
    prepare(engine)  # which leaves a connection in the pool
    worker = Worker(engine)

    def effect(task):
        task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})

    worker.use("effect", effect)
    app = Flask(__name__)

    @app.get("/")
    def add():
        if os.environ["APP_STARTS"] == "at a request":
            worker.start()
        with Session(engine) as session, session.begin():
            session.execute(sa.text("SELECT pg_sleep(0.01)"))
            Queue().add(session, "effect")
        return str(os.getpid())

    if os.environ["APP_STARTS"] == "at the import":
        worker.start()
"""

HOOK = """
def post_worker_init(_):
    from app import worker
    worker.start()
"""


class Server:
    """A program that serves an application, on a free port."""

    def __init__(self, process: subprocess.Popen, port: int, log: Path) -> None:
        self.process, self._url, self._log = process, f"http://127.0.0.1:{port}/", log

    @property
    def said(self) -> str:
        return self._log.read_text()

    def get(self) -> int:
        """Add a task; answer the id of the process that did."""
        try:
            with urllib.request.urlopen(self._url, timeout=SOON) as response:
                return int(response.read())
        except urllib.error.HTTPError as error:
            error.add_note(self.said)
            raise

    def get_if_there(self) -> int | None:
        """Do so; return None if the process isn't there, or ends before the response does."""
        assert self.process.poll() is None, self.said
        try:
            return self.get()
        except (OSError, HTTPException, ValueError):  # none, a part of it, or not even all its headers
            return None

    def is_another_than(self, process_id: int) -> bool:
        return self.get_if_there() not in {None, process_id}

    def stop(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(SOON)


@pytest.fixture
def serve(tmp_path, url) -> Iterator[Callable[..., Server]]:
    """Serve the application by a command, which ends with the test."""
    (tmp_path / "app.py").write_text(textwrap.dedent(APP))
    (tmp_path / "conf.py").write_text(HOOK)
    # The reloader is to look at the files itself: where watchdog is installed, it may not be told of them.
    (tmp_path / "watchdog.py").write_text("raise ImportError")
    started: list[subprocess.Popen] = []

    def serve(command: str, starts: str) -> Server:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        environment = {
            **os.environ,
            "APP_DATABASE": url.render_as_string(hide_password=False),
            "APP_STARTS": starts,
        }
        log = tmp_path / "log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *command.format(port=port).split()],
                cwd=tmp_path,
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        started.append(process)
        server = Server(process, port, log)
        until(server.get_if_there)
        return server

    yield serve
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the group that it leads, and its children are in
        process.wait()


def worker_pids(engine: sa.Engine) -> set[int]:
    return {pid for (pid,) in rows(engine, "SELECT pid FROM apoq_workers")}


def in_parallel(count: int, function: Callable[[], int]) -> list[int]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda _: function(), range(count)))


GUNICORN = "gunicorn --workers 2 --threads {threads} --bind 127.0.0.1:{{port}} {options} app:app"


@needs_fork
@pytest.mark.parametrize("starts", ["at the import", "at a request", "in a hook"])
@pytest.mark.parametrize("preload", [False, True], ids=["", "preload"])
def test_under_gunicorn_tasks_are_worked_once_and_nothing_is_left(engine, serve, preload, starts):
    threads = 1 if preload else 4  # its plain kind of worker, and the threaded one
    options = "--preload " * preload + "--config conf.py" * (starts == "in a hook")
    server = serve(GUNICORN.format(threads=threads, options=options), starts)

    served_by = set(in_parallel(60, server.get))
    until(lambda: ledger(engine)[0] > 60)
    until(lambda: {state for state, *_ in outcomes(engine)} == {"completed"})
    if starts == "at the import" and preload:
        expected = 1
    else:
        expected = len(served_by) if starts == "at a request" else 2
    until(lambda: len(worker_pids(engine)) >= expected)  # the other one may still be on its way
    workers = worker_pids(engine)

    if preload and starts == "at the import":
        assert workers == {server.process.pid}
    elif starts == "at a request":
        assert served_by <= workers
    else:
        assert len(workers) == 2
        assert served_by <= workers
    assert server.stop(signal.SIGTERM) == 0
    assert outcomes(engine) == {("completed", 1, 0)}
    assert ledger(engine)[0] == ledger(engine)[1] == rows(engine, "SELECT count(*) FROM apoq_tasks")[0][0]
    assert worker_pids(engine) == set()
    assert "Traceback" not in server.said


def test_under_flasks_reloader_two_workers_run_and_change_places(engine, serve, tmp_path):
    server = serve("flask --app app run --debug --port {port}", "at the import")
    until(lambda: len(worker_pids(engine)) == 2)
    first = server.get()

    changed = tmp_path / "changed"
    changed.write_text(textwrap.dedent(APP) + "# changed\n")
    changed.replace(tmp_path / "app.py")  # at once, or a part of it might be imported
    until(lambda: server.is_another_than(first))
    in_parallel(20, server.get)
    until(lambda: len(worker_pids(engine)) == 2 and first not in worker_pids(engine))
    until(lambda: {state for state, *_ in outcomes(engine)} == {"completed"})
    server.stop(signal.SIGINT)

    assert outcomes(engine) == {("completed", 1, 0)}
    assert ledger(engine)[0] == ledger(engine)[1] == rows(engine, "SELECT count(*) FROM apoq_tasks")[0][0]
    assert "Traceback" not in server.said


def test_a_program_whose_worker_has_lost_a_thread_ends_with_an_error(run):
    told = run("""
        import logging
        import probe
        logging.disable()

        def end():
            probe.end_claimers_thread(worker)

        try:
            worker.run(on_start=lambda stop: end())
        except RuntimeError as error:
            print(error, worker.is_healthy(), one("SELECT count(*) FROM apoq_workers"))
    """)

    assert (
        told.splitlines()[-1]
        == "the worker stopped because its thread apoq-claimer died; see the log False 0"
    )


def test_it_works_where_no_process_can_fork():
    """As on Windows."""
    told = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os; del os.fork, os.register_at_fork; import apoq; print(apoq.Worker.__name__)",
        ],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (told.stdout, told.stderr) == ("Worker\n", "")
