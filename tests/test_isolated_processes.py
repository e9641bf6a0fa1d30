"""The processes of isolated tasks: how they end, what they inherit, and how the main program is imported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from multiprocessing.spawn import get_executable, set_executable
from typing import Any

import isolated_tasks as tasks
import probe
import pytest
import sqlalchemy as sa
from isolated_tasks import is_running
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session
from waiting import patience

from apoq import Queue, Task, Worker
from apoq.events import TaskLost

pytestmark = pytest.mark.slow

SOON = 60.0

until = patience(SOON)


def add(engine, type_: str, data: Any = None, **options: Any) -> int:
    with Session(engine) as session, session.begin():
        return Queue().add(session, type_, data, **options).id


def load(engine, task_id: int) -> Task:
    with Session(engine) as session:
        return session.get(Task, task_id)


def result_of(engine, task_id: int) -> Any:
    with Session(engine) as session:
        return Queue().result(session, task_id).value


def has_ended(engine, *task_ids: int) -> bool:
    """Return whether these tasks have completed or failed once at least."""
    ended = (load(engine, task_id) for task_id in task_ids)
    return all(task.state in {"completed", "failed"} or task.error for task in ended)


def ledger(engine) -> list[int]:
    with engine.connect() as connection:
        return list(connection.scalars(sa.text("SELECT task_id FROM ledger ORDER BY task_id")))


@pytest.fixture
def isolate(worker) -> Callable[..., str]:
    """Let the worker run a function's tasks in children; return their type."""

    def use(function: Callable[..., Any], **options: Any) -> str:
        options = {"keep_result": True, "retry_delay": 0, **options}
        worker.use(function.__name__, function, isolated=True, **options)
        return function.__name__

    return use


@pytest.fixture
def run(engine, worker, isolate) -> Callable[..., Task]:
    """Run one attempt of a function in a child, and return its task."""

    def run(function: Callable[..., Any], data: Any = None, **options: Any) -> Task:
        add(engine, isolate(function, **options), data)
        return worker.work()

    return run


