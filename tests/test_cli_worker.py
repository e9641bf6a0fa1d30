"""``apoq worker``, as a program of its own."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import probe
import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from sqlalchemy.orm import Session
from worker_programs import PATIENCE, Program

from apoq import Queue, Task
from apoq.cli import burst, logs, main
from apoq.cli.exits import Failure
from apoq.cli.lifeline import REPORT_INTERVAL_SECONDS, Lifeline
from apoq.cli.status import line
from apoq.schema.tables import WorkerRow
from apoq.worker.settling.counters import WorkerStats

APP = """
import os, sqlalchemy, sys, threading, time
from apoq import Queue, Worker, database_url

queue = Queue()
emails = Queue("emails")
worker = Worker(sqlalchemy.create_engine(database_url(os.environ["DATABASE_URL"])), queue, emails)
here = set()

def show(line):
    sys.stdout.write(line + "\\n")  # in one piece, because two tasks may do so at once
    sys.stdout.flush()

def say(task):
    show(f"working {task.id}")

def hold(task):
    show(f"holding {task.id}")
    threading.Event().wait()

def until(task):
    show("until is there")
    while not os.path.exists("go"):
        time.sleep(0.01)

def chain(task):
    if task.data:
        queue.add(task.session, "chain", task.data - 1)

def fail(task):
    raise ValueError("no")

@queue.task
def typed(word: str) -> None:
    show(f"working {word}")

worker.use("say", say)
worker.use("hold", hold)
worker.use("until", until)
worker.use("chain", chain)
worker.use("fail", fail, retry_limit=0)
worker.use("retry", fail, retry_delay=lambda _: 3_600)

def make():
    return worker

def number():
    return 5

def broken():
    return {}["color"]

def arguments(of, its, own):
    pass

def exits():
    raise SystemExit(4)

async def coroutine():
    pass
class Lazy:
    def __getattr__(self, name):
        raise RuntimeError("outside of a context")

lazy = Lazy()
"""
FLASK_APP = """
from flask import Flask
from apoq.flask import Apoq

apoq = Apoq(Flask("shop"))

@apoq.task
def nightly() -> None:
    raise AssertionError("it was called")
