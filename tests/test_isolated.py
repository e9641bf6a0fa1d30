"""Isolated tasks: each attempt runs in a child process of the worker."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

import isolated_tasks as tasks
import pytest
import sqlalchemy as sa
from isolated_tasks import is_running
from sqlalchemy.orm import Session
from waiting import patience

from apoq import InvalidProcessor, Queue, Task, Worker
from apoq.events import TaskCompleted, TaskEnded, TaskRetried
from apoq.flask import Apoq
from apoq.testing import drain

SOON = 60.0

until = patience(SOON)

NUMBERS = count(1)


# One database and one worker for all tests here, because each child takes a second of a core to start.


@pytest.fixture(scope="module")
def url(clones) -> Iterator[sa.URL]:
    url = clones.take()
    yield url
    clones.give_back(url)


@pytest.fixture(scope="module")
def engine(url) -> Iterator[sa.Engine]:
    engine = sa.create_engine(url)
    yield engine
    engine.dispose()


@pytest.fixture(scope="module")
def worker(engine) -> Iterator[Worker]:
    worker = Worker(engine, Queue(), tasks.queue, concurrency=1)
    worker.start()
    yield worker
    worker.stop(timeout=5)


@pytest.fixture
def ended(worker) -> set[int]:
    """The ids of the tasks of which an attempt has ended."""
    ids: set[int] = set()
    worker.events.on(TaskEnded, lambda event: ids.add(event.id))
    return ids


def load(engine, task_id: int) -> Task:
    with Session(engine) as session:
        return session.get(Task, task_id)


def result_of(engine, task: Task) -> Any:
    with Session(engine) as session:
        return Queue().result(session, task).value


def has_written(engine, task: Task) -> bool:
    with engine.connect() as connection:
        written = sa.text("SELECT count(*) FROM ledger WHERE task_id = :id")
        return connection.scalar(written, {"id": task.id}) == 1


@pytest.fixture
def begin(engine, worker) -> Callable[..., Task]:
    """Add a task of a function, whose attempts run in children, or on threads."""

    def begin(
        function: Callable[..., Any], data: Any = None, *, isolated: bool = True, **options: Any
    ) -> Task:
        type_ = f"{function.__name__}_{next(NUMBERS)}"
        options = {"keep_result": True, "retry_delay": 3600, **options}
        worker.use(type_, function, isolated=isolated, **options)
        with Session(engine, expire_on_commit=False) as session, session.begin():
            return Queue().add(session, type_, data, priority=3, meta={"tenant": 7})

    return begin


@pytest.fixture
def run(engine, begin, ended) -> Callable[..., Task]:
    """Run one attempt of a function, and return its task."""

    def run(*arguments: Any, **options: Any) -> Task:
        task = begin(*arguments, **options)
        until(lambda: task.id in ended)
        return load(engine, task.id)

    return run


class TestTheDeclaration:
    @pytest.mark.parametrize(
        ("function", "reason"),
        [
            (lambda task: None, "a lambda"),
            (tasks.Tasks().method, "a method of an object"),
            (partial(tasks.nothing), "no name that can be imported"),
            (tasks.coroutine, "must be a plain function, got the coroutine function"),
        ],
        ids=["lambda", "method", "partial", "coroutine"],
    )
    def test_a_function_that_no_module_has_is_refused(self, engine, function, reason):
        with pytest.raises(InvalidProcessor, match=reason):
            Worker(engine).use("t", function, isolated=True)

    def test_a_nested_function_is_refused(self, queue):
        with pytest.raises(InvalidProcessor, match="is defined in another function"):

            @queue.task(isolated=True)
            def nested() -> None: ...

    def test_it_is_true_or_false(self, engine):
        with pytest.raises(InvalidProcessor, match="isolated must be True or False, got 'yes'"):
            Worker(engine).use("t", tasks.nothing, isolated="yes")

    def test_a_worker_whose_function_has_another_name_by_now_does_not_start(self, make_worker):
        worker = make_worker()
        worker.use("t", tasks.kept_replaced, isolated=True)

        with pytest.raises(
            InvalidProcessor, match="importable in another process as isolated_tasks:replaced"
        ):
            worker.start()

    def test_a_middleware_must_be_importable_as_well(self, make_worker):
        worker = make_worker(middleware=partial(tasks.entered))

        with pytest.raises(InvalidProcessor, match="the middleware of a worker with isolated tasks"):
            worker.use("t", tasks.nothing, isolated=True)

    def test_a_flask_application_cannot_have_isolated_tasks(self):
        apoq = Apoq()

        with pytest.raises(InvalidProcessor, match="define the task on a Queue of its own"):
            apoq.task(isolated=True)
        with pytest.raises(InvalidProcessor, match="define the task on a Queue of its own"):
            apoq.use("t", tasks.nothing, isolated=True)

    def test_a_worker_without_isolated_tasks_may_have_any_middleware(self, make_worker):
        worker = make_worker(middleware=partial(tasks.entered))
        worker.use("t", tasks.nothing)

        assert worker.work() is None

    def test_the_function_that_makes_the_engine_must_be_importable(self, engine):
        with pytest.raises(InvalidProcessor, match="isolated_engine must be a function at the top level"):
            Worker(engine, isolated_engine=lambda: engine)


class TestAnAttempt:
    def test_it_runs_in_another_process_and_its_result_is_kept(self, engine, run):
        task = run(tasks.pid)

        assert task.state == "completed"
        assert result_of(engine, task) != os.getpid()

    def test_it_sees_what_it_would_see_on_a_thread(self, engine, run):
        data = {"text": "💖", "number": 2**70, "none": None, "long": "x" * 30_000}
        isolated, plain = (result_of(engine, run(tasks.seen, data, isolated=each)) for each in (True, False))

        of_a_task = {"type", "created_at", "process_at"}
        assert {name for name, value in plain.items() if isolated[name] != value} == of_a_task
        assert isolated["data"] == data

    def test_its_times_are_those_of_the_task(self, engine, run):
        task = run(tasks.seen)

        assert result_of(engine, task)["created_at"] == task.created_at.isoformat()

    def test_it_may_be_due_at_any_time_that_postgresql_knows(self, engine, worker, ended):
        worker.use("since ever", tasks.seen, isolated=True, keep_result=True)
        with Session(engine, expire_on_commit=False) as session, session.begin():
            task = Queue().add(session, "since ever")
            due = sa.text("UPDATE apoq_tasks SET process_at = '-infinity' WHERE id = :id")
            session.execute(due, {"id": task.id})

        until(lambda: task.id in ended)

        assert result_of(engine, task)["process_at"].startswith("0001")

    def test_a_static_method_is_found_by_its_qualified_name(self, engine, run):
        assert result_of(engine, run(tasks.Tasks.double, 4)) == 8

    def test_a_typed_task_gets_its_arguments(self, engine, worker, ended):
        with Session(engine) as session, session.begin():
            task_id = tasks.add_up.add(session, [1, 2], start=4).id

        until(lambda: task_id in ended)

        with Session(engine) as session:
            assert tasks.add_up.result(session, task_id).value == 7

    def test_its_session_commits_together_with_the_completion(self, engine, run):
        task = run(tasks.write)

        assert task.state == "completed"
        assert has_written(engine, task)

    def test_its_session_is_rolled_back_if_it_raises(self, engine, run):
        task = run(tasks.write_and_raise)

        assert (task.state, task.error["class"]) == ("pending", "ValueError")
        assert not has_written(engine, task)

    def test_it_must_not_commit_its_session(self, engine, run):
        task = run(tasks.write_and_commit)

        assert task.error["class"] == "SessionMisused"
        assert not has_written(engine, task)

    @pytest.mark.parametrize("data", ["refuse", "refuse from"])
    def test_the_stored_error_is_that_of_a_thread(self, run, data):
        isolated, plain = (run(tasks.refuse, data, isolated=each).error for each in (True, False))

        assert isolated == plain
        assert isolated["class"] == "Refused"

    def test_listeners_get_an_error_with_its_name_and_its_message(self, worker, run):
        errors = []
        worker.events.on(TaskRetried, lambda event: errors.append(event.error))

        run(tasks.refuse)

        (error,) = errors
        assert (type(error).__name__, str(error)) == ("Refused", "refused: no (7)")
        assert "in refuse" in error.__notes__[0]

    @pytest.mark.parametrize(
        ("chosen", "state", "attempt", "error"),
        [
            ("retry", "pending", 1, "Retry"),
            ("retry from", "pending", 1, "Refused"),
            ("fail", "failed", 1, "Fail"),
            ("cancel", "cancelled", 1, "Cancel"),
            ("snooze", "pending", 0, None),
            ("exit", "pending", 1, "SystemExit"),
        ],
    )
    def test_it_can_choose_its_outcome(self, run, chosen, state, attempt, error):
        task = run(tasks.outcome, chosen)

        assert (task.state, task.attempt) == (state, attempt)
        assert (task.error and task.error["class"]) == error

    def test_a_result_that_is_not_json_fails_it(self, run):
        assert run(tasks.unstorable).error["class"] == "InvalidData"

    def test_it_reads_the_results_of_its_parents(self, engine, worker, ended, run):
        first = run(tasks.result, 5)
        worker.use("parents", tasks.parents, isolated=True, keep_result=True)
        with Session(engine, expire_on_commit=False) as session, session.begin():
            last = Queue().add(session, "parents", after=[first.id])

        until(lambda: last.id in ended)

        assert result_of(engine, last) == [5]

    def test_it_reports_progress(self, engine, run):
        task = run(tasks.progress)

        def reported() -> Any:
            with Session(engine) as session:
                return Queue().progress(session, task.id)

        until(reported)
        assert (reported().done, reported().total, reported().note) == (3, 4, "three")

    def test_middleware_is_entered_in_the_child_and_writes_in_its_transaction(self, engine, make_worker):
        worker = make_worker(Queue("middleware"), middleware=tasks.entered)
        worker.use("t", tasks.environment, isolated=True, keep_result=True)
        with Session(engine) as session, session.begin():
            Queue("middleware").add(session, "t")

        task = worker.work()

        with Session(engine) as session:
            assert Queue("middleware").result(session, task).value == str(task.id)
        assert has_written(engine, task)
        assert "APOQ_TEST_ENTERED" not in os.environ

    def test_listeners_hear_of_its_completion(self, worker, run):
        heard = []
        worker.events.on("task.completed", heard.append)
        worker.events.on(TaskCompleted, heard.append)

        task = run(tasks.write, 4)
        until(lambda: len(heard) == 2)

        event, heard_task = sorted(heard, key=lambda each: isinstance(each, Task))
        assert (heard_task.id, heard_task.state, heard_task.data) == (task.id, "completed", 4)
        assert event.seconds > 0

    def test_it_completes_without_being_kept(self, engine, make_worker):
        worker = make_worker(Queue("not kept"), keep_completed=0)
        heard = []
        worker.events.on("task.completed", heard.append)
        worker.use("write", tasks.write, isolated=True)
        with Session(engine) as session, session.begin():
            Queue("not kept").add(session, "write")

        task = worker.work()

        assert task.state == "completed"
        assert has_written(engine, task)
        assert load(engine, task.id) is None
        assert [(each.id, each.state) for each in heard] == [(task.id, "completed")]

    def test_drain_runs_it_in_the_test_and_in_its_transaction(self, session, make_worker):
        worker = make_worker()
        worker.use("write", tasks.write, isolated=True)
        worker.use("pid", tasks.pid, isolated=True, keep_result=True)
        task = Queue().add(session, "write")
        other = Queue().add(session, "pid")

        drain(session, worker)

        assert session.scalars(sa.text("SELECT task_id FROM ledger")).all() == [task.id]
        assert Queue().result(session, other).value == os.getpid()


class TestItsProcess:
    def test_it_is_used_again(self, engine, run):
        assert result_of(engine, run(tasks.pid)) == result_of(engine, run(tasks.pid))

    def test_it_has_only_its_own_files(self, engine, run):
        # The connection to the worker and the lifeline; the connection to the database is a socket, too.
        assert set(result_of(engine, run(tasks.open_files))) <= {"pipe", "socket"}
        assert len(result_of(engine, run(tasks.open_files))) <= 3

    def test_its_command_and_environment_do_not_name_the_database(self, url, engine, run):
        found = result_of(engine, run(tasks.place))

        assert url.database not in found["argv"] + found["environ"]

    def test_ctrl_c_does_not_reach_it(self, engine, run):
        assert result_of(engine, run(tasks.place))["group"] != os.getpgid(0)

    def test_its_function_is_called_on_the_main_thread(self, engine, run):
        assert result_of(engine, run(tasks.place))["is_main"]

    def test_a_sigterm_of_the_init_system_does_not_end_it(self, engine, run):
        assert result_of(engine, run(tasks.survive_sigterm)) == "survived"

    def test_its_log_is_that_of_the_worker(self, run, caplog):
        task = run(tasks.log)

        records = [record for record in caplog.records if record.name == "isolated_tasks"]
        assert [record.getMessage() for record in records] == [f"task {task.id}", "refused"]
        assert "in log" in records[1].exc_info[1].__notes__[0]
        assert records[0].process != os.getpid()

    def test_no_worker_starts_in_it(self, run):
        error = run(tasks.start_a_worker).error

        assert error["class"] == "RuntimeError"
        assert "a worker must not start in the process of an isolated task" in error["message"]


class TestItsEnd:
    def test_a_timeout_interrupts_it_and_says_where_it_was(self, run, tmp_path):
        path = tmp_path / "cleaned"

        task = run(tasks.clean_up, str(path), timeout=0.2)

        assert (task.state, task.attempt, task.error["class"]) == ("pending", 1, "TimeoutError")
        assert task.error["message"] == "ran longer than its timeout of 0.2 s"
        assert "in clean_up" in task.error["traceback"]
        assert path.read_text() == "cleaned up"

    def test_the_death_of_its_process_fails_the_attempt(self, run):
        task = run(tasks.segfault)

        assert (task.state, task.attempt, task.fail_count) == ("pending", 1, 1)
        assert task.error["class"] == "ProcessDied"
        assert task.error["message"] == "the process of the task was killed by SIGSEGV"

    def test_an_allocation_that_fails_is_an_ordinary_error(self, run):
        assert run(tasks.run_out_of_memory).error["class"] == "MemoryError"

    def test_a_cancelled_task_ends_with_its_process(self, engine, worker, begin, tmp_path):
        path = tmp_path / "pid"
        task = begin(tasks.touch_and_sleep, str(path))
        until(path.exists)
        with Session(engine) as session, session.begin():
            Queue().cancel(session, task.id)

        until(lambda: not is_running(int(path.read_text())))

        assert load(engine, task.id).state == "cancelled"
        until(lambda: worker.stats().running == 0)
        assert load(engine, task.id).error["class"] == "Cancel"
