"""A system that allows no more threads, for a moment: each thread is started when that is over."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta

import probe
import pytest
import sqlalchemy as sa
from proxy import Proxy
from sqlalchemy.orm import Session
from waiting import patience

from apoq import AsyncRunningTask, Queue, RunningTask, Task, Worker
from apoq.client.notifier import threads
from apoq.events import TaskReleased
from apoq.worker import in_process
from apoq.worker.in_process import InProcessWorker
from apoq.worker.process import PROCESS

SOON = 20.0
SHORT = timedelta(seconds=3)
"""A lease: with each heartbeat, threads that are missing are tried again."""

until = patience(SOON)

FULL = "can't start new thread"
"""What CPython says."""


class Limit:
    """What a container's limit of processes does: threads whose names begin so can't be started."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.refused = 0

    def refuse(self, *names: str) -> None:
        self.names = names

    def lift(self) -> None:
        self.names = ()


@pytest.fixture
def limit(monkeypatch) -> Iterator[Limit]:
    limit, start = Limit(), threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if limit.names and thread.name.startswith(limit.names):
            limit.refused += 1
            raise RuntimeError(FULL)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    yield limit
    limit.lift()


def add(engine: sa.Engine, type_: str = "t", number: int = 1) -> None:
    with Session(engine) as session, session.begin():
        Queue().add_many(session, type_, range(number))


def count(engine: sa.Engine, *conditions: sa.ColumnElement[bool]) -> int:
    with engine.connect() as connection:
        found = connection.scalar(sa.select(sa.func.count()).select_from(Task).where(*conditions))
        assert found is not None
        return found


def own_threads() -> set[str]:
    """Return the names of a worker's threads that run."""
    others = {"apoq-notifications", "apoq-watch", "apoq-exit", "apoq-cancel"}
    names = {thread.name for thread in threading.enumerate()}
    return {name for name in names if name.startswith("apoq")} - others


class TestSlots:
    @pytest.fixture
    def worker(self, make_worker) -> Worker:
        return make_worker(lease=SHORT)

    @pytest.fixture(params=["plain", "coroutine"])
    def ran(self, request, worker) -> list[int]:
        ran: list[int] = []

        async def coroutine(task: AsyncRunningTask) -> None:
            ran.append(task.id)

        worker.use("t", coroutine if request.param == "coroutine" else lambda task: ran.append(task.id))
        return ran

    def test_run_what_has_waited_for_a_thread(self, engine, worker, ran, limit, caplog):
        caplog.set_level(logging.WARNING, "apoq")
        worker.start()
        until(worker.is_healthy)
        limit.refuse("apoq-slot", "apoq-loop")
        add(engine, number=6)

        until(lambda: limit.refused)
        until(lambda: not worker.is_healthy())
        until(lambda: worker.stats().running == 0)
        limit.lift()

        until(lambda: count(engine, Task.state == "completed", Task.attempt == 1) == 6)
        until(worker.is_healthy)
        assert len(ran) == len(set(ran)) == 6
        first, last = caplog.messages
        assert first == f"starting a thread failed, and is tried again until it succeeds: {FULL}"
        assert last.startswith("starting a thread works again, after ")

    def test_are_all_there_again_although_there_is_nothing_to_do(self, engine, worker, ran, limit):
        worker.start()
        limit.refuse("apoq-slot", "apoq-loop")
        add(engine)
        until(lambda: not worker.is_healthy() and probe.lacks_threads(worker))
        with Session(engine) as session, session.begin():
            session.execute(sa.delete(Task))
        until(lambda: probe.executor(worker).load == 0)
        assert not worker.is_healthy()

        limit.lift()

        until(worker.is_healthy)
        assert ran == []

    def test_give_back_what_they_could_not_begin_when_the_worker_stops(self, engine, worker, ran, limit):
        worker.start()
        limit.refuse("apoq-slot", "apoq-loop")
        add(engine, number=6)
        until(lambda: probe.lacks_threads(worker))

        worker.stop()

        assert ran == []
        assert count(engine, Task.state == "pending", Task.attempt == 0) == 6


def test_a_slot_whose_thread_could_not_be_started_once_is_not_lost(engine, make_worker, limit):
    together = threading.Barrier(2)
    worker = make_worker(concurrency=2, lease=SHORT)
    worker.use("t", lambda task: together.wait(SOON))
    worker.start()
    limit.refuse("apoq-slot-2")
    add(engine, number=2)
    until(lambda: limit.refused)

    limit.lift()

    until(lambda: count(engine, Task.state == "completed", Task.attempt == 1) == 2)


