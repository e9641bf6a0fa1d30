"""Whatever is given to `add` and `add_many`: a clear refusal and no row, or a row that comes back as it was.

`python -m pytest --hypothesis-profile thorough tests/test_fuzz.py` draws thousands, each time others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from enum import IntEnum, StrEnum
from typing import Any

import probe
import psycopg
import pytest
import sqlalchemy as sa
from drawn import drawn
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.orm import Session

from apoq import InvalidData, InvalidTask, Queue, Task, UnsupportedSession, Worker

pytestmark = pytest.mark.slow

queue = Queue()


# What is given.


class Level(IntEnum):
    HIGH = 3


class Color(StrEnum):
    RED = "red"


class Mute:
    """Its repr raises, as that of an object whose database is closed."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text("Mute()")


class Odd(tzinfo):
    """A time zone that knows no offset."""

    def utcoffset(self, _: datetime | None) -> None:
        return None


characters = st.characters(exclude_categories=())
"""Lone surrogates, NUL and what is beyond the first plane among them."""

texts = st.one_of(
    st.text(),
    st.text(characters),
    st.text(st.sampled_from("\\\"'\0\n\r\t\x7fu0{}%:$\u2028💖\udc80\ud83d"), max_size=8),
    st.sampled_from(["\\u0000", "\\", "\\.", "\\N", "%(task_data)s", "k" * 70_000, "💖" * 20_000]),
)
integers = st.one_of(
    st.integers(),
    st.sampled_from([2**63, -(2**63) - 1, Level.HIGH, True]),
    st.builds(
        lambda sign, digits: sign * 10**digits, st.sampled_from([1, -1]), st.sampled_from([400, 4299, 4300])
    ),
)
floats = st.one_of(
    st.floats(),
    st.sampled_from([-0.0, 5e-324, 2.2250738585072014e-308, 1e16, 1e22, 1e23, 1e308, math.pi]),
)
foreign = st.one_of(
    st.binary(max_size=3),
    st.datetimes(),
    st.dates(),
    st.timedeltas(),
    st.decimals(),
    st.fractions(),
    st.complex_numbers(),
    st.uuids(),
    st.frozensets(st.integers(), max_size=2),
    st.builds(Mute),
    st.sampled_from([Ellipsis, NotImplemented, int, len, Color, lambda: None, range(3), memoryview(b"x")]),
)
"""What isn't JSON."""


def containers(inner: st.SearchStrategy[Any], keys: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
    )


sound_characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
sound_texts = st.text(sound_characters)
sound = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), sound_texts
    ),
    lambda inner: containers(inner, sound_texts),
    max_leaves=20,
)
"""Data of which nothing may be refused."""

hashable = st.one_of(texts, integers, floats, st.none(), st.tuples(st.integers()), st.just(Color.RED))
unsound = st.recursive(
    st.one_of(st.none(), texts, integers, floats, foreign),
    lambda inner: containers(inner, st.one_of(texts, texts, hashable)),
    max_leaves=20,
)


@st.composite
def deep(draw: st.DrawFn) -> Any:
    """Data in many lists and dicts, at the limit of what is taken and beyond."""
    data = draw(st.sampled_from([None, [], "\0"]))
    key = draw(st.sampled_from([None, "k"]))
    for _ in range(draw(st.sampled_from([150, 198, 199, 200, 201, 900]))):
        data = [data] if key is None else {key: data}
    return data


items = st.one_of(sound, unsound, deep())

anything = st.one_of(texts, integers, floats, foreign, st.none(), st.lists(st.integers(), max_size=2))

offsets = st.timedeltas(
    timedelta(hours=-24) + timedelta.resolution, timedelta(hours=24) - timedelta.resolution
)
zones = st.timezones() | st.builds(timezone, offsets)
times = st.one_of(
    st.datetimes(timezones=zones),
    st.datetimes(timezones=zones),
    # At the ends of the calendar, or nobody knows when.
    st.datetimes(datetime(9999, 12, 20), timezones=zones),  # noqa: DTZ001
    st.datetimes(max_value=datetime(1, 1, 9), timezones=zones),  # noqa: DTZ001
    st.datetimes(timezones=st.none() | st.builds(Odd)),
)
spans = st.timedeltas(timedelta(0), timedelta(days=36_525))
sound_options: dict[str, st.SearchStrategy[Any]] = {
    "priority": st.integers(-(2**15), 2**15 - 1),
    "process_at": times,
    "retry_limit": st.integers(0, 2**31 - 2),
    "retry_delay": st.floats(0, 3e9) | spans,
    "timeout": st.floats(1e-6, 3e9) | spans,
}


