"""Limits: how many tasks of a key, of a type or of a queue run at once."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import probe
import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session
from waiting import patience

from apoq import InvalidLimit, InvalidTask, Limit, Queue, Snooze, Task, prepare
from apoq.core.places import KEY, Share
from apoq.core.states import CANCELLED, COMPLETED, FAILED, PENDING, RUNNING, WAITING
from apoq.testing import drain, travel
from apoq.worker.claim_log import MIN_FORGOTTEN

until = patience(20)


class Running:
    """Counts the tasks that run at once, by key, and lets them end."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.most: Counter[str] = Counter()
        self._now: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._may_end: Counter[int] = Counter()
        self.holds = True

    def __call__(self, task) -> None:
        key = str(task.data["key"])
        with self._lock:
            self.begun.append(task.data["n"])
            self._now[key] += 1
            self.most[key] = max(self.most[key], self._now[key])
        while self.holds and not self._may_end[task.data["n"]] and not task.should_stop:
            time.sleep(0.002)
        with self._lock:
            self._now[key] -= 1

    def end(self, *numbers: int) -> None:
        for number in numbers:
            self._may_end[number] = 1


@pytest.fixture
def running() -> Running:
    return Running()


@pytest.fixture
def add(engine, queue) -> Callable[..., int]:
    def add(number: int, key: str | None = "a", type: str = "t", **options) -> int:
        with Session(engine) as session, session.begin():
            return queue.add(session, type, {"n": number, "key": key}, key=key, **options).id

    return add


@pytest.fixture
def states(engine) -> Callable[[], dict[int, str]]:
    def states() -> dict[int, str]:
        with engine.connect() as connection:
            rows = connection.execute(sa.text("SELECT (data ->> 'n')::int, state FROM apoq_tasks"))
            return dict(rows.all())

    return states


@pytest.fixture
def limit(engine, queue):
    def limit(at_most: int | None, **of) -> None:
        with Session(engine) as session, session.begin():
            queue.limit(session, at_most, **of)

    return limit


def started(worker, running, **options):
    worker.use("t", running, **options)
    worker.start()
    return worker


class TestOfAKey:
    def test_one_of_each_key_runs_at_once_and_the_others_wait(self, make_worker, running, add, states):
        worker = started(make_worker(concurrency=4), running, limit=Limit(1, key=True))
        for number, key in enumerate("aab"):
            add(number, key)
        until(lambda: states() == {0: RUNNING, 1: WAITING, 2: RUNNING})

        running.end(0)
        until(lambda: states() == {0: COMPLETED, 1: RUNNING, 2: RUNNING})
        running.end(1, 2)
        until(lambda: set(states().values()) == {COMPLETED})
        assert running.most == {"a": 1, "b": 1}
        assert worker.stats().completed == 3

    def test_a_waiting_task_keeps_its_attempt_and_its_token(self, engine, make_worker, running, add, states):
        started(make_worker(concurrency=4), running, limit=Limit(1, key=True))
        add(0)
        until(lambda: states() == {0: RUNNING})
        waiting_id = add(1)
        until(lambda: states()[1] == WAITING)
        with Session(engine) as session:
            task = session.get_one(Task, waiting_id)

        assert (task.attempt, task.claim_token, task.worker_id, task.claimed_at) == (0, 0, None, None)
        assert task.waiting_for == "key"
        assert task.waiting_since is not None
        running.end(0, 1)
        until(lambda: states()[1] == COMPLETED)
        with Session(engine) as session:
            task = session.get_one(Task, waiting_id)
        assert (task.attempt, task.waiting_for, task.waiting_since, task.held_key) == (1, None, None, None)

    def test_the_next_one_is_that_of_the_highest_priority(self, make_worker, running, add, states):
        started(make_worker(concurrency=4), running, limit=Limit(1, key=True))
        add(0)
        until(lambda: states() == {0: RUNNING})
        add(1)
        add(2, priority=5)
        until(lambda: list(states().values()).count(WAITING) == 2)
        running.holds = False
        until(lambda: set(states().values()) == {COMPLETED})

        assert running.begun == [0, 2, 1]

    def test_tasks_without_a_key_are_not_limited(self, make_worker, running, add, states):
        started(make_worker(concurrency=4), running, limit=Limit(1, key=True))
        for number in range(3):
            add(number, key=None)
        until(lambda: set(states().values()) == {RUNNING})

    def test_without_a_limit_a_key_means_nothing(self, make_worker, running, add, states):
        started(make_worker(concurrency=4), running)
        for number in range(3):
            add(number)
        until(lambda: set(states().values()) == {RUNNING})

    def test_of_two_workers_both_keep_it(self, make_worker, running, add, states):
        for _ in range(2):
            started(make_worker(concurrency=4), running, limit=Limit(2, key=True))
        for number in range(6):
            add(number)
        until(lambda: sorted(states().values()) == [RUNNING] * 2 + [WAITING] * 4)
        until(lambda: len(running.begun) == 2)
        running.holds = False
        until(lambda: set(states().values()) == {COMPLETED})
        assert running.most == {"a": 2}