@pytest.mark.parametrize("first", ["plain", "coroutine"])
def test_a_slot_that_ends_a_task_of_one_kind_does_not_lose_the_next_one_of_the_other(
    engine, make_worker, limit, first
):
    begun, may_end, ran, released = (threading.Event() for _ in range(4))

    def wait(_task: RunningTask) -> None:
        begun.set()
        may_end.wait(SOON)

    async def wait_on_the_loop(task: AsyncRunningTask) -> None:
        await asyncio.to_thread(wait, task)

    async def run(_task: AsyncRunningTask) -> None:
        ran.set()

    worker = make_worker(concurrency=1, lease=SHORT)
    worker.use("first", wait if first == "plain" else wait_on_the_loop)
    worker.use("then", run if first == "plain" else lambda task: ran.set())
    worker.events.on(TaskReleased, lambda _: released.set())
    worker.start()
    add(engine, "first")
    assert begun.wait(SOON)
    probe.executor(worker).run_time = 0.1  # so that the next one is claimed ahead
    add(engine, "then")
    until(lambda: probe.executor(worker).load == 2)
    limit.refuse("apoq-slot", "apoq-loop")

    may_end.set()

    assert released.wait(SOON)
    assert not worker.is_healthy()
    assert not ran.is_set()
    limit.lift()
    until(lambda: count(engine, Task.state == "completed", Task.attempt == 1) == 2)
    until(worker.is_healthy)


def test_a_timeout_holds_as_soon_as_a_thread_can_watch_over_it(engine, make_worker, limit):
    begun, may_end = threading.Event(), threading.Event()

    def process(_task: RunningTask) -> None:
        begun.set()
        may_end.wait(SOON)

    worker = make_worker(lease=SHORT)
    worker.use("t", process, retry_limit=0, timeout=0.1)
    worker.start()
    until(worker.is_healthy)
    limit.refuse("apoq-deadlines")
    add(engine)
    assert begun.wait(SOON)
    until(lambda: not worker.is_healthy())
    assert count(engine, Task.state == "running") == 1

    limit.lift()

    until(lambda: count(engine, Task.state == "failed") == 1)
    until(worker.is_healthy)
    may_end.set()


def test_an_attempt_with_a_timeout_does_not_fail_because_nothing_can_watch_over_it(
    engine, make_worker, limit
):
    worker = make_worker()
    worker.use("t", lambda task: None, retry_limit=0, timeout=60)
    worker.start()
    limit.refuse("apoq-deadlines")
    add(engine)

    until(lambda: count(engine, Task.state == "completed") == 1)
    assert limit.refused


class TestStart:
    @pytest.mark.parametrize(
        "name",
        ["exit", "heartbeat", "lost-tasks", "settler", "listener", "scanner", "pruner", "claimer"],
    )
    def test_raises_and_leaves_nothing_half_started(self, engine, worker, limit, name, monkeypatch):
        monkeypatch.setattr(PROCESS, "_stopper", None)  # as in a process that has started no worker yet
        ran = threading.Event()
        worker.use("t", lambda task: ran.set())
        add(engine)
        before = own_threads()
        limit.refuse(f"apoq-{name}")

        with pytest.raises(RuntimeError, match=FULL):
            worker.start()

        assert own_threads() <= before
        assert not worker.is_healthy()
        assert not probe.is_started_in_process(worker)
        with engine.connect() as connection:
            assert connection.scalar(sa.text("SELECT count(*) FROM apoq_workers")) == 0
        assert count(engine, Task.state == "pending", Task.claim_token == 0) == 1
        limit.lift()
        worker.start()
        assert ran.wait(SOON)
        until(worker.is_healthy)

    def test_is_completed_by_the_heartbeat_if_the_database_came_later(self, url, engine, limit):
        proxy = Proxy(url)
        proxy.close()  # nobody listens there yet
        far = sa.create_engine(proxy.url)
        ran = threading.Event()
        worker = Worker(far, lease=timedelta(seconds=2))
        worker.use("t", lambda task: ran.set())
        add(engine)
        worker.start()
        limit.refuse("apoq-scanner")

        there = Proxy(url, proxy.url.port)
        until(lambda: limit.refused > 3)
        assert not worker.is_healthy()
        assert probe.lease(worker).is_held
        limit.lift()

        assert ran.wait(SOON)
        until(worker.is_healthy)
        worker.stop()
        there.close()
        far.dispose()


def test_a_coroutine_that_can_not_be_run_by_work_is_given_back(engine, worker, limit):
    async def process(_task: AsyncRunningTask) -> None:
        """Do nothing."""

    worker.use("t", process)
    add(engine)
    limit.refuse("apoq-loop")

    with pytest.raises(RuntimeError, match=FULL):
        worker.work()

    assert count(engine, Task.state == "pending", Task.attempt == 0, Task.claim_token == 1) == 1
    limit.lift()
    assert worker.work().state == "completed"


