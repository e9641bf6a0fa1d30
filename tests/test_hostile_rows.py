"""Rows that anybody who may INSERT can write: none of them stops, slows or bloats a worker.

Each stands beside innocent tasks, which must be done in time.
"""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import pytest
import sqlalchemy as sa
import sqlalchemy.exc
from claims import note
from sqlalchemy.orm import Session
from waiting import patience

from apoq import Limit, Queue, Snooze, Task, Worker
from apoq.core.states import CANCELLED, COMPLETED, FAILED, PENDING, WAITING

SOON = 15.0
"""Seconds for what takes a hundredth of that on an idle machine."""

ENDED = {COMPLETED, FAILED, CANCELLED}

until = patience(SOON)

needs_procfs = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the peak of a process's memory is read from /proc"
)


def insert(engine: sa.Engine, row: str) -> list[int]:
    """Write rows as another program may, past all that this library checks; return their ids."""
    with engine.begin() as connection:
        return list(connection.exec_driver_sql(f"INSERT INTO apoq_tasks {row} RETURNING id").scalars())


def execute(engine: sa.Engine, *statements: str) -> None:
    with engine.begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def scalar(engine: sa.Engine, statement: str, **parameters: object) -> object:
    with engine.connect() as connection:
        return connection.scalar(sa.text(statement), parameters)


def tasks(engine: sa.Engine, ids: list[int]) -> list[Task]:
    """Return the tasks of these ids, without what Python may have no value for."""
    wanted = (Task.id, Task.state, Task.attempt, Task.error)
    with Session(engine) as session:
        return session.scalars(
            sa.select(Task).where(Task.id.in_(ids)).options(sa.orm.load_only(*wanted))
        ).all()


def state_of(engine: sa.Engine, id_: int) -> str:
    return scalar(engine, "SELECT state FROM apoq_tasks WHERE id = :id", id=id_)


def left(engine: sa.Engine, type_: str = "good") -> int:
    """Count the tasks of a type that haven't completed."""
    statement = "SELECT count(*) FROM apoq_tasks WHERE type = :type AND state <> 'completed'"
    return scalar(engine, statement, type=type_)


def add(engine: sa.Engine, queue: Queue, number: int = 1, type_: str = "good", **options) -> None:
    with Session(engine) as session, session.begin():
        queue.add_many(session, type_, [{}] * number, **options)


def nothing(task) -> None:
    """Complete."""


def all_are_done(engine: sa.Engine, queue: Queue, number: int = 10, timeout: float = SOON) -> None:
    """Add innocent tasks, and see them done in time."""
    add(engine, queue, number)
    until(lambda: not left(engine), timeout)


def named_at_error(caplog: pytest.LogCaptureFixture, id_: int) -> bool:
    """Tell whether the log names a task at ERROR."""
    return any(
        record.levelno >= logging.ERROR and re.search(rf"(?<![\d-]){id_}(?!\d)", record.getMessage())
        for record in caplog.records
    )