class TestItsEnd:
    @pytest.mark.parametrize("function", [tasks.count_in_c, tasks.stubborn], ids=lambda each: each.__name__)
    def test_a_timeout_kills_a_function_that_cannot_be_interrupted(self, run, function):
        began = time.monotonic()

        task = run(function, timeout=0.2)

        assert (task.attempt, task.error["class"]) == (1, "TimeoutError")
        assert time.monotonic() - began < 10

    def test_a_timeout_cancels_the_statement_in_the_server(self, engine, run):
        task = run(tasks.sleep_in_the_server, timeout=0.2)

        assert task.error["class"] == "TimeoutError"
        sleeping = sa.text(
            "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%' AND state = 'active'"
        )
        with engine.connect() as connection:
            assert connection.scalar(sleeping) == 0

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (tasks.read_null, "the process of the task was killed by SIGSEGV"),
            (tasks.abort, "the process of the task was killed by SIGABRT"),
            (
                tasks.kill,
                "the process of the task was killed by SIGKILL: the system does this when memory runs out",
            ),
            (tasks.leave, "the process of the task ended with exit code 3"),
        ],
        ids=lambda each: getattr(each, "__name__", ""),
    )
    def test_the_death_of_its_process_fails_the_attempt(self, run, function, message):
        task = run(function)

        assert (task.state, task.attempt, task.fail_count) == ("pending", 1, 1)
        assert (task.error["class"], task.error["message"]) == ("ProcessDied", message)

    def test_a_process_that_it_has_forked_does_not_hide_its_death_and_ends_with_it(self, run, tmp_path):
        path = tmp_path / "pid"
        began = time.monotonic()

        task = run(tasks.touch_and_fork, str(path))

        until(lambda: not is_running(int(path.read_text())))
        assert task.error["class"] == "ProcessDied"
        assert time.monotonic() - began < 10

    @pytest.mark.parametrize("function", [tasks.start_another, tasks.start_another_and_exit])
    def test_a_program_that_it_has_started_ends_with_a_child_that_ends_with_code_0(
        self, run, tmp_path, worker, function
    ):
        path = tmp_path / "pid"

        run(function, str(path))
        worker.stop()

        until(lambda: not is_running(int(path.read_text())))

    def test_others_are_not_harmed(self, engine, make_worker):
        worker = make_worker(concurrency=4)
        lost = []
        worker.events.on(TaskLost, lost.append)
        for function in (tasks.sleep_briefly, tasks.segfault):
            worker.use(function.__name__, function, isolated=True, retry_limit=0)
        worker.use("plain", tasks.sleep_briefly)
        others = [add(engine, type_, 1.5) for type_ in ("sleep_briefly", "sleep_briefly", "plain")]
        worker.start()
        until(lambda: worker.stats().running == 3)
        deaths = [add(engine, "segfault") for _ in range(3)]

        until(lambda: has_ended(engine, *others, *deaths))

        assert {(load(engine, each).state, load(engine, each).attempt) for each in others} == {
            ("completed", 1)
        }
        assert {load(engine, each).state for each in deaths} == {"failed"}
        assert lost == []

    def test_a_task_whose_lease_has_ended_ends_with_its_process(self, engine, worker, isolate, tmp_path):
        path = tmp_path / "pid"
        add(engine, isolate(tasks.touch_and_sleep), str(path))
        worker.start()
        until(path.exists)

        probe.lose_leases(worker, [None])

        until(lambda: not is_running(int(path.read_text())), timeout=2)

    def test_it_is_told_to_stop_when_the_worker_stops(self, engine, worker, isolate, tmp_path):
        path = tmp_path / "begun"
        task_id = add(engine, isolate(tasks.wait_until_it_should_stop), str(path))
        worker.start()
        until(path.exists)

        worker.stop(timeout=SOON)

        assert (load(engine, task_id).state, load(engine, task_id).attempt) == ("pending", 0)

    def test_it_is_killed_and_released_when_the_time_to_stop_is_up(self, engine, worker, isolate, tmp_path):
        path = tmp_path / "pid"
        task_id = add(engine, isolate(tasks.touch_and_sleep), str(path))
        worker.start()
        until(path.exists)

        worker.stop(timeout=0)

        assert not is_running(int(path.read_text()))
        assert (load(engine, task_id).state, load(engine, task_id).attempt) == ("pending", 0)


class TestItsProcess:
    def test_it_is_used_again_and_ends_with_the_worker(self, engine, make_worker):
        worker = make_worker(concurrency=1)
        worker.use("pid", tasks.pid, isolated=True, keep_result=True)
        ids = [add(engine, "pid") for _ in range(3)]
        worker.start()
        until(lambda: has_ended(engine, *ids))
        (pid,) = {result_of(engine, task_id) for task_id in ids}
        assert is_running(pid)

        worker.stop()

        assert not is_running(pid)

    def test_a_task_for_which_none_can_be_started_loses_no_attempt(self, run, caplog):
        executable = get_executable()
        set_executable("/nowhere")

        task = run(tasks.pid)

        set_executable(executable)
        assert (task.state, task.attempt, task.error) == ("pending", 0, None)
        assert "no process can be started for an isolated task" in caplog.text

    def test_it_ends_when_it_has_nothing_to_do_for_long(self, engine, worker, isolate, monkeypatch):
        monkeypatch.setattr("apoq.worker.isolation.pool.IDLE_SECONDS", 0.1)
        task_id = add(engine, isolate(tasks.pid))
        worker.start()
        until(lambda: has_ended(engine, task_id))

        until(lambda: not is_running(result_of(engine, task_id)))

    def test_one_that_has_died_while_idle_is_replaced_and_no_attempt_fails(self, engine, worker, isolate):
        first = add(engine, isolate(tasks.pid))
        worker.start()
        until(lambda: has_ended(engine, first))
        os.kill(result_of(engine, first), signal.SIGKILL)

        second = add(engine, "pid")
        until(lambda: has_ended(engine, second))

        assert (load(engine, second).state, load(engine, second).attempt) == ("completed", 1)