def test_a_loop_that_can_not_be_made_is_made_later(engine, worker, monkeypatch):
    make, is_full = asyncio.new_event_loop, threading.Event()

    def limited() -> asyncio.AbstractEventLoop:
        if is_full.is_set():
            raise OSError(24, "Too many open files")
        return make()

    async def process(_task: AsyncRunningTask) -> None:
        """Do nothing."""

    monkeypatch.setattr(asyncio, "new_event_loop", limited)
    is_full.set()
    worker.use("t", process)
    worker.start()
    add(engine)
    until(lambda: probe.lacks_threads(worker))
    assert not worker.is_healthy()

    is_full.clear()

    until(lambda: count(engine, Task.state == "completed", Task.attempt == 1) == 1)
    until(worker.is_healthy)


def test_a_worker_whose_loop_has_ended_is_not_healthy(engine, worker):
    ended = threading.Event()

    async def end_the_loop(task: AsyncRunningTask) -> None:
        await task.session.connection()
        asyncio.get_running_loop().call_soon(ended.set)
        asyncio.get_running_loop().call_soon(asyncio.get_running_loop().stop)

    worker.use("t", end_the_loop)
    worker.start()
    until(worker.is_healthy)
    add(engine)
    assert ended.wait(SOON)

    until(lambda: not worker.is_healthy())
    worker.stop(timeout=0)
    assert count(engine, Task.state == "pending") == 1


def test_the_next_commit_notifies_workers_if_the_one_before_could_start_no_thread(
    engine, make_worker, limit, caplog
):
    caplog.set_level(logging.WARNING, "apoq.client.notifier")
    ran = threading.Semaphore(0)
    worker = make_worker(poll_interval=timedelta(minutes=10))
    worker.use("t", lambda task: ran.release())
    worker.start()
    until(lambda: probe.is_listening(worker))
    limit.refuse("apoq-notifications")
    for _ in range(3):
        add(engine)
    assert limit.refused == 3
    assert len(caplog.messages) == 1
    assert FULL in caplog.messages[0]
    threads.flush(timeout=60)  # as at the end of the program: nobody sends them

    limit.lift()
    add(engine)

    for _ in range(4):
        assert ran.acquire(timeout=SOON)
    assert caplog.messages[1:] == [
        "started the thread that notifies the workers: new tasks are notified again"
    ]


def test_an_in_process_worker_is_started_by_a_later_request(worker, limit, monkeypatch, caplog):
    monkeypatch.setattr(in_process, "START_RETRY_SECONDS", 0.0)
    begin: Callable[[], Worker] = lambda: worker  # noqa: E731
    in_process_worker = InProcessWorker(begin, name="shop")
    limit.refuse("apoq-starter")
    in_process_worker.serve()
    assert FULL in caplog.text

    limit.lift()
    in_process_worker.serve()

    until(worker.is_healthy)


AT_THE_END = """
import atexit, sys, threading
import sqlalchemy as sa
from sqlalchemy.orm import Session
from apoq import Queue

start = threading.Thread.start

def refuse(thread):
    # As Python 3.12 and later do, whatever this one does.
    if not threading.main_thread().is_alive():
        raise RuntimeError("can't create new thread at interpreter shutdown")
    start(thread)

threading.Thread.start = refuse
engine = sa.create_engine(sys.argv[1])

@atexit.register
def add():
    with Session(engine) as session, session.begin():
        Queue().add(session, "t")
    with engine.begin() as connection:
        Queue().add(connection, "t")
"""


def test_what_is_added_at_the_end_of_a_program_is_added_without_a_word(engine, url):
    command = [sys.executable, "-c", AT_THE_END, url.render_as_string(hide_password=False)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=SOON)

    assert (done.stdout, done.stderr) == ("", "")
    assert count(engine) == 2


def test_a_session_that_can_not_be_closed_costs_no_slot(engine, queue, make_worker):
    """As if a thread that the processor has left behind were using it."""
    worker = make_worker(concurrency=1)
    ran = threading.Event()

    def use(task) -> None:
        session = task.session
        session.execute(sa.text("SELECT 1"))
        session.close = session.invalidate = refuse

    worker.use("t", use, retry_limit=0)
    worker.use("after", lambda task: ran.set())
    with Session(engine) as session, session.begin():
        queue.add(session, "t")
    worker.start()
    until(lambda: worker.stats().running == 0 and worker.stats().completed + worker.stats().failed)
    with Session(engine) as session, session.begin():
        queue.add(session, "after")

    assert ran.wait(10)


def refuse() -> None:
    raise RuntimeError("it is in use")