def failures(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what the log says of loops that failed, and of outages that there were none of."""
    return [
        record.getMessage()
        for record in caplog.records
        if re.search(
            r"apoq-\w+ failed|database is away|no longer belonged to this worker", record.getMessage()
        )
    ]


def claims(engine: sa.Engine) -> int:
    return scalar(engine, "SELECT count(*) FROM apoq_claims")


H1 = {
    "a token that can't grow": "(type, claim_token) VALUES ('t', 9223372036854775807)",
    "due since the first moment": "(type, process_at) VALUES ('t', '4714-11-24 00:00:00+00 BC')",
    "a retry_delay of five million years": "(type, retry_delay) VALUES ('t', '5000000 years')",
    "an infinite retry_delay": "(type, retry_delay) VALUES ('t', 'infinity')",
    "the lowest id": "(id, type) VALUES (-9223372036854775808, 't')",
}

SIBLINGS = (
    "(type, retry_delay) VALUES ('t', '-5000000 years')",
    "(type, retry_delay) VALUES ('t', '-infinity')",
    "(type, retry_delay) VALUES ('t', '2147483647 months 2147483647 days 9223372036854775807 microseconds')",
    "(type, timeout) VALUES ('t', 'infinity')",
    "(type, timeout) VALUES ('t', '-infinity')",
    "(type, timeout) VALUES ('t', '5000000 years')",
    "(type, process_at) VALUES ('t', '4714-11-24 00:00:00.000001+00 BC')",
    "(id, type, process_at) VALUES (-9223372036854775807, 't', '-infinity')",
    "(id, type, priority) VALUES (-9223372036854775806, 't', 32767)",
    "(id, type, priority) VALUES (9223372036854775806, 't', -32768)",
    "(id, type) VALUES (9223372036854775807, 't')",
    "(type, claim_token, fail_count, rescue_count) VALUES ('t', 9223372036854775807, 1, 1)",
    "(type, claim_token) VALUES ('t', -9223372036854775808)",
    "(type, fail_count, attempt, retry_limit) VALUES ('t', 2147483647, 2147483647, 2147483647)",
    "(type, fail_count, attempt, retry_limit) VALUES ('t', -2147483648, -2147483648, -2147483648)",
    "(type, rescue_count) VALUES ('t', 2147483647)",
    "(type, rescue_count) VALUES ('t', -2147483648)",
    "(type, rescue_count) VALUES ('t', -1)",
    "(type, created_at, failed_at, claimed_at) VALUES ('t', 'infinity', '-infinity', 'infinity')",
)
"""What is like these in other columns, and at other ends."""


def write_hostile(engine: sa.Engine) -> list[int]:
    """Write all of them that the server can hold; return their ids."""
    with engine.connect() as connection:
        has_infinite_intervals = connection.dialect.server_version_info >= (17,)
    return [
        id_
        for row in (*H1.values(), *SIBLINGS)
        if has_infinite_intervals or not re.search(r"(delay|timeout)\).*infinity", row)
        for id_ in insert(engine, row)
    ]


@pytest.fixture(params=H1.values(), ids=H1)
def row(engine, request) -> str:
    with engine.connect() as connection:
        if "'infinity'" in request.param and connection.dialect.server_version_info < (17,):
            pytest.skip("before PostgreSQL 17, an interval can't be infinite")
    return request.param


class TestARowThatAnybodyMayWrite:
    """H1."""

    def ends(self, engine, caplog, id_: int) -> None:
        """See that the row itself ends, or is passed over with a word at ERROR."""
        until(lambda: state_of(engine, id_) in ENDED or named_at_error(caplog, id_))

    def test_it_stops_no_worker_that_starts(self, engine, queue, worker, row, caplog):
        worker.use("t", nothing)
        worker.use("good", nothing)
        add(engine, queue, 5)
        [id_] = insert(engine, row)
        add(engine, queue, 5)

        worker.start()

        until(lambda: not left(engine))
        self.ends(engine, caplog, id_)
        assert worker.is_healthy()
        worker.stop()
        assert claims(engine) == 0

    def test_it_stops_no_worker_that_idles(self, engine, queue, worker, row, caplog):
        worker.use("t", nothing)
        worker.use("good", nothing)
        worker.start()
        all_are_done(engine, queue)

        [id_] = insert(engine, row)

        for _ in range(3):
            all_are_done(engine, queue)
        self.ends(engine, caplog, id_)
        assert worker.is_healthy()
        worker.stop()
        assert claims(engine) == 0

    def test_it_stops_no_call_of_work(self, engine, queue, worker, row):
        worker.use("t", nothing)
        worker.use("good", nothing)
        add(engine, queue, 2)
        insert(engine, row)
        add(engine, queue, 2)

        for _ in range(8):
            worker.work()

        assert left(engine) == 0

    def test_it_slows_no_other_queue(self, engine, make_worker, row):
        bad, good = Queue("bad"), Queue("good")
        worker = make_worker(bad, good)
        worker.use("t", nothing)
        worker.use("good", nothing)
        columns, values = row.removesuffix(")").split(") VALUES (")
        insert(engine, f"{columns}, queue) VALUES ({values}, 'bad')")
        worker.start()

        all_are_done(engine, good, 5_000)

        assert fastest(engine, good, worker) < 0.1
        assert worker.is_healthy()


class TestManyOfThemAtOnce:
    def test_all_of_them_are_done(self, engine, queue, worker, caplog):
        caplog.set_level(logging.INFO, "apoq")
        told: list[int] = []
        worker.events.on("task.completed", lambda task: told.append(task.id))
        worker.use("t", nothing)
        worker.use("good", nothing)
        add(engine, queue, 30)
        ids = write_hostile(engine)
        add(engine, queue, 30)

        worker.start()

        until(lambda: not left(engine))
        until(lambda: all(state_of(engine, id_) in ENDED for id_ in ids))
        # More than these, where a timeout below zero has led to a retry.
        until(lambda: sum(worker.stats()[1:]) >= 60 + len(ids))
        worker.stop()
        assert claims(engine) == 0
        assert failures(caplog) == []

    def test_their_failures_are_written(self, engine, queue, worker, caplog):
        worker.use("t", lambda task: 1 / 0)
        worker.use("good", nothing)
        ids = write_hostile(engine)

        worker.start()

        all_are_done(engine, queue)
        until(lambda: all(task.error or task.state in ENDED for task in tasks(engine, ids)))
        assert worker.is_healthy()
        worker.stop()
        assert (claims(engine), failures(caplog)) == (0, [])

    def test_they_can_be_snoozed(self, engine, queue, worker, caplog):
        snoozed = set()

        def snooze(task):
            snoozed.add(task.id)
            raise Snooze(3600)

        worker.use("t", snooze)
        worker.use("good", nothing)
        write_hostile(engine)

        worker.start()

        all_are_done(engine, queue)
        until(lambda: snoozed)
        worker.stop()
        states = {task.state for task in tasks(engine, [*snoozed])}
        assert (states, claims(engine), failures(caplog)) == ({PENDING}, 0, [])

    def test_they_can_be_given_back(self, engine, queue, make_worker, caplog):
        worker = make_worker(concurrency=40)
        ended = threading.Event()
        worker.use("t", lambda task: ended.wait(SOON))
        ids = write_hostile(engine)
        worker.start()
        until(lambda: worker.stats().running >= 10)

        worker.stop(timeout=0)

        ended.set()
        assert {task.state for task in tasks(engine, ids)} <= {PENDING, FAILED}
        assert (claims(engine), failures(caplog)) == (0, [])


def fastest(engine: sa.Engine, queue: Queue, worker: Worker, tries: int = 10, **options) -> float:
    """Return the shortest of some times from a commit to the begin of the task, in seconds."""
    begun = threading.Event()
    type_ = f"clock {uuid4()}"
    worker.use(type_, lambda task: begun.set())
    times = []
    for _ in range(tries):
        begun.clear()
        add(engine, queue, type_=type_, **options)
        committed = time.monotonic()
        assert begun.wait(SOON)
        times.append(time.monotonic() - committed)
    return min(times)


TRIGGERS = {
    "before": "CREATE TRIGGER own BEFORE UPDATE ON apoq_tasks",
    "at the commit": (
        "CREATE CONSTRAINT TRIGGER own AFTER UPDATE ON apoq_tasks DEFERRABLE INITIALLY DEFERRED"
    ),
}


class TestARowThatTheServerRefuses:
    """A trigger of the user's own raises when a claim, or a completion, comes to it."""

    BAD = "NEW.data ? 'bad'"

    @pytest.fixture(params=TRIGGERS.values(), ids=TRIGGERS)
    def refuse(self, engine, request) -> Callable[..., None]:
        def refuse(condition: str, code: str = "P0001") -> None:
            execute(
                engine,
                f"""
                CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
                BEGIN
                    IF {condition} THEN
                        RAISE EXCEPTION 'not this row' USING ERRCODE = '{code}';
                    END IF;
                    RETURN NEW;
                END $$
                """,
                f"{request.param} FOR EACH ROW EXECUTE FUNCTION refuse()",
            )

        return refuse

    def bad_row(self, engine: sa.Engine, queue: Queue | None = None) -> int:
        name = queue.name if queue else "default"
        [id_] = insert(engine, f"""(type, data, queue) VALUES ('good', '{{"bad": 1}}', '{name}')""")
        return id_

    def innocents(self, engine: sa.Engine) -> int:
        return scalar(
            engine, "SELECT count(*) FROM apoq_tasks WHERE NOT data ? 'bad' AND state <> 'completed'"
        )

    @pytest.mark.parametrize("code", ["P0001", "23514"])
    def test_a_claim_passes_it_over_and_names_it(self, engine, queue, worker, refuse, caplog, code):
        refuse(f"{self.BAD} AND NEW.state = 'running'", code)
        worker.use("good", nothing)
        add(engine, queue, 20)
        bad = self.bad_row(engine)
        add(engine, queue, 20)

        worker.start()

        until(lambda: not self.innocents(engine))
        until(lambda: named_at_error(caplog, bad))
        for _ in range(3):
            add(engine, queue, 20)
            until(lambda: not self.innocents(engine))
        assert state_of(engine, bad) == PENDING
        until(worker.is_healthy)
        worker.stop()
        assert claims(engine) == 0

    def test_a_claim_under_limits_passes_it_over(self, engine, queue, worker, refuse, caplog):
        refuse(f"{self.BAD} AND NEW.state = 'running'")
        worker.use("good", nothing, limit=Limit(1, key=True))
        add(engine, queue, 20, key="a")
        [bad] = insert(engine, """(type, data, key) VALUES ('good', '{"bad": 1}', 'b')""")
        add(engine, queue, 20, key="c")

        worker.start()

        until(lambda: not self.innocents(engine))
        until(lambda: named_at_error(caplog, bad))
        assert state_of(engine, bad) == PENDING
        until(worker.is_healthy)

    def test_it_keeps_no_place_from_the_tasks_of_other_keys(self, engine, queue, worker, refuse, caplog):
        refuse(f"{self.BAD} AND NEW.state = 'running'")
        running, go = threading.Semaphore(0), threading.Event()

        def hold(task) -> None:
            running.release()
            assert go.wait(SOON)

        worker.use("good", hold, limit=Limit(1, key=True))
        add(engine, queue, key="a")
        add(engine, queue, key="b")
        worker.start()
        assert all(running.acquire(timeout=SOON) for _ in range(2))
        [bad] = insert(engine, """(type, data, key) VALUES ('good', '{"bad": 1}', 'a')""")
        add(engine, queue, 5, key="b")
        until(lambda: scalar(engine, "SELECT count(*) FROM apoq_tasks WHERE state = 'waiting'") == 6)

        go.set()

        until(lambda: not self.innocents(engine))
        assert state_of(engine, bad) == WAITING
        assert "a free place of the key 'a' can't be given to the next task" in caplog.text
        until(worker.is_healthy)

    def test_a_claim_passes_over_several(self, engine, queue, worker, refuse, caplog):
        refuse(f"{self.BAD} AND NEW.state = 'running'")
        worker.use("good", nothing)
        bad = []
        for _ in range(6):
            bad.append(self.bad_row(engine))
            add(engine, queue, 20)

        worker.start()

        until(lambda: not self.innocents(engine), 2 * SOON)
        until(lambda: all(named_at_error(caplog, id_) for id_ in bad), 2 * SOON)
        until(worker.is_healthy)

    def test_a_row_that_comes_to_an_idle_worker_is_passed_over(self, engine, queue, worker, refuse, caplog):
        refuse(f"{self.BAD} AND NEW.state = 'running'")
        worker.use("good", nothing)
        worker.start()
        all_are_done(engine, queue)

        bad = self.bad_row(engine)

        add(engine, queue)
        until(lambda: not self.innocents(engine))
        until(lambda: named_at_error(caplog, bad))
        add(engine, queue)
        until(lambda: not self.innocents(engine))
        assert fastest(engine, queue, worker) < 0.1

    def test_an_idle_worker_looks_at_it_seldom(self, engine, queue, worker, refuse, caplog):
        refuse(f"{self.BAD} AND NEW.state = 'running'")
        worker.use("good", nothing)
        worker.start()
        all_are_done(engine, queue)
        bad = self.bad_row(engine)
        until(lambda: named_at_error(caplog, bad))
        before, began = transactions(engine), time.monotonic()

        until(lambda: time.monotonic() > began + 3)

        assert transactions(engine) - before < 60

    def test_work_passes_it_over(self, engine, queue, worker, refuse, caplog):
        refuse(f"{self.BAD} AND NEW.state = 'running'")
        worker.use("good", nothing)
        bad = self.bad_row(engine)
        add(engine, queue, 3)

        for _ in range(6):
            worker.work()

        assert self.innocents(engine) == 0
        assert named_at_error(caplog, bad)

    def test_it_slows_no_other_queue(self, engine, make_worker, refuse):
        bad, good = Queue("bad"), Queue("good")
        worker = make_worker(bad, good)
        refuse(f"{self.BAD} AND NEW.state = 'running'")
        worker.use("good", nothing)
        self.bad_row(engine, bad)
        worker.start()

        add(engine, good, 5_000)
        until(lambda: not self.innocents(engine))

        assert fastest(engine, good, worker) < 0.1

    def test_once_it_is_no_longer_refused_another_worker_does_it(
        self, engine, queue, make_worker, refuse, caplog
    ):
        refuse(f"{self.BAD} AND NEW.state = 'running'")
        first, second = make_worker(), make_worker()
        first.use("good", nothing)
        second.use("good", nothing)
        bad = self.bad_row(engine)
        first.start()
        until(lambda: named_at_error(caplog, bad))
        first.stop()

        execute(engine, "DROP TRIGGER own ON apoq_tasks")
        second.start()

        until(lambda: state_of(engine, bad) == COMPLETED)

    @pytest.mark.parametrize("listens", [False, True])
    def test_a_completion_that_is_refused_is_named_and_the_others_are_written(
        self, engine, queue, worker, refuse, caplog, listens
    ):
        refuse(f"{self.BAD} AND NEW.state = 'completed'")
        worker.use("good", nothing)
        told: list[int] = []
        if listens:
            worker.events.on("task.completed", lambda task: told.append(task.id))
        add(engine, queue, 20)
        bad = self.bad_row(engine)
        add(engine, queue, 20)

        worker.start()

        until(lambda: not self.innocents(engine))
        until(lambda: named_at_error(caplog, bad))
        until(lambda: worker.stats().completed == 40)
        assert not listens or (len(told), bad in told) == (40, False)
        assert worker.is_healthy()
        assert failures(caplog) == []

    def test_a_failure_that_is_refused_is_named_and_the_others_are_written(
        self, engine, queue, worker, refuse, caplog
    ):
        refuse(f"{self.BAD} AND NEW.state = 'failed'")
        worker.use("good", lambda task: 1 / 0, retry_limit=0)
        add(engine, queue, 10)
        bad = self.bad_row(engine)
        add(engine, queue, 10)

        worker.start()

        until(lambda: scalar(engine, "SELECT count(*) FROM apoq_tasks WHERE state = 'failed'") == 20)
        until(lambda: named_at_error(caplog, bad))
        assert worker.is_healthy()


def test_a_worker_whose_every_claim_fails_is_not_healthy_until_they_succeed(engine, queue, worker, caplog):
    """A trigger for the statement raises whichever rows are claimed, and if there are none."""
    worker.use("good", nothing)
    worker.start()
    all_are_done(engine, queue)

    execute(
        engine,
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN RAISE EXCEPTION 'no statement'; END $$
        """,
        "CREATE TRIGGER own BEFORE UPDATE ON apoq_tasks FOR EACH STATEMENT EXECUTE FUNCTION refuse()",
    )
    add(engine, queue, 10)

    until(lambda: not worker.is_healthy(), 30)
    execute(engine, "DROP TRIGGER own ON apoq_tasks")
    until(lambda: not left(engine), 60)
    until(worker.is_healthy)
    worker.stop()
    assert claims(engine) == 0


PROGRAM = """
    import json, re, sys, threading, time
    from pathlib import Path
    import sqlalchemy as sa
    from apoq import Queue, Worker

    def memory(name):
        return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    engine = sa.create_engine(sys.argv[1])
    worker = Worker(engine, concurrency=16)
    worker.use("t", lambda task: None, retry_limit=0)
    worker.use("good", lambda task: None)

    def left(condition):
        with engine.connect() as connection:
            return connection.scalar(sa.text(f"SELECT count(*) FROM apoq_tasks WHERE {condition}"))

    def wait(condition, seconds):
        began = time.monotonic()
        while left(condition) and time.monotonic() < began + seconds:
            time.sleep(0.02)
        return time.monotonic() - began

    if sys.argv[2] == "heard":
        for name in ("task.completed", "task.retried", "task.failed"):
            worker.events.on(name, lambda *arguments: None)

    first = memory("VmRSS")
    worker.start()
"""

DRAINED = """
    good = wait("type = 'good' AND state <> 'completed'", 20)
    bad = wait("type = 't' AND state IN ('pending', 'running')", 20)
    is_healthy = worker.is_healthy()
    worker.stop(5)
    print(json.dumps({"good": good, "bad": bad, "grew": memory("VmHWM") - first, "is_healthy": is_healthy}))
"""

FLOODED = """
    print("ready", flush=True)
    sys.stdin.readline()
    grew = memory("VmHWM") - first
    began = time.monotonic()
    worker.stop(2)
    print(json.dumps({"grew": grew, "stopped_in": time.monotonic() - began}))
"""

ROOM = 250
"""Megabytes by which a worker's memory may grow: some dozen tasks of the usual limit, as text and read."""


@contextmanager
def a_worker_apart(url: sa.URL, then: str, *, listens: str = "") -> Iterator[subprocess.Popen]:
    """Run a worker in a process of its own, whose memory can be measured."""
    code = textwrap.dedent(PROGRAM) + textwrap.dedent(then)
    words = [sys.executable, "-c", code, url.render_as_string(hide_password=False), listens]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def of_200_mb(engine: sa.Engine, number: int) -> list[int]:
    """Write tasks whose data take little room on the disk and 200 MB as text."""
    [first] = insert(engine, "(type, data) VALUES ('t', to_jsonb(repeat('a', 200000000)))")
    # Copied as it is stored, which takes the server no time.
    copies = f"SELECT type, data FROM apoq_tasks, generate_series(2, {number}) WHERE id = {first}"
    return [first, *insert(engine, f"(type, data) {copies}")]


# Who listens to what becomes of tasks gets them whole.
listeners = pytest.mark.parametrize("listens", ["", "heard"], ids=["no listener", "a listener"])


@needs_procfs
@pytest.mark.slow
@listeners
@pytest.mark.parametrize("number", [1, 4])
def test_a_task_of_200_mb_fails_by_itself_and_takes_no_memory(engine, url, queue, number, listens):
    """M1."""
    add(engine, queue, 20)
    ids = of_200_mb(engine, number)
    add(engine, queue, 20)

    with a_worker_apart(url, DRAINED, listens=listens) as process:
        found = json.loads(process.communicate(timeout=60)[0])

    assert found["good"] < SOON
    assert found["grew"] < ROOM
    large = tasks(engine, ids)
    assert [(task.state, task.attempt) for task in large] == [(FAILED, 1)] * number
    for task in large:
        assert re.search(r"max_data_size|bytes", task.error["message"])
    assert found["is_healthy"]
    assert claims(engine) == 0


EXPANDING = {
    # Each number takes a few bytes in jsonb, and 131,072 digits as text.
    "one of 260 MB": (2_000, 1),
    "one of more than PostgreSQL's text can hold": (9_000, 1),
    "sixty of 13 MB": (100, 60),
}


@needs_procfs
@pytest.mark.slow
@listeners
@pytest.mark.parametrize(("numbers", "number"), EXPANDING.values(), ids=EXPANDING)
def test_numbers_that_are_long_as_text_take_no_memory(engine, url, queue, numbers, number, listens):
    """M1. What is stored is one or two kilobytes, so that no limit of the stored size helps.

    To write them as text, once or twice, takes the server some seconds in all; no other task waits for more.
    """
    data = f"('[' || repeat('1e131071,', {numbers - 1}) || '1e131071]')::jsonb"
    add(engine, queue, 20)
    try:
        insert(engine, f"(type, data) SELECT 't', {data} FROM generate_series(1, {number})")
    except sqlalchemy.exc.DBAPIError:
        return  # the table refuses it, which is as good
    add(engine, queue, 20)

    with a_worker_apart(url, DRAINED, listens=listens) as process:
        found = json.loads(process.communicate(timeout=60)[0])

    assert found["good"] < 2 * SOON
    assert found["grew"] < ROOM
    assert found["is_healthy"]


@needs_procfs
@pytest.mark.slow
@listeners
def test_many_tasks_of_the_largest_data_take_little_memory(engine, url, listens):
    """M1."""
    insert(
        engine,
        "(type, data) SELECT 'good', to_jsonb(repeat('a', 1024 * 1024 - 2)) FROM generate_series(1, 400)",
    )

    with a_worker_apart(url, DRAINED, listens=listens) as process:
        found = json.loads(process.communicate(timeout=60)[0])

    assert left(engine) == 0
    assert found["grew"] < ROOM
    assert found["is_healthy"]


@pytest.mark.parametrize(
    "data",
    ["a" * (1024 * 1024 - 2), [0] * (512 * 1024 - 1), [{}] * (340 * 1024), {"ü" * 174_000: "💖" * 174_000}],
    ids=["text", "numbers", "objects", "outside ASCII"],
)
def test_data_at_the_limit_are_worked(engine, queue, worker, data):
    """Whatever guards the worker's memory, what `add` takes has to be worked."""
    received = []
    worker.use("large", lambda task: received.append(task.data == data))
    with Session(engine) as session, session.begin():
        queue.add(session, "large", data)

    worker.start()

    until(lambda: received)
    until(lambda: not left(engine, "large"))
    assert received == [True]


def test_a_queue_that_allows_more_gets_more(engine, make_worker):
    queue = Queue(max_data_size=8 * 1024 * 1024)
    worker = make_worker(queue)
    sizes = []
    worker.use("large", lambda task: sizes.append(len(task.data)))
    with Session(engine) as session, session.begin():
        queue.add_many(session, "large", ["a" * 6_000_000] * 3)

    worker.start()

    until(lambda: not left(engine, "large"), 3 * SOON)
    assert sizes == [6_000_000] * 3


class TestARowThatCannotBeReadBack:
    """M2 and M5."""

    ROW = "(type, timeout) VALUES ('t', '5000000 years')"

    def test_completions_beside_it_are_told(self, engine, queue, worker, caplog):
        caplog.set_level(logging.INFO, "apoq")
        told: list[int] = []
        worker.events.on("task.completed", lambda task: told.append(task.id))
        worker.use("t", nothing)
        worker.use("good", nothing)
        add(engine, queue, 300)
        insert(engine, self.ROW)
        add(engine, queue, 300)

        worker.start()

        until(lambda: worker.stats().completed == 601)
        until(lambda: len(told) == 601)
        assert failures(caplog) == []

    @pytest.mark.parametrize("kind", ["retried", "failed"])
    def test_failures_beside_it_are_told(self, engine, queue, worker, caplog, kind):
        caplog.set_level(logging.INFO, "apoq")
        told: list[int] = []
        worker.events.on(f"task.{kind}", lambda task, error: told.append(task.id))
        limit = 0 if kind == "failed" else 1
        for type_ in ("t", "good"):
            worker.use(type_, lambda task: 1 / 0, retry_limit=limit, retry_delay=lambda _: 3600)
        add(engine, queue, 30)
        insert(engine, self.ROW)
        add(engine, queue, 30)

        worker.start()

        until(lambda: len(told) == 61)
        assert failures(caplog) == []

    def test_completions_that_are_deleted_are_told(self, engine, queue, make_worker, caplog):
        caplog.set_level(logging.INFO, "apoq")
        told: list[int] = []
        worker = make_worker(keep_completed=timedelta())
        worker.events.on("task.completed", lambda task: told.append(task.id))
        worker.use("t", nothing)
        worker.use("good", nothing)
        add(engine, queue, 30)
        insert(engine, self.ROW)

        worker.start()

        until(lambda: len(told) == 31)
        assert failures(caplog) == []

    def test_a_completion_in_the_tasks_session_is_told_or_undone(self, engine, queue, worker, caplog):
        def write(task):
            task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id})

        told: list[int] = []
        worker.events.on("task.completed", lambda task: told.append(task.id))
        worker.use("t", write)
        [id_] = insert(engine, self.ROW)

        worker.start()

        # Read on a connection of the user's engine, it may fail its own task; but no other.
        until(lambda: told or tasks(engine, [id_])[0].error)
        assert scalar(engine, "SELECT count(*) FROM ledger") == len(told)

    @pytest.mark.parametrize("name", ["timeout", "retry_delay"])
    def test_work_returns_it(self, engine, worker, name):
        worker.use("t", nothing)
        insert(engine, self.ROW.replace("timeout", name))

        task = worker.work()

        assert task.state == COMPLETED

    def test_its_claims_leave_nothing(self, engine, queue, worker):
        worker.use("t", nothing)
        worker.use("good", nothing)
        insert(engine, self.ROW.replace("timeout", "retry_delay"))
        worker.start()
        for _ in range(3):
            all_are_done(engine, queue)
        assert claims(engine) < 40

        worker.stop()

        assert claims(engine) == 0


