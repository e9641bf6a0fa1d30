"""What a running task sees of the end of its worker, and how the end comes."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import probe
import pytest
import sqlalchemy as sa
from proxy import Proxy
from sqlalchemy.orm import Session
from waiting import catches, patience

from apoq import AsyncRunningTask, Queue, RunningTask, Snooze, Task, Worker

SOON = 30.0
"""Seconds within which what a test waits for has long happened."""

until = patience(SOON)

KINDS = ["function", "coroutine"]


def add(engine, data=None, type_="t", **options) -> int:
    with Session(engine) as session, session.begin():
        return Queue().add(session, type_, data, **options).id


def load(engine, task_id: int) -> Task:
    with Session(engine) as session:
        return session.get(Task, task_id)


class TestStoppingTasks:
    @pytest.mark.parametrize("kind", KINDS)
    def test_one_that_sees_it_gives_itself_back_with_no_attempt_used(self, engine, worker, kind):
        begun = threading.Event()

        def function(task: RunningTask) -> None:
            begun.set()
            while not task.should_stop:
                time.sleep(0.005)
            raise Snooze(0)

        async def coroutine(task: AsyncRunningTask) -> None:
            begun.set()
            while not task.should_stop:  # noqa: ASYNC110 - as a processor with much to do looks at it
                await asyncio.sleep(0.005)
            raise Snooze(0)

        worker.use("t", function if kind == "function" else coroutine)
        task_id = add(engine)
        worker.start()
        assert begun.wait(SOON)

        worker.stop(timeout=SOON)

        task = load(engine, task_id)
        assert (task.state, task.attempt, task.fail_count) == ("pending", 0, 0)

    @pytest.mark.parametrize("kind", KINDS)
    def test_it_is_false_until_then(self, engine, worker, kind):
        seen = []

        def function(task: RunningTask) -> None:
            seen.append(task.should_stop)

        async def coroutine(task: AsyncRunningTask) -> None:
            seen.append(task.should_stop)

        worker.use("t", function if kind == "function" else coroutine, timeout=3600)
        add(engine)
        worker.start()
        until(lambda: seen)
        worker.stop()
        add(engine)
        worker.work()

        assert seen == [False, False]

    def test_a_run_that_was_given_up_sees_it_for_ever_and_its_next_one_does_not(self, engine, worker):
        runs, may_end = [], threading.Event()

        def process(task: RunningTask) -> None:
            runs.append(task)
            may_end.wait(SOON)

        worker.use("t", process)
        task_id = add(engine)
        worker.start()
        until(lambda: runs)
        worker.stop(timeout=0.05)
        worker.start()
        until(lambda: len(runs) == 2)

        assert [task.should_stop for task in runs] == [True, False]
        assert (runs[0].id, runs[1].id) == (task_id, task_id)
        may_end.set()
        worker.stop()
        assert load(engine, task_id).attempt == 1


class TestLapse:
    """The network between a worker and its server is cut, until the worker's lease has ended."""

    @pytest.fixture
    def proxy(self, url) -> Iterator[Proxy]:
        proxy = Proxy(url)
        yield proxy
        proxy.close()

    @pytest.fixture
    def far_worker(self, proxy) -> Iterator[Worker]:
        engine = sa.create_engine(proxy.url)
        worker = Worker(engine, lease=timedelta(seconds=2.5))
        yield worker
        worker.stop(timeout=1)
        engine.dispose()

    def test_what_runs_sees_it_and_its_next_run_does_not(self, engine, proxy, far_worker):
        runs, seen = [], []

        def process(task: RunningTask) -> None:
            runs.append(task)
            seen.append(task.should_stop)
            if len(runs) == 1:
                until(lambda: task.should_stop)
                raise Snooze(0)

        far_worker.use("t", process)
        task_id = add(engine)
        far_worker.start()
        until(lambda: runs)
        proxy.cut()
        until(lambda: runs[0].should_stop)
        proxy.heal()
        until(lambda: load(engine, task_id).state == "completed", 30)

        assert (seen, load(engine, task_id).fail_count) == ([False, False], 0)

    def test_one_that_is_over_its_limit_meanwhile_has_failed_once(self, engine, proxy, far_worker):
        """Its session is cut off, and would be a reason to give it back, had it not failed before."""
        begun, told = threading.Event(), []

        def process(task: RunningTask) -> None:
            task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})
            if task.attempt == 1:
                begun.set()
                until(lambda: proxy.is_cut)
                task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})

        far_worker.use("t", process, timeout=1, retry_delay=lambda fail_count: 0)
        far_worker.events.on("task.retried", lambda task, error: told.append(type(error)))
        far_worker.events.on("task.completed", lambda task: told.append("completed"))
        task_id = add(engine)
        far_worker.start()
        assert begun.wait(SOON)
        proxy.cut()
        until(lambda: probe.executor(far_worker).free == 4)
        proxy.heal()
        until(lambda: load(engine, task_id).state == "completed", 30)
        far_worker.stop()

        task = load(engine, task_id)
        assert (told, task.fail_count, task.attempt) == ([TimeoutError, "completed"], 1, 2)
        with engine.connect() as connection:
            assert connection.scalar(sa.text("SELECT count(*) FROM ledger")) == 1


