"""Arguments as JSON and back, by the annotations of a typed task's function."""

from __future__ import annotations

import collections
import datetime as dt
import enum
import json
import numbers
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Annotated, Any, Generic, Literal, NamedTuple, NewType, TypedDict, TypeVar
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import attrs
import msgspec
import pydantic
import pytest
from drawn import drawn
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup
from sqlalchemy import Column, Integer, MetaData, Table
from sqlalchemy.orm import Session, registry

from apoq import (
    AsyncRunningTask,
    InvalidArguments,
    InvalidData,
    InvalidProcessor,
    InvalidTask,
    Queue,
    RunningTask,
    Task,
)
from apoq.core.arguments import Arguments
from apoq.core.losses import find_loss
from apoq.testing import assert_enqueued, enqueued

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


class Pair(NamedTuple):
    x: int
    y: int


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


@dataclass
class User:
    id: int


registry().map_imperatively(User, Table("users", MetaData(), Column("id", Integer, primary_key=True)))


def subclass(base: Any) -> Any:
    """Make a class such as pendulum's DateTime."""
    return type(f"My{base.__name__}", (base,), {})


@numbers.Real.register
class Number:
    """A number that is neither an int nor a float, such as numpy's."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return self.value == other

    __hash__ = None  # type: ignore[assignment]

    def __float__(self) -> float:
        return float(self.value)


@numbers.Integral.register
class Whole(Number):
    def __index__(self) -> int:
        return int(self.value)


class NotATime(datetime):
    """As pandas' NaT."""

    def isoformat(self, *_: Any) -> str:
        return "NaT"

    def utcoffset(self) -> timedelta | None:
        raise ValueError("NotATime does not support utcoffset")


class Fake(type):
    """Of a class that stands in for another, as freezegun's do while the time is frozen."""

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, cls.__mro__[1])

    def __subclasscheck__(cls, other: type) -> bool:
        return issubclass(other, cls.__mro__[1])


class FakeDatetime(datetime, metaclass=Fake):
    pass


class FakeDate(date, metaclass=Fake):
    pass


@dataclass
class MadeWhileFrozen:
    at: FakeDatetime
    on: FakeDate | None = None


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

    @drawn(25)
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

    @pytest.mark.parametrize(
        "value",
        [
            Markup("<b>"),
            subclass(int)(2**80),
            subclass(float)(0.5),
            subclass(Decimal)("1.10"),
            subclass(UUID)(int=7),
            subclass(datetime)(2031, 5, 4, 3, 2, 1, 9, tzinfo=ZoneInfo("Europe/Berlin")),
            subclass(date)(2031, 5, 4),
            subclass(time)(3, 2, tzinfo=UTC),
            subclass(timedelta)(days=-1, microseconds=5),
            subclass(bytes)(b"\xff"),
        ],
        ids=lambda value: type(value).__mro__[1].__name__,
    )
    def test_a_value_of_a_subclass_of_a_scalar_comes_back_without_its_class(self, session, value):
        type_ = type(value).__mro__[1]
        arguments = arguments_of(dict[str, list[type_]])

        task = Queue().add(session, "send", arguments.write(({"a": [value]},), {}))
        session.expire(task)

        (read,) = arguments.read(task.data)["value"]["a"]
        assert (read, type(read)) == (value, type_)

    @pytest.mark.parametrize(("type_", "value"), [(int, 3), (float, 0.5), (float, 3)])
    def test_a_number_of_another_library_comes_back_as_pythons(self, type_, value):
        arguments = arguments_of(type_ | None)

        read = arguments.read(arguments.write((Whole(value) if value == 3 else Number(value),), {}))["value"]

        assert (read, type(read)) == (value, type_)

    @pytest.mark.parametrize("annotated", [datetime, FakeDatetime], ids=["datetime", "FakeDatetime"])
    def test_a_frozen_time_comes_back_as_pythons(self, monkeypatch, annotated):
        frozen = FakeDatetime(2031, 5, 4, tzinfo=UTC)
        monkeypatch.setattr(dt, "datetime", FakeDatetime)
        monkeypatch.setattr(dt, "date", FakeDate)
        arguments = arguments_of(dict[str, list[annotated]])  # a function that is decorated by then

        (read,) = arguments.read(arguments.write(({"a": [frozen]},), {}))["value"]["a"]

        assert (read, type(read)) == (frozen, datetime)

    def test_a_class_that_was_made_while_the_time_was_frozen(self):
        made = MadeWhileFrozen(FakeDatetime(2031, 5, 4), FakeDate(2031, 5, 4))
        arguments = arguments_of(MadeWhileFrozen)

        read = arguments.read(arguments.write((made,), {}))["value"]

        assert (type(read.at), type(read.on)) == (datetime, date)
        with pytest.raises(InvalidData, match=r"data\['value'\]\.at: Expected `datetime`, got `str`"):
            arguments.write((MadeWhileFrozen("2031-05-04"),), {})  # type: ignore[arg-type]