class TestTheWaysOut:
    """However an attempt ends, the next task of the key begins."""

    @pytest.fixture
    def waiting(self, make_worker, running, add, states):
        """Let the first task run, and the second one wait."""
        worker = started(make_worker(concurrency=2), running, limit=Limit(1, key=True), retry_limit=0)
        self.first = add(0)
        until(lambda: states() == {0: RUNNING})
        add(1)
        until(lambda: states() == {0: RUNNING, 1: WAITING})
        running.end(1)
        return worker

    @pytest.fixture
    def failing(self, make_worker, add, states):
        """Let the first task end by an exception."""

        def run(error: BaseException, **options) -> None:
            def process(task) -> None:
                if task.data["n"] == 0 and task.attempt == 1:
                    until(lambda: states().get(1) == WAITING)
                    raise error

            worker = make_worker(concurrency=2)
            worker.use("t", process, limit=Limit(1, key=True), **options)
            worker.start()
            add(0)
            until(lambda: states() == {0: RUNNING})
            add(1)
            until(lambda: states()[1] == COMPLETED)

        return run

    def test_it_fails(self, failing, states):
        failing(ValueError(), retry_limit=0)

        assert states()[0] == FAILED

    def test_it_is_retried_later(self, failing, states):
        failing(ValueError(), retry_delay=3600)

        assert states()[0] == PENDING

    def test_it_is_snoozed(self, failing, states):
        failing(Snooze(3600))

        assert states()[0] == PENDING

    def test_it_takes_too_long(self, failing, states):
        failing(TimeoutError(), retry_limit=0)

        assert states()[0] == FAILED

    def test_a_caller_cancels_it(self, engine, queue, waiting, states):
        with Session(engine) as session, session.begin():
            assert queue.cancel(session, self.first)

        until(lambda: states() == {0: CANCELLED, 1: COMPLETED}, 5)

    def test_it_is_deleted(self, engine, waiting, states):
        with engine.begin() as connection:
            connection.execute(sa.delete(Task).where(Task.id == self.first))

        until(lambda: states() == {1: COMPLETED})

    def test_another_program_ends_it(self, engine, waiting, states):
        with engine.begin() as connection:
            connection.execute(sa.update(Task).where(Task.id == self.first).values(state=COMPLETED))

        until(lambda: states() == {0: COMPLETED, 1: COMPLETED})

    def test_its_worker_stops(self, engine, waiting, make_worker, running, states):
        waiting.stop(timeout=0)
        until(lambda: states() == {0: PENDING, 1: PENDING})
        other = make_worker(concurrency=2)
        running.end(0)
        started(other, running, limit=Limit(1, key=True))

        until(lambda: states() == {0: COMPLETED, 1: COMPLETED})
        assert running.most == {"a": 1}

    def test_a_waiting_one_is_cancelled(self, engine, queue, waiting, running, add, states):
        third = add(2)
        until(lambda: states()[2] == WAITING)
        with Session(engine) as session, session.begin():
            assert queue.cancel(session, third)
        running.end(0)

        until(lambda: states() == {0: COMPLETED, 1: COMPLETED, 2: CANCELLED})