class TestStop:
    @pytest.mark.parametrize("kind", KINDS)
    def test_what_still_runs_uses_no_attempt_however_it_ends_then(self, engine, worker, kind):
        """It is given back, and then it fails, or is cancelled: both at the same time."""
        begun = threading.Semaphore(0)

        def function(task: RunningTask) -> None:
            begun.release()
            while not task.should_stop:
                time.sleep(0.001)
            time.sleep(0.02)
            raise ValueError("interrupted")

        async def coroutine(_task: AsyncRunningTask) -> None:
            begun.release()
            await asyncio.sleep(60)

        told = []
        worker.use("t", function if kind == "function" else coroutine)
        worker.events.on("task.retried", lambda task, error: told.append(task.id))
        tasks = [add(engine) for _ in range(4)]
        for _ in range(25):
            worker.start()
            for _task in tasks:
                assert begun.acquire(timeout=SOON)
            worker.stop(timeout=0.0199 if kind == "function" else 0)

            used = sum(load(engine, task_id).fail_count for task_id in tasks)
            assert used == len(told)  # those that failed before they were given back, and no others
            if kind == "coroutine":
                assert used == 0
            for task_id in tasks:
                task = load(engine, task_id)
                assert (task.state, task.attempt) == ("pending", task.fail_count)
            with engine.begin() as connection:
                connection.execute(
                    sa.text("UPDATE apoq_tasks SET attempt = 0, fail_count = 0, process_at = now()")
                )
            told.clear()

    def test_a_cancelled_coroutine_has_time_to_clean_up(self, engine, worker):
        begun, cleaned = threading.Event(), threading.Event()

        async def process(task: AsyncRunningTask) -> None:
            await task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})
            begun.set()
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0.2)
                cleaned.set()

        worker.use("t", process)
        task_id = add(engine)
        worker.start()
        assert begun.wait(SOON)

        worker.stop(timeout=0)

        assert cleaned.is_set()
        task = load(engine, task_id)
        assert (task.state, task.attempt, task.fail_count) == ("pending", 0, 0)

    def test_a_coroutine_that_had_no_turn_yet_leaves_its_slot_free(self, engine, worker):
        """The loop is blocked until the stop, so that the second one begins and is cancelled at once."""
        begun, may_end = threading.Event(), threading.Event()

        async def block(_task: AsyncRunningTask) -> None:
            begun.set()
            may_end.wait(SOON)

        async def process(_task: AsyncRunningTask) -> None:
            await asyncio.sleep(60)

        worker.use("block", block)
        worker.use("t", process)
        add(engine, type_="block")
        worker.start()
        assert begun.wait(SOON)
        task_id = add(engine)
        until(lambda: probe.executor(worker).free == 2)

        threading.Timer(0.5, may_end.set).start()
        worker.stop(timeout=0)

        until(lambda: probe.executor(worker).free == 4)
        task = load(engine, task_id)
        assert (task.state, task.attempt, task.fail_count) == ("pending", 0, 0)

    def test_a_coroutine_that_blocks_its_loop_does_not_keep_it_from_stopping(self, engine, worker):
        begun, may_end = threading.Event(), threading.Event()

        async def block(task: AsyncRunningTask) -> None:
            await task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})
            begun.set()
            may_end.wait(60)

        worker.use("t", block)
        task_id = add(engine)
        worker.start()
        assert begun.wait(SOON)

        loop = probe.event_loop_thread(worker)
        began = time.monotonic()
        worker.stop(timeout=0)

        assert time.monotonic() - began < 3
        assert load(engine, task_id).state == "pending"
        may_end.set()
        until(lambda: not loop.is_alive())

    @pytest.mark.parametrize("timeout", ["5", -1, float("nan"), True], ids=repr)
    def test_a_timeout_that_makes_no_sense_stops_nothing(self, engine, worker, timeout):
        done = threading.Event()
        worker.use("t", lambda task: done.set())
        worker.start()

        with pytest.raises((TypeError, ValueError), match="timeout must be "):
            worker.stop(timeout)
        with pytest.raises((TypeError, ValueError), match="timeout must be "):
            worker.run(timeout=timeout)

        add(engine)
        assert done.wait(SOON)