PRIORITIES = "(type, priority) SELECT '{}', p FROM generate_series(-32768, 32767) p"


class TestEveryPriority:
    """M3."""

    def test_those_of_a_type_that_nobody_works_slow_no_worker(self, engine, queue, worker):
        insert(engine, PRIORITIES.format("unworked"))
        worker.use("good", nothing)
        worker.start()
        all_are_done(engine, queue)

        assert fastest(engine, queue, worker) < 0.05

    def test_a_worker_forgets_those_that_are_gone(self, engine, queue, worker):
        worker.use("good", nothing)
        worker.start()
        insert(engine, PRIORITIES.format("unworked"))
        all_are_done(engine, queue)
        execute(engine, "TRUNCATE apoq_tasks")

        all_are_done(engine, queue)

        until(lambda: fastest(engine, queue, worker, 3) < 0.05, 4 * SOON)

    @pytest.mark.slow
    def test_those_of_a_type_that_is_worked_are_done(self, engine, queue, worker):
        worker.use("good", nothing)
        insert(engine, PRIORITIES.format("good"))

        worker.start()

        for _ in range(5):
            assert fastest(engine, queue, worker, 1, priority=32767) < 1
        until(lambda: not left(engine), 60)

    def test_a_priority_beyond_those_that_are_remembered_is_found(self, engine, queue, make_worker):
        worker = make_worker()
        worker.use("good", nothing)
        worker.start()
        all_are_done(engine, queue)
        insert(engine, PRIORITIES.format("unworked"))

        for priority in (-32768, -5, 0, 5, 32767):
            add(engine, queue, 20, priority=priority)

        until(lambda: not left(engine))