class TestHandingOver:
    def test_it_waits_for_no_results_of_other_tasks(self, make_worker, running, add, states):
        worker = started(make_worker(concurrency=4), running, limit=Limit(1, key=True))
        running.holds = False
        with probe.held_up(probe.settler(worker)) as is_held_up:
            add(0, key=None)
            until(is_held_up.is_set)
            for number in range(1, 4):
                add(number)
            until(lambda: states() == {0: RUNNING, 1: COMPLETED, 2: COMPLETED, 3: COMPLETED})
        until(lambda: states()[0] == COMPLETED)

    def test_it_waits_for_no_claim_of_other_tasks(self, make_worker, running, add, states):
        worker = started(make_worker(concurrency=4), running, limit=Limit(1, key=True))
        for number in range(2):
            add(number)
        until(lambda: states() == {0: RUNNING, 1: WAITING})
        with probe.held_up(probe.claimer(worker)) as is_held_up:
            probe.claimer(worker).wake()
            until(is_held_up.is_set)
            running.end(0)
            until(lambda: states() == {0: COMPLETED, 1: RUNNING})
        running.end(1)

    def test_a_task_that_another_worker_has_unblocked_waits_for_no_poll(
        self, engine, make_worker, running, add, states
    ):
        """The survey that finds it has reported it before, and it was blocked then."""
        worker = started(
            make_worker(concurrency=4, poll_interval=timedelta(seconds=60)), running, limit=Limit(1, key=True)
        )
        add(0)
        until(lambda: states() == {0: RUNNING})
        waiting_id = add(1, delay=0.3)
        until(lambda: states()[1] == WAITING)
        with engine.begin() as connection:
            connection.execute(sa.update(Task).where(Task.id != waiting_id).values(state=COMPLETED))
            unblocked = {"state": PENDING, "waiting_for": None, "waiting_since": None}
            connection.execute(sa.update(Task).where(Task.id == waiting_id).values(**unblocked))
        running.end(1)
        probe.claimer(worker).look_for_tasks()

        until(lambda: states()[1] == COMPLETED)

    def test_slots_that_were_reserved_are_free_again_if_no_task_was_waiting(
        self, queue, make_worker, running, add, states
    ):
        worker = make_worker(concurrency=1, poll_interval=timedelta(hours=1))
        started(worker, running, limit=Limit(1, key=True))
        running.holds = False
        add(0)
        until(lambda: states() == {0: COMPLETED} and probe.is_idle(worker))
        probe.executor(worker).run_time = 10.0  # so that no task is claimed ahead
        with probe.held_up(probe.claims_of_free_places(worker), "hand_over") as is_held_up:
            probe.runtime(worker).hand_over.expect(queue, {Share(KEY, "a"): 1})
            until(is_held_up.is_set)
            add(1, key=None)
            until(lambda: probe.waits_for_room(worker))
        until(lambda: states() == {0: COMPLETED, 1: COMPLETED})

    def test_a_queue_for_which_it_fails_holds_up_no_other(self, engine, queue, make_worker, running, states):
        prepare(engine, schema="bad")
        worker = make_worker(Queue(schema="bad"), queue, concurrency=4)
        started(worker, running, limit=Limit(1, key=True))
        with Session(engine) as session, session.begin():
            for number, its in enumerate(worker.queues):
                its.add(session, "t", {"n": number, "key": its.schema}, key="a")
        until(lambda: len(running.begun) == 2)
        with Session(engine) as session, session.begin():
            for number, its in enumerate(worker.queues):
                its.add(session, "t", {"n": number + 2, "key": its.schema}, key="a")
        until(lambda: states() == {1: RUNNING, 3: WAITING})
        with engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE bad.apoq_limits RENAME TO hidden")
        running.end(0)
        until(lambda: probe.fails_to_hand_over(worker, worker.queues[0]))
        running.end(1, 3)

        until(lambda: states() == {1: COMPLETED, 3: COMPLETED}, 3)
        with engine.begin() as connection:
            connection.exec_driver_sql("ALTER TABLE bad.hidden RENAME TO apoq_limits")
        until(lambda: 2 in running.begun)
        running.end(2)

    def test_a_worker_that_stops_hands_over_until_its_last_task_has_ended(
        self, make_worker, running, add, states
    ):
        """And not only then: the next task of a key must not wait for the longest one of the worker."""
        ends = [threading.Event(), threading.Event()]
        worker = make_worker(concurrency=3)
        worker.use("long", lambda task: ends[task.data["n"]].wait(60), limit=Limit(1, key=True))
        started(worker, running, limit=Limit(1, key=True))
        for number, key in enumerate(("a", None)):
            add(number, key, type="long")
        until(lambda: states() == {0: RUNNING, 1: RUNNING})
        add(2)
        until(lambda: states()[2] == WAITING)
        stopping = threading.Thread(target=worker.stop)
        stopping.start()
        until(lambda: probe.is_closed(probe.executor(worker)))
        ends[0].set()

        until(lambda: states() == {0: COMPLETED, 1: RUNNING, 2: PENDING})
        ends[1].set()
        stopping.join(60)