class TestStopWithoutTheDatabase:
    """It is silent: nothing that is sent to it arrives, and nobody is told."""

    @pytest.fixture
    def proxy(self, url) -> Iterator[Proxy]:
        proxy = Proxy(url)
        yield proxy
        proxy.close()

    @pytest.fixture
    def far_worker(self, proxy) -> Iterator[Worker]:
        engine = sa.create_engine(proxy.url)
        worker = Worker(engine)
        yield worker
        worker.stop(timeout=1)
        engine.dispose()

    @pytest.mark.parametrize("is_busy", [False, True], ids=["idle", "busy"])
    def test_it_stops_in_time_and_starts_again(self, engine, proxy, far_worker, is_busy):
        begun, done = threading.Event(), threading.Event()
        far_worker.use("hold", lambda task: (begun.set(), done.wait(SOON)))
        far_worker.use("t", lambda task: done.set())
        far_worker.start()
        until(far_worker.is_healthy)
        if is_busy:
            add(engine, type_="hold")
            assert begun.wait(SOON)
        proxy.cut()
        time.sleep(0.5)  # so that a part of it waits for an answer just now

        began = time.monotonic()
        far_worker.stop(timeout=0.2)

        assert time.monotonic() - began < 0.2 + 3
        proxy.heal()
        far_worker.start()
        add(engine)
        assert done.wait(SOON)

    def test_a_start_that_waits_for_it_starts_nothing(self, engine, proxy, far_worker):
        proxy.cut()
        far_worker.use("t", lambda task: None)
        add(engine)
        starting = threading.Thread(target=far_worker.start)
        starting.start()
        until(lambda: probe.is_entering(far_worker))

        began = time.monotonic()
        far_worker.stop(timeout=SOON)

        assert time.monotonic() - began < 3
        proxy.heal()
        starting.join(SOON)
        assert not probe.lifecycle(far_worker).is_in_use
        assert load(engine, 1).state == "pending"


class TestWhatIsClaimedWhileItStops:
    def test_is_given_back_at_once(self, engine, worker, monkeypatch):
        """A claim is under way, and its answer comes after the stop has begun."""
        begun, may_end, claimed, ran = threading.Event(), threading.Event(), threading.Event(), []
        claimer = probe.claimer(worker)
        claim = claimer.claim

        def claim_late(*arguments):
            found = claim(*arguments)
            if begun.is_set() and found:
                claimed.set()
                until(lambda: probe.is_executor_closed(worker))
            return found

        monkeypatch.setattr(claimer, "claim", claim_late)
        worker.use("hold", lambda task: (begun.set(), may_end.wait(SOON)))
        worker.use("t", lambda task: ran.append(task.id))
        add(engine, type_="hold")
        worker.start()
        assert begun.wait(SOON)
        task_id = add(engine)
        assert claimed.wait(SOON)
        stopping = threading.Thread(target=worker.stop)
        stopping.start()

        until(lambda: load(engine, task_id).state == "pending")  # while another still runs
        assert stopping.is_alive()
        may_end.set()
        stopping.join(SOON)
        assert ran == []
        assert load(engine, task_id).attempt == 0


def test_a_loop_that_runs_on_the_same_thread_does_not_keep_it_from_stopping(engine, worker):
    """As with gevent, with which all threads are greenlets of one."""
    done = threading.Event()

    async def process(_task: AsyncRunningTask) -> None:
        done.set()

    worker.use("t", process)
    add(engine)
    worker.start()
    assert done.wait(SOON)

    asyncio._set_running_loop(probe.asyncio_loop(worker))
    try:
        worker.stop()
    finally:
        asyncio._set_running_loop(None)

    assert not worker.is_healthy()


