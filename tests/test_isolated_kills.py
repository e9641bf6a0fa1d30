"""Child processes that are killed at any moment, and the death of their worker."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import isolated_tasks as tasks
import pytest
import sqlalchemy as sa
from isolated_tasks import is_running
from sqlalchemy.orm import Session
from test_isolated_processes import add, has_ended, ledger, load
from waiting import patience

from apoq import Queue, Task, Worker
from apoq.events import TaskCompleted, TaskLost, TaskRetried

pytestmark = pytest.mark.slow

SOON = 120.0

until = patience(SOON)


def children() -> list[int]:
    """Return the child processes of workers in this process."""
    # Each thread has a list of the processes that it has started.
    lists = [path.read_text() for path in Path("/proc/self/task").glob("*/children")]
    return [int(pid) for pid in " ".join(lists).split() if "isolation.child" in command_of(pid)]


def command_of(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def count(engine, *conditions) -> int:
    with engine.connect() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(Task).where(*conditions))


def has_completed(worker: Worker, tasks: int) -> bool:
    return worker.stats().completed >= tasks


class TestABoundary:
    @pytest.mark.parametrize(
        "boundary", ["before it writes", "before it asks", "before the completion", "before the commit"]
    )
    @pytest.mark.parametrize("keep_completed", [3600, 0])
    def test_a_death_before_the_commit_fails_the_attempt(self, engine, make_worker, boundary, keep_completed):
        worker = make_worker(keep_completed=keep_completed)
        heard = []
        worker.events.on(TaskRetried, heard.append)
        worker.use("die_at", tasks.die_at, isolated=True, retry_delay=0)
        task_id = add(engine, "die_at", boundary)

        task = worker.work()
        assert (task.state, task.fail_count, task.error["class"]) == ("pending", 1, "ProcessDied")
        assert ledger(engine) == []
        assert worker.work().state == "completed"

        assert ledger(engine) == [task_id]
        assert len(heard) == 1

    @pytest.mark.parametrize("keep_completed", [3600, 0])
    @pytest.mark.parametrize("is_followed", [False, True])
    def test_a_death_after_the_commit_is_a_completion(self, engine, make_worker, keep_completed, is_followed):
        worker = make_worker(keep_completed=keep_completed)
        heard = []
        for event in (TaskCompleted, TaskRetried, TaskLost):
            worker.events.on(event, heard.append)
        worker.use("die_at", tasks.die_at, isolated=True, retry_delay=0)
        with Session(engine) as session, session.begin():
            first = Queue().add(session, "die_at", "after the commit")
            if is_followed:
                Queue().add(session, "die_at", "nowhere", after=[first])
            task_id = first.id

        task = worker.work()

        assert (task.id, task.state) == (task_id, "completed")
        assert ledger(engine) == [task_id]
        assert [(type(event), event.id) for event in heard] == [(TaskCompleted, task_id)]
        assert worker.stats().completed == 1
        if is_followed:
            assert worker.work().state == "completed"
        assert worker.work() is None

    def test_a_death_while_the_server_commits_is_a_completion(self, engine, make_worker):
        with engine.begin() as connection:
            connection.exec_driver_sql(
                "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS "
                "$$ BEGIN PERFORM pg_sleep(1.5); RETURN NULL; END $$"
            )
            connection.exec_driver_sql(
                "CREATE CONSTRAINT TRIGGER waits AFTER INSERT ON ledger DEFERRABLE INITIALLY DEFERRED "
                "FOR EACH ROW EXECUTE FUNCTION wait()"
            )
        worker = make_worker()
        heard = []
        for event in (TaskCompleted, TaskRetried, TaskLost):
            worker.events.on(event, heard.append)
        worker.use("write", tasks.write, isolated=True)
        task_id = add(engine, "write")
        committing = sa.text(
            "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query = 'COMMIT'"
        )
        watching = engine.execution_options(isolation_level="AUTOCOMMIT")
        worker.start()
        with watching.connect() as connection:
            until(lambda: connection.scalar(committing))

        (pid,) = children()
        os.kill(pid, signal.SIGKILL)
        until(lambda: heard)

        assert [type(event) for event in heard] == [TaskCompleted]
        assert (load(engine, task_id).state, ledger(engine)) == ("completed", [task_id])


def test_writes_take_effect_once_though_children_are_killed_at_random(engine, make_worker):
    worker = make_worker(concurrency=4)
    worker.use("write_slowly", tasks.write_slowly, isolated=True, retry_limit=100, retry_delay=0)
    with Session(engine) as session, session.begin():
        Queue().add_many(session, "write_slowly", range(100))
    worker.start()

    kills = 0
    while (completed := worker.stats().completed) < 100:
        # Not earlier, because most of the time is that in which children start.
        until(partial(has_completed, worker, min(completed + 5, 100)))
        time.sleep(random.uniform(0, 0.04))
        for pid in random.sample(there := children(), min(2, len(there))):
            os.kill(pid, signal.SIGKILL)
            kills += 1

    with Session(engine) as session:
        ids = sorted(session.scalars(sa.select(Task.id)))
    assert len(ids) == 100
    assert ledger(engine) == ids
    assert count(engine, Task.state == "completed") == 100
    assert kills >= 10


def test_nothing_is_left_of_two_hundred_attempts(engine, make_worker):
    worker = make_worker(concurrency=2)
    worker.use("sometimes_die", tasks.sometimes_die, isolated=True, retry_limit=0)
    first = add(engine, "sometimes_die", 1)
    worker.start()
    until(lambda: has_ended(engine, first))
    until(lambda: worker.stats().running == 0)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with Session(engine) as session, session.begin():
        Queue().add_many(session, "sometimes_die", range(200))

    until(lambda: worker.stats().completed + worker.stats().failed == 201)
    assert 1 <= len(children()) <= 2
    worker.stop()

    assert children() == []
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
    assert (worker.stats().completed, worker.stats().failed) == (191, 10)


WORKER = """
    import os
    import isolated_tasks as tasks
    import sqlalchemy as sa
    from apoq import Worker

    worker = Worker(sa.create_engine(os.environ["APOQ_TEST_URL"]))
    for function in (tasks.touch_and_sleep, tasks.touch_and_count, tasks.touch):
        worker.use(function.__name__, function, isolated=True)
    worker.run()
"""


class TestTheDeathOfTheWorker:
    @pytest.fixture
    def program(self, url, tmp_path) -> Iterator[subprocess.Popen]:
        path = tmp_path / "program.py"
        path.write_text(textwrap.dedent(WORKER))
        process = subprocess.Popen(
            [sys.executable, str(path)],
            env={
                **os.environ,
                "APOQ_TEST_URL": url.render_as_string(hide_password=False),
                "PYTHONPATH": str(Path(__file__).parent),
            },
        )
        yield process
        process.kill()
        process.wait()

    @pytest.mark.parametrize("type_", ["touch_and_sleep", "touch_and_count", "touch"])
    def test_its_children_end_at_once(self, engine, program, tmp_path, type_):
        path = tmp_path / "pid"
        add(engine, type_, str(path))
        until(path.exists)
        pid = int(path.read_text())
        assert is_running(pid)

        program.kill()

        until(lambda: not is_running(pid), timeout=1)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_they_end_with_it_when_it_stops(self, engine, program, tmp_path, number):
        path = tmp_path / "pid"
        add(engine, "touch", str(path))
        until(path.exists)

        program.send_signal(number)

        assert program.wait(SOON) == 0
        assert not is_running(int(path.read_text()))