class TestWork:
    def test_a_task_that_takes_too_long_is_failed_while_it_still_runs(self, worker, running, add, states):
        may_end = threading.Event()
        worker.use("t", lambda _: may_end.wait(60), limit=Limit(1, key=True), timeout=0.2, retry_limit=0)
        add(0)
        working = threading.Thread(target=worker.work)
        working.start()

        until(lambda: states() == {0: FAILED})
        assert working.is_alive()
        may_end.set()
        working.join(60)

    def test_a_worker_that_only_hands_over_leaves_no_notes_of_its_claims(self, engine, make_worker, add):
        """Their number grew with each task, and each heartbeat compared all with those that it knows."""
        notes: list[int] = []

        def count_notes(_: object) -> None:
            with engine.connect() as connection:
                notes.append(connection.exec_driver_sql("SELECT count(*) FROM apoq_claims").scalar_one())

        for number in range(120):
            add(number)
        worker = make_worker(concurrency=4)
        worker.use("t", count_notes, limit=Limit(1, key=True))
        worker.start()
        until(lambda: len(notes) == 120)

        assert max(notes) < 3 * MIN_FORGOTTEN

    def test_it_hands_over_to_other_workers(self, engine, queue, worker, add, states):
        worker.use("t", lambda _: None, limit=Limit(1, key=True))
        add(0)
        add(1)
        while worker.work():
            pass

        assert set(states().values()) == {COMPLETED}


class TestOfATypeAndAQueue:
    def test_so_many_tasks_of_a_type_run(self, make_worker, running, add, states):
        started(make_worker(concurrency=4), running, limit=Limit(2))
        for number in range(4):
            add(number, key=None)
        until(lambda: sorted(states().values()) == [RUNNING] * 2 + [WAITING] * 2)
        until(lambda: len(running.begun) == 2)
        running.holds = False
        until(lambda: set(states().values()) == {COMPLETED})

        assert running.most == {"None": 2}

    def test_so_many_tasks_of_a_queue_run_and_the_others_stay_pending(self, engine, make_worker, running):
        queue = Queue("limited", limit=Limit(2))
        started(make_worker(queue, concurrency=4), running)
        with Session(engine) as session, session.begin():
            for number in range(4):
                queue.add(session, "t", {"n": number, "key": "q"}, key="k" if number % 2 else None)
        until(lambda: len(running.begun) == 2)
        with engine.connect() as connection:
            found = connection.scalars(sa.select(Task.state)).all()
        assert sorted(found) == [PENDING] * 2 + [RUNNING] * 2
        running.holds = False
        until(lambda: len(running.begun) == 4)

        assert running.most == {"q": 2}

    def test_a_plain_claim_takes_nothing_of_a_type_with_a_limit(self, engine, queue, make_worker, add, limit):
        """So the first limit is exact for workers that don't know of it."""
        worker = make_worker(concurrency=4)
        worker.use("t", lambda _: None)
        limit(0, type="t")
        add(0, key=None)

        assert worker.work() is None
        limit(None, type="t")
        until(lambda: worker.work() is not None)