def mostly(sound: st.SearchStrategy[Any], odd: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.sampled_from([sound, sound, sound, odd]).flatmap(lambda chosen: chosen)


types = mostly(st.text(sound_characters, min_size=1, max_size=255), st.text(max_size=300) | anything)
options = st.builds(
    lambda some, other: {**some, **other},
    st.fixed_dictionaries({}, optional=sound_options),
    mostly(
        st.just({}),
        st.fixed_dictionaries({"delay": spans | st.timedeltas() | anything})
        | st.one_of(*(st.fixed_dictionaries({name: st.timedeltas() | anything}) for name in sound_options)),
    ),
)


# What comes back.


def is_json(data: Any, levels: int = 200) -> bool:
    """Tell whether JSON, jsonb and Python's own limits let a task have this data."""
    match data:
        case None:
            return True
        case str():
            return "\0" not in data and not any("\ud800" <= character <= "\udfff" for character in data)
        case int():
            return abs(data) < 10**4300
        case float():
            return math.isfinite(data)
        case list() | tuple():
            return levels > 0 and all(is_json(item, levels - 1) for item in data)
        case dict():
            return levels > 0 and all(
                isinstance(key, str) and is_json(key) and is_json(item, levels - 1)
                for key, item in data.items()
            )
    return False


def same(back: Any, data: Any) -> bool:
    """Tell whether this is what comes back of that data."""
    match data:
        case None | bool():
            return back is data
        case float():
            # jsonb keeps the decimal digits, and without a point where there are none behind it.
            return type(back) in {int, float} and float(back) == data
        case int():
            return type(back) is int and back == data
        case str():
            return type(back) is str and back == data
        case list() | tuple():
            return type(back) is list and len(back) == len(data) and all(map(same, back, data))
    return (
        type(back) is dict and back.keys() == data.keys() and all(same(back[key], data[key]) for key in data)
    )


@pytest.fixture(scope="module")
def engine(template, create_database, drop_database) -> Iterator[sa.Engine]:
    url = create_database(template.database)
    engine = sa.create_engine(url)
    yield engine
    engine.dispose()
    drop_database(url)


@pytest.fixture(scope="module")
def received(engine) -> Iterator[Callable[[], dict[int, Any]]]:
    """Work all that is due, and answer with what the processor found in each task."""
    found: dict[int, Any] = {}
    worker = Worker(engine)
    worker.use("t", lambda task: found.update({task.id: task.data}))

    def work() -> dict[int, Any]:
        found.clear()
        while worker.work():
            pass
        return dict(found)

    probe.lifecycle(
        worker
    ).acquire()  # so that each of the tasks doesn't find new connections and a heartbeat of its own
    yield work
    probe.lifecycle(worker).release()


@pytest.fixture(scope="module")
def transactions(engine) -> Iterator[dict[str, Callable[[], Any]]]:
    """Ways to begin a transaction, by what it is in."""
    url = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url) as connection:
        yield {
            "Session": lambda: Session(engine),
            "Connection": engine.connect,
            "psycopg": lambda: nullcontext(connection),
        }