"""
LINE_OF_BROKEN = APP[: APP.index('{}["color"]')].count("\n") + 1


@pytest.fixture
def start(url, tmp_path) -> Iterator[Callable[..., Program]]:
    """Start the program, in a folder with an application in it."""
    (tmp_path / "app.py").write_text(APP)
    started = []

    def begin(*arguments: str) -> Program:
        started.append(Program(*arguments, cwd=tmp_path, url=url))
        return started[-1]

    yield begin
    for program in started:
        program.kill()


@pytest.fixture
def add(engine) -> Callable[..., int]:
    def commit(type_: str, queue: str = "default") -> int:
        with Session(engine) as session, session.begin():
            return Queue(queue).add(session, type_).id

    return commit


def processes(engine: sa.Engine) -> set[int]:
    """The workers that have shown themselves."""
    with engine.connect() as connection:
        return set(connection.scalars(sa.select(WorkerRow.pid)))


def wait_until(is_so: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A child of ours, or of whoever has adopted it, that nobody has waited for is dead, too.
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


@pytest.mark.slow
class TestOneProcess:
    def test_it_works_the_typed_tasks_of_a_queue(self, start, engine):
        with Session(engine) as session, session.begin():
            Queue().add(session, "app.typed", {"word": "💖"})
        program = start("app:queue")

        program.wait_for("working 💖")
        program.signal(signal.SIGINT)

        assert program.end() == 0

    def test_a_second_signal_ends_it_at_once(self, start, add):
        add("hold")
        program = start("app:make")
        program.wait_for("holding")

        program.signal(signal.SIGINT)
        wait_until(lambda: program.signal(signal.SIGINT) or program.has_ended())

        assert program.end() == -signal.SIGINT
        assert "Traceback" not in program.output

    def test_what_still_runs_after_the_timeout_is_given_back(self, start, add, engine):
        id_ = add("hold")
        program = start("app:worker", "--timeout", "0.1")
        program.wait_for("holding")

        program.signal(signal.SIGTERM)

        assert program.end() == 0
        with Session(engine) as session:
            assert (session.get(Task, id_).state, session.get(Task, id_).attempt) == ("pending", 0)

    def test_its_options_adjust_the_worker_and_its_log(self, start, add, engine):
        left, id_ = add("say"), add("say", "emails")
        program = start("app:worker", "--queues", "emails", "--concurrency", "7", "--log-format", "json")
        program.wait_for(f"working {id_}")
        with Session(engine) as session:
            row = session.scalars(sa.select(WorkerRow)).one()

        program.signal(signal.SIGTERM)
        program.end()

        assert (row.queues, row.concurrency) == (["emails"], 7)
        assert f"working {left}" not in program.output
        records = [json.loads(line) for line in program.output.splitlines() if line.startswith("{")]
        assert [record["level"] for record in records] == ["info"] * 4

    def test_missing_tables_are_said_with_the_command_that_makes_them(self, start, engine):
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP TABLE apoq_tasks, apoq_workers, apoq_migrations")

        program = start("app:worker")

        assert program.end() == 4
        program.wait_for("run `apoq migrate`")


@pytest.mark.slow
class TestAStop:
    """What is said while a worker stops that still runs tasks."""

    def test_it_says_how_many_tasks_it_waits_for_until_when_and_how_to_end_them(self, start, add):
        add("hold")
        program = start("app:worker", "--timeout", "1.5")
        program.wait_for("holding")

        program.signal(signal.SIGINT)

        program.wait_for(r"waiting until \d\d:\d\d:\d\d for 1 running task; a second signal ends it now")
        assert program.end() == 0

    def test_it_says_so_again_when_the_number_changes(self, start, add, tmp_path):
        add("hold"), add("until")
        program = start("app:worker", "--timeout", "20")
        for _ in range(2):  # either may be the first
            program.wait_for("holding|until is there")

        program.signal(signal.SIGTERM)
        program.wait_for(r"waiting until \S+ for 2 running tasks")
        (tmp_path / "go").touch()

        program.wait_for(r"still waiting until \S+ for 1 running task")
        program.signal(signal.SIGTERM)
        assert program.end() == -signal.SIGTERM

    def test_nothing_is_said_if_nothing_runs(self, start):
        program = start("app:worker")
        program.wait_for("has started")

        program.signal(signal.SIGTERM)

        assert program.end() == 0
        program.wait_for("has stopped")
        assert "waiting until" not in program.output

    def test_with_several_processes_their_tasks_are_counted_together(self, start, add):
        add("hold"), add("hold")
        program = start("app:worker", "--processes", "2", "--concurrency", "1", "--timeout", "1")
        program.wait_for("holding")
        program.wait_for("holding")
        # A child reports how many tasks it runs every second.
        wait_until(lambda: program.output.count("has started") == 2)
        time.sleep(2 * REPORT_INTERVAL_SECONDS)

        program.signal(signal.SIGTERM)

        program.wait_for(r"waiting until \S+ for 2 running tasks")
        program.end()
        assert program.output.count("waiting until") == 1


@pytest.mark.slow
class TestSeveralQueues:
    """``apoq worker a:queue b:queue``."""

    @pytest.fixture(autouse=True)
    def modules(self, tmp_path) -> None:
        for name in ("users", "orders"):
            (tmp_path / f"{name}.py").write_text(
                "from apoq import Queue\n"
                f"queue, others, twin = Queue(), Queue('of {name}'), Queue()\n"
                "@queue.task\n"
                f"def hello(): print('hello from {name}', flush=True)\n"
                "@others.task(type='same')\n"
                f"def other(): print('other in {name}', flush=True)\n"
                "@twin.task\n"
                f"def twins(): print('twin in {name}', flush=True)\n"
            )
        (tmp_path / "clash.py").write_text(
            "import users\n"
            "from apoq import Queue\n"
            "queue = Queue()\n"
            "@queue.task(type='users.hello')\n"
            "def another(): ...\n"
        )

    def test_the_tasks_of_all_of_them_are_run(self, start, add):
        add("users.hello"), add("orders.hello"), add("same", "of users")

        program = start("users:queue", "orders:queue", "users:others", "users:queue", "--burst")

        assert program.end() == 0, program.output
        program.wait_for("done in")
        for said in ("hello from users", "hello from orders", "other in users"):
            assert said in program.output

    def test_tasks_of_an_equal_queue_are_run_too(self, start, add):
        add("users.twins")

        program = start("users:queue", "--burst")

        assert program.end() == 0
        program.wait_for("twin in users")

    def test_two_tasks_of_one_type_are_refused(self, start):
        program = start("clash:queue")

        assert program.end() != 0
        program.wait_for("the type 'users.hello' already has a processor, <function hello")

    def test_a_worker_comes_alone(self, start):
        program = start("users:queue", "app:worker")

        assert program.end() == 2
        program.wait_for("app:worker is a Worker, which has its own queues: give it alone")


@pytest.mark.slow
class TestABurst:
    def test_what_is_due_is_run_and_what_becomes_due_by_it(self, start, engine, add, tmp_path):
        with Session(engine) as session, session.begin():
            Queue().add(session, "chain", 3)
            later = Queue().add(session, "say", delay=timedelta(hours=1)).id
            other = Queue().add(session, "unknown").id

        program = start("app:worker", "--burst")

        assert program.end() == 0
        program.wait_for("done in .*: 4 tasks completed$")
        with Session(engine) as session:
            assert {session.get(Task, id_).state for id_ in (later, other)} == {"pending"}

    def test_a_chain_is_run_to_its_end(self, start, engine):
        """Between the end of a task and the unblocking of the next one, none is due, and none runs."""
        queue = Queue()
        with Session(engine) as session, session.begin():
            task = queue.add(session, "chain")
            for _ in range(400):
                task = queue.add(session, "chain", after=[task])

        program = start("app:worker", "--burst")

        assert program.end() == 0
        program.wait_for("done in .*: 401 tasks completed$")

    def test_failures_are_counted_and_a_retry_that_is_due_later_is_left(self, start, engine, add):
        failed, retried = add("fail"), add("retry")

        program = start("app:worker", "--burst")

        assert program.end() == 0
        program.wait_for("0 tasks completed, 1 failed and will be tried again, 1 failed for good")
        with Session(engine) as session:
            assert (session.get(Task, failed).state, session.get(Task, retried).state) == (
                "failed",
                "pending",
            )

    def test_with_nothing_to_do_it_ends(self, start):
        program = start("app:queue", "--burst")

        assert program.end() == 0
        program.wait_for("done in .*: 0 tasks completed")

    def test_it_waits_for_a_running_task_and_a_signal_stops_it(self, start, add, engine):
        id_ = add("hold")
        program = start("app:worker", "--burst", "--timeout", "0.1")
        program.wait_for("holding")

        program.signal(signal.SIGTERM)

        assert program.end() == 0
        with Session(engine) as session:
            assert session.get(Task, id_).state == "pending"

    def test_what_can_not_be_claimed_ends_it_with_an_error(self, worker, engine, add, monkeypatch):
        monkeypatch.setattr(burst, "STUCK_AFTER_SECONDS", 0.5)
        id_ = add("say")
        worker.use("say", print)
        stopped = threading.Event()
        with Session(engine) as session, session.begin():
            session.get(Task, id_, with_for_update=True)
            worker.start()
            until_done = burst.Burst(worker)

            until_done.watch(stopped.set)

            assert stopped.wait(PATIENCE)
        with pytest.raises(Failure, match="tasks are due, but can't be claimed"):
            until_done.finish()

    def test_a_database_that_is_away_is_said_at_once(self, start, url):
        program = start("app:queue", "--burst", "--database-url", "postgresql://localhost:1/none")

        assert program.end() == 3
        program.wait_for("the database at postgresql://localhost:1/none can't be reached")

    @pytest.mark.parametrize("others", [["--processes", "2"], ["--reload"]])
    def test_it_goes_alone(self, start, others):
        program = start("app:queue", "--burst", *others)

        assert program.end() == 2
        program.wait_for("can't be combined")


@pytest.mark.slow
class TestSeveralProcesses:
    def test_one_that_dies_is_replaced_and_a_signal_stops_them_all(self, start, engine):
        program = start("app:worker", "--processes", "2")
        wait_until(lambda: len(processes(engine)) == 2)
        victim = min(processes(engine))

        os.kill(victim, signal.SIGKILL)

        program.wait_for(r"worker process \d was killed by SIGKILL; another one starts in 1 s")
        wait_until(lambda: len(processes(engine) - {victim}) == 2)

        program.signal(signal.SIGTERM)

        assert program.end() == 0
        assert processes(engine) <= {victim}

    def test_a_signal_that_reaches_all_of_them_is_one_signal(self, start, engine, add):
        """As systemd sends it."""
        id_ = add("hold")
        program = start("app:worker", "--processes", "1", "--timeout", "0.5")
        program.wait_for("holding")
        (child,) = processes(engine)

        program.signal(signal.SIGTERM)
        program.wait_for("stopping 1 worker")
        os.kill(child, signal.SIGTERM)

        assert program.end() == 0
        with Session(engine) as session:
            assert (session.get(Task, id_).state, session.get(Task, id_).attempt) == ("pending", 0)

    def test_a_second_signal_ends_them_all_at_once(self, start, engine, add):
        add("hold")
        program = start("app:worker", "--processes", "2")
        program.wait_for("holding")
        wait_until(lambda: len(processes(engine)) == 2)
        children = processes(engine)

        program.signal(signal.SIGTERM)
        program.wait_for("stopping 2 worker processes")
        program.signal(signal.SIGTERM)

        assert program.end() == -signal.SIGTERM
        assert not any(map(is_alive, children))

    def test_they_stop_when_the_supervisor_is_gone(self, start, engine):
        program = start("app:worker", "--processes", "2")
        wait_until(lambda: len(processes(engine)) == 2)
        children = processes(engine)

        program.signal(signal.SIGKILL)
        program.end()

        wait_until(lambda: not any(map(is_alive, children)))
        assert processes(engine) == set()

    def test_what_can_not_start_is_said_once(self, start):
        program = start("app:wroker", "--processes", "4")

        assert program.end() == 2
        program.wait_for("no 'wroker'; there is queue, emails, worker")
        assert program.output.count("Error") == 1


class TestWhatIsToBeWorked:
    """What `apoq worker` says where it can't."""

    @pytest.fixture
    def said(self, tmp_path, monkeypatch, url) -> Callable[..., str]:
        (tmp_path / "app_of_theirs.py").write_text(APP)
        (tmp_path / "app_of_flask.py").write_text(FLASK_APP)
        (tmp_path / "app_without_color.py").write_text("import app_of_theirs\napp_of_theirs.broken()\n")
        (tmp_path / "app_without_modules.py").write_text("import no_such_module_of_theirs\n")
        (tmp_path / "app_that_is_no_python.py").write_text("x = 1\ndef :\n")
        (tmp_path / "app_that_exits.py").write_text("import sys\nsys.exit(0)\n")
        (tmp_path / "app_without_end.py").write_text("def f(): f()\nf()\n")
        (tmp_path / "app_of_many_lines.py").write_text("raise ValueError('a\\nb')\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False))

        def run(*arguments: str) -> str:
            done = CliRunner().invoke(main, ["worker", *arguments])
            assert done.exit_code == 2, done.output
            assert "Traceback" not in done.output
            return done.output.removeprefix("Error: ").rstrip()

        yield run
        for name in [name for name in sys.modules if name.startswith("app_")]:
            del sys.modules[name]

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("app_of_theirs", "must be module:object, such as myapp.tasks:worker, got 'app_of_theirs'"),
            ("app_of_theirs:", "must be module:object, such as myapp.tasks:worker, got 'app_of_theirs:'"),
            ("no_such_module:worker", "there is no module 'no_such_module', neither in "),
            ("app_of_theirs:wroker", "has no 'wroker'; there is queue, emails, worker"),
            (
                "app_of_theirs:number",
                "that returns one of these, got an object of type int",
            ),
            ("app_of_theirs:APP.x", "has no 'APP.x'"),
            ("app_of_theirs:broken", "failed: KeyError: 'color' ("),
            ("app_of_theirs:arguments", "missing 3 required positional arguments"),
            ("app_without_color:worker", "can't be imported: KeyError: 'color' ("),
            ("app_without_modules:worker", "No module named 'no_such_module_of_theirs' ("),
            ("app_that_is_no_python:worker", "SyntaxError: invalid syntax ("),
            ("app_that_exits:worker", "app_that_exits can't be imported: SystemExit: 0 ("),
            ("app_without_end:worker", "RecursionError: maximum recursion depth exceeded ("),
            ("app_of_many_lines:worker", "ValueError: a b ("),
            ("app_of_theirs:exits", "app_of_theirs:exits failed: SystemExit: 4 ("),
            ("app_of_theirs:coroutine", "got a coroutine function: make it a plain function"),
            ("app_of_theirs:lazy", "app_of_theirs:lazy can't be read: RuntimeError: outside of a context ("),
        ],
    )
    def test_what_is_wrong_is_said_in_a_line(self, said, name, message):
        assert message in said(name)

    @pytest.mark.parametrize(
        ("name", "place"),
        [
            ("app_of_theirs:broken", rf"app_of_theirs\.py, line {LINE_OF_BROKEN}\)$"),
            ("app_without_modules:worker", r"app_without_modules\.py, line 1\)$"),
            ("app_that_is_no_python:worker", r"app_that_is_no_python\.py, line 2\)$"),
        ],
    )
    def test_what_is_wrong_is_said_with_its_place(self, said, name, place):
        assert re.search(place, said(name))

    def test_a_task_is_not_its_queue(self, said):
        assert said("app_of_theirs:typed").endswith("is a task of Queue('default'): give that queue instead")

    def test_a_task_of_a_flask_application_is_not_called(self, said):
        assert said("app_of_flask:nightly").endswith("run `flask apoq worker` instead")

    def test_a_queue_without_tasks(self, said):
        assert "has no tasks to run" in said("app_of_theirs:emails")

    def test_nothing_to_work_is_a_usage_error(self, said):
        assert "missing argument MODULE:OBJECT: give a Queue or a Worker" in said()

    def test_a_queue_that_the_worker_has_not(self, said):
        assert said("app_of_theirs:worker", "--queues", "emials") == (
            "queues must be some of this worker's, default, emails, got emials"
        )

    @pytest.mark.parametrize("option", ["--concurrency", "--processes"])
    def test_less_than_one_is_no_number_of_things(self, said, option):
        assert "not in the range x>=1" in said("app_of_theirs:worker", option, "0")

    def test_a_database_for_a_worker_that_has_one(self, said):
        assert "app_of_theirs:worker is a Worker, which has its own engine" in said(
            "app_of_theirs:worker", "--database-url", "postgresql://localhost/other"
        )

    @pytest.mark.parametrize("descriptor", ["abc", "", "-1", "987654"])
    def test_a_supervisor_that_there_is_not(self, said, monkeypatch, descriptor):
        monkeypatch.setenv("APOQ_SUPERVISOR_FD", descriptor)

        assert "APOQ_SUPERVISOR_FD must be set only by `apoq worker`" in said("thing:queue")

    def test_a_number_of_another_program_is_not_the_supervisors(self, monkeypatch):
        monkeypatch.setenv("APOQ_WORKER_NUMBER", "web.1")

        assert Lifeline.take() is None

    def test_a_schema_for_a_queue_that_knows_its_own(self, said):
        assert "Queue(schema=…)" in said("app_of_theirs:queue", "--schema", "jobs")