PROGRAM = """
    import sys, time
    import sqlalchemy as sa
    from apoq import Snooze, Worker

    def busy(task):
        while True:
            sum(range(1000))

    def polite(task):
        while not task.should_stop:
            sum(range(1000))
        raise Snooze(0)

    worker = Worker(sa.create_engine(sys.argv[1]))
    worker.use("busy", busy)
    worker.use("polite", polite)
    print("starting", flush=True)
    worker.run(timeout=float(sys.argv[2]))
"""

DEAF = """
    import signal, sys, threading
    import sqlalchemy as sa
    from apoq import Worker

    def say(stop):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Timer(0.5, print, ["started"], {"flush": True}).start()

    worker = Worker(sa.create_engine(sys.argv[1]))
    worker.use("t", lambda task: None)
    worker.run(on_start=say)
"""


@pytest.fixture
def spawn(url) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start programs that are workers, which end with the test."""
    started: list[subprocess.Popen] = []

    def start(timeout: float = 60.0, at: sa.URL = url) -> subprocess.Popen:
        rendered = at.render_as_string(hide_password=False)
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROGRAM), rendered, str(timeout)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        started.append(process)
        assert process.stdout.readline() == b"starting\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def running(engine) -> int:
    with engine.connect() as connection:
        return connection.scalar(sa.text("SELECT count(*) FROM apoq_tasks WHERE state = 'running'"))


@pytest.mark.slow
class TestRun:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_at_a_signal_a_busy_thread_that_sees_it_gives_its_task_back(self, engine, spawn, number):
        task_id = add(engine, type_="polite")
        program = spawn()
        until(lambda: running(engine) == 1)

        program.send_signal(number)

        assert program.wait(SOON) == 0
        task = load(engine, task_id)
        assert (task.state, task.attempt, task.fail_count) == ("pending", 0, 0)

    def test_a_signal_that_wakes_nobody_is_noticed(self, engine, url):
        """As it is that comes when the main thread begins to wait; here, it goes to another one."""
        command = [sys.executable, "-c", textwrap.dedent(DEAF), url.render_as_string(hide_password=False)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as program:
            assert program.stdout.readline() == b"started\n"
            program.terminate()
            try:
                assert program.wait(SOON) == 0
            finally:
                program.kill()

    def test_at_a_signal_a_busy_thread_has_its_time_and_no_more(self, engine, spawn):
        task_id = add(engine, type_="busy")
        program = spawn(timeout=0.5)
        until(lambda: running(engine) == 1)

        program.send_signal(signal.SIGTERM)

        assert program.wait(SOON) == 0
        task = load(engine, task_id)
        assert (task.state, task.attempt, task.fail_count) == ("pending", 0, 0)

    @pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
    @pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
    def test_a_second_signal_ends_it_at_once_under_busy_threads(self, engine, spawn, first, second):
        for _ in range(4):
            add(engine, type_="busy")
        polite = add(engine, type_="polite")
        program = spawn()
        until(lambda: running(engine) == 4)

        program.send_signal(first)
        until(lambda: not catches(program.pid, signal.SIGTERM))
        assert program.poll() is None
        program.send_signal(second)

        assert program.wait(SOON) == -second
        assert load(engine, polite).attempt == 0

    def test_a_signal_ends_it_while_it_still_starts(self, url, spawn):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            # Whoever connects waits for an answer that doesn't come.
            program = spawn(at=url.set(host="127.0.0.1", port=silent.getsockname()[1], query={}))
            client, _ = silent.accept()
            with client:
                program.send_signal(signal.SIGTERM)

                assert program.wait(SOON) == 0


def test_a_worker_that_can_not_start_leaves_no_row_behind(engine, make_worker, monkeypatch):
    """It is registered already when what it does next fails, or is told to stop."""
    worker = make_worker()

    def refused(**_options: object) -> float:
        raise RuntimeError("refused")

    monkeypatch.setattr(probe.scanner(worker), "survey", refused)

    with pytest.raises(RuntimeError, match="refused"):
        worker.start()

    with Session(engine) as session:
        assert session.scalar(sa.text("SELECT count(*) FROM apoq_workers")) == 0