class TestStrictOrder:
    STRICT = Limit(1, key=True, order="strict")

    def test_a_task_does_not_begin_before_the_one_before_it_has_ended(self, worker, add, states):
        failed = []

        def process(task) -> None:
            failed.append(task.data["n"])
            if task.data["n"] == 0 and task.attempt < 3:
                raise ValueError

        worker.use("t", process, limit=self.STRICT, retry_delay=0.05)
        for number in range(3):
            add(number, priority=number)
        worker.start()
        until(lambda: set(states().values()) == {COMPLETED})

        assert failed == [0, 0, 0, 1, 2]

    def test_the_last_step_of_a_group_does_not_hold_up_its_members(self, engine, queue, worker):
        """Its id is lower than theirs, and it waits for them."""
        ran = []
        worker.use("t", lambda task: ran.append(task.data["n"]), limit=self.STRICT)
        with Session(engine) as session, session.begin(), queue.group(session) as group:
            group.then("t", {"n": 2}, key="k")
            for number in range(2):
                group.add("t", {"n": number}, key="k")
        worker.start()

        until(lambda: len(ran) == 3)
        assert ran == [0, 1, 2]

    def test_after_a_failure_the_next_one_begins(self, worker, add, states):
        worker.use("t", fail_first, limit=self.STRICT, retry_limit=0)
        add(0)
        add(1)
        worker.start()

        until(lambda: states() == {0: FAILED, 1: COMPLETED})

    def test_or_the_key_is_held_until_the_failed_task_is_retried(self, engine, queue, worker, add, states):
        held = Limit(1, key=True, order="strict", after_failure="hold")
        worker.use("t", fail_first, limit=held, retry_limit=0)
        first = add(0)
        add(1)
        worker.start()
        until(lambda: states() == {0: FAILED, 1: WAITING})
        add(2, key="b")
        until(lambda: states()[2] == COMPLETED)
        assert states()[1] == WAITING

        with Session(engine) as session, session.begin():
            session.execute(sa.update(Task).where(Task.id == first).values(data={"n": 7, "key": "a"}))
            assert queue.retry(session, first)
        until(lambda: states() == {7: COMPLETED, 1: COMPLETED, 2: COMPLETED})


def fail_first(task) -> None:
    if task.data["n"] == 0:
        raise ValueError


