"""The metrics of a worker and of the database."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

import pytest
import sqlalchemy as sa
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from proxy import Proxy
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool
from waiting import patience

from apoq import Cancel, Queue, Snooze, Worker
from apoq.events import TaskLost, TaskSnoozed, TasksRescued
from apoq.metrics import DatabaseMetrics, database_registry, exposition

until = patience(20)

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(registry: CollectorRegistry) -> Samples:
    """Read the metrics as Prometheus does."""
    _, body = exposition(registry)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float:
    return found[name, tuple(sorted(labels.items()))]


@pytest.fixture
def add(engine, queue) -> Callable[..., None]:
    def add(type_: str, number: int = 1, **options: object) -> None:
        with Session(engine) as session, session.begin():
            for _ in range(number):
                queue.add(session, type_, **options)

    return add


class TestOfAWorker:
    @pytest.fixture
    def worker(self, make_worker) -> Worker:
        return make_worker(metrics=True)

    def test_each_series_is_zero_from_the_start(self, worker):
        worker.use("t", lambda task: None)

        found = samples(worker.metrics)

        for outcome in ("completed", "failed", "retried", "cancelled", "snoozed", "lost"):
            assert value(found, "apoq_tasks_total", queue="default", type="t", outcome=outcome) == 0
        assert value(found, "apoq_tasks_total", queue="other", type="other", outcome="rescued") == 0
        for name in ("apoq_task_seconds_count", "apoq_task_wait_seconds_count"):
            assert value(found, name, queue="default", type="t") == 0
        for name in ("apoq_slots_busy", "apoq_claims_total", "apoq_heartbeat_age_seconds", "apoq_connected"):
            assert value(found, name) == 0

    def test_it_counts_each_outcome(self, worker, add):
        def process(task):
            match task.data:
                case "fail" | "retry":
                    raise ValueError
                case "cancel":
                    raise Cancel
                case "snooze":
                    raise Snooze(3600)
                case "session":
                    task.session.execute(sa.text("SELECT 1"))

        worker.use("t", process)
        add("t", 3, data="complete")
        add("t", 2, data="session")
        for data in ("cancel", "snooze"):
            add("t", data=data)
        add("t", data="retry", retry_delay=3600)
        add("t", data="fail", retry_limit=0)

        worker.start()
        expected = {"completed": 5, "failed": 1, "retried": 1, "cancelled": 1, "snoozed": 1, "lost": 0}
        try:
            until(
                lambda: (
                    {
                        outcome: value(
                            samples(worker.metrics),
                            "apoq_tasks_total",
                            queue="default",
                            type="t",
                            outcome=outcome,
                        )
                        for outcome in expected
                    }
                    == expected
                )
            )
            found = samples(worker.metrics)
            assert value(found, "apoq_connected") == 1
        finally:
            worker.stop()

        assert value(found, "apoq_task_seconds_count", queue="default", type="t") == 9
        assert value(found, "apoq_task_wait_seconds_bucket", queue="default", type="t", le="+Inf") == 9
        assert value(found, "apoq_slots") == worker.options.concurrency
        assert value(found, "apoq_claims_total") >= 1
        assert value(samples(worker.metrics), "apoq_connected") == 0

    def test_a_task_that_was_taken_away_is_lost(self, worker, add, engine):
        def process(task):
            with engine.begin() as connection:
                connection.execute(sa.text("UPDATE apoq_tasks SET claim_token = 9"))

        worker.use("t", process)
        add("t")
        worker.start()
        its = {"queue": "default", "type": "t"}
        until(lambda: value(samples(worker.metrics), "apoq_tasks_total", outcome="lost", **its) == 1)
        worker.stop()

        assert value(samples(worker.metrics), "apoq_tasks_total", outcome="completed", **its) == 0

    def test_what_it_hears_of_tasks_without_a_processor_is_other(self, worker):
        lost = TaskLost(1, "unheard-of", "default", None, 1)
        worker.events.report(lost)
        worker.events.report(TasksRescued(3, None))

        found = samples(worker.metrics)

        assert value(found, "apoq_tasks_total", queue="default", type="other", outcome="lost") == 1
        assert value(found, "apoq_tasks_total", queue="other", type="other", outcome="rescued") == 3

    def test_the_histograms_hold_how_long_tasks_ran_and_waited(self, worker, add):
        worker.use("t", lambda task: time.sleep(0.03))
        add("t", process_at=datetime(2020, 1, 1, tzinfo=UTC))

        worker.start()
        try:
            until(lambda: worker.stats().completed)
        finally:
            worker.stop()
        found = samples(worker.metrics)

        its = {"queue": "default", "type": "t"}
        assert value(found, "apoq_task_seconds_bucket", le="0.025", **its) == 0
        assert value(found, "apoq_task_seconds_bucket", le="1800.0", **its) == 1
        assert 0.03 <= value(found, "apoq_task_seconds_sum", **its) < 60
        assert value(found, "apoq_task_wait_seconds_bucket", le="1800.0", **its) == 0
        assert value(found, "apoq_task_wait_seconds_sum", **its) > 1e8

    def test_its_labels_have_no_ids(self, worker, add):
        worker.use("t", lambda task: None)
        add("t", 5)
        worker.start()
        try:
            until(lambda: worker.stats().completed == 5)
        finally:
            worker.stop()

        labels = {name for _, found in samples(worker.metrics) for name, _ in found}

        assert labels == {"queue", "type", "outcome", "le"}

    def test_a_registry_can_be_given_but_only_to_one_worker(self, make_worker):
        registry = CollectorRegistry()
        worker = make_worker(metrics=registry)
        assert worker.metrics is registry

        with pytest.raises(ValueError, match="without the metrics of another worker"):
            make_worker(metrics=registry)
        with pytest.raises(TypeError, match="metrics must be True, False or a CollectorRegistry, got 9400"):
            make_worker(metrics=9400)

    def test_a_forked_child_begins_at_zero(self, url):
        program = (
            "import os, sqlalchemy as sa\n"
            "from apoq import Worker\n"
            "from apoq.events import TasksRescued\n"
            "from apoq.metrics import exposition\n"
            "worker = Worker(sa.create_engine('postgresql+psycopg://localhost/app'), metrics=True)\n"
            "worker.events.report(TasksRescued(3, None))\n"
            "child = os.fork()\n"
            "if child: os.waitpid(child, 0)\n"
            "text = exposition(worker.metrics)[1].decode()\n"
            "print(next(line for line in text.splitlines() if 'rescued' in line)[-3:], flush=True)\n"
            "os._exit(0)\n"
        )

        said = subprocess.check_output([sys.executable, "-W", "ignore", "-c", program], text=True)

        assert said == "0.0\n3.0\n"

    def test_without_them_nothing_is_counted(self, make_worker):
        worker = make_worker()

        assert worker.metrics is None
        assert not worker.events.has_listeners(TaskSnoozed)  # only metrics, and the log while it is at debug


class TestOfTheDatabase:
    @pytest.fixture
    def metrics(self, engine) -> Callable[..., Samples]:
        made = []

        def read(engine: sa.Engine = engine, **options: object) -> Samples:
            if not made:
                made.append(DatabaseMetrics(engine, **{"timeout": 20, **options}))
            registry = CollectorRegistry()
            registry.register(made[0])
            return samples(registry)

        return read

    def test_they_are_the_tasks_by_queue_and_state(self, engine, add, metrics):
        add("t", 3)
        add("t", 2, delay=3600)
        with engine.begin() as connection:
            connection.execute(
                sa.text("INSERT INTO apoq_tasks (type, state, waiting_for) VALUES ('t', 'waiting', 'key')")
            )
            Queue("paused").pause(connection)

        found = metrics()

        counts = {"ready": 3, "scheduled": 2, "waiting": 1, "running": 0, "completed": 0, "failed": 0}
        for state, count in counts.items():
            assert value(found, "apoq_tasks", queue="default", state=state) == count
            assert value(found, "apoq_tasks_bounded", queue="default", state=state) == 0
        assert value(found, "apoq_lag_seconds", queue="default") > 0
        assert value(found, "apoq_waiting", queue="default", reason="key") == 1
        assert value(found, "apoq_waiting", queue="default", reason="parents") == 0
        assert value(found, "apoq_queue_paused", queue="default") == 0
        assert value(found, "apoq_workers_alive") == 0
        assert value(found, "apoq_schedule_late_seconds") == 0
        assert value(found, "apoq_table_bytes") > 8192
        assert value(found, "apoq_dead_tuples") >= 0
        assert value(found, "apoq_database_up") == 1

    def test_a_queue_that_has_emptied_goes_to_zero_and_stays(self, engine, add, metrics):
        add("t", 3)
        assert value(metrics(), "apoq_tasks", queue="default", state="ready") == 3
        with engine.begin() as connection:
            connection.execute(sa.text("DELETE FROM apoq_tasks"))

        found = metrics()

        assert value(found, "apoq_tasks", queue="default", state="ready") == 0
        assert value(found, "apoq_lag_seconds", queue="default") == 0

    def test_a_queue_that_is_no_longer_read_is_not_exported_as_empty(self, engine, metrics):
        def add_to(numbers: range) -> None:
            with engine.begin() as connection:
                for number in numbers:
                    Queue(f"queue {number:03}").add(connection, "t")

        add_to(range(50, 150))
        assert value(metrics(), "apoq_tasks", queue="queue 149", state="ready") == 1
        add_to(range(50))

        found = metrics()

        queues = {dict(labels)["queue"] for name, labels in found if name == "apoq_tasks"}
        assert queues == {f"queue {number:03}" for number in range(100)}

    def test_several_scrapes_at_once_are_all_answered(self, engine):
        with engine.begin() as connection:
            for number in range(100):
                Queue(f"queue {number:03}").add(connection, "t")
        registry, failures = database_registry(engine, timeout=20), []

        def scrape() -> None:
            try:
                for _ in range(3):
                    samples(registry)
            except RuntimeError as error:
                failures.append(error)

        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        threads = [threading.Thread(target=scrape) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)

        assert failures == []

    def test_counts_are_bounded(self, engine, metrics):
        with engine.begin() as connection:
            connection.execute(
                sa.text("INSERT INTO apoq_tasks (type) SELECT 't' FROM generate_series(1, 10050)")
            )

        found = metrics()

        assert value(found, "apoq_tasks", queue="default", state="ready") == 10_000
        assert value(found, "apoq_tasks_bounded", queue="default", state="ready") == 1
        assert value(found, "apoq_tasks_bounded", queue="default", state="scheduled") == 0

    def test_a_schedule_that_does_not_tick_is_late(self, engine, queue, metrics):
        with engine.begin() as connection:
            queue.schedule(connection, "often", "t", every=60)
            connection.execute(sa.text("UPDATE apoq_schedules SET next_at = now() - interval '5 min'"))

        assert 299 < value(metrics(), "apoq_schedule_late_seconds") < 330

    def test_a_database_that_hangs_holds_up_no_scrape(self, url, metrics, caplog):
        proxy = Proxy(url)
        engine = sa.create_engine(proxy.url, poolclass=NullPool)
        until(lambda: value(metrics(engine, timeout=0.5), "apoq_database_up") == 1)
        caplog.clear()
        proxy.cut()
        for _ in range(3):
            began = time.monotonic()
            assert metrics() == {("apoq_database_up", ()): 0}
            assert time.monotonic() - began < 5
            assert [thread.name for thread in threading.enumerate()].count("apoq-metrics") <= 1
        proxy.heal()
        until(lambda: value(metrics(), "apoq_database_up") == 1)
        proxy.close()
        said = [record.message for record in caplog.records if "the metrics lack" in record.message]
        assert len(said) == 1
        assert said[0].startswith("the metrics lack the database until they can be read: ")

    def test_a_table_that_is_locked_holds_up_no_scrape(self, engine, metrics):
        until(lambda: value(metrics(timeout=0.5), "apoq_database_up") == 1)
        with engine.begin() as connection:
            connection.exec_driver_sql("LOCK TABLE apoq_tasks IN ACCESS EXCLUSIVE MODE")

            found = metrics()

            assert value(found, "apoq_database_up") == 0
        until(lambda: value(metrics(), "apoq_database_up") == 1)

    def test_without_tables_it_is_not_up(self, empty_url, metrics, caplog):
        found = metrics(sa.create_engine(empty_url, poolclass=NullPool))

        assert value(found, "apoq_database_up") == 0
        assert "apoq's tables" in caplog.text

    def test_an_engine_must_be_given(self):
        with pytest.raises(TypeError, match="engine must be an Engine or an AsyncEngine, got str"):
            database_registry("postgresql://localhost/app")

    def test_it_writes_openmetrics_if_that_is_asked_for(self, engine):
        content_type, body = exposition(
            database_registry(engine), "application/openmetrics-text; version=1.0.0"
        )

        assert content_type.startswith("application/openmetrics-text")
        assert body.endswith(b"# EOF\n")
