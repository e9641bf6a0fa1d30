"""Typed tasks: a function's calls, added with its own arguments and run by a worker of its queue."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial, wraps
from types import SimpleNamespace

import probe
import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from apoq import (
    AsyncRunningTask,
    InvalidProcessor,
    InvalidTask,
    Queue,
    RunningTask,
    Task,
    TypedTask,
    Worker,
)

LATER = datetime(2031, 5, 4, tzinfo=UTC)


@dataclass
class Parcel:
    mail: Mail


@Queue().task
def deliver(mail: Mail) -> None: ...


@Queue().task
def pack(parcel: Parcel) -> None: ...


@dataclass
class Mail:
    to: str


def send(user_id: int, *, locale: str = "en") -> str:
    """Send a mail."""
    return f"{user_id} {locale}"


@pytest.fixture
def task(queue) -> TypedTask[..., str]:
    return queue.task(send)


@pytest.fixture
def ran() -> list[object]:
    """What the functions of a test say."""
    return []


def add(engine: sa.Engine, task: TypedTask, *args, **kwargs) -> int:
    with Session(engine) as session, session.begin():
        return task.add(session, *args, **kwargs).id


def load(engine: sa.Engine, id_: int) -> Task:
    with Session(engine, expire_on_commit=False) as session:
        return session.get_one(Task, id_)


class TestAdding:
    def test_the_data_holds_just_the_arguments_that_are_given_by_their_names(self, session, task):
        assert task.add(session, 7).data == {"user_id": 7}
        assert task.add(session, user_id=7, locale="de").data == {"user_id": 7, "locale": "de"}

    def test_the_type_is_the_dotted_path_of_the_function(self, session, task):
        assert task.add(session, 7).type == task.type == f"{__name__}.send"

    def test_the_type_may_be_named(self, session, queue):
        named = queue.task(type="send_welcome")(send)

        assert named.add(session, 7).type == "send_welcome"

    def test_it_goes_to_its_queue(self, session):
        assert Queue("emails").task(send).add(session, 7).queue == "emails"

    def test_nothing_is_sent_where_the_session_rolls_back(self, session, task):
        with session.begin_nested() as savepoint:
            task.add(session, 7)
            savepoint.rollback()

        assert session.scalar(sa.select(sa.func.count()).select_from(Task)) == 0

    def test_an_argument_may_have_the_name_of_one_of_ours(self, session, queue):
        @queue.task
        def send(session: int, self: str, type: str, data: int) -> None: ...

        added = send.add(session, session=1, self="a", type="b", data=2)

        assert added.data == {"session": 1, "self": "a", "type": "b", "data": 2}

    def test_further_keywords_travel_too(self, session, queue, engine):
        seen = {}

        @queue.task
        def send(user_id: int, **extra: datetime) -> None:
            seen.update(extra, user_id=user_id)

        assert send.add(session, 7, at=LATER).data == {"user_id": 7, "at": "2031-05-04T00:00:00Z"}

        add(engine, send, 7, at=LATER, extra=LATER)
        Worker(engine, queue).work()
        assert seen == {"user_id": 7, "at": LATER, "extra": LATER}

    def test_asyncio_sessions_and_connections_await_it(self, url, task):
        async def use() -> list[str]:
            engine = create_async_engine(url)
            async with AsyncSession(engine) as session, session.begin():
                types = [(await task.add(session, 7)).type]
                assert await task.add_many(session, [task.call(8), task.call(9)]) == 2
            async with engine.begin() as connection:
                types.append((await task.add(connection, 7)).type)
            await engine.dispose()
            return types

        assert asyncio.run(use()) == [task.type, task.type]

    def test_psycopg_connections_take_it(self, url, task):
        dsn = url.set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(dsn) as connection:
            assert task.add(connection, 7).data == {"user_id": 7}


class TestAddingMany:
    @pytest.mark.parametrize("make", [list, tuple, iter])
    def test_each_call_is_a_task(self, session, task, make):
        calls = make([task.call(1), task.call(user_id=2, locale="de")])

        assert task.add_many(session, calls) == 2

        found = session.scalars(sa.select(Task.data).order_by(Task.id)).all()
        assert found == [{"user_id": 1}, {"user_id": 2, "locale": "de"}]

    def test_an_iterator_is_read_as_it_is_sent(self, session, task):
        def calls():
            for n in range(2500):
                yield task.call(n)
                if n == 2000:
                    assert session.scalar(sa.select(sa.func.count()).select_from(Task)) == 1000

        assert task.add_many(session, calls()) == 2500

    def test_the_arguments_of_calls_may_be_dicts(self, session, task):
        assert task.add_many(session, [{"user_id": 1}, task.call(2), {"user_id": 3, "locale": "de"}]) == 3

        found = session.scalars(sa.select(Task.data).order_by(Task.id)).all()
        assert found == [{"user_id": 1}, {"user_id": 2}, {"user_id": 3, "locale": "de"}]

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (7, r"calls\[1\] must be a dict of arguments of .*send', or a call of it, got 7"),
            (None, r"calls\[1\] must be a dict of arguments"),
            ({}, r"calls\[1\]: .*missing a required argument: 'user_id'"),
            ({"user_id": 1, "color": "red"}, r"calls\[1\]: .*unexpected keyword argument 'color'"),
            ({1: 2}, r"calls\[1\]: "),
            ({"user_id": "seven"}, r"calls\[1\]\['user_id'\]: "),
        ],
    )
    def test_what_is_no_call_is_refused(self, session, task, wrong, message):
        with pytest.raises(InvalidTask, match=message):
            task.add_many(session, [{"user_id": 1}, wrong])

        assert session.scalar(sa.select(sa.func.count()).select_from(Task)) == 0

    def test_a_call_of_another_task_is_refused(self, session, queue, task):
        other = queue.task(type="other")(send)

        with pytest.raises(InvalidTask, match=r"calls\[0\] must be a dict of arguments of .*send'"):
            task.add_many(session, [other.call(1)])

    def test_a_call_with_other_options_is_refused(self, session, task):
        with pytest.raises(InvalidTask, match=r"calls\[0\] must have no options of its own, got priority"):
            task.add_many(session, [task.using(priority=5).call(1)])

        assert task.using(priority=5).add_many(session, [task.using(priority=5).call(1)]) == 1

    def test_one_dict_is_not_many(self, session, task):
        with pytest.raises(InvalidTask, match="calls must be an iterable of calls"):
            task.add_many(session, {"user_id": 1})

    def test_one_call_is_not_many(self, session, task):
        with pytest.raises(InvalidTask, match="calls must be an iterable of calls"):
            task.add_many(session, task.call(1))

    def test_a_wrong_argument_is_refused_where_the_call_is_made(self, task):
        with pytest.raises(InvalidTask, match=r"data\['user_id'\]: Expected `int`, got `str`"):
            task.call("x")


class TestUsing:
    def test_its_options_are_those_of_the_task(self, session, task):
        using = task.using(
            process_at=LATER, priority=3, retry_limit=1, retry_delay=60, timeout=timedelta(minutes=2)
        )

        added = using.add(session, 7)

        assert (added.process_at, added.priority) == (LATER, 3)
        assert (added.retry_limit, added.retry_delay) == (1, timedelta(minutes=1))
        assert added.timeout == timedelta(minutes=2)

    def test_it_answers_a_copy(self, session, task):
        task.using(priority=3)

        assert task.add(session, 7).priority == 0

    def test_copies_of_copies_have_the_options_of_both(self, session, task):
        added = task.using(priority=3, timeout=30).using(priority=4, delay=timedelta(hours=1)).add(session, 7)

        assert (added.priority, added.timeout) == (4, timedelta(seconds=30))
        assert added.process_at > datetime.now(UTC)

    def test_many_are_added_with_them(self, session, task):
        task.using(priority=3).add_many(session, [task.call(1)])

        assert session.scalars(sa.select(Task.priority)).all() == [3]

    def test_a_copy_still_calls_the_function(self, task):
        assert task.using(priority=3)(7) == "7 en"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"priority": 2**15}, "priority must be a whole number"),
            ({"delay": "60"}, "delay must be a number of seconds or a timedelta"),
            ({"process_at": LATER.replace(tzinfo=None)}, "must have a time zone"),
            ({"delay": timedelta(1), "process_at": LATER}, "can't both be given"),
            ({"retry_limit": -1}, "retry_limit must be a whole number"),
            ({"retry_delay": "1"}, "retry_delay must be a number"),
            ({"timeout": 0}, "timeout must be positive, got 0"),
        ],
        ids=lambda value: value if isinstance(value, str) else " ".join(value),
    )
    def test_what_makes_no_sense_is_refused_at_once(self, task, options, message):
        with pytest.raises(InvalidTask, match=message):
            task.using(**options)

    def test_what_is_no_option_is_refused(self, task):
        with pytest.raises(TypeError, match="unexpected keyword argument 'delayed'"):
            task.using(delayed=3)


class TestCalling:
    def test_it_calls_the_function(self, task):
        assert task(7, locale="de") == "7 de"

    def test_a_coroutine_function_is_awaited(self, queue):
        @queue.task
        async def double(n: int) -> int:
            return 2 * n

        assert asyncio.run(double(7)) == 14

    def test_it_looks_like_the_function(self, task):
        assert (task.__name__, task.__doc__, task.__module__) == ("send", "Send a mail.", __name__)

    def test_its_repr_names_its_queue(self, task):
        assert repr(task) == f"<TypedTask '{__name__}.send' of Queue('default')>"


class TestRunning:
    def test_a_worker_of_the_queue_calls_the_function(self, engine, queue, ran):
        @queue.task
        def send(user_id: int, *, locale: str = "en") -> None:
            ran.append((user_id, locale))

        add(engine, send, 7)
        add(engine, send, 8, locale="de")
        worker = Worker(engine, queue)

        assert [worker.work().state, worker.work().state] == ["completed", "completed"]
        assert ran == [(7, "en"), (8, "de")]

    def test_a_coroutine_function_is_run_on_an_event_loop(self, engine, queue, ran):
        @queue.task
        async def send(user_id: int) -> None:
            await asyncio.sleep(0)
            ran.append(user_id)

        add(engine, send, 7)

        assert Worker(engine, queue).work().state == "completed"
        assert ran == [7]

    def test_a_started_worker_runs_it(self, engine, queue, make_worker):
        from queue import SimpleQueue

        done = SimpleQueue()

        @queue.task
        def send(user_id: int) -> None:
            done.put(user_id)

        make_worker(queue).start()
        add(engine, send, 7)

        assert done.get(timeout=10) == 7

    def test_the_running_task_comes_first_where_it_is_asked_for(self, engine, queue):
        @queue.task
        def note(task: RunningTask, /, amount: int) -> None:
            task.session.execute(sa.text("INSERT INTO ledger VALUES (:id)"), {"id": task.id + amount})

        id_ = add(engine, note, amount=1000)

        assert Worker(engine, queue).work().data == {"amount": 1000}
        with engine.connect() as connection:
            assert connection.scalar(sa.text("SELECT task_id FROM ledger")) == id_ + 1000

    def test_and_in_a_coroutine_function(self, engine, queue, ran):
        @queue.task
        async def note(task: AsyncRunningTask, amount: int) -> None:
            assert isinstance(task.session, AsyncSession)
            ran.append((task.id, amount))

        id_ = add(engine, note, 7)
        Worker(engine, queue).work()

        assert ran == [(id_, 7)]

    def test_a_task_added_by_its_type_runs_too(self, engine, queue, ran):
        queue.task(type="send")(lambda user_id: ran.append(user_id + 1))
        with Session(engine) as session, session.begin():
            queue.add(session, "send", {"user_id": 7})

        Worker(engine, queue).work()

        assert ran == [8]

    def test_old_names_are_worked(self, engine, queue, ran):
        @queue.task(type="new", aliases=["old", "older"])
        def send(user_id: int) -> None:
            ran.append(user_id)

        with Session(engine) as session, session.begin():
            queue.add(session, "older", {"user_id": 7})
            queue.add(session, "old", {"user_id": 8})
        worker = Worker(engine, queue)
        worker.work()
        worker.work()

        assert ran == [7, 8]

    def test_the_options_of_the_decorator_are_the_policy(self, engine, queue):
        @queue.task(retry_limit=1, retry_delay=lambda fail_count: 0)
        def fail() -> None:
            raise ValueError("no")

        id_ = add(engine, fail)
        worker = Worker(engine, queue)

        assert (worker.work().state, worker.work().state) == ("pending", "failed")
        assert load(engine, id_).error["message"] == "no"

    def test_the_timeout_of_the_decorator_holds(self, engine, queue):
        @queue.task(timeout=0.05)
        async def sleep() -> None:
            await asyncio.sleep(60)

        add(engine, sleep)

        assert Worker(engine, queue).work().error["class"] == "TimeoutError"

    def test_it_runs_within_the_context_of_the_worker(self, engine, queue, ran):
        @queue.task
        def send(user_id: int) -> None:
            ran.append("run")

        @contextmanager
        def middleware(task: RunningTask):
            ran.append(f"enter {task.data['user_id']}")
            yield
            ran.append("exit")

        add(engine, send, 7)
        Worker(engine, queue, middleware=middleware).work()

        assert ran == ["enter 7", "run", "exit"]


class TestMismatchedData:
    """Tasks of other versions of the code, or of other programs."""

    @pytest.fixture
    def fail(self, engine, queue) -> Callable[[object], Task]:
        @queue.task(type="send", retry_limit=1, retry_delay=lambda fail_count: 0)
        def send(user_id: int, at: datetime | None = None, orders: list[Order] | None = None) -> None: ...

        def fail(data: object) -> Task:
            with Session(engine) as session, session.begin():
                queue.add(session, "send", data)
            return Worker(engine, queue).work()

        return fail

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ({"user_id": "x"}, "the argument 'user_id' of 'send' doesn't fit: Expected `int`, got `str`"),
            ({"user_id": None}, "the argument 'user_id' of 'send' doesn't fit: Expected `int`, got `null`"),
            ({"user_id": 7, "at": "soon"}, "the argument 'at' of 'send' doesn't fit: Invalid RFC3339"),
            (
                {"user_id": 7, "orders": [{"id": 1}, {"id": None}]},
                "the argument 'orders' of 'send' doesn't fit: Expected `int`, got `null`, at orders[1].id",
            ),
            (
                {"user_id": 7, "orders": [{}]},
                "the argument 'orders' of 'send' doesn't fit: Object missing required field `id`, at ",
            ),
            ({}, "the argument 'user_id' of 'send' is missing in the task's data"),
            ({"user_id": 7, "x": 1}, "'send' has no parameter for the argument 'x' of the task's data"),
            ([7], "the data of 'send' must be an object of its arguments, such as {'user_id': 7}, got [7]"),
            (None, "the data of 'send' must be an object of its arguments, such as {'user_id': 7}, got None"),
        ],
        ids=["type", "null", "text", "inside", "field", "missing", "unexpected", "list", "null data"],
    )
    def test_the_attempt_fails_with_a_message_that_names_the_argument_and_the_task(self, fail, data, message):
        task = fail(data)

        assert task.error["class"] == "InvalidArguments"
        assert task.error["message"].startswith(message)

    def test_it_is_tried_again_for_a_deploy_may_cure_it(self, fail, engine, queue):
        task = fail({})

        assert task.state == "pending"
        assert Worker(engine, queue).work().state == "failed"


@dataclass
class Order:
    id: int


class TestQueuesOfAWorker:
    def test_a_task_that_is_made_later_is_known(self, engine, queue, ran):
        worker = Worker(engine, queue)

        @queue.task
        def send(user_id: int) -> None:
            ran.append(user_id)

        add(engine, send, 7)
        worker.work()

        assert ran == [7]

    def test_two_queues_have_different_tasks_of_one_type(self, engine, ran):
        emails, reports = Queue("emails"), Queue("reports")
        email = emails.task(type="send")(lambda n: ran.append(f"email {n}"))
        report = reports.task(type="send")(lambda n: ran.append(f"report {n}"))
        add(engine, email, 1)
        add(engine, report, 2)

        worker = Worker(engine, emails, reports)
        worker.work()
        worker.work()

        assert sorted(ran) == ["email 1", "report 2"]

    def test_a_type_of_one_queue_is_not_claimed_from_another(self, engine):
        emails, reports = Queue("emails"), Queue("reports")
        reports.task(type="send")(send)
        with Session(engine) as session, session.begin():
            emails.add(session, "send", {"user_id": 7})

        assert Worker(engine, emails, reports).work() is None

    def test_a_function_may_be_a_task_of_two_queues(self, engine, ran):
        emails, reports = Queue("emails"), Queue("reports")

        @emails.task
        @reports.task
        async def send(n: int) -> None:
            ran.append(n)

        add(engine, send, 7)
        Worker(engine, emails).work()

        assert ran == [7]
        assert [*emails.tasks] == [*reports.tasks]

    def test_equal_queues_are_one(self, engine, ran):
        one, two = Queue(), Queue()
        task = two.task(type="send")(lambda n: ran.append(n + 1))
        worker = Worker(engine, one, two)
        add(engine, task, 7)

        assert worker.work() is not None
        assert worker.work() is None
        assert ran == [8]

    def test_processors_of_use_work_beside_them(self, engine, queue, task, ran):
        worker = Worker(engine, queue)
        worker.use("other", lambda task: ran.append(task.type))
        add(engine, task, 7)
        with Session(engine) as session, session.begin():
            queue.add(session, "other")

        assert {worker.work().type, worker.work().type} == {task.type, "other"}
        assert ran == ["other"]

    def test_a_queue_keeps_no_worker_alive(self, engine, queue):
        import weakref

        worker = Worker(engine, queue)
        gone = weakref.ref(probe.registry(worker))
        del worker
        gc.collect()

        assert gone() is None


class TestTwoProcessors:
    def message(self, type_: str) -> str:
        return f"the type '{type_}' (already has a processor|has a processor already)"

    def test_a_type_is_one_task_of_its_queue(self, queue):
        queue.task(type="send")(send)

        with pytest.raises(InvalidProcessor, match=self.message("send")):
            queue.task(type="send")(print_it)
        with pytest.raises(InvalidProcessor, match=self.message("send")):
            queue.task(type="other", aliases=["send"])(print_it)
        assert [*queue.tasks] == ["send"]

    def test_a_typed_task_is_not_used_again(self, engine, queue):
        queue.task(type="send", aliases=["old"])(send)
        worker = Worker(engine, queue)

        for type_ in ("send", "old"):
            with pytest.raises(InvalidProcessor, match=self.message(type_)):
                worker.use(type_, print)

    def test_what_is_used_is_no_typed_task_later(self, engine, queue):
        worker = Worker(engine, queue)
        worker.use("send", print)

        with pytest.raises(InvalidProcessor, match=self.message("send")):
            queue.task(type="send")(send)
        assert not queue.tasks

    def test_one_queue_in_which_it_is_typed_is_enough(self, engine):
        emails, reports = Queue("emails"), Queue("reports")
        worker = Worker(engine, emails, reports)
        reports.task(type="send")(send)

        with pytest.raises(InvalidProcessor, match=self.message("send")):
            worker.use("send", print)

    def test_equal_queues_of_one_worker_have_one(self, engine):
        one, two = Queue(), Queue()
        one.task(type="send")(send)

        with pytest.raises(InvalidProcessor, match=self.message("send")):
            two.task(type="send")(print_it)
        assert [*Worker(engine, one, two).types] == ["send"]

    def test_equal_queues_of_one_worker_have_one_later_too(self, engine):
        one, two = Queue(), Queue()
        worker = Worker(engine, one, two)
        one.task(type="send")(send)

        with pytest.raises(InvalidProcessor, match=self.message("send")):
            two.task(type="send")(print_it)
        assert [*probe.registry(worker).of(one)] == ["send"]

    def test_a_typed_task_is_not_given_to_use(self, engine, queue, task):
        with pytest.raises(InvalidProcessor, match=r"must not be a typed task.*Worker\(engine, queue\)"):
            Worker(engine).use("send", task)


def print_it(user_id: int) -> None:
    print(user_id)


class TestFunctions:
    """What may be decorated."""

    def test_tasks_by_type_and_alias(self, queue):
        task = queue.task(type="new", aliases=["old", "new"])(send)

        assert queue.tasks == {"new": task, "old": task}

    def test_a_static_method_is_a_task(self, queue):
        class Mailer:
            @queue.task
            @staticmethod
            async def inner(n: int) -> int:
                return n

            @staticmethod
            @queue.task
            def outer(n: int) -> int:
                return n

        assert asyncio.run(Mailer.inner(7)) == Mailer.outer(7) == 7
        assert Mailer.inner.call(7).data == Mailer().outer.call(7).data == {"n": 7}

    def test_a_bound_method_is_a_task(self, queue, session):
        class Mailer:
            def send(self, n: int) -> str:
                return f"{n}"

        task = queue.task(Mailer().send)

        assert task.type.endswith("Mailer.send")
        assert task.add(session, 7).data == {"n": 7}

    def test_a_partial_function_is_a_task_of_what_is_left(self, queue, session):
        task = queue.task(type="greet")(partial(send, locale="de"))

        assert task.add(session, 7).data == {"user_id": 7}
        assert task(7) == "7 de"

    def test_a_decorated_function_has_the_parameters_of_what_it_wraps(self, queue, engine, ran):
        def logged(function):
            @wraps(function)
            def call(*args, **kwargs):
                ran.append("called")
                return function(*args, **kwargs)

            return call

        @queue.task
        @logged
        def send(at: datetime) -> None:
            ran.append(at)

        add(engine, send, LATER)
        Worker(engine, queue).work()

        assert ran == ["called", LATER]

    def test_a_callable_object_is_a_task(self, queue, session):
        class Send:
            def __call__(self, at: datetime) -> None: ...

        task = queue.task(type="send")(Send())

        assert task.add(session, LATER).data == {"at": "2031-05-04T00:00:00Z"}

    def test_annotations_may_name_what_is_defined_further_down(self, session):
        assert deliver.add(session, Mail("you")).data == {"mail": {"to": "you"}}
        assert pack.add(session, Parcel(Mail("you"))).data == {"parcel": {"mail": {"to": "you"}}}

    def test_annotations_may_not_name_what_is_nowhere_to_be_found(self, session, queue):
        @dataclass
        class Hidden:
            to: str

        @queue.task
        def send(mail: Hidden) -> None: ...

        with pytest.raises(
            InvalidProcessor,
            match=r"annotations of .*send', .* can't be read: name 'Hidden' is not defined: .*import",
        ):
            send.add(session, Hidden("you"))

    def test_the_functions_of_a_program_are_named_by_its_file(self, monkeypatch):
        def main() -> None: ...

        main.__module__, main.__qualname__ = "__main__", "main"
        program = SimpleNamespace(__spec__=None, __file__="/srv/shop/mails.py")
        monkeypatch.setitem(sys.modules, "__main__", program)
        assert Queue().task(main).type == "mails.main"

        program.__spec__ = SimpleNamespace(name="shop.mails")
        assert Queue().task(main).type == "shop.mails.main"

        monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace())
        assert Queue().task(main).type == "__main__.main"


def test_the_page_about_them_says_what_is_so(engine, run_page):
    run_page("typed-tasks.md", "shop", engine=engine)

    with Session(engine) as session:
        by_state = sa.select(Task.state, sa.func.count()).group_by(Task.state)
        assert dict(session.execute(by_state).all()) == {"completed": 1, "pending": 1_006}