UNCOUNTABLE = {
    "rescues beyond counting": {"rescue_count": 2**31 - 1},
    "failures beyond counting": {"fail_count": 2**31 - 1},
    "attempts below counting": {"attempt": -(2**31), "ahead": True},
    "all of them": {
        "rescue_count": 2**31 - 1,
        "fail_count": 2**31 - 1,
        "attempt": -(2**31),
        "ahead": True,
    },
}


class TestRowsThatADeadWorkerLeft:
    """M6."""

    ORPHANS = """
        INSERT INTO apoq_tasks
            (type, state, worker_id, rescue_count, fail_count, attempt, prefetched, claimed_at)
        SELECT 't', 'running', '{worker_id}', {rescue_count}, {fail_count}, {attempt}, {ahead}, now()
        FROM generate_series(1, {number})
    """

    def leave(self, engine: sa.Engine, number: int, **columns: object) -> None:
        values = {"rescue_count": 0, "fail_count": 0, "attempt": 1, "ahead": False} | columns
        execute(engine, self.ORPHANS.format(worker_id=uuid4(), number=number, **values))

    @pytest.mark.parametrize("row", UNCOUNTABLE.values(), ids=UNCOUNTABLE)
    def test_an_innocent_task_behind_them_is_rescued(self, engine, make_worker, row):
        # More than are passed over, one by one, between two heartbeats.
        self.leave(engine, 8_000 if row == {"rescue_count": 2**31 - 1} else 300, **row)
        self.leave(engine, 1)
        with engine.begin() as connection:
            note(connection)
        innocent = scalar(engine, "SELECT max(id) FROM apoq_tasks")
        worker = make_worker()
        worker.use("t", nothing, retry_delay=lambda _: 0)

        worker.start()

        until(lambda: state_of(engine, innocent) == COMPLETED, 2 * SOON)
        until(lambda: not scalar(engine, "SELECT count(*) FROM apoq_tasks WHERE state = 'running'"))
        until(lambda: worker.stats().running == 0)
        assert worker.is_healthy()
        worker.stop()
        assert claims(engine) == 0

    def test_a_failure_beyond_counting_is_written(self, engine, queue, worker, caplog):
        worker.use("t", lambda task: 1 / 0)
        worker.use("good", nothing)
        [id_] = insert(engine, "(type, fail_count, retry_limit) VALUES ('t', 2147483647, 2147483647)")

        worker.start()

        all_are_done(engine, queue)
        # No number of failures is beyond this limit.
        until(lambda: tasks(engine, [id_])[0].error)
        worker.stop()
        assert (state_of(engine, id_), claims(engine)) == (PENDING, 0)

    def test_an_attempt_of_a_stray_claim_below_counting_is_given_back(self, engine, queue, worker):
        """The twin of a rescue, of a live worker: what it claimed without learning of it."""
        worker.use("t", nothing)
        [id_] = insert(engine, "(type, attempt) VALUES ('t', -2147483648)")

        worker.start()

        until(lambda: state_of(engine, id_) == COMPLETED)


