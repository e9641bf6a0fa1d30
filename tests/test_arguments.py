"""Arguments as JSON and back, by the annotations of a typed task's function."""

from __future__ import annotations

import collections
import enum
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Annotated, Any, Generic, Literal, NamedTuple, NewType, TypedDict, TypeVar
from uuid import UUID

import attrs
import msgspec
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.orm import Session

from apoq import AsyncRunningTask, InvalidData, InvalidProcessor, InvalidTask, Queue, RunningTask, Task
from apoq.arguments import Arguments

T = TypeVar("T")
ID = UUID("0b5f6c0a-95a5-4b0c-8bb1-0d4f0e2a7a11")
AT = datetime(2031, 5, 4, 3, 2, 1, 999, tzinfo=timezone(timedelta(hours=2)))
UserId = NewType("UserId", int)


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Word(enum.StrEnum):
    YES = "yes"


class Right(enum.Flag):
    READ = 1
    WRITE = 2


@dataclass
class Line:
    sku: str
    price: Decimal


@dataclass(frozen=True)
class Order:
    id: UUID
    at: datetime
    lines: list[Line] = field(default_factory=list)
    parent: Order | None = None


class Address(TypedDict, total=False):
    street: str
    since: date


class Point(NamedTuple):
    x: int
    at: datetime


@attrs.define
class Parcel:
    id: UUID
    weight: Decimal


class Struct(msgspec.Struct):
    at: datetime


class Model(pydantic.BaseModel):
    user_id: int = pydantic.Field(alias="userId")
    at: datetime
    colours: set[Colour] = set()

    @pydantic.computed_field
    def year(self) -> int:
        return self.at.year


class Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid")
    at: datetime
    of: UUID


@dataclass
class Box(Generic[T]):
    content: T


ROUND_TRIPS: dict[str, tuple[Any, Any, Any]] = {
    "int": (int, 7, 7),
    "large int": (int, 2**80, 2**80),
    "float": (float, 0.5, 0.5),
    "int for float": (float, 7, 7),
    "bool": (bool, True, True),
    "str": (str, "ü💖", "ü💖"),
    "None": (None, None, None),
    "bytes": (bytes, b"\x00\xff", "AP8="),
    "datetime": (datetime, AT, "2031-05-04T03:02:01.000999+02:00"),
    "naive datetime": (datetime, AT.replace(tzinfo=None), "2031-05-04T03:02:01.000999"),
    "date": (date, date(2031, 5, 4), "2031-05-04"),
    "time": (time, time(3, 2, 1), "03:02:01"),
    "timedelta": (timedelta, timedelta(days=-1, microseconds=5), "-PT86399.999995S"),
    "UUID": (UUID, ID, str(ID)),
    "Decimal": (Decimal, Decimal("1.10"), "1.10"),
    "enum": (Colour, Colour.RED, "red"),
    "int enum": (Level, Level.HIGH, 3),
    "str enum": (Word, Word.YES, "yes"),
    "flags": (Right, Right.READ | Right.WRITE, 3),
    "literal": (Literal["a", "b"], "a", "a"),
    "new type": (UserId, UserId(7), 7),
    "optional": (datetime | None, None, None),
    "union": (int | str, "x", "x"),
    "list": (list[Decimal], [Decimal(1)], ["1"]),
    "set": (set[UUID], {ID}, [str(ID)]),
    "frozenset": (frozenset[int], frozenset({1}), [1]),
    "tuple": (tuple[int, date], (1, date(2031, 5, 4)), [1, "2031-05-04"]),
    "sequence": (Sequence[int], [1, 2], [1, 2]),
    "dict": (dict[str, Decimal], {"a": Decimal(1)}, {"a": "1"}),
    "dict of numbers": (dict[int, str], {1: "a"}, {"1": "a"}),
    "dict of ids": (dict[UUID, timedelta], {ID: timedelta(seconds=1)}, {str(ID): "PT1S"}),
    "mapping": (Mapping[date, int], {date(2031, 5, 4): 1}, {"2031-05-04": 1}),
    "object": (dict[str, object], {"a": [1, None]}, {"a": [1, None]}),
    "dataclass": (
        Order,
        Order(ID, AT, [Line("a", Decimal("1.50"))], Order(ID, AT)),
        {
            "id": str(ID),
            "at": "2031-05-04T03:02:01.000999+02:00",
            "lines": [{"sku": "a", "price": "1.50"}],
            "parent": {
                "id": str(ID),
                "at": "2031-05-04T03:02:01.000999+02:00",
                "lines": [],
                "parent": None,
            },
        },
    ),
    "generic dataclass": (Box[date], Box(date(2031, 5, 4)), {"content": "2031-05-04"}),
    "typed dict": (Address, {"since": date(2031, 5, 4)}, {"since": "2031-05-04"}),
    "named tuple": (Point, Point(1, AT), [1, "2031-05-04T03:02:01.000999+02:00"]),
    "attrs": (Parcel, Parcel(ID, Decimal("0.5")), {"id": str(ID), "weight": "0.5"}),
    "msgspec": (Struct, Struct(AT), {"at": "2031-05-04T03:02:01.000999+02:00"}),
    "pydantic": (
        Model,
        Model(userId=7, at=AT, colours={Colour.RED}),
        {"userId": 7, "at": "2031-05-04T03:02:01.000999+02:00", "colours": ["red"]},
    ),
    "strict pydantic": (
        Strict,
        Strict(at=AT, of=ID),
        {"at": "2031-05-04T03:02:01.000999+02:00", "of": str(ID)},
    ),
    "list of pydantic": (
        list[Strict],
        [Strict(at=AT, of=ID)],
        [{"at": "2031-05-04T03:02:01.000999+02:00", "of": str(ID)}],
    ),
    "optional pydantic": (Strict | None, None, None),
    "constrained": (Annotated[int, msgspec.Meta(ge=1)], 1, 1),
}