class TestItsEngine:
    def test_it_has_the_arguments_of_the_workers(self, url, engine):
        configured = sa.create_engine(url, connect_args={"application_name": "configured"})
        worker = Worker(configured)
        worker.use("t", tasks.application_name, isolated=True, keep_result=True)
        task_id = add(engine, "t")

        worker.work()

        configured.dispose()
        assert result_of(engine, task_id) == "configured"

    def test_it_is_made_from_an_asyncio_engine(self, url, engine):
        worker = Worker(create_async_engine(url))
        worker.use("write", tasks.write, isolated=True)
        task_id = add(engine, "write")

        worker.work()

        assert ledger(engine) == [task_id]

    def test_without_a_way_to_make_one_the_session_says_so_and_other_tasks_run(self, url, engine):
        listening = sa.create_engine(url)

        @sa.event.listens_for(listening, "connect")
        def set_path(connection, _record) -> None: ...

        worker = Worker(listening)
        worker.use("write", tasks.write, isolated=True)
        worker.use("nothing", tasks.nothing, isolated=True)
        ids = [add(engine, "write"), add(engine, "nothing")]
        worker.work(), worker.work()

        refused, completed = (load(engine, task_id) for task_id in ids)

        listening.dispose()
        assert (refused.error["class"], completed.state) == ("UnsupportedDatabase", "completed")
        assert "set_path" in refused.error["message"]
        assert "Worker(…, isolated_engine=make_engine)" in refused.error["message"]

    def test_a_function_can_make_it(self, url, engine, make_worker, monkeypatch):
        monkeypatch.setenv("APOQ_TEST_URL", url.render_as_string(hide_password=False))
        worker = make_worker(isolated_engine=tasks.make_engine)
        worker.use("t", tasks.application_name, isolated=True, keep_result=True)
        task_id = add(engine, "t")

        worker.work()

        assert result_of(engine, task_id) == "made in the child"


PROGRAM = """
    import os, sys
    import sqlalchemy as sa
    from apoq import Queue, Worker

    queue = Queue()

    @queue.task(isolated=True)
    def whoami(path: str) -> None:
        with open(path, "w") as file:
            file.write(f"{whoami.function.__module__} {os.getpid()}")

    def main():
        Worker(sa.create_engine(os.environ["APOQ_TEST_URL"]), queue).work()
"""


class TestTheMainProgram:
    @pytest.fixture
    def program(self, url, engine, tmp_path) -> Callable[..., subprocess.CompletedProcess]:
        def run(last_lines: str, *arguments: str) -> subprocess.CompletedProcess:
            (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM) + textwrap.dedent(last_lines))
            add(engine, "program.whoami", {"path": str(tmp_path / "who")})
            return subprocess.run(
                [sys.executable, *arguments],
                cwd=tmp_path,
                env={**os.environ, "APOQ_TEST_URL": url.render_as_string(hide_password=False)},
                capture_output=True,
                text=True,
                timeout=SOON,
                check=False,
            )

        return run

    @pytest.mark.parametrize("arguments", [["program.py"], ["-m", "program"]], ids=["script", "module"])
    def test_its_functions_are_found_by_the_name_of_the_file(self, program, tmp_path, arguments):
        ended = program('if __name__ == "__main__":\n    main()\n', *arguments)

        assert ended.stderr == ""
        assert (tmp_path / "who").read_text().startswith("program ")

    def test_one_that_would_start_its_worker_again_is_refused(self, program):
        ended = program("main()\n", "program.py")

        assert "put the code that must not run there" in ended.stderr

    def test_a_module_that_starts_a_worker_when_it_is_imported_fails_the_attempt(self, program, engine):
        program("print(__name__)\nmain()\n", "program.py")

        with Session(engine) as session:
            (task,) = session.scalars(sa.select(Task))
        assert task.error["class"] == "RuntimeError"
        assert "a worker must not start in the process of an isolated task" in task.error["message"]