class TestForgedRescues:
    """A row may say that it was taken from dead workers, however often."""

    BACKLOG = 20_000

    def time_of_a_backlog(self, engine: sa.Engine, worker: Worker) -> float:
        """Return the seconds that a new worker takes for tasks that are there before it."""
        insert(engine, f"(type) SELECT 'good' FROM generate_series(1, {self.BACKLOG})")
        worker.use("good", nothing)
        worker.start()
        # Looking at the table would take more than the work itself.
        took = until(lambda: worker.stats().completed >= self.BACKLOG, 4 * SOON)
        worker.stop()
        return took

    def test_one_behind_a_backlog_slows_it_little(self, engine, make_worker):
        usual = min(self.time_of_a_backlog(engine, make_worker()) for _ in range(2))
        insert(engine, "(type, priority, process_at, rescue_count) VALUES ('good', -32768, 'epoch', 1)")

        assert self.time_of_a_backlog(engine, make_worker()) < 3 * usual

    def test_fewer_than_none_are_as_none(self, engine, queue, worker):
        worker.use("t", nothing)
        worker.use("good", nothing)
        worker.start()
        # Short ones, after which the worker claims ahead.
        all_are_done(engine, queue, 500)

        [id_] = insert(engine, "(type, rescue_count) VALUES ('t', -1)")

        until(lambda: state_of(engine, id_) == COMPLETED)