def arguments_of(type_: Any) -> Arguments:
    def send(value) -> None: ...

    send.__annotations__["value"] = type_
    return Arguments(send, "send", is_coroutine=False)


class TestRoundTrips:
    @pytest.mark.parametrize(("type_", "value", "document"), ROUND_TRIPS.values(), ids=ROUND_TRIPS)
    def test_a_value_comes_back_as_its_annotation_says(self, session, type_, value, document):
        arguments = arguments_of(type_)

        written = arguments.write((value,), {})
        task = Queue().add(session, "send", written)
        session.expire(task)

        assert task.data == {"value": document}
        read = arguments.read(task.data)["value"]
        assert read == value
        assert type(read) is (float if type_ is float else type(value))

    def test_a_naive_time_stays_naive(self):
        read = arguments_of(datetime).read({"value": "2031-05-04T03:02:01"})

        assert read["value"].tzinfo is None

    @pytest.mark.parametrize("value", [1, "x", None, [1, {"a": None}], 0.5, True])
    def test_what_is_not_annotated_is_plain_json(self, value):
        def send(value, *, other: Any = None) -> None: ...

        arguments = Arguments(send, "send", is_coroutine=False)

        assert arguments.write((value,), {"other": value}) == {"value": value, "other": value}
        assert arguments.read({"value": value})["value"] is value

    @settings(max_examples=25, deadline=None)
    @given(
        st.lists(
            st.builds(
                Order,
                id=st.uuids(),
                at=st.datetimes(timezones=st.just(UTC)),
                lines=st.lists(st.builds(Line, sku=st.text(), price=st.decimals(allow_nan=False))),
            )
        )
    )
    def test_whatever_a_dataclass_holds_comes_back(self, orders):
        arguments = arguments_of(list[Order])

        document = json.dumps(arguments.write((orders,), {}))

        assert arguments.read(json.loads(document)) == {"value": orders}

    def test_a_subclass_of_str_is_text(self):
        class Markup(str):
            __slots__ = ()

        (written,) = arguments_of(str).write((Markup("<b>"),), {}).values()

        assert type(written) is str