class Login(pydantic.BaseModel):
    user: str
    tokens: list[pydantic.SecretStr]


class KeptLogin(Login):
    @pydantic.field_serializer("tokens", when_used="json")
    def write(self, tokens: list[pydantic.SecretStr]) -> list[str]:
        return [token.get_secret_value() for token in tokens]


class Hidden(pydantic.BaseModel):
    optional: int = pydantic.Field(default=0, exclude=True)
    required: int = pydantic.Field(exclude=True)


class ByName(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(populate_by_name=True)
    user_id: int = pydantic.Field(validation_alias="userId")
    secret: str = pydantic.Field(default="", exclude=True, validation_alias="SECRET")


class ByChoice(pydantic.BaseModel):
    user_id: int = pydantic.Field(validation_alias=pydantic.AliasChoices("userId", "user_id"))


class Converted(pydantic.BaseModel):
    user_id: int = pydantic.Field(serialization_alias="userId")

    @pydantic.model_validator(mode="before")
    @classmethod
    def rename(cls, data: Any) -> Any:
        return {"user_id": data["userId"]} if "userId" in data else data


class Constrained(pydantic.BaseModel):
    ids: list[Annotated[int, pydantic.Field(gt=0)]]


class Rounded(pydantic.BaseModel):
    total: Annotated[Decimal, pydantic.PlainSerializer(lambda total: round(float(total), 1))]


class Counted(pydantic.BaseModel):
    _tries: int = pydantic.PrivateAttr(0)


class Made(pydantic.BaseModel):
    id: UUID = pydantic.Field(default_factory=uuid4)


class MadeAgain(pydantic.BaseModel):
    id: UUID = pydantic.Field(default_factory=uuid4, exclude=True)


class Open(pydantic.BaseModel, extra="allow", frozen=True):
    id: int


class Cat(pydantic.BaseModel):
    kind: Literal["cat"] = "cat"


class Dog(pydantic.BaseModel):
    kind: Literal["dog"] = "dog"


class Owner(pydantic.BaseModel):
    pets: list[Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]]
    settings: pydantic.Json[dict[str, int]]