class TestAdjust:
    def test_an_unknown_queue_is_refused(self, worker):
        with pytest.raises(ValueError, match=r"queues must be .*, default, got emails"):
            probe.adjust(worker, queues=["emails"])

    def test_no_queue_is_refused(self, worker):
        with pytest.raises(ValueError, match=r"queues must be .*, default, got none"):
            probe.adjust(worker, queues=[])

    def test_it_is_refused_while_the_worker_runs(self, worker):
        worker.start()

        with pytest.raises(RuntimeError, match="after it has started"):
            probe.adjust(worker, concurrency=2)

    def test_it_works_only_these_queues(self, make_worker, engine):
        worker = make_worker(Queue("a"), Queue("b"))
        worker.use("say", print)
        with Session(engine) as session, session.begin():
            Queue("a").add(session, "say")
            id_ = Queue("b").add(session, "say").id

        probe.adjust(worker, queues=["b"])

        assert worker.work().id == id_
        assert worker.work() is None


class TestTheStatus:
    def test_a_worker_counts_what_it_did(self, worker, engine):
        queue = Queue()
        worker.use("say", lambda task: None)
        worker.use("write", lambda task: task.session.execute(sa.text("SELECT 1")))
        worker.use("fail", lambda task: 1 / 0, retry_limit=0)
        worker.use("retry", lambda task: 1 / 0, retry_delay=lambda _: timedelta(hours=1))
        with Session(engine) as session, session.begin():
            for type_ in ("say", "write", "fail", "retry"):
                queue.add(session, type_)

        while worker.work():
            pass

        assert worker.stats() == WorkerStats(running=0, completed=2, retried=1, failed=1, cancelled=0)

    def test_a_worker_counts_the_tasks_that_are_running(self, worker, engine):
        running, end = threading.Event(), threading.Event()
        worker.use("hold", lambda task: (running.set(), end.wait()))
        with Session(engine) as session, session.begin():
            Queue().add(session, "hold")

        worker.start()
        running.wait(PATIENCE)
        stats = worker.stats()
        end.set()

        assert stats == WorkerStats(running=1)

    def test_it_is_a_line_that_fits(self):
        said = line(WorkerStats(64, 12_345_678, 1_234, 567, 89), 12_345)

        assert said.strip() == (
            "64 running, 12,345,678 completed (12,345/s), 1,234 retried, 567 failed, 89 cancelled"
        )

    def test_it_leaves_out_what_has_not_happened(self):
        assert line(WorkerStats(0, 3), 1.4).strip() == "0 running, 3 completed (1/s), 0 failed"