class TestWrongCalls:
    """Refused at the call, with nothing written."""

    @pytest.fixture
    def send(self):
        @Queue().task(type="send")
        def send(user_id: int, *, locale: str = "en", order: Order | None = None, plain=None) -> None: ...

        return send

    @pytest.mark.parametrize(
        ("args", "kwargs", "message"),
        [
            ((), {}, "missing a required argument: 'user_id'"),
            ((), {"locale": "de"}, "missing a required argument: 'user_id'"),
            ((7, "de"), {}, "too many positional arguments"),
            ((7,), {"lang": "de"}, "got an unexpected keyword argument 'lang'"),
            ((7,), {"user_id": 7}, "multiple values for argument 'user_id'"),
        ],
        ids=["none", "missing", "too many", "unexpected", "twice"],
    )
    def test_arguments_that_the_function_doesnt_take(self, session, send, args, kwargs, message):
        with pytest.raises(InvalidTask) as raised:
            send.add(session, *args, **kwargs)

        assert str(raised.value).startswith(f"send() {message}: its parameters are (user_id: int, *, locale:")
        assert session.query(Task).count() == 0

    @pytest.mark.parametrize(
        ("kwargs", "path", "reason"),
        [
            ({"user_id": "7"}, "data['user_id']", "Expected `int`, got `str`"),
            ({"user_id": True}, "data['user_id']", "Expected `int`, got `bool`"),
            ({"user_id": None}, "data['user_id']", "Expected `int`, got `null`"),
            ({"user_id": object()}, "data['user_id']", "object has no form in JSON: <object"),
            ({"user_id": 7, "locale": AT}, "data['locale']", "Expected `str`, got `datetime`"),
            ({"user_id": 7, "locale": "\0"}, "data['locale']", "jsonb can't hold U+0000"),
            (
                {"user_id": 7, "order": Order("x", AT)},  # type: ignore[arg-type]
                "data['order'].id",
                "Expected `uuid`, got `str`",
            ),
            (
                {"user_id": 7, "order": Order(ID, AT, [Line("a", Decimal(1)), Line("b", 1.5)])},  # type: ignore[arg-type]
                "data['order'].lines[1].price",
                "Expected `decimal`, got `float`",
            ),
            (
                {"user_id": 7, "plain": AT},
                "data['plain']",
                "datetime is not JSON, and converted only if 'send' annotates its parameter",
            ),
            ({"user_id": 7, "plain": [{"at": AT}]}, "data['plain'][0]['at']", "datetime is not JSON"),
        ],
        ids=["str", "bool", "None", "object", "time", "NUL", "inside", "deeper", "plain", "plain inside"],
    )
    def test_a_value_that_its_annotation_or_json_cant_have(self, session, send, kwargs, path, reason):
        with pytest.raises(InvalidData) as raised:
            send.add(session, **kwargs)

        assert raised.value.path == path
        assert str(raised.value).startswith(f"{path}: {reason}")
        assert session.query(Task).count() == 0

    @pytest.mark.parametrize(
        ("type_", "value", "message"),
        [
            (datetime, "2031-05-04T03:02:01Z", "Expected `datetime`, got `str`"),
            (UUID, str(ID), "Expected `uuid`, got `str`"),
            (date, AT, "Expected `date`, got `datetime`"),
            (list[int], {"a": 1}, "Expected `array`, got `object`"),
            (Literal["a"], "b", "Invalid enum value 'b'"),
            (Annotated[int, msgspec.Meta(ge=1)], 0, "Expected `int` >= 1"),
            (Strict, {"at": "x"}, "1 validation error|validation errors for Strict"),
            (list[int], collections.deque([1]), "deque has no form in JSON"),
            (float, float("nan"), None),
        ],
        ids=["time", "UUID", "date", "dict", "literal", "bound", "model", "deque", "NaN"],
    )
    def test_a_value_of_another_type_than_the_annotation(self, session, queue, type_, value, message):
        def send(value) -> None: ...

        send.__annotations__["value"] = type_
        send = queue.task(send)

        with pytest.raises(InvalidData, match=message):
            send.add(session, value)

    def test_a_list_that_contains_itself(self, session, queue):
        @queue.task
        def send(values: list[Any]) -> None: ...

        values: list[Any] = []
        values.append(values)

        with pytest.raises(InvalidData, match=r"data\['values'\]: it contains itself"):
            send.add(session, values)

    def test_more_than_a_task_may_hold(self, session):
        task = Queue(max_data_size=20).task(type="send")(lambda text: None)

        with pytest.raises(InvalidData, match="over the limit of 20"):
            task.add(session, "x" * 20)


