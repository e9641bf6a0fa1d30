"""What is the same after a round trip through JSON, and what is a loss: no database, no conversion."""

from __future__ import annotations

import enum
import threading
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from functools import cached_property
from typing import Any, Generic, NamedTuple, TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo

import attrs
import msgspec
import pydantic
import pytest
from markupsafe import Markup
from pydantic import PrivateAttr, SecretStr

from apoq.core.losses import Loss, find_loss

T = TypeVar("T")
NAIVE = datetime(2031, 5, 4, tzinfo=UTC).replace(tzinfo=None)
BERLIN = ZoneInfo("Europe/Berlin")
ID = "0b5f6c0a-95a5-4b0c-8bb1-0d4f0e2a7a11"


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1


class Other(enum.IntEnum):
    LOW = 1


class Point(NamedTuple):
    x: int
    y: int = 0


class NamedPoint(Point):
    pass


@dataclass
class Shape:
    name: str
    note: str = field(default="", compare=False)

    @cached_property
    def title(self) -> str:
        return self.name.title()


@dataclass
class Circle(Shape):
    radius: float = 1.0


@attrs.define(frozen=True, cache_hash=True)
class Parcel:
    weight: int
    note: str = attrs.field(default="", eq=False)


class Event(msgspec.Struct):
    id: int


class Refund(Event):
    cents: int = 0


class Login(pydantic.BaseModel, extra="allow"):
    user: str = "ada"
    _tries: int = PrivateAttr(0)
    _lock: Any = PrivateAttr(default_factory=threading.Lock)


class Page(pydantic.BaseModel, Generic[T]):
    items: list[T]


class Plain:
    def __init__(self, **attributes: object) -> None:
        vars(self).update(attributes)


class Executor:
    __slots__ = ("x",)

    def __init__(self, x: int) -> None:
        self.x = x


class Array:
    def __eq__(self, other: object) -> bool:
        raise ValueError("the truth value of an array is ambiguous")

    __hash__ = None  # type: ignore[assignment]


class Lenient:
    """Equal to whatever has the same `x`."""

    def __init__(self, x: int, y: int = 0) -> None:
        self.x, self.y = x, y

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Lenient) and self.x == other.x

    __hash__ = None  # type: ignore[assignment]


def login(**attributes: object) -> Login:
    made = Login(**{name: value for name, value in attributes.items() if not name.startswith("_")})
    for name, value in attributes.items():
        if name.startswith("_"):
            setattr(made, name, value)
    return made


def titled(shape: Shape) -> Shape:
    assert shape.title
    return shape


def hashed(parcel: Parcel) -> Parcel:
    hash(parcel)
    return parcel


LAST_NIGHT = datetime(2031, 10, 26, 2, 30, tzinfo=BERLIN, fold=1)
"""When the clocks have been put back, and `==` between zones is False."""

SAME: dict[str, tuple[Any, Any]] = {
    "int": (2**80, 2**80),
    "int for float": (7, 7.0),
    "NaN": (float("nan"), float("nan")),
    "a subclass of str": (Markup("<b>"), "<b>"),
    "a member for its int": (Level.LOW, 1),
    "a value for its member": ("red", Colour.RED),
    "a subclass of a member's value": (Markup("red"), Colour.RED),
    "Decimal": (Decimal("1.10"), Decimal("1.1")),
    "no Decimal": (Decimal("NaN"), Decimal("NaN")),
    "a signalling Decimal": (Decimal("sNaN"), Decimal("sNaN")),
    "another zone": (datetime(2031, 5, 4, 2, tzinfo=BERLIN), datetime(2031, 5, 4, tzinfo=UTC)),
    "a fixed offset": (LAST_NIGHT, LAST_NIGHT.replace(tzinfo=timezone(timedelta(hours=1)), fold=0)),
    "the end of the calendar": (
        datetime.max.replace(tzinfo=timezone(-timedelta(hours=5))),
        datetime.max.replace(tzinfo=timezone(timedelta(hours=-5))),
    ),
    "naive": (NAIVE, NAIVE.replace()),
    "tuple as list": ((1, (2,)), [1, [2]]),
    "list as tuple": ([1, 2], (1, 2)),
    "set as list": ({1}, [1]),
    "NamedTuple": (Point(1), Point(1)),
    "NamedTuple as tuple": (Point(1), (1, 0)),
    "set": ({1, UUID(ID)}, frozenset({UUID(ID), 1})),
    "set of values": ({"red"}, {Colour.RED}),
    "dict": ({"a": [1], "b": None}, {"b": None, "a": [1]}),
    "a subclass of dict": (OrderedDict(a=Counter("x")), {"a": {"x": 1}}),
    "dict of values": ({"red": 1}, {Colour.RED: 1}),
    "dataclass": (Circle("a", radius=2), Circle("a", radius=2.0)),
    "cached property": (titled(Shape("a")), Shape("a")),
    "attrs": (hashed(Parcel(1)), Parcel(1)),
    "struct": (Refund(1, 5), Refund(1, 5)),
    "model": (login(more=(1,), _tries=2), login(more=[1], _tries=2)),
    "fields that were set": (Login(), Login(user="ada")),
    "a generic of its values": (Page(items=[1]), Page[int](items=[1])),
    "a secret": (SecretStr("x"), SecretStr("x")),
    "equal by itself": (Lenient(1, 2), Lenient(1, 3)),
    "deque": (deque([1]), deque([1])),
    "object": (Plain(x=[Plain(y=1)]), Plain(x=[Plain(y=1)])),
    "slots": (Executor(1), Executor(1)),
    "nothing to compare": (object(), object()),
}

