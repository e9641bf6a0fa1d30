"""Beside the Node.js original: its own statements, on our table, while a worker of ours is at work."""

from __future__ import annotations

import threading

import psycopg
import sqlalchemy as sa
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from apoq import Queue, Task

# As the original sends them (original.md): with `client`, in a transaction that stays open while it works.
ADD = "INSERT INTO apoq_tasks (type, data) VALUES (%s, %s) RETURNING *"
CLAIM = """
    SELECT * FROM apoq_tasks
    WHERE state = 'pending' AND type = ANY (%s) AND process_at <= NOW()
    ORDER BY process_at ASC FOR UPDATE SKIP LOCKED LIMIT 1
"""
COMPLETE = "UPDATE apoq_tasks SET completed_at = NOW(), state = 'completed' WHERE id = %s RETURNING *"
RETRY = """
    UPDATE apoq_tasks SET process_at = NOW() + %s * INTERVAL '1', fail_count = %s WHERE id = %s RETURNING *
"""
FAIL = "UPDATE apoq_tasks SET state = 'failed', fail_count = %s WHERE id = %s RETURNING *"


class Original:
    """The original's `add` and `work`."""

    def __init__(self, url: sa.URL) -> None:
        dsn = url.set(drivername="postgresql").render_as_string(hide_password=False)
        self.connection = psycopg.connect(dsn, row_factory=dict_row)

    def add(self, type_: str, data: object) -> int:
        with self.connection.transaction():
            return self.connection.execute(ADD, (type_, Jsonb(data))).fetchone()["id"]

    def work(self, types: list[str], processor, retry_limit: int = 5) -> dict | None:
        with self.connection.transaction():
            task = self.connection.execute(CLAIM, (types,)).fetchone()
            if task is None:
                return None
            try:
                processor(task)
            except Exception:
                fail_count = task["fail_count"] + 1
                if fail_count > retry_limit:
                    return self.connection.execute(FAIL, (fail_count, task["id"])).fetchone()
                return self.connection.execute(RETRY, (0, fail_count, task["id"])).fetchone()
            return self.connection.execute(COMPLETE, (task["id"],)).fetchone()


def test_our_worker_works_what_the_original_adds(url, engine, worker):
    original = Original(url)
    ran = []
    worker.use("t", lambda task: ran.append(task.data))
    task_id = original.add("t", {"color": "💖"})

    task = worker.work()

    assert (task.id, task.state, ran) == (task_id, "completed", [{"color": "💖"}])
    original.connection.close()


def test_the_original_works_what_we_add(url, engine, queue):
    original = Original(url)
    with engine.begin() as connection:
        task_id = queue.add(connection, "t", [1]).id

    done = original.work(["t"], lambda task: None)

    assert (done["id"], done["state"], done["data"]) == (task_id, "completed", [1])
    original.connection.close()


def test_a_failure_there_and_a_success_here(url, engine, worker, queue):
    original = Original(url)
    worker.use("t", lambda task: None)
    with engine.begin() as connection:
        queue.add(connection, "t")

    original.work(["t"], lambda task: 1 / 0)
    task = worker.work()

    assert (task.state, task.fail_count, task.attempt) == ("completed", 1, 1)
    original.connection.close()


def test_the_limit_of_failures_counts_both(url, engine, worker, queue):
    original = Original(url)
    worker.use("t", lambda task: 1 / 0, retry_limit=1, retry_delay=lambda fail_count: 0)
    with engine.begin() as connection:
        queue.add(connection, "t")

    original.work(["t"], lambda task: 1 / 0)

    assert worker.work().state == "failed"
    original.connection.close()


def test_both_add_and_work_and_each_task_is_worked_once(url, engine, make_worker):
    """Two originals and a running worker of ours share 600 tasks, of which both sides added a half."""
    ran: list[int] = []
    everything = threading.Semaphore(0)

    def process(task) -> None:
        ran.append(task["id"] if isinstance(task, dict) else task.id)
        everything.release()

    worker = make_worker()
    worker.use("t", process)
    worker.start()
    added = threading.Barrier(3, timeout=30)

    def original() -> None:
        one = Original(url)
        for n in range(150):
            one.add("t", n)
            one.work(["t"], process)
        added.wait()
        while one.work(["t"], process):
            pass
        one.connection.close()

    threads = [threading.Thread(target=original) for _ in range(2)]
    for thread in threads:
        thread.start()
    queue = Queue()
    for n in range(300):
        with engine.begin() as connection:
            queue.add(connection, "t", n)
    added.wait()
    for _ in range(600):
        assert everything.acquire(timeout=30)
    for thread in threads:
        thread.join(30)
    worker.stop()

    assert len(ran) == len(set(ran)) == 600
    with engine.connect() as connection:
        assert connection.execute(sa.select(Task.state, sa.func.count()).group_by(Task.state)).all() == [
            ("completed", 600)
        ]
        by_us = connection.scalar(sa.select(sa.func.count()).where(Task.worker_id.is_not(None)))
    assert 0 < by_us < 600