class TestChanges:
    def test_a_raised_limit_lets_more_begin(self, make_worker, running, add, states, limit):
        started(make_worker(concurrency=4), running, limit=Limit(1, key=True))
        for number in range(3):
            add(number)
        until(lambda: sorted(states().values()) == [RUNNING, WAITING, WAITING])
        limit(2, key="a")
        until(lambda: sorted(states().values()) == [RUNNING, RUNNING, WAITING])

        limit(None, key="a")
        running.holds = False
        until(lambda: set(states().values()) == {COMPLETED})

    def test_a_removed_limit_unblocks_all(self, engine, queue, make_worker, running, add, states, limit):
        started(make_worker(concurrency=4), running)
        limit(1, key="a")
        for number in range(4):
            add(number)
        until(lambda: sorted(states().values()) == [RUNNING, WAITING, WAITING, WAITING])
        limit(None, key="a")

        until(lambda: set(states().values()) == {RUNNING})
        with Session(engine) as session:
            assert queue.limits(session) == []

    def test_a_lowered_limit_is_exact_from_the_commit_on(self, make_worker, running, add, states, limit):
        started(make_worker(concurrency=8), running, limit=Limit(4, key=True))
        for number in range(8):
            add(number)
        until(lambda: sorted(states().values()) == [RUNNING] * 4 + [WAITING] * 4)
        until(lambda: len(running.begun) == 4)
        limit(1, key="a")
        first = running.begun[:4]
        running.end(*first[:3])
        until(lambda: list(states().values()).count(COMPLETED) == 3)
        assert len(running.begun) == 4

        running.end(first[3])
        until(lambda: len(running.begun) == 5)
        assert list(states().values()).count(RUNNING) <= 1
        running.holds = False
        until(lambda: set(states().values()) == {COMPLETED})

    def test_0_pauses_a_key(self, make_worker, running, add, states, limit):
        limit(0, key="a")
        started(make_worker(concurrency=4), running)
        add(0)
        add(1, key="b")
        until(lambda: states() == {0: WAITING, 1: RUNNING})
        limit(None, key="a")

        until(lambda: states() == {0: RUNNING, 1: RUNNING})

    def test_what_the_code_declares_is_in_the_database(self, engine, queue, make_worker, limit):
        worker = make_worker(concurrency=1)
        worker.use("t", print, limit=Limit(1, key=True, order="strict", after_failure="hold"))
        worker.work()
        limit(3, key="x")
        with Session(engine) as session:
            of_key, of_type = queue.limits(session)

        assert (of_key.key, of_key.at_most, of_key.declared) == ("x", 3, None)
        assert (of_type.type, of_type.at_most, of_type.declared) == ("t", 1, 1)
        assert (of_type.is_of_key, of_type.is_strict, of_type.holds) == (True, True, True)

    def test_an_older_release_does_not_undo_a_limit(self, engine, queue, make_worker, caplog):
        now = datetime.now(UTC)
        for at_most, release in ((5, now), (2, now - timedelta(days=1))):
            worker = make_worker(concurrency=1, release=release)
            worker.use("t", print, limit=Limit(at_most))
            worker.work()
        with Session(engine) as session:
            assert [each.at_most for each in queue.limits(session)] == [5]
        assert "was declared by a later release" in caplog.text

    def test_an_older_worker_that_declares_the_same_limit_logs_nothing(
        self, engine, queue, make_worker, caplog
    ):
        now = datetime.now(UTC)
        for release in (now, now - timedelta(seconds=1)):
            worker = make_worker(concurrency=1, release=release)
            worker.use("t", print, limit=Limit(5))
            worker.work()

        assert "later release" not in caplog.text

    def test_a_set_limit_survives_the_next_start(self, engine, queue, make_worker, limit):
        limit(7, type="t")
        worker = make_worker(concurrency=1)
        worker.use("t", print, limit=Limit(2))
        worker.work()
        with Session(engine) as session:
            assert [(each.at_most, each.declared) for each in queue.limits(session)] == [(7, 2)]