LOST: dict[str, tuple[Any, Any, str, str]] = {
    "int": (1, 2, "", "it would come back as another value, 2"),
    "bool for int": (True, 1, "", "it would come back as int, not as bool: annotate it as bool, or pass int"),
    "int for bool": (1, True, "", "as bool, not as int"),
    "False": (False, True, "", "another value, True"),
    "float for int": (1.0, 1, "", "as int, not as float"),
    "None": (None, 0, "", "as int, not as NoneType"),
    "too large for a float": (2**53 + 1, 2.0**53, "", "another value, 9007199254740992.0"),
    "str for bytes": ("x", b"x", "", "as bytes, not as str"),
    "text of a date": (date(2031, 5, 4), "2031-05-04", "", "as str, not as date"),
    "a time of the day": (NAIVE, date(2031, 5, 4), "", "another value"),
    "a zone": (datetime(2031, 5, 4, tzinfo=UTC), NAIVE, "", "another value"),
    "no zone": (NAIVE, datetime(2031, 5, 4, tzinfo=UTC), "", "another value"),
    "another instant": (LAST_NIGHT, LAST_NIGHT.replace(fold=0).astimezone(UTC), "", "another value"),
    "a time's zone": (time(3, tzinfo=BERLIN), time(3), "", r"another value, datetime.time(3, 0)"),
    "Decimal": (Decimal("1.25"), Decimal("1.2"), "", "another value, Decimal('1.2')"),
    "no Decimal": (Decimal("NaN"), Decimal(1), "", "another value"),
    "another member": (Colour.RED, Colour.BLUE, "", "another value"),
    "another enum": (Other.LOW, Level.LOW, "", "as Level, not as Other"),
    "another value": ("blue", Colour.RED, "", "another value, 'red'"),
    "an item": ([1, "x", True], [1, "x", 1], "[2]", "as int, not as bool"),
    "an item's type": ([1, True], [True, 1], "[0]", "as bool, not as int"),
    "an item too few": ([1, 2], [1], "", "another value, [1]"),
    "list for set": ([1, 1], {1}, "", "as set, not as list"),
    "an item of a set": ({1, 2}, {1, 3}, "", "another value, {1, 3}"),
    "fewer items of a set": ({1, 2}, {1}, "", "another value, {1}"),
    "the type of an item of a set": ({True}, {1}, "", "another value, {1}"),
    "the names of a NamedTuple": (Point(1), [1, 0], "", "as list, not as Point"),
    "the class of a NamedTuple": (NamedPoint(1), Point(1), "", "as Point, not as NamedPoint"),
    "tuple for NamedTuple": ((1, 0), Point(1), "", "as Point, not as tuple"),
    "in a NamedTuple": (Point(1), Point(1, 2), ".y", "another value, 2"),
    "a key": ({"a": {"b c": 1}}, {"a": {}}, "['a']['b c']", "it would not come back: leave it out"),
    "the type of a key": ({1: "x"}, {"1": "x"}, "[1]", "would not come back"),
    "keys that are one": ({1: "x", "1": "y"}, {"1": "y"}, "[1]", "would not come back"),
    "one more key": ({"a": 1}, {"a": 1, "b": 2}, "['b']", "it was not given, but would come back as 2"),
    "in a subclass of dict": (OrderedDict(a=[True]), OrderedDict(a=[1]), "['a'][0]", "as int, not as bool"),
    "subclass of dict": ({}, OrderedDict(), "", "as OrderedDict, not as dict"),
    "in a deque": (deque([True]), deque([1]), "[0]", "as int, not as bool"),
    "dict for dataclass": ({"name": "a"}, Shape("a"), "", "as Shape, not as dict"),
    "base of a dataclass": ([Circle("a")], [Shape("a")], "[0]", "as Shape, not as Circle"),
    "base of a struct": ({"e": Refund(1)}, {"e": Event(1)}, "['e']", "as Event, not as Refund"),
    "not compared": (Shape("a", "b"), Shape("a"), ".note", "another value, ''"),
    "not equal for attrs": (Parcel(1, "b"), Parcel(1), ".note", "another value, ''"),
    "not declared": (Plain(x=1), Plain(), ".x", "would not come back"),
    "added": (Plain(), Plain(x=1), ".x", "was not given"),
    "extra": (login(more=1), login(), ".more", "would not come back"),
    "private": (login(_tries=1), login(), "._tries", "another value, 0"),
    "a secret": (
        {"login": Plain(token=SecretStr("s3cret"))},
        {"login": Plain(token=SecretStr("**********"))},
        "['login'].token",
        "another value, SecretStr('**********')",
    ),
    "a mapped object": (
        [type("User", (Plain,), {"__mapper__": None})()],
        [{}],
        "[0]",
        "a mapped object belongs to its session: pass its id",
    ),
    "in a generic": (Page(items=[True]), Page[int](items=[1]), ".items[0]", "as int, not as bool"),
    "another generic": (Page(items=[1]), Login(), "", "as Login, not as Page"),
    "slots": (Executor(1), Executor(2), ".x", "another value, 2"),
    "function": (print, len, "", "another value"),
    "no answer": (Array(), Array(), "", "another value"),
}


@pytest.mark.parametrize(("given", "back"), SAME.values(), ids=SAME)
def test_what_is_the_same(given, back):
    assert find_loss(given, back) is None


@pytest.mark.parametrize(("given", "back", "path", "reason"), LOST.values(), ids=LOST)
def test_what_is_lost(given, back, path, reason):
    loss = find_loss(given, back)

    assert isinstance(loss, Loss)
    assert loss.path == path
    assert reason in loss.reason


def test_a_secret_is_not_shown():
    assert "s3cret" not in str(find_loss("s3cret", "***"))