class File(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")
    content: bytes


class Ordered(pydantic.BaseModel):
    words: collections.OrderedDict[str, int]
    last: collections.deque[int]


class Page(pydantic.BaseModel, Generic[T]):
    items: list[T]


@pydantic.dataclasses.dataclass
class Place:
    street: str
    since: date | None = None


@pydantic.dataclasses.dataclass
class FieldPlace:
    street: str = pydantic.Field(default="")


class Refund(Struct):
    cents: int


class Further(Address):
    country: str


@dataclass
class Discounted(Line):
    percent: int


@dataclass
class Inherited(Line):
    pass


class NotDeclared(Line):
    def __init__(self, sku: str, price: Decimal, note: str) -> None:
        super().__init__(sku, price)
        self.note = note


@dataclass
class Reset:
    """Its field is set after `__init__`, and again when it is read."""

    count: int = field(init=False)

    def __post_init__(self) -> None:
        self.count = 0


def counted(model: Any, name: str, value: int) -> Any:
    setattr(model, name, value)
    return model


LINE = Line("a", Decimal(1))
REFUND = Refund(AT, 500)
LOGIN = Login(user="ada", tokens=["s3cret"])

KEPT: dict[str, tuple[Any, Any]] = {
    "bytes of a model": (File, File(content=b"\xff")),
    "dicts and queues of a model": (Ordered, Ordered(words={"b": 1, "a": 2}, last=[1, 2])),
    "a secret that is kept": (KeptLogin, KeptLogin(user="ada", tokens=["s3cret"])),
    "extra fields": (Open, Open(id=1, tags=["a"])),
    "a default that is made": (Made, Made()),
    "discriminated models": (Owner, Owner(pets=[Cat(), Dog()], settings='{"a": 1}')),
    "a generic model": (Page[Cat], Page[Cat](items=[Cat()])),
    "a generic model of its values": (Page[Cat], Page(items=[Cat()])),
    "an alias and the name": (ByName, ByName(user_id=7)),
    "a choice of aliases": (ByChoice, ByChoice(user_id=7)),
    "an alias that a validator reads": (Converted, Converted(user_id=7)),
    "constraints of a model": (Constrained, Constrained(ids=[1])),
    "a root model": (pydantic.RootModel[list[date]], pydantic.RootModel[list[date]]([date(2031, 5, 4)])),
    "a private attribute as it is made": (Counted, Counted()),
    "a pydantic dataclass": (Place, Place("Main Street", date(2031, 5, 4))),
    "a subclass that is annotated": (Discounted | None, Discounted("a", Decimal(1), 5)),
    "a value for its member": (dict[Colour, list[Colour]], {"red": ["red"]}),
    "a tuple for a list": (Sequence[int], (1, 2)),
    "a list for a tuple": (tuple[int, ...], [1, 2]),
    "a set for a collection": (Collection[int], {1, 2}),
    "a text for any": (dict[str, Any], {"a": Markup("b"), "c": (1, [None])}),
    "any": (Any, {"a": Markup("b"), "c": (1, [None])}),
    "a number for any": (Any, Level.HIGH),
    "another zone": (datetime, datetime(2031, 10, 26, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin"))),
}

LOST: dict[str, tuple[Any, Any, str, str]] = {
    "secrets": (Login, LOGIN, ".tokens[0]", "come back as another value, SecretStr('**********')"),
    "secrets inside": (dict[str, list[Login] | None], {"a": [LOGIN]}, "['a'][0].tokens[0]", "another value"),
    "a subclass of a model": (Login, KeptLogin(user="a", tokens=[]), "", "as Login, not as KeptLogin"),
    "a hidden field": (Hidden, Hidden(optional=1, required=2), ".required", "Field required, says Hidden"),
    "a rounded number": (Rounded, Rounded(total=Decimal("1.25")), ".total", "another value, Decimal('1.2')"),
    "a private attribute": (Counted, counted(Counted(), "_tries", 1), "._tries", "another value, 0"),
    "a default that is made": (MadeAgain, MadeAgain(), ".id", "another value, UUID("),
    "what is not validated": (Open, Open.model_construct(id="1"), ".id", "as int, not as str"),
    "a time in an extra field": (Open, Open(id=1, at=AT), ".at", "as str, not as datetime"),
    "a subclass of a dataclass": (
        list[Line],
        [LINE, Discounted("a", Decimal(1), 5)],
        "[1]",
        "it would come back as Line, not as Discounted: annotate it as Discounted, or pass Line",
    ),
    "a subclass without fields": (
        Line | None,
        Inherited("a", Decimal(1)),
        "",
        "as Line, not as Inherited",
    ),
    "no field": (NotDeclared, NotDeclared("a", Decimal(1), "b"), ".note", "it would not come back"),
    "a field that is set again": (Reset, counted(Reset(), "count", 5), ".count", "another value, 0"),
    "a subclass of a struct": (Struct, REFUND, "", "as Struct, not as Refund"),
    "a key": (Address, Further(country="x"), "['country']", "it would not come back: leave it out"),
    "a dict for a dataclass": (
        Line,
        {"sku": "a", "price": Decimal(1)},
        "",
        "as Line, not as dict",
    ),
    "a list for a set": (set[int], [1, 1], "", "as set, not as list"),
    "keys that are one": (dict[int | str, int], {1: 1, "1": 2}, "[1]", "it would not come back"),
    "a large int for a float": (float, 2**53 + 1, "", "another value, 9007199254740992.0"),
    "a time's zone": (time, time(3, tzinfo=ZoneInfo("Europe/Berlin")), "", "another value, datetime.time(3"),
    "seconds of an offset": (
        datetime,
        AT.replace(tzinfo=timezone(timedelta(seconds=1))),
        "",
        "another value",
    ),
    "a time for any": (dict[str, Any], {"a": [AT]}, "['a'][0]", "it would come back as str, not as datetime"),
    "a class for any": (list[Any], [LINE], "[0]", "it would come back as dict, not as Line"),
    "a NamedTuple for any": (Any, {"at": Point(1, AT)}, "['at'][1]", "datetime is not JSON"),
    "the names of a NamedTuple": (Any, [Pair(1, 2)], "[0]", "it would come back as list, not as Pair"),
}


class TestLosses:
    """What JSON, or a class's own serializer, would change is refused at the call."""

    @pytest.mark.parametrize(("type_", "value"), KEPT.values(), ids=KEPT)
    def test_what_comes_back_as_it_was_given_is_taken(self, session, type_, value):
        arguments = arguments_of(type_)

        task = Queue().add(session, "send", arguments.write((value,), {}))
        session.expire(task)

        assert find_loss(value, arguments.read(task.data)["value"]) is None

    @pytest.mark.parametrize(("type_", "value", "path", "reason"), LOST.values(), ids=LOST)
    def test_what_would_not_is_refused_with_the_place(self, type_, value, path, reason):
        with pytest.raises(InvalidData) as raised:
            arguments_of(type_).write((value,), {})

        assert raised.value.path == f"data['value']{path}"
        assert reason in str(raised.value)
        assert "s3cret" not in str(raised.value)

    @pytest.mark.parametrize(
        "call",
        [
            lambda task, session: task.add(session, LOGIN),
            lambda task, session: task.using(priority=1).add(session, login=LOGIN),
            lambda task, session: task.call(LOGIN),
            lambda task, session: task.add_many(session, (task.call(LOGIN) for _ in range(3))),
            lambda task, session: enqueued(session, task, login=LOGIN),
            lambda task, session: assert_enqueued(session, task, {"login": LOGIN}),
        ],
        ids=["add", "using", "call", "add_many", "enqueued", "assert_enqueued"],
    )
    def test_wherever_a_call_is_made(self, session, queue, call):
        @queue.task
        def log_in(login: Login) -> None: ...

        with pytest.raises(InvalidData, match=r"data\['login'\]\.tokens\[0\]: it would come back as"):
            call(log_in, session)

    def test_in_further_keywords(self, queue):
        @queue.task
        def log_in(**logins: Login) -> None: ...

        with pytest.raises(InvalidData, match=r"data\['ada'\]\.tokens\[0\]: it would come back as"):
            log_in.call(ada=LOGIN)

    def test_a_validator_that_fails_names_the_place_when_it_is_read(self):
        with pytest.raises(InvalidArguments, match=r"at value\[0\]\.tokens\[1\]"):
            arguments_of(list[Login]).read({"value": [{"user": "a", "tokens": ["x", 5]}]})


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
            (
                {"user_id": None},
                "data['user_id']",
                "Expected `int`, got `None`, for 'send': an id is None until its object is flushed",
            ),
            (
                {"user_id": User(id=7)},
                "data['user_id']",
                "a mapped object belongs to its session: pass its id",
            ),
            ({"user_id": 7, "plain": User(id=7)}, "data['plain']", "a mapped object belongs to its session"),
            ({"user_id": 7, "plain": [User(id=7)]}, "data['plain'][0]", "User is not JSON: a mapped object"),
            ({"user_id": object()}, "data['user_id']", "object can't be converted to JSON: <object"),
            ({"user_id": 7, "locale": AT}, "data['locale']", "Expected `str`, got `datetime`"),
            ({"user_id": 7, "locale": "\0"}, "data['locale']", "jsonb can't hold U+0000"),
            (
                {"user_id": 7, "order": Order("x", AT)},  # type: ignore[arg-type]
                "data['order'].id",
                "Expected `uuid`, got `str`",
            ),
            (
                {
                    "user_id": 7,
                    "order": Order(ID, AT, [Line("a", Decimal(1)), Line("b", 1.5)]),
                },  # type: ignore[arg-type]
                "data['order'].lines[1].price",
                "Expected `decimal`, got `float`",
            ),
            (
                {"user_id": 7, "plain": AT},
                "data['plain']",
                "datetime is not JSON, and is converted only if 'send' annotates its parameter",
            ),
            ({"user_id": 7, "plain": [{"at": AT}]}, "data['plain'][0]['at']", "datetime is not JSON"),
        ],
        ids=[
            "str",
            "bool",
            "None",
            "mapped",
            "plain mapped",
            "mapped inside",
            "object",
            "time",
            "NUL",
            "inside",
            "deeper",
            "plain",
            "plain inside",
        ],
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
            (
                Strict,
                {"at": "x"},
                r"data\['value'\]\.at: Input should be a valid datetime.*, says Strict, for",
            ),
            (list[int], collections.deque([1]), "deque can't be converted to JSON"),
            (float, float("nan"), None),
            (datetime | None, NotATime(1, 1, 1), "NotATime can't be converted to JSON"),
        ],
        ids=["time", "UUID", "date", "dict", "literal", "bound", "model", "deque", "NaN", "NaT"],
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

        with pytest.raises(InvalidData, match="exceed the limit of 20"):
            task.add(session, "x" * 20)


@dataclass
class MappedField:
    users: list[User]


class MappedModelField(pydantic.BaseModel, arbitrary_types_allowed=True):
    user: User


class Validated(pydantic.BaseModel):
    user_id: int = pydantic.Field(default=0, validation_alias="userId")


class Serialized(pydantic.BaseModel):
    user_id: int = pydantic.Field(serialization_alias="userId")


class WithSerialized(pydantic.BaseModel):
    inner: Serialized | None = None


@attrs.define
class PrivateParcel:
    _id: int


def generator(n: int):
    yield n


def star(*values: int) -> None: ...
def star_after(value: int, *values: int) -> None: ...
def positional(value: int, /) -> None: ...
def method(self, value: int) -> None: ...
def of_session(session: Session) -> None: ...
def of_sessions(user_id: int, sessions: list[Session]) -> None: ...
def of_places(places: list[FieldPlace]) -> None: ...
def of_users(users: list[User | None]) -> None: ...
def of_markup(text: list[Markup]) -> None: ...
def of_number(n: Number) -> None: ...
def of_callback(call: Callable[[], None]) -> None: ...
def of_times(at: datetime | date) -> None: ...
def of_models(of: Model | Strict) -> None: ...
def of_mapped_field(of: MappedField) -> None: ...
def of_mapped_model_field(of: dict[str, MappedModelField]) -> None: ...
def of_validated(of: list[Validated]) -> None: ...
def of_serialized(of: WithSerialized) -> None: ...
def of_positive(n: pydantic.PositiveInt | None) -> None: ...
def of_secret(of: pydantic.SecretStr) -> None: ...
def of_private(of: PrivateParcel) -> None: ...
def late_task(value: int, task: RunningTask) -> None: ...
def wrong_task(task: AsyncRunningTask) -> None: ...
async def wrong_async_task(task: RunningTask) -> None: ...


CANT_BE = {
    "generator": (generator, "must not be a generator function"),
    "star": (star, r"takes \*values, but arguments are sent by name: give it a parameter for each"),
    "star after": (star_after, r"takes \*values"),
    "positional": (positional, "the parameter 'value' of .* is positional-only"),
    "method": (
        method,
        "is a method, whose 'self' can't be sent as JSON: make it a function or a staticmethod",
    ),
    "class": (Order, "@queue.task must decorate a function, got <class"),
    "name": ("send", "@queue.task must decorate a function, got 'send'"),
    "builtin": (len, "the parameter 'obj' of 'builtins.len' is positional-only"),
    "unknown": (iter, "the parameters of 'builtins.iter' can't be read"),
    "lambda": (
        lambda user_id: None,
        r"a task's function must have a name, got .*: give its type, `queue.task\(type=…\)`",
    ),
    "session": (
        of_session,
        "the parameter 'session' of .* can't be sent as JSON: Session can't be converted",
    ),
    "inside": (of_sessions, "the parameter 'sessions' of .*: Session can't be converted: pass something"),
    "pydantic field": (
        of_places,
        "FieldInfo .*: give each field of a pydantic dataclass a plain default, or",
    ),
    "mapped": (
        of_users,
        "can't be sent as JSON: User is a mapped class, .*: pass the id, and load the object",
    ),
    "subclass": (of_markup, "Markup can't be converted: annotate str, which accepts it as well"),
    "number": (of_number, "Number can't be converted: annotate int or float, which accept it as well"),
    "callback": (of_callback, "the parameter 'call' of .*: Callable can't be converted"),
    "ambiguous union": (of_times, "the parameter 'at' of .* more than one str-like type"),
    "models": (of_models, "the parameter 'of' of .* custom type .* a pydantic model with a discriminator"),
    "mapped field": (of_mapped_field, "can't be sent as JSON: User is a mapped class"),
    "mapped model field": (of_mapped_model_field, "can't be sent as JSON: User is a mapped class"),
    "validation alias": (
        of_validated,
        r"Validated\.user_id is written as 'user_id' and read as 'userId': give it an `alias=`",
    ),
    "serialization alias": (
        of_serialized,
        r"Serialized\.user_id is written as 'userId' and read as 'user_id': give it an `alias=`",
    ),
    "pydantic constraint": (of_positive, r"Gt\(gt=0\) is pydantic's, which checks it only in its models"),
    "pydantic type": (of_secret, "SecretStr can't be converted: make it a field of a pydantic model"),
    "private attribute": (of_private, r"PrivateParcel\._id is private, and msgspec leaves it out: rename"),
    "late task": (late_task, "must take the running task as its first parameter, not as 'task'"),
    "async task": (wrong_task, "is a plain function, so its running task must be annotated RunningTask"),
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
            ({"type": ""}, "a task's type must not be empty"),
            ({"type": 5}, "a task's type must be a string"),
            ({"type": "x" * 256}, "at most 255 characters"),
            ({"aliases": "old"}, r"aliases must be a list of types, such as \['old'\]"),
            ({"aliases": [""]}, "a task's type must not be empty"),
            ({"aliases": [5]}, "a task's type must be a string"),
            ({"retry_limit": -1}, "retry_limit must be a number of retries"),
            ({"retry_delay": "30"}, "retry_delay must be a number of seconds, a timedelta, or a function"),
            ({"timeout": 0}, "timeout must be positive, got 0"),
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