def generator(n: int):
    yield n


def star(*values: int) -> None: ...
def star_after(value: int, *values: int) -> None: ...
def positional(value: int, /) -> None: ...
def method(self, value: int) -> None: ...
def of_session(session: Session) -> None: ...
def of_sessions(user_id: int, sessions: list[Session]) -> None: ...
def of_callback(call: Callable[[], None]) -> None: ...
def of_times(at: datetime | date) -> None: ...
def of_models(of: Model | Strict) -> None: ...
def late_task(value: int, task: RunningTask) -> None: ...
def wrong_task(task: AsyncRunningTask) -> None: ...
async def wrong_async_task(task: RunningTask) -> None: ...


CANT_BE = {
    "generator": (generator, "is a generator function"),
    "star": (star, r"takes \*values, and arguments travel by their names: give it a parameter for each"),
    "star after": (star_after, r"takes \*values"),
    "positional": (positional, "the parameter 'value' of .* is positional-only"),
    "method": (method, "is a method, whose 'self' can't travel: make it a function or a staticmethod"),
    "class": (Order, "a task is a function, not <class"),
    "name": ("send", "a task is a function, not 'send'"),
    "builtin": (len, "the parameter 'obj' of 'builtins.len' is positional-only"),
    "unknown": (iter, "the parameters of 'builtins.iter' can't be known"),
    "lambda": (lambda user_id: None, r"has no name of its own: give one, `queue.task\(type=…\)`"),
    "session": (
        of_session,
        "the parameter 'session' of .* can't travel as JSON: there is no conversion for Session",
    ),
    "inside": (of_sessions, "the parameter 'sessions' of .*: there is no conversion for Session: give what"),
    "callback": (of_callback, "the parameter 'call' of .*: there is no conversion for Callable"),
    "ambiguous union": (of_times, "the parameter 'at' of .* more than one str-like type"),
    "models": (of_models, "the parameter 'of' of .* custom type"),
    "late task": (late_task, "gets the running task as its first parameter, not as 'task'"),
    "async task": (wrong_task, "is a plain function, so the task that it gets is annotated RunningTask"),
    "plain task": (wrong_async_task, "is a coroutine function, so .* annotated AsyncRunningTask"),
}


class TestFunctionsThatCantBeTasks:
    @pytest.mark.parametrize(("function", "message"), CANT_BE.values(), ids=CANT_BE)
    def test_it_is_refused_when_it_is_decorated(self, queue, function, message):
        with pytest.raises(InvalidProcessor, match=message):
            queue.task(function)
        assert not queue.tasks

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"type": ""}, "a task's type can't be empty"),
            ({"type": 5}, "a task's type is a string"),
            ({"type": "x" * 256}, "at most 255 characters"),
            ({"aliases": "old"}, r"aliases are several types, such as \['old'\]"),
            ({"aliases": [""]}, "a task's type can't be empty"),
            ({"aliases": [5]}, "a task's type is a string"),
            ({"retry_limit": -1}, "retry_limit is a number of retries"),
            ({"retry_delay": 30}, "retry_delay is a plain function"),
            ({"timeout": 0}, "timeout: a timeout is longer than nothing"),
        ],
    )
    def test_options_that_make_no_sense(self, queue, options, message):
        with pytest.raises(InvalidProcessor, match=message):
            queue.task(**options)(late_mail)
        assert not queue.tasks


def late_mail(user_id: int) -> None: ...


def test_importing_apoq_imports_no_converter():
    code = "import sys, apoq; apoq.Queue(); print({'msgspec', 'pydantic', 'attrs'} & sys.modules.keys())"

    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert said.stdout == "set()\n"
