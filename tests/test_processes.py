"""Workers in processes of their own, killed by real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import sqlalchemy as sa
from claims import asked, note
from sqlalchemy.orm import Session
from waiting import patience

from apoq import Task
from apoq.schema.statements.claim import claim
from apoq.schema.statements.recover import rescue

pytestmark = pytest.mark.slow

SOON = 60.0

until = patience(SOON)

WORKER = """
    import os, signal, sys, threading, time
    from datetime import timedelta
    import sqlalchemy as sa
    from apoq import Worker

    engine = sa.create_engine(sys.argv[1])
    worker = Worker(engine, lease=timedelta(seconds=float(sys.argv[2])))

    def effect(task):
        task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})

    def poison(task):
        os.kill(os.getpid(), signal.SIGKILL)

    def slow(task):
        time.sleep(task.data)

    for name, processor in dict(effect=effect, poison=poison, slow=slow, noop=lambda task: None).items():
        worker.use(name, processor, retry_delay=lambda fail_count: 0)
    worker.run()
"""


@pytest.fixture
def spawn(url) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start workers in processes of their own, which end with the test."""
    started: list[subprocess.Popen] = []

    def start(lease: float = 1.0) -> subprocess.Popen:
        code = textwrap.dedent(WORKER)
        rendered = url.render_as_string(hide_password=False)
        process = subprocess.Popen(
            [sys.executable, "-c", code, rendered, str(lease)], stderr=subprocess.DEVNULL
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def add_many(engine, queue, type_: str, count: int, **options) -> None:
    with Session(engine) as session, session.begin():
        queue.add_many(session, type_, range(count), **options)


def count(engine, *conditions) -> int:
    with engine.connect() as connection:
        return connection.scalar(sa.select(sa.func.count()).select_from(Task).where(*conditions))


def effects(engine) -> tuple[int, int]:
    with engine.connect() as connection:
        return tuple(
            connection.execute(sa.text("SELECT count(*), count(DISTINCT task_id) FROM ledger")).one()
        )


def workers_seen(engine) -> int:
    with engine.connect() as connection:
        return connection.scalar(sa.text("SELECT count(*) FROM apoq_workers"))


def test_thousands_of_tasks_over_three_processes_are_each_completed_once(engine, queue, spawn):
    workers = [spawn() for _ in range(3)]
    until(lambda: workers_seen(engine) == 3)
    add_many(engine, queue, "effect", 1_500)
    add_many(engine, queue, "noop", 1_500)

    until(lambda: count(engine, Task.state == "completed") == 3_000)

    assert effects(engine) == (1_500, 1_500)
    assert count(engine, Task.attempt != 1) == 0
    with engine.connect() as connection:
        shares = connection.scalars(
            sa.select(sa.func.count()).select_from(Task).group_by(Task.worker_id)
        ).all()
    assert 1 < len(shares) <= len(workers)


def test_the_tasks_of_a_killed_worker_are_finished_by_others_with_no_effect_doubled(engine, queue, spawn):
    victim, *_others = [spawn() for _ in range(3)]
    until(lambda: workers_seen(engine) == 3)
    add_many(engine, queue, "effect", 3_000)

    until(lambda: count(engine, Task.state == "completed") > 500)
    victim.kill()
    until(lambda: count(engine, Task.state == "completed") == 3_000)

    assert effects(engine) == (3_000, 3_000)


def test_a_task_that_kills_its_worker_ends_as_failed(engine, queue, spawn):
    with Session(engine) as session, session.begin():
        task_id = queue.add(session, "poison", retry_limit=2).id
    workers = [spawn(lease=0.5)]

    def failed() -> bool:
        # Each worker that it kills is replaced, as a supervisor would.
        if workers[-1].poll() is not None:
            workers.append(spawn(lease=0.5))
        return count(engine, Task.id == task_id, Task.state == "failed") == 1

    until(failed)

    with Session(engine) as session:
        task = session.get(Task, task_id)
    assert (task.fail_count, task.error["class"]) == (3, "WorkerDied")
    assert (task.attempt, task.rescue_count) == (3, 3)
    assert len([worker for worker in workers if worker.poll() is not None]) == 3


def test_what_merely_waited_beside_a_task_that_kills_its_worker_loses_no_attempt(engine, queue, spawn):
    """A hundred are claimed ahead; the first crash takes all of them back, and the next ones take none."""
    with Session(engine) as session, session.begin():
        queue.add_many(session, "slow", [0.005] * 200)
        poison = queue.add(session, "poison", retry_limit=3).id
        queue.add_many(session, "slow", [0.005] * 200)
    workers = [spawn(lease=0.5)]

    def ended() -> bool:
        if workers[-1].poll() is not None:
            workers.append(spawn(lease=0.5))
        return count(engine, Task.state.in_(["pending", "running"])) == 0

    until(ended)

    assert count(engine, Task.id == poison, Task.state == "failed") == 1
    assert count(engine, Task.state == "completed") == 400
    # It may be claimed ahead of a slot once, and then begins each time beside three others at most; what has
    # ended a moment before each crash may not have been written yet.
    crashes = len(workers) - 1
    assert crashes in {4, 5}
    assert count(engine, Task.state == "completed", Task.rescue_count > 0) > 10 * crashes
    assert count(engine, Task.state == "completed", Task.fail_count > 0) <= 8 * crashes


def test_the_tasks_of_a_killed_worker_run_elsewhere_within_six_seconds(engine, queue, spawn):
    """With the lease as it comes, of fifteen: the server shows that the worker's connection is gone."""
    victim, _other = spawn(lease=15), spawn(lease=15)
    until(lambda: workers_seen(engine) == 2)
    time.sleep(5)  # they are steady
    with Session(engine) as session, session.begin():
        queue.add_many(session, "slow", [1.0] * 8)
    until(lambda: count(engine, Task.state == "running") == 8)
    with engine.connect() as connection:
        its = connection.scalar(sa.text("SELECT id FROM apoq_workers WHERE pid = :pid"), {"pid": victim.pid})
    held = count(engine, Task.worker_id == its)
    assert held
    victim.kill()
    killed = time.monotonic()

    until(lambda: count(engine, Task.worker_id == its, Task.state == "running") == 0)
    assert time.monotonic() - killed < 6.5
    until(lambda: count(engine, Task.state == "completed") == 8)


def test_a_worker_stops_at_sigterm_when_its_tasks_have_ended(engine, queue, spawn):
    with Session(engine) as session, session.begin():
        queue.add(session, "slow", 0.5)
    worker = spawn()
    until(lambda: count(engine, Task.state == "running") == 1)

    worker.send_signal(signal.SIGTERM)

    assert worker.wait(SOON) == 0
    assert count(engine, Task.state == "completed") == 1


def test_a_second_signal_ends_it_at_once(engine, queue, spawn):
    with Session(engine) as session, session.begin():
        queue.add(session, "slow", 30)
    worker = spawn()
    until(lambda: count(engine, Task.state == "running") == 1)

    def ended() -> bool:
        worker.send_signal(signal.SIGTERM)
        return worker.poll() is not None

    until(ended, timeout=10)

    assert worker.returncode == -signal.SIGTERM


def test_a_frozen_workers_tasks_run_elsewhere_and_its_own_effects_are_refused(engine, queue, spawn):
    frozen = spawn()
    add_many(engine, queue, "effect", 1_000)
    until(lambda: count(engine, Task.state == "completed") > 100)
    os.kill(frozen.pid, signal.SIGSTOP)
    spawn()

    until(lambda: count(engine, Task.state == "completed") == 1_000)
    os.kill(frozen.pid, signal.SIGCONT)
    add_many(engine, queue, "noop", 100)
    until(lambda: count(engine, Task.state == "completed") == 1_100)

    assert effects(engine) == (1_000, 1_000)


def test_the_tasks_of_a_live_worker_are_not_rescued(engine, queue, worker):
    worker.start()
    with engine.begin() as connection:
        queue.add(connection, "t")
        connection.execute(
            # For however long.
            sa.text(
                "UPDATE apoq_tasks SET state = 'running', worker_id = (SELECT id FROM apoq_workers), "
                "claimed_at = now() - interval '1 year'"
            )
        )
        note(connection)
        dead = connection.scalars(sa.text("SELECT id FROM apoq_workers")).all()
        sweep = {"at_most": 10, "reason": "{}", "dead": dead}
        assert connection.execute(rescue(None), sweep).rowcount == 0

        connection.execute(sa.text("UPDATE apoq_workers SET expires_at = now() - interval '1 second'"))
        assert connection.execute(rescue(None), sweep).rowcount == 1
        connection.rollback()


def test_one_that_works_a_single_task_and_ends_rescues_as_well(engine, queue, make_worker):
    """As from cron: it doesn't live long enough to become steady."""
    worker = make_worker(lease=timedelta(seconds=0.5))
    worker.use("t", lambda task: None)
    with engine.begin() as connection:
        queue.add(connection, "t")
        connection.execute(sa.text("UPDATE apoq_tasks SET state = 'running', worker_id = gen_random_uuid()"))
        note(connection)

    task = worker.work()

    assert (task.state, task.rescue_count) == ("completed", 1)


def test_a_running_task_whose_worker_left_no_row_is_rescued(engine, queue, make_worker):
    worker = make_worker(lease=timedelta(seconds=0.5))
    worker.use("t", lambda task: None)
    with engine.begin() as connection:
        queue.add(connection, "t")
        connection.execute(sa.text("UPDATE apoq_tasks SET state = 'running', worker_id = gen_random_uuid()"))
        note(connection)

    worker.start()
    until(lambda: count(engine, Task.state == "completed") == 1)

    with Session(engine) as session:
        task = session.scalar(sa.select(Task))
    assert (task.fail_count, task.rescue_count, task.error["class"]) == (1, 1, "WorkerDied")


@pytest.mark.parametrize(("own_limit", "types_limit"), [(0, 5), (None, 0)])
def test_a_claim_that_is_to_end_a_task_counts_no_attempt_where_its_worker_dies(
    engine, queue, make_worker, own_limit, types_limit
):
    worker = make_worker(lease=timedelta(seconds=0.5))
    worker.use("t", lambda task: None, retry_limit=types_limit)
    by_nobody_alive = asked(at_most=1, limits={"t": types_limit})
    with Session(engine) as session, session.begin():
        queue.add(session, "t")
        # It has killed its worker.
        session.execute(
            sa.update(Task).values(retry_limit=own_limit, attempt=1, fail_count=1, rescue_count=1)
        )
        assert len(session.execute(claim(None), by_nobody_alive).all()) == 1

    worker.start()
    until(lambda: count(engine, Task.state == "failed") == 1)

    with Session(engine) as session:
        task = session.scalar(sa.select(Task))
    assert (task.attempt, task.fail_count, task.rescue_count) == (1, 1, 2)