@pytest.fixture(scope="module", autouse=True)
def small_batches() -> Iterator[None]:
    """Let a COPY begin after the second task."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apoq.client.operations.FIRST_COUNT", 2)
        patch.setattr("apoq.client.operations.BEFORE_COPY", 2)
        patch.setattr("apoq.client.operations.BATCH_COUNT", 2)
        yield


kinds = st.sampled_from(["Session", "Connection", "psycopg"])


def add(
    transaction: Callable[[], Any], act: Callable[[Any], object], *, in_savepoint: bool = False
) -> tuple[list[int], InvalidTask | None]:
    """Add tasks, and commit, whether or not they are refused; answer the ids of those that are there then."""
    refusal = None
    with transaction() as session:

        def ids(after: int) -> list[int]:
            statement = f"SELECT id FROM apoq_tasks WHERE id > {after} ORDER BY id"
            is_psycopg = isinstance(session, psycopg.Connection)
            return [id_ for (id_,) in session.execute(statement if is_psycopg else sa.text(statement))]

        last = max(ids(0), default=0)
        begin_nested = getattr(session, "begin_nested", getattr(session, "transaction", None))
        try:
            with begin_nested() if in_savepoint else nullcontext():
                act(session)
        except InvalidTask as error:
            refusal = error
        added = ids(last)
        session.commit()
    return added, refusal


def stored(engine: sa.Engine, ids: list[int]) -> list[Task]:
    with Session(engine) as session:
        return [session.get_one(Task, id_) for id_ in ids]


@drawn(60)
@given(kind=kinds, data=items)
def test_data_are_refused_or_come_back(engine, transactions, received, kind, data):
    ids, refusal = add(transactions[kind], lambda session: queue.add(session, "t", data))

    if refusal:
        assert isinstance(refusal, InvalidData)
        assert refusal.path.startswith("data")
        assert not is_json(data)
        assert ids == []
    else:
        (task,) = stored(engine, ids)
        assert same(task.data, data)
        assert same(received()[task.id], data)


@drawn(40)
@given(kind=kinds, many=st.lists(sound | items, max_size=7), make=st.sampled_from([list, tuple, iter]))
def test_the_data_of_many_are_refused_or_come_back(engine, transactions, received, kind, many, make):
    ids, refusal = add(
        transactions[kind], lambda session: queue.add_many(session, "t", make(many)), in_savepoint=True
    )

    if refusal:
        assert isinstance(refusal, InvalidData)
        first = next(index for index, data in enumerate(many) if not is_json(data))
        assert refusal.path.startswith(f"items[{first}]")
        assert ids == []
    else:
        tasks, found = stored(engine, ids), received()
        assert len(tasks) == len(many)
        assert all(same(task.data, data) for task, data in zip(tasks, many, strict=True))
        assert all(same(found[task.id], data) for task, data in zip(tasks, many, strict=True))


@drawn(60)
@given(kind=kinds, type_=types, options=options, many=st.booleans())
def test_types_and_options_are_refused_or_kept(engine, transactions, kind, type_, options, many):
    of_its_own = Queue("options")
    began = datetime.now(UTC)

    def act(session: Any) -> None:
        if many:
            of_its_own.add_many(session, type_, [None] * 5, **options)
        else:
            of_its_own.add(session, type_, None, **options)

    ids, refusal = add(transactions[kind], act)

    if refusal:
        assert ids == []
        assert len(str(refusal)) < 1_000
    else:
        assert len(ids) == (5 if many else 1)
    for task in stored(engine, ids):
        assert (task.type, task.data, task.queue) == (type_, None, "options")
        assert task.priority == options.get("priority", 0)
        assert task.retry_limit == options.get("retry_limit")
        for name in ("retry_delay", "timeout"):
            length = options.get(name)
            is_number = isinstance(length, int | float)
            assert getattr(task, name) == (timedelta(seconds=length) if is_number else length)
        if options.get("process_at") is not None:
            assert task.process_at == options["process_at"]
        else:
            waits = options.get("delay") or timedelta()
            assert began - timedelta(seconds=1) <= task.process_at - waits <= datetime.now(UTC)


@drawn(30)
@given(session=anything, many=st.booleans())
def test_what_is_no_session_is_refused(session, many):
    with pytest.raises(UnsupportedSession):
        queue.add_many(session, "t", [1]) if many else queue.add(session, "t")


@drawn(30)
@given(many=anything)
def test_what_is_no_list_of_data_is_refused(engine, transactions, many):
    is_iterable = isinstance(many, Iterable) and not isinstance(many, str | bytes)

    ids, refusal = add(
        transactions["Session"], lambda session: queue.add_many(session, "t", many), in_savepoint=True
    )

    assert (refusal is None) == is_iterable or isinstance(refusal, InvalidData)
    assert len(ids) == (0 if refusal else len(list(many)))
