"""Queues with the same name and schema share their typed tasks."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
from sqlalchemy.orm import Session

from apoq import InvalidProcessor, Queue, Worker, prepare
from apoq.testing import drain


def add(engine, task, *args) -> None:
    with Session(engine) as session, session.begin():
        task.add(session, *args)


def define(queue: Queue, run: Callable[[int], object], type: str = "send"):
    """Define the same function on a queue, as an application factory does."""

    @queue.task(type=type)
    def send(n: int) -> None:
        run(n)

    return send


def print_it(n: int) -> None:
    print(n)


@pytest.mark.parametrize("schema", [None, "jobs"])
def test_a_worker_runs_the_typed_tasks_of_an_equal_queue(engine, schema):
    ran = []
    if schema is not None:
        with engine.begin() as connection:
            connection.exec_driver_sql(f"CREATE SCHEMA {schema}")
        prepare(engine, schema=schema)
    emails = Queue("emails", schema=schema)
    send = define(emails, ran.append)
    add(engine, send, 7)

    task = Worker(engine, Queue("emails", schema=schema)).work()

    assert (task.state, ran) == ("completed", [7])


@pytest.mark.parametrize(("name", "schema"), [("reports", None), ("emails", "jobs"), ("default", None)])
def test_other_queues_share_nothing(engine, name, schema):
    emails, other = Queue("emails"), Queue(name, schema=schema)
    define(emails, print)

    assert Worker(engine, other).types == []
    assert not other.tasks


def test_they_have_the_same_tasks():
    one, two = Queue("emails"), Queue("emails")
    task = define(one, print)

    assert one.tasks == two.tasks == {"send": task}


def test_a_task_that_is_defined_later_is_known_to_the_worker(engine):
    ran = []
    worker = Worker(engine, Queue("emails"))
    worker.start()
    emails = Queue("emails")
    send = define(emails, ran.append)
    add(engine, send, 7)
    worker.stop()

    assert worker.types == ["send"]
    worker.work()
    assert ran == [7]


def test_drain_runs_them(session):
    ran = []
    emails = Queue("emails")
    send = define(emails, ran.append)
    send.add(session, 7)

    drain(session, Queue("emails"))

    assert ran == [7]


class TestTwoDefinitions:
    def test_two_functions_for_one_type_are_rejected(self):
        one, two = Queue("emails"), Queue("emails")
        one.task(type="send")(print_it)

        with pytest.raises(
            InvalidProcessor, match=r"already has a processor, <function print_it.*Queue\('emails'\)"
        ):
            define(two, print)
        assert [*two.tasks] == ["send"]
        assert two.tasks["send"].function is print_it

    def test_two_lambdas_are_two_functions(self):
        one, two = Queue("emails"), Queue("emails")
        one.task(type="send")(lambda n: n)

        with pytest.raises(InvalidProcessor, match="already has a processor"):
            two.task(type="send")(lambda n: -n)

    def test_a_type_that_a_worker_uses_is_rejected(self, engine):
        worker = Worker(engine, Queue("emails"))
        worker.use("send", print)

        with pytest.raises(InvalidProcessor, match="processor"):
            define(Queue("emails"), print)

    def test_a_typed_task_of_an_equal_queue_is_not_used_again(self, engine):
        emails = Queue("emails")
        define(emails, print)

        with pytest.raises(InvalidProcessor, match="processor"):
            Worker(engine, Queue("emails")).use("send", print)

    def test_a_function_may_be_defined_again_and_each_queue_keeps_its_own(self, engine):
        ran = []
        first, second = Queue("emails"), Queue("emails")
        send = define(first, lambda n: ran.append(("first", n)))
        early, early_second = Worker(engine, first), Worker(engine, second)
        define(second, lambda n: ran.append(("second", n)))

        for worker in (early, early_second, Worker(engine, first), Worker(engine, second)):
            add(engine, send, 7)
            worker.work()

        assert [name for name, _ in ran] == ["first", "second", "first", "second"]

    def test_a_third_queue_runs_the_last_definition(self, engine):
        ran = []
        first, second = Queue("emails"), Queue("emails")
        send = define(first, lambda n: ran.append("first"))
        define(second, lambda n: ran.append("second"))
        add(engine, send, 7)

        Worker(engine, Queue("emails")).work()

        assert ran == ["second"]


def test_a_queue_that_is_gone_shares_nothing():
    def use() -> None:
        Queue("emails").task(type="send")(print_it)

    use()
    gc.collect()

    assert not Queue("emails").tasks


def test_a_type_can_be_defined_anew_when_its_queue_is_gone():
    gc.disable()  # so that only the definition below looks for it
    try:
        Queue("emails").task(type="send")(print_it)
        emails = Queue("emails")
        define(emails, print)
    finally:
        gc.enable()

    assert emails.tasks["send"].function is not print_it