class TestForgedNotes:
    """Who may write into apoq_claims can note what it likes, in the name of whom it likes."""

    def test_one_of_the_number_of_a_workers_next_claim_stops_no_claim(self, engine, queue, worker):
        worker.use("good", nothing)
        worker.start()
        all_are_done(engine, queue)

        execute(
            engine,
            "INSERT INTO apoq_claims SELECT w.id, n, '{}' FROM apoq_workers w, generate_series(1, 100000) n "
            "ON CONFLICT DO NOTHING",
        )

        for _ in range(3):
            all_are_done(engine, queue)
        assert worker.is_healthy()


PAYLOADS = {
    "digits without end": ("apoq_cancelled", "9" * 5_000),
    "a number that is no bigint": ("apoq_cancelled", "9" * 19),
    "digits of another script": ("apoq_cancelled", "٣" * 3_000),
    "superscript digits": ("apoq_cancelled", "²" * 30),
    "nothing": ("apoq_cancelled", ""),
    "a notification of nobody's queue": ("apoq", "x" * 7_900),
}


class TestNotifications:
    """M7: any role that may connect can send them."""

    @pytest.mark.parametrize(("channel", "payload"), PAYLOADS.values(), ids=PAYLOADS)
    def test_a_forged_one_disturbs_nothing(self, engine, queue, make_worker, caplog, channel, payload):
        caplog.set_level(logging.INFO, "apoq")
        # So long that only a notification finds a task at once.
        worker = make_worker(poll_interval=timedelta(hours=1))
        worker.use("good", nothing)
        worker.start()
        all_are_done(engine, queue)

        for _ in range(20):
            with engine.begin() as connection:
                connection.execute(
                    sa.text("SELECT pg_notify(:channel, :payload)"), {"channel": channel, "payload": payload}
                )
            add(engine, queue)
            until(lambda: not left(engine), 2)

        assert failures(caplog) == []
        assert worker.is_healthy()

    def test_forged_cancellations_of_a_running_task_cost_few_lookups(self, engine, queue, worker):
        ended = threading.Event()
        worker.use("long", lambda task: ended.wait(SOON))
        add(engine, queue, type_="long")
        worker.start()
        until(lambda: worker.stats().running == 1)
        id_ = scalar(engine, "SELECT max(id) FROM apoq_tasks")
        began = time.monotonic()

        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            # Each commits by itself, for PostgreSQL tells equal ones of a transaction once.
            connection.exec_driver_sql(
                f"""
                DO $$ BEGIN FOR i IN 1..1000 LOOP
                    PERFORM pg_notify('apoq_cancelled', '{id_}'), pg_sleep(0.0003); COMMIT;
                END LOOP; END $$
                """
            )

        took = time.monotonic() - began
        ended.set()
        until(lambda: worker.stats().completed == 1)
        worker.stop()  # what it has counted arrives when its connections end
        scans = "SELECT idx_scan FROM pg_stat_user_tables WHERE relname = 'apoq_tasks'"
        until(lambda: scalar(engine, scans))
        assert scalar(engine, scans) < 50 + 100 * took

    @needs_procfs
    @pytest.mark.slow
    def test_a_flood_takes_no_memory_and_holds_up_no_stop(self, engine, url):
        with a_worker_apart(url, FLOODED) as process:
            assert process.stdout.readline() == "ready\n"
            end = time.monotonic() + 3
            with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                while time.monotonic() < end:
                    connection.exec_driver_sql(
                        "SELECT pg_notify('apoq', i || repeat('x', 7000)) FROM generate_series(1, 500) i"
                    )
                process.stdin.write("stop\n")
                process.stdin.flush()
                while process.poll() is None and time.monotonic() < end + 15:
                    connection.exec_driver_sql(
                        "SELECT pg_notify('apoq', i || repeat('x', 7000)) FROM generate_series(1, 500) i"
                    )
            found = json.loads(process.communicate(timeout=10)[0])

        assert found["grew"] < ROOM
        assert found["stopped_in"] < 4