class TestTheLog:
    def test_an_applications_own_stays(self, monkeypatch):
        theirs = logging.NullHandler()

        with monkeypatch.context() as patch:
            patch.setattr(logging.getLogger(), "handlers", [theirs])
            logs.set_up(None, None)
            found = list(logging.getLogger().handlers)

        assert found == [theirs]

    def test_unless_another_is_asked_for(self, monkeypatch):
        root = logging.getLogger()

        with monkeypatch.context() as patch:
            patch.setattr(root, "handlers", [logging.NullHandler()])
            patch.setattr(root, "level", root.level)
            logs.set_up("json", "warning")
            ((handler,), level) = root.handlers, root.level

        assert isinstance(handler.formatter, logs.JsonFormatter)
        assert level == logging.WARNING

    def test_a_record_as_json_has_its_extras_and_its_error(self):
        try:
            1 / 0  # noqa: B018
        except ZeroDivisionError:
            record = logging.makeLogRecord(
                {"msg": "a\nb %s", "args": ("💖",), "apoq_task_id": 7, "exc_info": sys.exc_info()}
            )

        written = logs.JsonFormatter().format(record)

        assert "\n" not in written
        read = json.loads(written)
        assert (read["message"], read["apoq_task_id"]) == ("a\nb 💖", 7)
        assert read["error"].endswith("ZeroDivisionError: division by zero")

    FORGED = "no such sku: x\n2026-11-29 CRITICAL [1] apoq: \x1b[2J\x1b]0;t\x07\u2028\x85\x9b\u202e"

    def record(self) -> logging.LogRecord:
        try:
            raise LookupError(self.FORGED)
        except LookupError as error:
            return logging.makeLogRecord(
                {
                    "msg": "task 1 failed: %s",
                    "args": (str(error),),
                    "levelname": "ERROR",
                    "exc_info": sys.exc_info(),
                    "stack_info": f"Stack:\n{self.FORGED}",
                    "exc_text": self.FORGED,  # as another handler has left it
                }
            )

    def test_a_message_forges_no_line_of_the_log(self):
        first, *others = logs.TextFormatter().format(self.record()).splitlines()

        assert "task 1 failed: no such sku: x 2026-11-29 CRITICAL" in first
        assert all(line.startswith("  ") for line in others)
        assert [line for line in others if "LookupError: no such sku: x" in line]
        assert all(character.isprintable() for line in (first, *others) for character in line)

    def test_a_handler_of_the_applications_gets_the_record_as_it_was(self):
        record = self.record()

        logs.TextFormatter().format(record)

        assert record.exc_text == self.FORGED

    def test_as_json_it_is_one_line_of_ascii(self):
        record = self.record()
        record.ratio, record.measured = float("nan"), {"rates": [float("inf"), 1.5]}

        written = logs.JsonFormatter().format(record)

        assert written.isascii()
        assert len(written.splitlines()) == 1

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        read = json.loads(written, parse_constant=refuse)
        assert read["message"] == f"task 1 failed: {self.FORGED}"
        assert (read["ratio"], read["measured"]) == ("nan", {"rates": ["inf", 1.5]})