class TestAdding:
    def test_the_key_of_a_typed_task_is_made_from_its_arguments(self, session, queue):
        @queue.task(type="charge", limit=Limit(2, key=lambda account_id, **_: account_id))
        def charge(account_id: int, amount: int = 1) -> None: ...

        assert charge.add(session, 7).key == "7"
        assert charge.using(key="other").add(session, 7).key == "other"
        charge.add_many(session, [charge.call(8), charge.call(9)])
        found = session.scalars(sa.select(Task.key).order_by(Task.id)).all()
        assert found == ["7", "other", "8", "9"]

    @pytest.mark.parametrize("many", [1, 7_000])
    def test_add_many_takes_one_key_or_a_function(self, session, queue, many):
        items = [{"n": number} for number in range(many)]
        assert queue.add_many(session, "t", items, key="all") == many
        assert queue.add_many(session, "t", items, key=lambda item: item["n"] % 3 or None) == many
        found = session.execute(sa.select(Task.key, sa.func.count()).group_by(Task.key)).all()

        assert sum(count for _, count in found) == 2 * many
        assert {key for key, _ in found} == {"all", None} | ({"1", "2"} if many > 1 else set())

    def test_a_replaced_task_has_the_new_key(self, session, queue):
        queue.add(session, "t", unique_key="u", key="a")
        task = queue.add(session, "t", unique_key="u", key="b", on_conflict="replace")
        session.refresh(task)

        assert task.key == "b"

    def test_a_schedules_tasks_have_the_key_of_its_arguments(self, session, queue):
        @queue.task(type="digest", limit=Limit(1, key=lambda user_id: user_id))
        def digest(user_id: int) -> None: ...

        assert queue.schedule(session, "digest-7", digest.call(7), every=60).key == "7"
        assert queue.schedule(session, "other", digest.call(7), every=60, key="k").key == "k"
        with travel(session, timedelta(minutes=2)):
            drain(session, queue)
        assert set(session.scalars(sa.select(Task.key))) == {"7", "k"}

    def test_drain_runs_tasks_with_keys(self, session, queue):
        @queue.task(type="t", limit=Limit(1, key=lambda n: n))
        def process(n: int) -> None: ...

        for number in (1, 1, 2):
            process.add(session, number)

        assert [task.state for task in drain(session, queue)] == [COMPLETED] * 3

    def test_drain_runs_tasks_of_types_and_queues_with_limits(self, session, queue):
        @queue.task(type="t")
        def process() -> None: ...

        queue.limit(session, 2, type="t")
        queue.limit(session, 2)
        process.add(session)

        assert [task.state for task in drain(session, queue)] == [COMPLETED]


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((-1,), "at_most must be a whole number from 0 to 10,000 for a type or a queue, got -1"),
            ((1_001, True), "at_most must be a whole number from 0 to 1,000 for each key, got 1001"),
            ((1.5,), "at_most must be a whole number"),
            ((True,), "at_most must be a whole number"),
            ((1, "k"), "key must be a function"),
            ((1, True, "fifo"), "order must be 'due' or 'strict', got 'fifo'"),
            ((2, True, "strict"), 'order="strict" needs a key and at_most=1'),
            ((1, None, "strict"), 'order="strict" needs a key and at_most=1'),
            ((1, True, "due", "hold"), 'after_failure="hold" needs order="strict"'),
            ((1, True, "strict", "stop"), "after_failure must be 'continue' or 'hold', got 'stop'"),
        ],
    )
    def test_a_limit_that_can_not_be(self, arguments, message):
        with pytest.raises(InvalidLimit, match=message.replace("(", r"\(")):
            Limit(*arguments)

    def test_a_limit_that_is_none(self, worker, queue):
        with pytest.raises(InvalidLimit, match=r"limit must be a Limit, such as Limit\(2\), got 2"):
            worker.use("t", print, limit=2)
        with pytest.raises(InvalidLimit, match="limit must be a Limit"):
            queue.task(type="u", limit="2")(lambda: None)

    def test_a_function_where_there_are_no_arguments(self, worker):
        with pytest.raises(InvalidLimit, match="key must be True, because only typed tasks have arguments"):
            worker.use("t", print, limit=Limit(2, key=len))

    def test_a_queue_with_a_limit_of_each_key(self):
        with pytest.raises(InvalidLimit, match="the limit of a queue must have no key"):
            Queue("keyed", limit=Limit(2, key=True))

    def test_two_limits_of_one_queue(self):
        first = Queue("twice", limit=Limit(2))
        assert Queue("twice").limited_to == first.limited_to
        with pytest.raises(InvalidLimit, match=r"Queue\('twice'\) must have one limit"):
            Queue("twice", limit=Limit(3))

    @pytest.mark.parametrize(
        ("key", "message"),
        [
            ("", "must"),
            ("x" * 256, "255"),
            (1.5, "text, a whole number or None"),
            (b"k", "text"),
            (True, "text"),
        ],
    )
    def test_a_key_that_can_not_be(self, session, queue, key, message):
        for given in (key, lambda _: key):
            with pytest.raises(InvalidTask, match=message):
                queue.add(session, "t", key=given)
            with pytest.raises(InvalidTask, match=message):
                queue.add_many(session, "t", [{}], key=given)

    def test_a_key_function_that_raises(self, session, queue):
        @queue.task(type="t", limit=Limit(1, key=lambda n: 1 // n))
        def process(n: int) -> None: ...

        with pytest.raises(ZeroDivisionError):
            process.add(session, 0)
        assert session.scalars(sa.select(Task)).all() == []

    def test_a_type_and_a_key(self, session, queue):
        with pytest.raises(InvalidLimit, match="type and key can't both be given"):
            queue.limit(session, 1, type="t", key="k")
        with pytest.raises(InvalidLimit, match="from 0 to 1,000"):
            queue.limit(session, 1_001, key="k")