def transactions(engine: sa.Engine) -> int:
    """Count what has been committed in this database."""
    with engine.connect() as connection:
        connection.exec_driver_sql("SELECT pg_stat_force_next_flush()")
        return connection.exec_driver_sql(
            "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"
        ).scalar_one()


class TestAnotherEncoding:
    """M8."""

    @pytest.fixture(params=["latin1", "win1252"])
    def make_other_worker(self, url, request) -> Iterator[Callable[..., Worker]]:
        """Make workers on an engine whose connections have another encoding."""
        engine = sa.create_engine(url, client_encoding=request.param)
        made: list[Worker] = []

        def make(*queues: Queue, **options) -> Worker:
            made.append(Worker(engine, *queues, **options))
            return made[-1]

        yield make
        for worker in made:
            worker.stop(timeout=5)
        engine.dispose()

    def test_a_character_that_it_has_not_stops_no_worker(self, engine, queue, make_other_worker, caplog):
        worker = make_other_worker()
        received = []
        worker.use("t", lambda task: received.append(task.data))
        worker.use("good", nothing)
        worker.start()
        all_are_done(engine, queue)

        insert(engine, """(type, data) VALUES ('t', '"€💥"')""")

        all_are_done(engine, queue)
        until(lambda: received)
        assert received == ["€💥"]
        assert worker.is_healthy()
        worker.stop()
        assert failures(caplog) == []

    def test_a_notification_of_one_ends_no_listening(self, engine, queue, make_other_worker, caplog):
        worker = make_other_worker(poll_interval=timedelta(hours=1))
        worker.use("good", nothing)
        worker.start()
        all_are_done(engine, queue)

        for _ in range(5):
            execute(engine, "SELECT pg_notify('apoq', '€💥')")
            add(engine, queue)
            until(lambda: not left(engine), 2)

        worker.stop()
        assert failures(caplog) == []

    def test_types_and_queues_of_other_characters_are_worked(self, engine, make_other_worker):
        queue = Queue("čeština 💖")
        worker = make_other_worker(queue)
        received = []
        worker.use("€", lambda task: received.append((task.type, task.queue)))

        add(engine, queue, type_="€")

        worker.start()
        until(lambda: received)
        worker.stop()
        assert received == [("€", "čeština 💖")]
