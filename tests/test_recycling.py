"""The limits of a worker's process: of tasks, of memory and of age."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from click import BadParameter
from sqlalchemy.orm import Session
from waiting import patience

from apoq import Queue, RunningTask, StopReason, Task, Worker
from apoq.cli.values import lifetime, memory
from apoq.core.recycling import VARIATION, drawn, reached
from apoq.core.sizes import read_size
from apoq.events import LimitReached
from apoq.schema.tables import WorkerRow
from apoq.worker import recycling
from apoq.worker.failures import Outage
from apoq.worker.recycling import LimitWatch, find_gauge
from apoq.worker.settling.counters import Counter

MB = 2**20
SOON = 20.0

until = patience(SOON)

measures_memory = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")


def add(engine: sa.Engine, type_: str, number: int = 1) -> list[int]:
    with Session(engine) as session, session.begin():
        return [Queue().add(session, type_).id for _ in range(number)]


def states(engine: sa.Engine, type_: str) -> dict[tuple[str, int], int]:
    """Return how many tasks of a type are in which state, after how many attempts."""
    query = sa.select(Task.state, Task.attempt, sa.func.count()).where(Task.type == type_)
    with engine.connect() as connection:
        rows = connection.execute(query.group_by(Task.state, Task.attempt))
        return {(state, attempt): count for state, attempt, count in rows}


LIMITS = {StopReason.MAX_TASKS: 10.0, StopReason.MAX_MEMORY: 512.0 * MB, StopReason.MAX_AGE: 60.0}


class TestTheDecision:
    def test_each_limit_is_varied_by_a_fifth(self):
        lowest, highest = drawn(LIMITS, lambda: 0.0), drawn(LIMITS, lambda: 1.0)

        assert VARIATION == 0.2
        assert lowest == pytest.approx({limit: 0.8 * most for limit, most in LIMITS.items()})
        assert highest == pytest.approx({limit: 1.2 * most for limit, most in LIMITS.items()})

    def test_each_limit_is_drawn_by_itself(self):
        chances = iter([0.0, 1.0, 0.5])

        assert list(drawn(LIMITS, lambda: next(chances)).values()) == [8, pytest.approx(614.4 * MB), 60]

    @pytest.mark.parametrize("chance", [0.0, 0.5, 0.999])
    def test_a_limit_of_one_task_stays_one(self, chance):
        assert drawn({StopReason.MAX_TASKS: 1}, lambda: chance) == {StopReason.MAX_TASKS: 1}

    @pytest.mark.parametrize(
        ("tasks", "bytes_", "seconds", "expected"),
        [
            (9, 511 * MB, 59.9, []),
            (10, 0, 0, [StopReason.MAX_TASKS]),
            (0, 512 * MB, 0, [StopReason.MAX_MEMORY]),
            (0, 0, 60, [StopReason.MAX_AGE]),
            (11, 0, 61, [StopReason.MAX_TASKS, StopReason.MAX_AGE]),
        ],
    )
    def test_a_limit_is_reached_when_the_use_is_as_high(self, tasks, bytes_, seconds, expected):
        used = dict(zip(LIMITS, (tasks, bytes_, seconds), strict=True))

        assert reached(LIMITS, used) == expected

    def test_a_reason_is_a_string_that_says_whether_it_is_a_limit(self):
        assert [reason for reason in StopReason if reason.is_limit] == ["max_tasks", "max_memory", "max_age"]


class TestTheOptions:
    @pytest.mark.parametrize(
        ("text", "size"),
        [
            ("512M", 512 * MB),
            ("512 MB", 512 * MB),
            ("512MiB", 512 * MB),
            ("1.5g", 1536 * MB),
            ("2048k", 2 * MB),
            ("1T", MB * MB),
            ("1048576", MB),
            ("1048576 bytes", MB),
        ],
    )
    def test_a_size_is_read(self, text, size):
        assert (read_size(text), memory(text)) == (size, size)

    @pytest.mark.parametrize("text", ["", "M", "12x", "-1M", "1,5G", "512 M B", "nan", "9" * 400])
    def test_another_text_is_refused(self, text):
        with pytest.raises(BadParameter, match="must be a size, such as 512M or 2G, got"):
            memory(text)

    def test_a_size_without_a_unit_is_recognized_as_a_mistake(self):
        with pytest.raises(BadParameter, match="must be 1M or more, got 512 bytes: write 512M for 512 mega"):
            memory("512")

    def test_an_age_is_a_duration_that_is_not_zero(self):
        assert lifetime("6h") == timedelta(hours=6)
        with pytest.raises(BadParameter, match="must be longer than zero, got '0'"):
            lifetime("0")

    def test_a_worker_stores_them_as_numbers(self, make_worker):
        options = make_worker(max_tasks=5, max_memory="512M", max_age=60).options

        assert (options.max_tasks, options.max_memory) == (5, 512 * MB)
        assert options.max_age == timedelta(minutes=1)

    @pytest.mark.parametrize(
        ("option", "error", "message"),
        [
            ({"max_tasks": 0}, ValueError, "max_tasks must be 1 or more, got 0; omit it for no limit"),
            ({"max_tasks": 1.5}, TypeError, "max_tasks must be a whole number of tasks, got 1.5"),
            ({"max_tasks": True}, TypeError, "max_tasks must be a whole number of tasks, got True"),
            ({"max_memory": "much"}, ValueError, "max_memory must be a size, such as 512M or 2G, got 'much'"),
            ({"max_memory": 512}, ValueError, "max_memory must be 1M or more, got 512 bytes"),
            ({"max_memory": 1.5e9}, TypeError, "max_memory must be a number of bytes or a text such as"),
            ({"max_age": 0}, ValueError, "max_age must be positive, got 0; omit it for no limit"),
            ({"max_age": "6h"}, TypeError, "max_age must be a number of seconds or a timedelta, got '6h'"),
        ],
    )
    def test_what_is_wrong_is_refused(self, make_worker, option, error, message):
        with pytest.raises(error, match=message):
            make_worker(**option)

    def test_a_system_that_does_not_show_the_memory_is_named(self, make_worker, monkeypatch):
        monkeypatch.setattr(recycling, "STATM", Path("/proc/self/none"))
        monkeypatch.setitem(sys.modules, "psutil", None)

        with pytest.raises(ValueError, match=r"max_memory needs the package psutil .* pip install psutil"):
            make_worker(max_memory="512M")


class TestRun:
    def test_it_returns_that_it_was_stopped(self, worker):
        assert worker.run(on_start=lambda stop: stop()) is StopReason.STOP

    def test_it_returns_that_a_signal_came(self, worker):
        assert worker.run(on_start=lambda _: os.kill(os.getpid(), signal.SIGTERM)) is StopReason.SIGNAL

    def test_it_ends_after_a_number_of_attempts_and_gives_back_what_has_not_begun(self, make_worker, engine):
        worker = make_worker(max_tasks=10, concurrency=1)
        worker.use("t", lambda task: time.sleep(0.01))
        add(engine, "t", 300)

        assert worker.run() is StopReason.MAX_TASKS

        found = states(engine, "t")
        assert set(found) == {("completed", 1), ("pending", 0)}
        assert found["completed", 1] >= 8

    def test_failed_attempts_count(self, make_worker, engine):
        worker = make_worker(max_tasks=1)
        worker.use("t", lambda task: 1 / 0, retry_delay=3600)
        add(engine, "t")

        assert worker.run() is StopReason.MAX_TASKS

    def test_it_ends_after_a_time(self, make_worker):
        assert make_worker(max_age=0.1).run() is StopReason.MAX_AGE

    @measures_memory
    def test_it_ends_when_the_process_uses_too_much_memory(self, make_worker, engine):
        leaked = []

        def leak(task: RunningTask) -> None:
            leaked.append(b"x" * (20 * MB))
            time.sleep(0.1)  # the memory is looked at once a second

        worker = make_worker(max_memory=int(find_gauge()() * 1.25) + 60 * MB, concurrency=1)
        worker.use("t", leak)
        add(engine, "t", 100)

        assert worker.run() is StopReason.MAX_MEMORY

        assert leaked
        assert set(states(engine, "t")) == {("completed", 1), ("pending", 0)}

    def test_a_running_task_ends_in_peace_while_others_are_left_to_other_workers(self, make_worker, engine):
        begun, end, stopping = threading.Event(), threading.Event(), []

        def hold(task: RunningTask) -> None:
            begun.set()
            end.wait(SOON)
            stopping.append(task.should_stop)

        worker = make_worker(max_tasks=1, concurrency=2, lease=1)
        worker.use("hold", hold)
        worker.use("t", lambda task: None)
        add(engine, "hold")
        threading.Thread(target=lambda: (begun.wait(SOON), add(engine, "t"))).start()
        drained = []

        def look() -> None:
            until(lambda: states(engine, "t") == {("completed", 1): 1} and not worker.is_healthy())
            add(engine, "t", 5)
            held_by_lease = sa.select(WorkerRow.expires_at > sa.func.clock_timestamp())
            before = worker.last_heartbeat_at
            until(lambda: worker.last_heartbeat_at > before + timedelta(seconds=1))
            with engine.connect() as connection:
                drained.append((states(engine, "t"), connection.scalar(held_by_lease)))
            end.set()

        looking = threading.Thread(target=look)
        assert worker.run(on_start=lambda _: looking.start()) is StopReason.MAX_TASKS
        looking.join(SOON)

        assert drained == [({("completed", 1): 1, ("pending", 0): 5}, True)]
        assert states(engine, "hold") == {("completed", 1): 1}
        assert stopping == [False]

    def test_a_signal_limits_the_time_of_the_running_tasks(self, make_worker, engine):
        begun, end = threading.Event(), threading.Event()
        worker = make_worker(max_tasks=1, concurrency=2)
        worker.use("hold", lambda task: (begun.set(), end.wait(SOON)))
        worker.use("t", lambda task: None)
        add(engine, "hold")
        threading.Thread(target=lambda: (begun.wait(SOON), add(engine, "t"))).start()

        def interrupt() -> None:
            until(lambda: states(engine, "t") == {("completed", 1): 1} and not worker.is_healthy())
            os.kill(os.getpid(), signal.SIGTERM)

        interrupting = threading.Thread(target=interrupt)
        reason = worker.run(timeout=0.1, on_start=lambda _: interrupting.start())
        end.set()

        assert reason is StopReason.SIGNAL
        assert states(engine, "hold") == {("pending", 0): 1}

    def test_a_function_that_hangs_after_its_timeout_is_not_waited_for(self, make_worker, engine):
        end = threading.Event()
        worker = make_worker(max_tasks=1)
        worker.use("hang", lambda task: end.wait(SOON), timeout=0.1, retry_limit=0)
        add(engine, "hang")

        reason = worker.run(timeout=0)
        end.set()

        assert reason is StopReason.MAX_TASKS
        assert states(engine, "hang") == {("failed", 1): 1}


class TestStart:
    @pytest.fixture
    def events(self) -> list[LimitReached]:
        return []

    def start(self, worker: Worker, events: list[LimitReached]) -> None:
        worker.events.on(LimitReached, events.append)
        worker.start()

    def test_it_reports_the_limit_once_and_the_worker_goes_on(self, make_worker, engine, events):
        worker = make_worker(max_tasks=3)
        worker.use("t", lambda task: None)
        self.start(worker, events)
        add(engine, "t", 5)
        until(lambda: states(engine, "t") == {("completed", 1): 5} and events)

        add(engine, "t", 5)

        until(lambda: states(engine, "t") == {("completed", 1): 10})
        assert worker.is_healthy()
        assert [(event.limit, event.used >= event.at_most) for event in events] == [("max_tasks", True)]

    def test_a_second_start_counts_from_zero(self, make_worker, engine, events):
        worker = make_worker(max_tasks=3)
        worker.use("t", lambda task: None)
        self.start(worker, events)
        add(engine, "t", 5)
        until(lambda: events)
        worker.stop()

        worker.start()
        add(engine, "t", 5)

        until(lambda: len(events) == 2)

    @measures_memory
    def test_garbage_does_not_count(self, events):
        gc.collect()
        limits = {StopReason.MAX_MEMORY: find_gauge()() + 100 * MB}
        watch = LimitWatch(limits, Counter(), Outage(report=events.append), "w", chance=lambda: 0.5)
        watch.start()
        for _ in range(4):
            cycle: list[object] = [b"x" * (40 * MB)]  # large enough for its memory to be returned at once
            cycle.append(cycle)
        del cycle
        littered = find_gauge()()

        until(lambda: find_gauge()() < littered - 100 * MB)

        watch.stop()
        assert littered > limits[StopReason.MAX_MEMORY]
        assert events == []

    @measures_memory
    def test_a_process_that_starts_above_its_limit_goes_on_without_it(
        self, make_worker, engine, events, caplog
    ):
        worker = make_worker(max_memory="1M", max_tasks=1)
        worker.use("t", lambda task: None)

        self.start(worker, events)

        found = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert len(found) == 1
        assert "max_memory must be much more than this process starts with, which is" in found[0]
        add(engine, "t")
        until(lambda: events)
        assert [event.limit for event in events] == ["max_tasks"]

    def test_no_thread_is_started_without_limits(self, worker):
        worker.start()

        assert "apoq-limits" not in [thread.name for thread in threading.enumerate()]


def test_the_settings_of_frameworks(make_worker: Callable[..., Worker]):
    from apoq.flask.settings import Settings as FlaskSettings
    from apoq.pyramid.settings import Misconfigured
    from apoq.pyramid.settings import Settings as PyramidSettings

    flask = FlaskSettings.read({"APOQ_MAX_TASKS": 5, "APOQ_MAX_MEMORY": "512M", "APOQ_MAX_AGE": 60})
    pyramid = PyramidSettings.read(
        {"apoq.max_tasks": "5", "apoq.max_memory": "512M", "apoq.max_age": "1 minute"}
    )

    expected = {"max_tasks": 5, "max_memory": 512 * MB, "max_age": timedelta(minutes=1)}
    assert (flask.worker, pyramid.worker) == (expected, expected)
    with pytest.raises(ValueError, match="APOQ_MAX_MEMORY must be a size, such as 512M or 2G, got 'x'"):
        FlaskSettings.read({"APOQ_MAX_MEMORY": "x"})
    with pytest.raises(Misconfigured, match=r"^apoq.max_memory must be a size, such as 512M or 2G, got 'x'"):
        PyramidSettings.read({"apoq.max_memory": "x"})
